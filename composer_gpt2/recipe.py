"""A recipe: everything that decides a training run, typed, checked and frozen.

:func:`load_recipe` reads YAML files and command-line overrides (``recipe_files.py``), checks them
(``recipe_checks.py``) and reports every mistake at once, before anything is built or downloaded.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from composer_gpt2.durations import parse_duration
from composer_gpt2.recipe_files import Mistake, merge
from composer_gpt2.tokenizer_by_name import load_tokenizer

__all__ = ["Data", "Model", "Recipe", "RecipeError", "Stream", "load_recipe"]


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Reads, merges and checks a recipe.

    Precedence: the schema's defaults, then the ``base:`` chain, then each file in order, then the
    overrides; later wins. ``name: null`` switches off an optimizer, scheduler, algorithm, callback
    or logger that an earlier layer chose::

        recipe = load_recipe(["yamls/gpt2-125m.yaml"], ["optimizer.adamw.lr=4.0e-4"])

    Args:
        files: YAML files. A bare name that is no file here, such as ``gpt2-125m.yaml``, is one of
            the recipes that come with this package. ``base:`` in a file is a path, or a list of
            paths, relative to it.
        overrides: ``dotted.key=value``; values are YAML.

    Raises:
        RecipeError: All mistakes, each with the file and line that it comes from.
    """
    from composer_gpt2.recipe_checks import check  # which is about Recipe

    paths = [files] if isinstance(files, str | Path) else files
    merged = merge([_find(Path(file)) for file in paths], overrides)
    mistakes = [*merged.mistakes, *check(merged)]
    if mistakes:
        raise RecipeError(mistakes)
    return Recipe.model_validate(merged.values)


def _find(file: Path) -> Path:
    """The file itself, or the shipped recipe of that name."""
    package = Path(__file__).parent
    folders = (package / "yamls", package.with_name("yamls"))  # installed; in a checkout
    # os.path's, unlike pathlib's, say no to a name that cannot be.
    shipped = [folder / file.name for folder in folders if os.path.isfile(folder / file.name)]
    return shipped[0] if shipped and file.parent == Path() and not os.path.exists(file) else file


class RecipeError(ValueError):
    """What is wrong with a recipe: all of it."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(sorted(mistakes, key=_place))
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        lines = "".join(f"\n  {mistake}" for mistake in self.mistakes)
        super().__init__(f"{count} in the recipe:{lines}")


def _place(mistake: Mistake) -> tuple[int, int]:
    """Where to look first: lower layers, then lower lines, then what nobody wrote."""
    origin = mistake.origin
    return (sys.maxsize, 0) if origin is None else (origin.layer, origin.line)


class _Section(BaseModel):
    # Strict: YAML has types, so "512" is not 512 and 1 is not true. Docstrings become descriptions.
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True
    )


def _in_units(*units: str) -> BeforeValidator:
    def check(text: object) -> object:
        if parse_duration(text, units).value == 0:
            raise ValueError(f"must be above 0, got {text!r}")
        return text

    return BeforeValidator(check)


_MaxDuration = Annotated[str, _in_units("ba", "tok", "sp", "ep", "sec")]
_Interval = Annotated[str, _in_units("ba", "tok", "sp", "ep", "sec", "dur")]
_Choices = dict[str, dict[str, Any]]
_Count = Annotated[int, Field(gt=0)]
_Limit = Annotated[int, Field(ge=-1)]  # -1: no limit.


class Model(_Section):
    """Which GPT-2; any further key is a setting of ``transformers.GPT2Config``."""

    model_config = ConfigDict(extra="allow")

    name: str
    """One of :func:`composer_gpt2.configs.family`."""
    pretrained: str | None = None
    """Weights to start from: a run folder, a checkpoint (nanoGPT's and minGPT's too), a Hugging
    Face folder or a hub id; of the shape that the other keys say. null: fresh ones."""
    allow_destructive_algorithms: bool = False
    """Whether algorithms may be added that destroy what pretrained weights compute."""

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The further keys, for :func:`composer_gpt2.configs.get_config`."""
        return dict(self.model_extra or {})


class Stream(_Section):
    """One of several corpora that are mixed."""

    remote: str
    """As ``data.remote``."""
    local: str | None = None
    """As ``data.local``."""
    proportion: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the samples; give it to all streams, with sum 1, or to none (then by size)."""
    repeat: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How often its samples come in an epoch, 1 unless given; 0.5 takes half of them. Not beside a
    proportion."""


class Data(_Section):
    """Where tokens come from: shards that ``composer-gpt2 prepare`` wrote."""

    remote: str | None = None
    """``s3://bucket/prefix``, ``gs://...``, or a folder. Either this or ``streams``."""
    streams: dict[str, Stream] = Field(default_factory=dict)
    """Several corpora by name. Either this or ``remote``."""
    local: str | None = None
    """Folder for copies of shards. Default: below ``$COMPOSER_GPT2_CACHE``; none for a folder."""
    train_split: str = "train"
    """Folder below remote with the training shards."""
    validation_split: str | None = "validation"
    """Folder below remote with the validation shards; null switches evaluation off."""
    sequence_length: _Count
    """Tokens a sample, as prepared; at most the model's ``n_positions``."""
    shuffle: bool = True
    """Whether training samples are shuffled (validation never is)."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes a rank; 0 loads in the training process and was fastest on CPU."""
    cache_limit: int | str | None = None
    """Most bytes of shards to keep in ``local``, such as ``100gb``; null keeps all."""
    download_retry: Annotated[int, Field(ge=0)] = 8
    """How often a shard or index that cannot be fetched is tried again; 8 outlast two minutes. One
    with a wrong hash is fetched again once."""
    download_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60
    """Seconds to wait for a shard."""
    num_canonical_nodes: _Count = 1
    """Fixes the order of samples, so that a run can go on with another number of ranks."""
    tokenizer: str = "gpt2"
    """With which the shards were made: ``gpt2``, or a folder with a saved Hugging Face tokenizer,
    whose size the model's vocabulary has unless ``model.vocab_size`` says otherwise."""
    check_tokenizer: bool = True
    """Whether the shards must have been made with that tokenizer."""


class Recipe(_Section):
    """A whole training run. Batch sizes are sequences over all ranks unless they say otherwise."""

    # --- what is trained, on what, for how long ---
    model: Model
    data: Data
    train_batch_size: _Count
    """Sequences in an optimizer step, over all ranks."""
    device_train_microbatch_size: _Count | Literal["auto"] | None = None
    """Sequences in a forward pass of one rank; null: all of them; auto: what fits (GPU only)."""
    max_duration: _MaxDuration
    """A time: ``14000ba``, ``7.34e9tok``, ``2ep``."""
    optimizer: _Choices
    """Exactly one; further arguments: ``weight_decay_exclude``."""
    schedulers: _Choices = Field(default_factory=dict)
    """Factors on the learning rate, multiplied; none: constant."""
    algorithms: _Choices = Field(default_factory=dict)
    """Training methods."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Of initialisation, dropout and the order of samples."""

    # --- how it is computed ---
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """Of matrix products; parameters stay fp32."""
    device: Literal["cpu", "gpu"] | None = None
    """null: a GPU if there is one."""
    compile: bool = False
    """Whether ``torch.compile`` is used."""
    deterministic_mode: bool = False
    """Whether only deterministic kernels are used (slower)."""
    dist_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that ranks wait for one another."""

    # --- evaluation ---
    eval_batch_size: _Count | None = None
    """Sequences, over all ranks. Default: train_batch_size."""
    eval_interval: _Interval | None = "1000ba"
    """Time between evaluations; there is always one at the end. null: only that."""
    eval_subset_num_batches: _Limit = -1
    """Batches in an evaluation; -1: the whole validation split."""

    # --- the run and its checkpoints ---
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Names folders and runs in loggers; null: the model's name and a fingerprint of the recipe."""
    run_folder: str | None = None
    """What the run writes. Default: ``runs/<run_name>``."""
    save_folder: str | None = None
    """Checkpoints: a folder or ``s3://...``. Default: ``<run_folder>/checkpoints``."""
    save_interval: _Interval | None = "1000ba"
    """Time between checkpoints; there is always one at the end. null: no checkpoints at all."""
    save_num_checkpoints_to_keep: _Limit = -1
    """The latest ones; -1: all."""
    save_keep_every: Annotated[str, _in_units("ba", "tok", "sp", "ep")] | None = None
    """The first checkpoint in each such span, such as ``10000ba``, is kept beside the latest."""
    save_overwrite: bool = False
    """Whether a run that starts anew may replace the checkpoints of an earlier one."""
    load_path: str | None = None
    """Checkpoint to start from."""
    load_weights_only: bool = False
    """Whether only its weights are taken, and optimizer, time and order of samples start anew."""
    autoresume: bool = True
    """Whether the run goes on from its own newest checkpoint, if it has one."""
    allow_recipe_changes: bool = False
    """Whether a run that goes on may have another recipe than its checkpoint; not another batch."""

    # --- what is logged ---
    callbacks: _Choices = Field(default_factory=dict)
    """Things to measure."""
    loggers: _Choices = Field(default_factory=dict)
    """Where measurements go."""
    log_interval: _Interval = "10ba"
    """Time between lines on the terminal."""
    progress_bar: bool = True
    """Whether a terminal shows a progress bar."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Defaults that follow from other values, so that a resolved recipe spells them out."""
        filled = dict(values)
        if "model" in filled:
            filled["model"] = _with_vocabulary(filled["model"], filled.get("data"))
        if filled.get("eval_batch_size") is None:
            filled["eval_batch_size"] = filled.get("train_batch_size")
        if filled.get("run_folder") is None and filled.get("run_name") is not None:
            filled["run_folder"] = f"runs/{filled['run_name']}"
        if filled.get("save_folder") is None and filled.get("run_folder") is not None:
            filled["save_folder"] = f"{filled['run_folder']}/checkpoints"
        return filled

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name in the registry."""
        return next(iter(self.optimizer))

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """What its class is called with, besides the parameters."""
        arguments = dict(self.optimizer[self.optimizer_name])
        arguments.pop("weight_decay_exclude", None)
        return arguments

    @property
    def weight_decay_exclude(self) -> tuple[str, ...]:
        """Parameters without weight decay: some of ``bias``, ``norm``, ``embedding``."""
        arguments = self.optimizer[self.optimizer_name]
        return tuple(arguments.get("weight_decay_exclude", WEIGHT_DECAY_EXCLUDE))

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in an optimizer step, over all ranks."""
        return self.train_batch_size * self.data.sequence_length

    def tokens(self, time: str) -> int | None:
        """A time in tokens; ``None`` where that takes the corpus (epochs) or a clock (seconds)."""
        value, unit = parse_duration(time)
        if unit == "dur":
            total = self.train_tokens
            return None if total is None else int(value * total)
        tokens_each = {
            "ba": self.tokens_per_batch,
            "sp": self.data.sequence_length,
            "tok": 1,
        }.get(unit)
        return None if tokens_each is None else int(value) * tokens_each

    @property
    def train_tokens(self) -> int | None:
        """``max_duration`` in tokens; ``None`` for epochs and seconds."""
        return self.tokens(self.max_duration)

    def with_run_name(self, run_name: str) -> Recipe:
        """The same recipe under a name, with the folders that follow from it."""
        return Recipe.model_validate({**self.model_dump(), "run_name": run_name})

    def to_yaml(self) -> str:
        """The resolved recipe; loading it gives an equal one."""
        return OmegaConf.to_yaml(OmegaConf.create(_without_interpolations(self.model_dump())))


def _with_vocabulary(model: Any, data: Any) -> Any:
    """The model's settings with the size of the corpus' own tokenizer, once that is there."""
    if not isinstance(model, dict) or not isinstance(data, dict) or "vocab_size" in model:
        return model
    file = Path(str(data.get("tokenizer", "gpt2"))) / "tokenizer.json"
    if not file.is_file():
        return model  # GPT-2's, or a folder that build_trainer will ask for
    return {**model, "vocab_size": len(load_tokenizer(str(file.parent)))}


WEIGHT_DECAY_EXCLUDE = ("bias", "norm", "embedding")
"""What weight decay leaves out unless the recipe says otherwise."""


def _without_interpolations(value: Any) -> Any:
    """Escapes ``${`` in text, which OmegaConf would read as an interpolation."""
    if isinstance(value, dict):
        return {key: _without_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_interpolations(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
