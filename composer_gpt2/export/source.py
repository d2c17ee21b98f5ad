"""What an export starts from: weights, and what is known of the run that trained them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from composer.utils import get_file
from torch import Tensor

from composer_gpt2.checkpoints.manifest import CheckpointError, read_manifest
from composer_gpt2.checkpoints.safe_loading import load_safely
from composer_gpt2.model import GPT2Model
from composer_gpt2.trained_model import find_checkpoint

__all__ = ["Origin", "Weights", "load_source"]

Weights = Literal["evaluated", "trained"]


@dataclass(frozen=True)
class Origin:
    """What is known of the run; what is not known is empty."""

    name: str
    """What the user called it, without the folders above it."""
    weights: str = "those of the file"
    """Which weights these are, in words."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    receipts: list[Mapping[str, Any]] = field(default_factory=list)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    trained: Mapping[str, int] = field(default_factory=dict)
    """How long: ``batches``, ``tokens``."""


@contextlib.contextmanager
def load_source(
    path_or_hub_id: str, weights: Weights, n_head: int | None = None
) -> Iterator[tuple[GPT2Model, Origin]]:
    """A trained model on the CPU, in float32 and evaluation mode, and where it comes from.

    Args:
        path_or_hub_id: As for :func:`composer_gpt2.trained_model.load_trained_model`.
        weights: Of a run that averaged its weights (EMA): ``"evaluated"`` for the averages, with
            which Composer evaluates; ``"trained"`` for those that the optimizer moved.
        n_head: As for :meth:`composer_gpt2.GPT2Model.from_pretrained`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It holds no GPT-2, or ``"trained"`` is asked of what holds one set of weights.
        CheckpointError: The file is no checkpoint, or would run code.
    """
    if weights not in ("evaluated", "trained"):
        raise ValueError(f"weights must be 'evaluated' or 'trained', got {weights!r}.")
    name = Path(path_or_hub_id.rstrip("/")).name
    source = find_checkpoint(path_or_hub_id)
    with contextlib.ExitStack() as stack:
        if "://" in source:
            source = str(stack.enter_context(_fetched(source)))
        model = GPT2Model.from_pretrained(source, n_head=n_head).float()
        origin = Origin(name)
        state = load_safely(source).get("state") if source.endswith(".pt") else None
        if state is not None:
            which = _choose_weights(model, state, weights)
            origin = _origin(name, which, Path(source), state)
        elif weights == "trained":
            raise ValueError(
                "weights must be 'evaluated' where there is one set of them, got 'trained' for "
                f"{path_or_hub_id}; give the .pt file of a checkpoint of a run with ema."
            )
        yield model, origin


@contextlib.contextmanager
def _fetched(address: str) -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"checkpoint{Path(address).suffix}"
        get_file(address, str(local))
        yield local


@torch.no_grad()
def _choose_weights(model: GPT2Model, state: Mapping[str, Any], weights: Weights) -> str:
    """Puts the asked-for weights into the model, and says in words which they are."""
    ema = dict(state.get("algorithms", [])).get("EMA")
    if ema is None or not ema["ema_started"]:
        if weights == "trained" and ema is None:
            raise ValueError(
                "weights must be 'evaluated' where there is one set of them, got 'trained' for a "
                "run without ema; leave it out."
            )
        return "those at the end of training"
    # Composer exchanges the two for evaluations and for most checkpoints; the others are in EMA.
    in_model = "evaluated" if ema["ema_weights_active"] else "trained"
    if weights != in_model:
        others: Mapping[str, Tensor] = ema["ema_model"]["named_parameters_dict"]
        named = {key.removeprefix("module."): tensor for key, tensor in others.items()}
        for key, parameter in model.named_parameters():
            parameter.copy_(named[key])
    if weights == "evaluated":
        return "exponential moving averages (EMA), as they were evaluated"
    return "those that the optimizer moved, not their averages (EMA)"


def _origin(name: str, weights: str, file: Path, state: Mapping[str, Any]) -> Origin:
    file = file.resolve()  # latest-rank0.pt points to the newest
    folder = file.parent.parent  # checkpoints are in runs/NAME/checkpoints unless told otherwise
    is_run_folder = (folder / "recipe.yaml").is_file()
    recipe = _read(folder / "recipe.yaml") if is_run_folder else {}
    receipts = [
        saved["receipt"]
        for _, saved in state.get("algorithms", [])
        if isinstance(saved, dict) and saved.get("receipt")
    ]
    if not recipe:
        with contextlib.suppress(OSError, CheckpointError):
            recipe = read_manifest(file.with_suffix(".json").read_bytes()).recipe
    timestamp = state.get("timestamp", {}).get("Timestamp", {})
    trained = {
        plural: int(timestamp[unit])
        for unit, plural in (("batch", "batches"), ("token", "tokens"))
        if unit in timestamp
    }
    metrics = _read(folder / "metrics.json") if is_run_folder else {}
    if metrics.get("batches") != trained.get("batches"):
        metrics = {}  # of the end of the run, and this is a checkpoint from before
    return Origin(
        name=str(state.get("run_name") or name),
        weights=weights,
        recipe=recipe,
        receipts=receipts,
        metrics=metrics,
        versions=_read(folder / "versions.json") if is_run_folder else {},
        trained=trained,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)) or {}
