"""What a benchmark measures, settled before anything is measured.

Everything here is plain data, so that it travels to worker processes as JSON: a worker that trains
Hugging Face's GPT-2 does not import Composer to read a recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_gpt2.contract import SpeedupAlgorithm
    from composer_gpt2.recipe import Recipe

__all__ = ["Line", "Settings", "read_settings"]

RECIPE = "gpt2-125m-fast.yaml"


@dataclass(frozen=True)
class Line:
    """A step of the waterfall: the algorithms that are on together."""

    label: str
    algorithms: Mapping[str, Mapping[str, Any]]
    """Name to arguments, as in recipes."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    model: str
    batch_size: int
    sequence_length: int
    rounds: int
    threads: int
    steps: str | None
    """As :func:`read_settings` takes it."""
    data: str | None
    peers: bool
    peer_adamw: str
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    config_overrides: Mapping[str, Any]
    """Settings of the network that differ from those of the model's name."""
    lines: tuple[Line, ...]
    left_out: Mapping[str, str]
    """Algorithms of the recipe that no line has, each with the reason."""

    @property
    def clip_norm(self) -> float | None:
        """Largest norm of the gradients; ``None`` where the recipe does not clip."""
        clipping = self.recipe["algorithms"].get("gradient_clipping")
        return None if clipping is None else float(clipping["clipping_threshold"])

    @property
    def n_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sequence_length


def read_settings(
    files: Sequence[str] = (RECIPE,),
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    batch_size: int = 4,
    sequence_length: int = 1024,
    rounds: int = 5,
    threads: int | None = None,
    steps: str | None = None,
    data: str | None = None,
    peers: bool = True,
    peer_adamw: str = "fused",
) -> Settings:
    """Checks everything that a user can get wrong, and resolves the recipe.

    Args:
        files: Recipe and fragments, as for training.
        overrides: ``dotted.key=value`` on top.
        model: A name of the family; default: the recipe's.
        batch_size: Sequences of a step.
        sequence_length: Tokens of a sequence.
        rounds: How often each contestant runs.
        threads: Of each process; default: one for each core.
        steps: The lines of the waterfall. Lines are separated by ``;``, and each adds its
            algorithms, separated by ``,``, to those of the line before; what cannot stand beside
            a new one is dropped. Default: a line for each algorithm of the recipe, in the order of
            installation.
        data: A text file to take the batch from; default: random tokens.
        peers: Whether Hugging Face and stock Composer take part.
        peer_adamw: ``"fused"``, as ours, or ``"default"``, torch's choice, for peers' AdamW.

    Raises:
        ValueError: With what must hold, what we got, and what to do.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("rounds", rounds),
        ("threads", 1 if threads is None else threads),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2 tokens, got {sequence_length}.")
    if peer_adamw not in ("fused", "default"):
        raise ValueError(f"peer_adamw must be 'fused' or 'default', got {peer_adamw!r}.")
    if data is not None and not Path(data).is_file():
        raise FileNotFoundError(f"data must be a text file, got {data}, which is none.")

    from composer_gpt2.configs import get_config
    from composer_gpt2.recipe import load_recipe

    if model is not None:
        get_config(model)  # one sentence about an unknown name, before the recipe's many
    recipe = load_recipe(
        files,
        [
            "data.remote=nothing-is-read",
            *overrides,
            *([] if model is None else [f"model.name={model}"]),
            "model.dropout=0.0",
            "algorithms.seq_length_warmup=null",  # changes the batch; may refuse its length
            "algorithms.skip_nonfinite=null",  # not for speed
            f"data.sequence_length={sequence_length}",
            f"train_batch_size={batch_size}",
            "device_train_microbatch_size=null",
            "device=cpu",
        ],
    )
    if recipe.precision != "amp_bf16":
        raise ValueError(
            "the recipe's precision must be amp_bf16 to be compared with bf16 autocast, got "
            f"{recipe.precision}; add the override precision=amp_bf16."
        )
    clipping = recipe.algorithms.get("gradient_clipping", {"clipping_type": "norm"})
    if clipping["clipping_type"] != "norm":
        raise ValueError(
            "gradient_clipping must be by norm, which every contestant has, got "
            f"{clipping['clipping_type']}; add the override algorithms.gradient_clipping=null."
        )
    lines, left_out = _lines(recipe, steps, sequence_length)
    return Settings(
        files=tuple(files),
        overrides=tuple(overrides),
        model=recipe.model.name,
        batch_size=batch_size,
        sequence_length=sequence_length,
        rounds=rounds,
        threads=threads or n_cores(),
        steps=steps,
        data=data,
        peers=peers,
        peer_adamw=peer_adamw,
        recipe=recipe.model_dump(),
        config_overrides=recipe.model.config_overrides,
        lines=lines,
        left_out=left_out,
    )


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(
    recipe: Recipe, steps: str | None, sequence_length: int
) -> tuple[tuple[Line, ...], dict[str, str]]:
    from composer_gpt2.contract import SpeedupAlgorithm, Stage, installation_order

    built = {name: _build(name, args) for name, args in recipe.algorithms.items()}
    left_out: dict[str, str] = {}
    for name, algorithm in built.items():
        if not isinstance(algorithm, SpeedupAlgorithm):
            if name != "gradient_clipping":
                left_out[name] = "is Composer's and no speedup"
        elif algorithm.stage is Stage.BATCH or (
            algorithm.sequence_length_after(sequence_length) != sequence_length
        ):
            left_out[name] = "changes the batch, so that it is other work"
    if steps is None:
        ours = installation_order(a for name, a in built.items() if name not in left_out)
        added = [[algorithm.name] for algorithm in ours]
    else:
        added = [
            [name.strip() for name in line.split(",") if name.strip()] for line in steps.split(";")
        ]
        if not all(added):
            raise ValueError(
                "steps must be names of algorithms, lines separated by ';' and names by ',' as in "
                f"'fused_gelu,fused_layernorm;fused_cross_entropy', got {steps!r}."
            )
    present: dict[str, SpeedupAlgorithm] = {}
    lines = []
    for names in added:
        label = " + ".join(names)
        new = {name: _build(name, recipe.algorithms.get(name, {})) for name in names}
        for name, algorithm in new.items():
            if not isinstance(algorithm, SpeedupAlgorithm) or algorithm.stage is Stage.BATCH:
                raise ValueError(
                    "steps must be speedup algorithms that leave the batch alone, got "
                    f"{name!r}; leave it out."
                )
        dropped = [name for name in present if _excluded(present[name], new.values())]
        if dropped:
            label += f" instead of {' + '.join(dropped)}"
        present = {name: a for name, a in present.items() if name not in dropped} | new
        lines.append(Line(label, {name: a.settings for name, a in present.items()}))
    for name, algorithm in built.items():
        if isinstance(algorithm, SpeedupAlgorithm) and name not in {*left_out, *present}:
            left_out[name] = "is in no line of --steps, or was replaced"
    return tuple(lines), left_out


def _excluded(algorithm: SpeedupAlgorithm, new: Iterable[SpeedupAlgorithm]) -> bool:
    """Whether it cannot stand beside one of the new ones."""
    from composer_gpt2.contract import conflicts

    return any(conflicts([algorithm, other]) for other in new)


def _build(name: str, arguments: Mapping[str, Any]) -> Any:
    from composer_gpt2 import registry

    return registry.get("algorithms", name).load()(**arguments)
