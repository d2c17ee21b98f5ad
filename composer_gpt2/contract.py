"""The contract of a speedup algorithm, as code: it takes effect and proves it, or the run ends.

An author subclasses :class:`SpeedupAlgorithm` and writes a pure function that changes a network or
a batch and returns a :class:`Receipt`. This file does the rest at Composer's ``INIT`` event: it
refuses what cannot stand together, applies everything in one order whatever the order of the
recipe's lines, checks that the optimizer still holds each trainable parameter once, logs the
receipts, and keeps them in the checkpoint. A receipt that is missing ends the run before a batch.

What an algorithm does to the architecture is recorded in the network's configuration, which
travels in every checkpoint: :func:`architecture` reads it.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import logging
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

from composer import Algorithm, Event, Logger, State, Time
from composer.core import Batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel, PretrainedConfig

from composer_gpt2.optimizer_groups import parameters_held

__all__ = [
    "ArchitectureMismatchError",
    "NoEffectError",
    "Plan",
    "Receipt",
    "SpeedupAlgorithm",
    "Stage",
    "architecture",
    "conflicts",
    "forget_architecture",
    "installation_order",
    "language_model",
    "plain_configuration",
    "receipts",
    "record_architecture",
]

ConfigType = TypeVar("ConfigType", bound=PretrainedConfig)

_log = logging.getLogger(__name__)


class NoEffectError(RuntimeError):
    """An algorithm would not change what it claims to change; the message has what it found."""


class ArchitectureMismatchError(ValueError):
    """A checkpoint was trained with other architectural algorithms than the run that loads it."""


class Stage(IntEnum):
    """Where an algorithm stands among the others; the lines of a recipe may have any order."""

    EMBEDDING = 10  # the rows of the embedding
    ATTENTION = 20  # attention and positions; sets the length at which a run trains
    BLOCK = 30  # how attention and MLP are joined
    KERNEL = 40  # the same function in a faster form, wherever the stages before left it
    MEMORY = 45  # what the backward pass keeps of the blocks, in their last form
    LOSS = 50
    BATCH = 60  # the lengths of single batches
    UPDATE = 70  # whether a batch changes the weights


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What one application changed, and the measurement that shows it."""

    algorithm: str
    """The name in recipes."""
    settings: Mapping[str, Any]
    """The arguments it ran with."""
    changed: str
    """What it did, how many times and where: ``biased 12 of 12 attention layers``."""
    count: int
    """How many things it changed; 0 only under neutral settings."""
    probe: Mapping[str, float]
    """What was measured on the changed model, each value under the name of the quantity."""

    def __str__(self) -> str:
        """One line, as it is logged."""
        measured = ", ".join(f"{name} {value:.3g}" for name, value in self.probe.items())
        return f"{self.algorithm}: {self.changed}" + (f" [{measured}]" if measured else "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before anything is built; unknown things are ``None``."""

    sequence_length: int
    """Tokens of a sequence, as the corpus has them and earlier stages leave them."""
    on_cpu: bool | None
    precision: str
    model: Mapping[str, Any]
    """The settings of the configuration, as ``GPT2Config.to_dict()`` has them."""
    algorithms: frozenset[str] = frozenset()
    """The names of all algorithms of the run, in recipes."""


class SpeedupAlgorithm(Algorithm):
    """Base of all algorithms of this project: a dataclass whose fields are its settings.

    A subclass sets the class variables, writes :meth:`apply_to_model` and, if it changes batches,
    :meth:`acts_on_batch` and :meth:`apply_to_batch`::

        @dataclass(eq=False)
        class MyMethod(SpeedupAlgorithm):
            strength: float = 1.0

            name = "my_method"
            stage = Stage.KERNEL

            def apply_to_model(self, module, optimizers):
                return apply_my_method(module, strength=self.strength, optimizers=optimizers)
    """

    name: ClassVar[str]
    """The name in recipes."""
    stage: ClassVar[Stage]
    architectural: ClassVar[bool] = False
    """Whether a checkpoint makes sense only with it. Such an algorithm calls
    :func:`record_architecture`, accepts a model that already has it with the same settings, and is
    rebuilt by ``GPT2Model.from_pretrained``."""
    keeps_function: ClassVar[bool] = False
    """Of an architectural algorithm: whether a network with trained weights computes the same after
    it, so that it may be added for finetuning."""
    conflicts_with: ClassVar[Mapping[str, str]] = {}
    """Class names, Composer's or ours, that cannot be used beside it, each with the reason."""
    free_on_resume: ClassVar[frozenset[str]] = frozenset()
    """Settings of an architectural algorithm that a resumed run may change."""

    exported_as: ClassVar[str | None] = None
    """Of an architectural algorithm: the function, ``module:function``, that makes the same change
    in an exported model. It takes a ``ComposerGPT2LMHeadModel`` and the settings. Its module
    imports torch, transformers and the standard library alone: its code is copied into the model's,
    which runs where this package is not installed."""

    reads_any_length: ClassVar[bool] = False
    """Whether the network has no learned positions left, so that sequences may be longer."""

    receipt: Receipt | None = None
    _acted_on: Time | None = None  # the count of batches when it changed the last one
    _microbatch_factor: float = 1  # by which micro-batches have more sequences meanwhile

    @abstractmethod
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        """Changes the network in place, or says what will be done to batches.

        Args:
            module: The network; the changes of earlier stages are there.
            optimizers: Those whose groups have to follow when parameters come or go.

        Raises:
            NoEffectError: There is nothing to change.
        """

    @classmethod
    def take_out(cls, module: GPT2LMHeadModel) -> bool:
        """Changes a network that has it into one without and with the same predictions.

        Called before an export; what can be taken out needs no :attr:`exported_as`.

        Returns:
            False if that cannot be done, and nothing was changed.
        """
        return False

    def check_plan(self, plan: Plan) -> None:
        """Refuses a run that could not work, before anything is built.

        Raises:
            ValueError: With what must hold, what the plan has, and what to do.
        """

    def prepare(self, state: State) -> None:
        """Learns what it needs of the run, such as its duration, before :meth:`apply_to_model`."""

    def measure_run(self, state: State) -> Receipt | None:
        """A better receipt than that of :meth:`apply_to_model`, now that the data are known.

        Called when the Trainer has its data loader, before a checkpoint is loaded.

        Raises:
            NoEffectError: With these data there is nothing to change.
        """
        return None

    def acts_on_batch(self, state: State) -> bool:
        """Whether :meth:`apply_to_batch` would change a batch at this time of the run."""
        return False

    def apply_to_batch(self, batch: Batch, state: State) -> Batch:
        """The batch to train on, of another shape; runs after those of earlier stages.

        If it has more sequences, so have its micro-batches, in which as many tokens stay.

        Raises:
            NoEffectError: It is no batch that it knows.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it acts on batches")

    def sequence_length_after(self, sequence_length: int) -> int:
        """The longest sequences that it makes of sequences of this length."""
        return sequence_length

    def after_batch(self, state: State) -> None:
        """Runs when a batch has been trained and counted, before any callback sees the counts."""

    @property
    def drops_tokens(self) -> bool:
        """Whether batches lose tokens, so that a number of batches trains fewer than it holds."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments with which an equal algorithm can be built."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        return {field.name: getattr(self, field.name) for field in fields if field.init}

    def __eq__(self, other: object) -> bool:
        """Equal settings make equal algorithms."""
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))  # Composer keeps algorithms in sets

    def match(self, event: Event, state: State) -> bool:
        """True where :meth:`apply` does something.

        Raises:
            NoEffectError: The model has been built and there is no receipt.
        """
        if event is Event.INIT:
            return True
        if event in (Event.BEFORE_LOAD, Event.FIT_START) and self.receipt is None:
            raise NoEffectError(
                f"{self.name} must leave a receipt when the Trainer is built, got none: its "
                "apply() did not run to its end. The run stops rather than train without it."
            )
        if event is Event.BEFORE_LOAD:
            return state.dataloader is not None and self._overrides("measure_run")
        # Outside of training there is no batch.
        expected = event is Event.BATCH_START and state.batch is not None
        if expected and self.acts_on_batch(state) and self._acted_on != state.timestamp.batch:
            raise NoEffectError(
                f"{self.name} must act on batch {state.timestamp.batch.value}, got a batch that it "
                "did not reach. The run stops rather than train on it."
            )
        if event is Event.AFTER_DATALOADER:
            return self.acts_on_batch(state)
        has_more_to_do = self._overrides("after_batch") or self._microbatch_factor != 1
        return event is Event.BATCH_END and has_more_to_do

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(SpeedupAlgorithm, method)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Dispatches to the methods above."""
        if event is Event.INIT:
            if state not in _installed:
                _installed.add(state)
                _install_all(state)
        elif event is Event.BEFORE_LOAD:
            self.receipt = self.measure_run(state) or self.receipt
        elif event is Event.AFTER_DATALOADER:
            self._put_back_microbatch_size(state)  # if the last batch was interrupted
            before, after = state.batch, self.apply_to_batch(state.batch, state)
            if after["input_ids"].shape == before["input_ids"].shape:
                raise NoEffectError(
                    f"{self.name} must change the shape of its batch, got it back as it was, "
                    f"{tuple(after['input_ids'].shape)}."
                )
            state.batch = after
            self._acted_on = state.timestamp.batch
            self._microbatch_factor = len(after["input_ids"]) / len(before["input_ids"])
            _rescale_microbatch(state, self._microbatch_factor)
        else:
            self._put_back_microbatch_size(state)
            self.after_batch(state)

    def _put_back_microbatch_size(self, state: State) -> None:
        _rescale_microbatch(state, 1 / self._microbatch_factor)
        self._microbatch_factor = 1

    def state_dict(self) -> dict[str, Any]:
        """Composer's, and the receipt."""
        receipt = None if self.receipt is None else dataclasses.asdict(self.receipt)
        return {**super().state_dict(), "receipt": receipt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to go on with other settings of an architectural algorithm.

        The receipt in a checkpoint is a record; this run has its own.

        Raises:
            ArchitectureMismatchError: With both settings.
        """
        saved, mine = (state.get("receipt") or {}).get("settings"), self.settings
        if not self.architectural or saved is None:
            return
        if any(saved.get(k) != v for k, v in mine.items() if k not in self.free_on_resume):
            raise ArchitectureMismatchError(
                f"a resumed run must have the settings of its checkpoint: {self.name} was "
                f"{dict(saved)}, got {mine}; use the former, or load the weights alone."
            )


# States whose algorithms have been applied: the first of ours that INIT reaches sees to all.
_installed: weakref.WeakSet[State] = weakref.WeakSet()


def _rescale_microbatch(state: State, factor: float) -> None:
    """Multiplies the sequences of a micro-batch.

    Composer halves the number itself when a GPU runs out of memory, so it is never restored to what
    it was, only scaled back.
    """
    size = state.device_train_microbatch_size
    if size is not None:
        state.device_train_microbatch_size = max(1, round(size * factor))


def language_model(model: nn.Module, algorithm: str) -> GPT2LMHeadModel:
    """The Hugging Face network in ``model``: itself, or inside a ``GPT2Model``.

    Raises:
        NoEffectError: There is none, or DDP has wrapped it, which would miss new parameters.
    """
    if isinstance(model, DistributedDataParallel):
        raise NoEffectError(
            f"{algorithm} must be applied before a model is wrapped, got DistributedDataParallel; "
            "apply it first and wrap then."
        )
    inner = getattr(model, "model", model)
    if not isinstance(inner, GPT2LMHeadModel):
        raise NoEffectError(
            f"{algorithm} needs a transformers GPT2LMHeadModel, or a model that holds one as "
            f".model, got {type(model).__name__}."
        )
    return inner


def architecture(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The architectural algorithms of a network, name to settings, in the order of application."""
    recorded = getattr(module.config, _RECORD, {})
    return {name: entry["settings"] for name, entry in recorded.items()}


def record_architecture(
    module: GPT2LMHeadModel,
    name: str,
    settings: Mapping[str, Any],
    config_changes: Mapping[str, Any] | None = None,
) -> bool:
    """Writes into the network's configuration that an algorithm is applied to it.

    Args:
        module: The network.
        name: The algorithm's name in recipes.
        settings: What defines the architecture: with these, an equal algorithm can be built.
        config_changes: New values of the configuration; the old ones are kept in the record.

    Returns:
        False if the network had it already, with these settings: then nothing is to be done.

    Raises:
        ValueError: It had it already with other settings.
    """
    recorded = getattr(module.config, _RECORD, {})
    if name in recorded:
        if recorded[name]["settings"] != dict(settings):
            raise ValueError(
                f"{name} must be applied once, but the model already has it with "
                f"{recorded[name]['settings']}, got {dict(settings)}; use the same settings or a "
                "new model."
            )
        return False
    changes = config_changes or {}
    before = {key: getattr(module.config, key) for key in changes}
    module.config.update(dict(changes))
    entry = {"settings": dict(settings), "before": before}
    setattr(module.config, _RECORD, {**recorded, name: entry})
    return True


def forget_architecture(module: GPT2LMHeadModel, name: str) -> None:
    """Takes an algorithm out of the record, with its changes of the configuration: it is undone."""
    recorded = dict(getattr(module.config, _RECORD))
    module.config.update(recorded.pop(name)["before"])
    setattr(module.config, _RECORD, recorded)
    if not recorded:
        delattr(module.config, _RECORD)


def plain_configuration(
    config: ConfigType,
) -> tuple[ConfigType, dict[str, dict[str, Any]]]:
    """The configuration of the network before any algorithm, and those to apply to it, in order."""
    config = copy.deepcopy(config)
    recorded = config.__dict__.pop(_RECORD, {})
    for entry in reversed(recorded.values()):
        config.update(entry["before"])
    return config, {name: entry["settings"] for name, entry in recorded.items()}


_RECORD = "composer_gpt2"  # an attribute of the configuration, saved with it


def conflicts(algorithms: Iterable[Algorithm]) -> list[str]:
    """One sentence for each pair that cannot stand together, and each of ours that is twice."""
    present = list(algorithms)
    names = [type(algorithm).__name__ for algorithm in present]
    found = []
    for algorithm in present:
        if not isinstance(algorithm, SpeedupAlgorithm):
            continue
        own = type(algorithm).__name__
        found += [
            f"{own} cannot be used with {other}: {reason}"
            for other, reason in algorithm.conflicts_with.items()
            if other in names
        ]
    ours = [type(a).__name__ for a in present if isinstance(a, SpeedupAlgorithm)]
    counts = collections.Counter(ours)
    found += [f"{name} must be there once, got it {n} times" for name, n in counts.items() if n > 1]
    return found


def installation_order(algorithms: Iterable[Algorithm]) -> list[SpeedupAlgorithm]:
    """Ours, in the order in which they are applied to a model and to a batch."""
    ours = [a for a in algorithms if isinstance(a, SpeedupAlgorithm)]
    return sorted(ours, key=lambda algorithm: (algorithm.stage, algorithm.name))


def receipts(algorithms: Iterable[Algorithm]) -> list[dict[str, Any]]:
    """The receipts of ours, ready for JSON, in the order of application."""
    return [
        dataclasses.asdict(algorithm.receipt)
        for algorithm in installation_order(algorithms)
        if algorithm.receipt is not None
    ]


def _install_all(state: State) -> None:
    problems = conflicts(state.algorithms)
    if problems:
        raise ValueError("; ".join(problems) + ".")
    ours = installation_order(state.algorithms)
    for earlier in itertools.takewhile(lambda a: a not in ours, state.algorithms):
        if any(isinstance(value, nn.Module) for value in vars(earlier).values()):  # SWA
            raise ValueError(
                f"{type(earlier).__name__} must be listed after {', '.join(a.name for a in ours)}, "
                "got it before: it has copied the model as it was without them."
            )
    for algorithm in ours:
        algorithm.receipt = None  # that of an earlier Trainer
        module = language_model(state.model, algorithm.name)
        outside = _trainable(module) - parameters_held(state.optimizers)
        algorithm.prepare(state)
        receipt = algorithm.apply_to_model(module, state.optimizers)
        if not isinstance(receipt, Receipt):
            raise NoEffectError(
                f"{algorithm.name} must return a receipt of what it changed, got {receipt!r}."
            )
        now_outside = _trainable(module) - parameters_held(state.optimizers)
        if state.optimizers and not now_outside <= outside:
            names = [n for n, p in module.named_parameters() if p in now_outside - outside]
            raise RuntimeError(
                f"{algorithm.name} must leave each new parameter in a group of the optimizer, but "
                f"{', '.join(names)} would not train."
            )
        algorithm.receipt = receipt
        _log.info("%s", receipt)
    # Composer turns the order round at AFTER_DATALOADER, where batches are reshaped.
    others = [a for a in state.algorithms if not isinstance(a, SpeedupAlgorithm)]
    state.algorithms[:] = [*reversed(ours), *others]


def _trainable(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}
