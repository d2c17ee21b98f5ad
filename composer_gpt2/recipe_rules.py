"""Rules that tie several keys of a recipe together.

Each takes a recipe that may be wrong elsewhere and reports what it finds; where a key that it needs
is missing or wrong, it is silent.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from composer_gpt2 import registry
from composer_gpt2.configs import get_config
from composer_gpt2.durations import UNITS, parse_duration
from composer_gpt2.recipe import Data, Model, Recipe
from composer_gpt2.recipe_files import KeyPath, Merged, Mistake

if TYPE_CHECKING:
    from transformers import GPT2Config

__all__ = ["RULES", "NotKnown", "Unchecked", "configuration_settings"]


class NotKnown(Exception):
    """A rule asked for a value that is missing or wrong."""


class Unchecked:
    """Merged values, and what is known to be wrong with them."""

    def __init__(self, merged: Merged) -> None:
        self.merged = merged
        self.values = merged.values
        self.mistakes: list[Mistake] = []
        self.wrong: set[KeyPath] = set(merged.unknown)

    def fail(self, path: KeyPath, message: str) -> None:
        """Notes a mistake."""
        self.wrong.add(path)
        key = ".".join(map(str, path))
        self.mistakes.append(Mistake(self.merged.origin(path), key, message))

    def __getitem__(self, path: KeyPath) -> Any:
        """A value or its default.

        Raises:
            NotKnown: It is missing, wrong, or something in it is.
        """
        if any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in self.wrong):
            raise NotKnown
        value: Any = self.values
        for key in path:
            if key not in value:
                if path not in _DEFAULTS:
                    raise NotKnown
                return _DEFAULTS[path]
            value = value[key]
        return value

    def wrote(self, path: KeyPath, after: KeyPath) -> bool:
        """Whether somebody wrote ``path``, in the layer of ``after`` or in a later one."""
        mine, other = self.merged.origins.get(path), self.merged.origin(after)
        return mine is not None and (other is None or mine.layer >= other.layer)


def _defaults(schema: type[BaseModel], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for name, field in schema.model_fields.items():
        if not field.is_required():
            yield (*path, name), field.get_default(call_default_factory=True)


_DEFAULTS: dict[KeyPath, Any] = dict([*_defaults(Recipe, ()), *_defaults(Data, ("data",))])


def configuration_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``model`` that are settings of GPT2Config."""
    return {key: value for key, value in model.items() if key not in Model.model_fields}


def _config(recipe: Unchecked) -> GPT2Config:
    model = recipe["model",]
    return get_config(model["name"], **configuration_settings(model))


def _one_source(recipe: Unchecked) -> None:
    remote, streams = recipe["data", "remote"], recipe["data", "streams"]
    if remote is None and not streams and recipe.merged.complete:
        recipe.fail(("data",), "must have remote or streams, got neither; write remote: s3://...")
    if remote is not None and streams:
        recipe.fail(
            ("data", "streams"), "must not stand beside remote; write data.remote: null to use it"
        )


def _proportions(recipe: Unchecked) -> None:
    streams = recipe["data", "streams"]
    proportions = [stream.get("proportion") for stream in streams.values()]
    given = [proportion for proportion in proportions if proportion is not None]
    if not given:
        return
    if any(stream.get("repeat") is not None for stream in streams.values()):
        recipe.fail(("data", "streams"), "must have proportions or repeats, got both")
    if len(given) < len(proportions):
        recipe.fail(("data", "streams"), "must all have a proportion, or none of them")
    elif abs(sum(given) - 1) > 1e-6:
        recipe.fail(("data", "streams"), f"must have proportions of sum 1, got {sum(given):g}")


def _different_splits(recipe: Unchecked) -> None:
    train, validation = recipe["data", "train_split"], recipe["data", "validation_split"]
    if train == validation:
        recipe.fail(("data", "validation_split"), f"must not be the training split, got {train!r}")


def _cache_of_the_only_copy(recipe: Unchecked) -> None:
    remote, local = recipe["data", "remote"], recipe["data", "local"]
    limit = recipe["data", "cache_limit"]
    if limit is not None and remote is not None and "://" not in remote and local in (None, remote):
        recipe.fail(
            ("data", "cache_limit"),
            f"must be null where data.remote is a folder without a separate data.local, got "
            f"{limit!r}: it would delete the only copy",
        )


def _context_is_long_enough(recipe: Unchecked) -> None:
    n_positions, length = _config(recipe).n_positions, recipe["data", "sequence_length"]
    if any(getattr(cls, "reads_any_length", False) for cls in _algorithm_classes(recipe)):
        return
    if length > n_positions:
        recipe.fail(
            ("data", "sequence_length"),
            f"must be at most the model's n_positions ({n_positions}), got {length}; "
            f"or write model.n_positions: {length}",
        )


def _microbatch_divides(recipe: Unchecked) -> None:
    batch, microbatch = recipe["train_batch_size",], recipe["device_train_microbatch_size",]
    if isinstance(microbatch, int) and batch % microbatch:
        fitting = max(n for n in range(1, microbatch + 1) if batch % n == 0)
        recipe.fail(
            ("device_train_microbatch_size",),
            f"must divide train_batch_size ({batch}), got {microbatch}; try {fitting}",
        )


def _needs_a_gpu(recipe: Unchecked) -> None:
    if recipe["device",] != "cpu":
        return
    if recipe["device_train_microbatch_size",] == "auto":
        recipe.fail(
            ("device_train_microbatch_size",), "must be a number or null on device: cpu, got 'auto'"
        )
    if recipe["precision",] == "amp_fp16":
        recipe.fail(("precision",), "must be 'fp32' or 'amp_bf16' on device: cpu, got 'amp_fp16'")


def _algorithm_classes(recipe: Unchecked) -> list[Any]:
    return [registry.get("algorithms", name).load() for name in recipe["algorithms",]]


def _algorithms_fit(recipe: Unchecked) -> None:
    """What they themselves say, of each other and of the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # They are shown when it is built in earnest.
        chosen = {
            name: registry.get("algorithms", name).load()(**arguments)
            for name, arguments in recipe["algorithms",].items()
        }
    if not chosen:
        return
    from composer_gpt2.contract import Plan, conflicts, installation_order

    for problem in conflicts(chosen.values()):
        recipe.fail(("algorithms",), problem)
    model, config = recipe["model",], _config(recipe)
    plan = Plan(
        sequence_length=recipe["data", "sequence_length"],
        on_cpu={"cpu": True, "gpu": False}.get(recipe["device",]),
        precision=recipe["precision",],
        # A configuration says eager until a network is built from it, which chooses sdpa.
        model={
            **config.to_dict(),
            "attn_implementation": model.get("attn_implementation") or "sdpa",
        },
        algorithms=frozenset(chosen),
    )
    for algorithm in installation_order(chosen.values()):
        try:
            algorithm.check_plan(plan)
        except ValueError as error:
            recipe.fail(("algorithms", algorithm.name), str(error).removesuffix("."))
            return
        length = algorithm.sequence_length_after(plan.sequence_length)
        plan = dataclasses.replace(plan, sequence_length=length)


def _suits_pretrained_weights(recipe: Unchecked) -> None:
    model = recipe["model",]
    source, allows = model.get("pretrained"), model.get("allow_destructive_algorithms", False)
    if source is None:
        if allows:
            recipe.fail(
                ("model", "allow_destructive_algorithms"), "has no effect without model.pretrained"
            )
        return
    if recipe["load_path",] is not None:
        recipe.fail(("load_path",), "must not stand beside model.pretrained; remove one")
    from composer_gpt2.pretrained import known_problems

    algorithms = recipe["algorithms",]
    for key, message in known_problems(source, _config(recipe), algorithms, allow_changes=allows):
        recipe.fail(key, message)


def _has_an_effect(recipe: Unchecked) -> None:
    if "low_precision_layernorm" in recipe["algorithms",] and (
        recipe["device",] != "gpu" or recipe["precision",] == "fp32"
    ):
        recipe.fail(
            ("algorithms", "low_precision_layernorm"),
            "does nothing in fp32 and nothing on a CPU; write device: gpu and precision: amp_bf16",
        )


def _resumes_exactly(recipe: Unchecked) -> None:
    resumes = recipe["load_path",] is not None and not recipe["load_weights_only",]
    if resumes and "sam" in recipe["algorithms",]:
        recipe.fail(
            ("algorithms", "sam"),
            "cannot be resumed: Composer's loads other weights than it saved; start anew, or from "
            "a checkpoint with load_weights_only: true",
        )


def _evaluates_something(recipe: Unchecked) -> None:
    split = ("data", "validation_split")
    if recipe[split] is not None:
        return
    for key in ("eval_interval", "eval_batch_size", "eval_subset_num_batches"):
        if recipe[key,] is not None and recipe.wrote((key,), after=split):
            recipe.fail((key,), "has no effect while data.validation_split is null; remove one")
    for name in ("early_stopper", "threshold_stopper"):
        if recipe["callbacks",].get(name, {}).get("dataloader_label") == "eval":
            recipe.fail(("callbacks", name), "needs data.validation_split, which is null")


def _loads_something(recipe: Unchecked) -> None:
    if recipe["load_weights_only",] and recipe["load_path",] is None:
        recipe.fail(("load_weights_only",), "has no effect without load_path; write load_path: ...")


def _keeps_something(recipe: Unchecked) -> None:
    if recipe["save_keep_every",] is not None and recipe["save_num_checkpoints_to_keep",] < 0:
        recipe.fail(
            ("save_keep_every",),
            "has no effect while all checkpoints are kept; write save_num_checkpoints_to_keep: 3",
        )


def _schedules_fit(recipe: Unchecked) -> None:
    """Composer finds these out after the model is built, and some of them not at all."""
    run = _Run(recipe)
    for name, arguments in recipe["schedulers",].items():
        entry = registry.get("schedulers", name)
        if entry.distribution != "composer-gpt2" or "t_warmup" not in arguments:
            continue
        path, warmup = ("schedulers", name, "t_warmup"), arguments["t_warmup"]
        share = run.share(warmup)
        if share is not None and share > 1:
            recipe.fail(
                path,
                f"must not be longer than max_duration ({run.max_duration}), got {warmup}; "
                f"or write it as a fraction, 0.01dur",
            )
            continue
        if "t_decay" in entry.parameters():
            _decay_fits(recipe, run, name, arguments)
        if "t_max" not in entry.parameters():
            continue
        t_max = arguments.get("t_max", "1dur")
        share = run.share(t_max)
        if share is not None and share < 1:
            recipe.fail(
                ("schedulers", name, "t_max"),
                f"must not be shorter than max_duration ({run.max_duration}), got {t_max}",
            )
        elif run.counts_in(warmup) != run.counts_in(t_max):
            unit = run.counts_in(t_max)
            recipe.fail(
                path,
                f"must count in {UNITS[unit]} as t_max ({t_max}) of a run of {run.max_duration} "
                f"does, got {warmup}; write {run.convert(warmup, unit) or 'e.g. 0.01dur'}",
            )


def _decay_fits(recipe: Unchecked, run: _Run, name: str, arguments: dict[str, Any]) -> None:
    path, warmup = ("schedulers", name, "t_decay"), arguments["t_warmup"]
    t_decay = arguments.get("t_decay", "0.9dur")
    end, start = run.share(t_decay), run.share(warmup)
    if run.counts_in(warmup) != run.counts_in(t_decay):
        unit = UNITS[run.counts_in(warmup)]
        recipe.fail(path, f"must count in {unit} as t_warmup ({warmup}) does, got {t_decay}")
    elif end is not None and end > 1:
        recipe.fail(
            path,
            f"must not be longer than max_duration ({run.max_duration}), got {t_decay}: the floor "
            "would never be reached; or write it as a fraction, 0.9dur",
        )
    elif end is not None and start is not None and end <= start:
        recipe.fail(path, f"must come after t_warmup ({warmup}), got {t_decay}")


def _averages_before_the_end(recipe: Unchecked) -> None:
    swa = recipe["algorithms",].get("swa")
    interval = swa.get("update_interval", "1ep") if swa is not None else "1ba"
    if interval.endswith("ep") and not recipe["max_duration",].endswith("ep"):
        recipe.fail(
            ("algorithms", "swa", "update_interval"),
            f"must be in batches where max_duration is not in epochs, got {interval!r}: "
            "averaging would never start; write e.g. 100ba",
        )


class _Run:
    """Times of one run, compared with one another."""

    def __init__(self, recipe: Unchecked) -> None:
        self.max_duration: str = recipe["max_duration",]
        self.tokens_each = {
            "ba": recipe["train_batch_size",] * recipe["data", "sequence_length"],
            "sp": recipe["data", "sequence_length"],
            "tok": 1,
        }

    def share(self, time: str) -> float | None:
        """A time as a fraction of the run; ``None`` where that takes the corpus or a clock."""
        (value, unit), (whole, whole_unit) = parse_duration(time), parse_duration(self.max_duration)
        if unit == "dur":
            return value
        if unit == whole_unit:
            return value / whole
        if unit in self.tokens_each and whole_unit in self.tokens_each:
            return value * self.tokens_each[unit] / (whole * self.tokens_each[whole_unit])
        return None

    def counts_in(self, time: str) -> str:
        """The unit that Composer turns a time into before it compares times."""
        unit = parse_duration(time).unit
        if unit == "dur":
            unit = parse_duration(self.max_duration).unit
        return "ba" if unit == "ep" else unit

    def convert(self, time: str, unit: str) -> str | None:
        """The same time in another unit, where that comes out whole."""
        value, mine = parse_duration(time)
        if mine not in self.tokens_each or unit not in self.tokens_each:
            return None
        tokens = int(value) * self.tokens_each[mine]
        whole, rest = divmod(tokens, self.tokens_each[unit])
        return None if rest else f"{whole}{unit}"


RULES = (
    _one_source,
    _proportions,
    _different_splits,
    _cache_of_the_only_copy,
    _context_is_long_enough,
    _microbatch_divides,
    _needs_a_gpu,
    _algorithms_fit,
    _suits_pretrained_weights,
    _has_an_effect,
    _resumes_exactly,
    _evaluates_something,
    _loads_something,
    _keeps_something,
    _schedules_fit,
    _averages_before_the_end,
)
