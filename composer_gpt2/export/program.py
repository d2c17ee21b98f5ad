"""A checkpoint to a Hugging Face folder: load, write beside the target, check, rename."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from composer_gpt2.contract import language_model
from composer_gpt2.export.architecture import changes_to_write
from composer_gpt2.export.checking import check_logits, write_probes
from composer_gpt2.export.folder import write_folder
from composer_gpt2.export.model_card import model_card
from composer_gpt2.export.source import Weights, load_source
from composer_gpt2.model import GPT2Model
from composer_gpt2.trained_model import find_checkpoint

__all__ = ["DTypeName", "Exported", "export_model"]

DTypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    changes: tuple[str, ...]
    """Algorithms in the code of a remote-code folder; none for a plain GPT-2."""
    weights: str
    """Which weights these are, in words."""
    n_parameters: int
    difference: float
    """The largest difference of logits, computed in float32 from the weights as they are stored."""
    rounding: float
    """How far storing them in another type than float32 has moved the logits, at most."""
    onnx_difference: float | None = None
    """The largest difference of the ONNX file's logits, if one was asked for."""


def export_model(
    checkpoint: str,
    out: str | Path,
    *,
    dtype: DTypeName = "float32",
    weights: Weights = "evaluated",
    n_head: int | None = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Writes a trained model as a folder that transformers loads without this package.

    A network that is GPT-2's becomes a plain ``GPT2LMHeadModel``; kernels leave no trace, and a
    padded vocabulary is cut to its real size. One that ALiBi, a parallel residual or another
    package's algorithm has changed brings its code, for ``trust_remote_code=True``.

    Args:
        checkpoint: As for :func:`composer_gpt2.trained_model.load_trained_model`.
        out: The folder to be; it must not be there, be empty, or ``overwrite`` be true.
        dtype: Of the stored weights.
        weights: As for :func:`composer_gpt2.export.source.load_source`.
        n_head: As for :meth:`composer_gpt2.GPT2Model.from_pretrained`.
        onnx: Whether to add ``model.onnx``; for plain networks in float32.
        overwrite: Whether an earlier export that is there is replaced, once the new one is checked.
            What does not look like one (``config.json``, and neither ``recipe.yaml`` nor
            ``checkpoints``) or holds ``checkpoint`` never is.

    Raises:
        FileExistsError: ``out`` is there and not to be replaced.
        NotExportableError: An algorithm of the network has no exported form.
        LogitsDifferError: What was written computes something else; it is gone again.
        ValueError: An option that cannot be, or ``onnx`` without its packages.
        OSError: The checkpoint cannot be read, or the folder cannot be written.
        CheckpointError: The file is no checkpoint, or would run code.
    """
    out = Path(out)
    torch_dtype = _dtype(dtype)
    if onnx:
        from composer_gpt2.export.onnx_file import check_onnx_options

        check_onnx_options(dtype)
    target = out.resolve()  # of a link: where it points to
    _check_target(target, overwrite, checkpoint)
    with load_source(checkpoint, weights, n_head) as (model, origin):
        # The reference is the network as it was trained, with all its algorithms.
        reference = copy.deepcopy(model)
        changes = changes_to_write(language_model(model, "export"))
        if onnx and changes:
            raise ValueError(
                f"--onnx is for a plain GPT-2, got a network with {', '.join(changes)}; leave it "
                "out."
            )
        with _beside(target) as folder:
            rounding = _round(reference, torch_dtype)
            largest = write_probes(reference, folder.with_name("probes.safetensors"))
            del reference
            write_folder(model, folder, changes=changes, dtype=torch_dtype)
            n_parameters = sum(parameter.numel() for parameter in model.parameters())
            config = model.model.config.to_dict() | ({"changes": changes} if changes else {})
            del model
            difference = check_logits(folder, folder.with_name("probes.safetensors"), largest)
            onnx_difference = None
            if onnx:
                from composer_gpt2.export.onnx_file import write_onnx

                onnx_difference = write_onnx(folder)
            card = model_card(
                origin,
                config=config,
                n_parameters=n_parameters,
                dtype=dtype,
                difference=difference,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            _check_target(target, overwrite, checkpoint)  # somebody may have written there
            _put_in_place(folder, target)
    return Exported(
        folder=out,
        changes=tuple(changes),
        weights=origin.weights,
        n_parameters=n_parameters,
        difference=difference,
        rounding=rounding,
        onnx_difference=onnx_difference,
    )


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}.")
    return known[name]


def _check_target(out: Path, overwrite: bool, checkpoint: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        problem = "a file; choose another"
    elif _holds(out, checkpoint):
        problem = "the folder of what is exported; choose another"
    elif not _looks_exported(out):
        problem = (
            "a folder that is no earlier export, which --overwrite leaves alone; choose another"
        )
    elif not overwrite:
        problem = "an earlier export; choose another, or replace it with --overwrite"
    else:
        return
    raise FileExistsError(
        f"the folder of an export must be new or empty, got {out}, which is {problem}."
    )


def _holds(out: Path, checkpoint: str) -> bool:
    """Whether a folder is or contains what is exported."""
    sources = {checkpoint, find_checkpoint(checkpoint)}
    here = [Path(source) for source in sources if "://" not in source and Path(source).exists()]
    # Of a link (latest-rank0.pt) both where it is and where it points to.
    places = [place for path in here for place in (path.resolve(), path.parent.resolve())]
    return any(place.is_relative_to(out) for place in places)


def _looks_exported(out: Path) -> bool:
    is_run = (out / "recipe.yaml").exists() or (out / "checkpoints").exists()
    return (out / "config.json").is_file() and not is_run


@torch.no_grad()
def _round(model: GPT2Model, dtype: torch.dtype) -> float:
    """Rounds the weights as storing them does; returns how far that moves logits, at most."""
    if dtype == torch.float32:
        return 0.0
    network = model.model
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randint(min(1000, network.config.vocab_size), (2, 16), generator=generator)

    def logits() -> Tensor:
        return network(tokens, use_cache=False).logits.clamp(min=-1e30)  # padding has -inf

    before = logits()
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype).float())
    return float((logits() - before).abs().max())


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty folder on the same disk, which is gone afterwards unless it has been moved."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # An absolute path, for the check in another process.
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent.resolve()))
    try:
        folder = place / "model"
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(place)


def _put_in_place(folder: Path, out: Path) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
        return
    # Not in the unfinished folder: that one is deleted, come what may.
    replaced = out.with_name(f"{folder.parent.name}-replaced")
    try:
        out.rename(replaced)
        folder.rename(out)
    finally:
        if not folder.exists():
            shutil.rmtree(replaced)
        elif replaced.exists():
            replaced.rename(out)  # an error or Ctrl-C came between the two
