"""Leave the update of a batch out: what the algorithms that do so have in common.

An update is skipped by taking all gradients away. Optimizers pass over a parameter without one: no
step, no weight decay, no change of a moment or of a count of steps. The batch itself is counted:
schedules and data go on.

Loss and gradients are measured when Composer asks who wants to run at ``AFTER_TRAIN_BATCH``, in
``match``, which is before anything runs there. So gradient clipping, which would spread a NaN or
cut an infinity off, comes later, whatever the order of the lines.
"""

from __future__ import annotations

import collections
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from composer import Event, Logger, State
from composer.utils import dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from composer_gpt2.contract import NoEffectError, SpeedupAlgorithm, Stage
from composer_gpt2.data.batch_samples import describe_samples, samples_of_batch

__all__ = [
    "NonfiniteError",
    "Update",
    "UpdateSkipper",
    "drop_gradients",
    "gradient_norm",
    "measure_effect",
]

_log = logging.getLogger(__name__)


class NonfiniteError(FloatingPointError):
    """Loss or gradients were not finite, and leaving updates out did not or could not help."""


@dataclass(frozen=True)
class Update:
    """What is known of a batch before its optimizer step, the same on all ranks."""

    loss: float
    """Mean over all sequences of the global batch."""
    gradient_norm: float
    """2-norm of all gradients together, before any clipping."""


class UpdateSkipper(SpeedupAlgorithm):
    """Base of algorithms that skip updates: a subclass says which.

    It counts what it skipped, also through a checkpoint, logs each with the samples of the batch,
    and has the metric ``<name>/skipped``. The price of a batch is one pass over the gradients, one
    reduction of three numbers over the ranks, and one wait for the device, of all such algorithms
    of a run together.
    """

    stage = Stage.UPDATE
    conflicts_with = {  # noqa: RUF012
        "SAM": "it computes gradients twice within one step, and moves the weights in between"
    }

    n_skipped: int = 0
    """Updates skipped since the start of the run."""
    n_skipped_in_a_row: int = 0
    """Updates skipped up to the last batch without a break."""

    _reason: str | None = None  # why the update of this batch is skipped
    # Of the first such algorithm of a run, which measures for all:
    _losses: list[tuple[Tensor, int]]  # of micro-batches, each with its number of sequences
    _update: Update | None = None

    @abstractmethod
    def reason_to_skip(self, update: Update, state: State) -> str | None:
        """Why this update must not be made, in a few words; None if it may be."""

    def before_skip(self, update: Update, state: State) -> None:
        """Runs when an update is about to be skipped; may end the run instead."""

    @property
    def skips_nothing(self) -> bool:
        """Whether its settings are neutral; then nothing is measured."""
        return False

    @override
    def prepare(self, state: State) -> None:
        self.n_skipped = self.n_skipped_in_a_row = 0
        self._reason = None

    @override
    def match(self, event: Event, state: State) -> bool:
        """As the base class; measures the update of a batch, and is true if it is skipped."""
        if event not in (Event.BEFORE_TRAIN_BATCH, Event.AFTER_LOSS, Event.AFTER_TRAIN_BATCH):
            return super().match(event, state)
        if self.skips_nothing:
            return False
        if event is not Event.AFTER_TRAIN_BATCH:
            return self is _measuring_one(state)
        if state.batch is None:  # Outside of training, somebody asks for the order.
            return True
        self._reason = self.reason_to_skip(_measuring_one(state)._measure(state), state)
        return self._reason is not None

    @override
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event is Event.BEFORE_TRAIN_BATCH:  # Also when a batch that did not fit is done again.
            self._losses, self._update = [], None
        elif event is Event.AFTER_LOSS:
            n_sequences = len(state.batch["input_ids"])
            loss = cast("Tensor", state.loss).detach().float()
            self._losses.append((loss * n_sequences, n_sequences))
        elif event is Event.AFTER_TRAIN_BATCH:
            self._skip(state, logger)
        else:
            super().apply(event, state, logger)

    def after_batch(self, state: State) -> None:
        """Counts."""
        skipped = self._reason is not None
        self.n_skipped += skipped
        self.n_skipped_in_a_row = self.n_skipped_in_a_row + 1 if skipped else 0
        self._reason = None

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = {"n_skipped": self.n_skipped, "n_skipped_in_a_row": self.n_skipped_in_a_row}
        return {**super().state_dict(), **counts}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.n_skipped = state["n_skipped"]
        self.n_skipped_in_a_row = state["n_skipped_in_a_row"]

    def _measure(self, state: State) -> Update:
        if self._update is None:
            norm = gradient_norm(state.model.parameters())
            loss = torch.stack([loss for loss, _ in self._losses]).sum()
            n_sequences = torch.full_like(norm, sum(n for _, n in self._losses))
            sums = torch.stack([loss, n_sequences, norm])
            dist.all_reduce(sums)
            total_loss, total_sequences, norms = sums.tolist()  # waits for the device
            # Ranks hold the same reduced gradients, so their norms are one.
            self._update = Update(total_loss / total_sequences, norms / dist.get_world_size())
        return self._update

    def _skip(self, state: State, logger: Logger) -> None:
        self.before_skip(_measuring_one(state)._measure(state), state)
        drop_gradients(state.model.parameters())
        logger.log_metrics({f"{self.name}/skipped": self.n_skipped + 1})
        if dist.get_global_rank() == 0:
            _log.warning(
                f"{self.name}: skipped the update of batch {state.timestamp.batch.value + 1}, "
                f"{self._reason} ({self.n_skipped_in_a_row + 1} in a row, {self.n_skipped + 1} in "
                f"all); samples {describe_samples(samples_of_batch(state))}"
            )


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Takes all gradients away, so that an optimizer step changes nothing."""
    for parameter in parameters:
        parameter.grad = None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together, a float32 scalar; not finite if any of them is not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).float()


def measure_effect(
    name: str,
    optimizers: Sequence[Optimizer],
    gradient: float,
    skip: Callable[[Sequence[nn.Parameter]], object],
) -> dict[str, float]:
    """How many numbers one bad gradient changes, with and without ``skip``.

    Steps of the run's own optimizers are tried on a small parameter in place of those of each
    group. The run's weights, moments and random numbers are not touched.

    Args:
        name: The algorithm's, for the message.
        optimizers: Those of the run.
        gradient: The bad one.
        skip: Called with the parameters before the bad step.

    Returns:
        Weights and numbers that the optimizers remember, as the probe of a receipt.

    Raises:
        NoEffectError: There is no optimizer, one computes its gradients itself, or a step makes the
            same change with ``skip`` and without.
    """
    own_gradients = [
        type(o).__name__ for o in optimizers if getattr(o, "_step_supports_amp_closure", False)
    ]
    if not optimizers or own_gradients:
        raise NoEffectError(
            f"{name} needs an optimizer that takes the gradients it is given, got "
            f"{', '.join(own_gradients) or 'none'}; choose another optimizer or leave {name} out."
        )
    changed = sum(_numbers_changed(o, gradient, skip) for o in optimizers)
    changed_without = sum(_numbers_changed(o, gradient, lambda _: None) for o in optimizers)
    if changed or not changed_without:
        raise NoEffectError(
            f"{name} must keep a bad gradient out of weights and optimizer, but a step of "
            f"{', '.join(type(o).__name__ for o in optimizers)} changed {changed} numbers with it "
            f"and {changed_without} without; choose another optimizer or leave {name} out."
        )
    return {
        "numbers changed by a bad gradient": float(changed),
        "without it": float(changed_without),
    }


def _measuring_one(state: State) -> UpdateSkipper:
    ours = (a for a in state.algorithms if isinstance(a, UpdateSkipper) and not a.skips_nothing)
    return next(ours)


def _numbers_changed(
    optimizer: Optimizer, gradient: float, skip: Callable[[Sequence[nn.Parameter]], object]
) -> int:
    stand_in: Any = object.__new__(type(optimizer))
    stand_in.__dict__.update(vars(optimizer))
    stand_in.state, stand_in.param_groups = collections.defaultdict(dict), []
    for group in optimizer.param_groups:
        for example in group["params"][:1]:  # a group may have become empty
            parameter = nn.Parameter(torch.ones(4, 4, dtype=example.dtype, device=example.device))
            stand_in.param_groups.append({**group, "params": [parameter]})
    parameters = [group["params"][0] for group in stand_in.param_groups]

    def step() -> None:
        type(optimizer).step(stand_in)  # a scheduler binds an instance's method to the instance

    _set_gradients(parameters, 1.0)
    step()  # so that there are moments
    before = _numbers(stand_in, parameters)
    _set_gradients(parameters, gradient)
    skip(parameters)
    step()
    after = _numbers(stand_in, parameters)
    return sum(int((one != other).sum()) for one, other in zip(before, after, strict=True))


def _set_gradients(parameters: Sequence[nn.Parameter], one_of_them: float) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[0, 0] = one_of_them


def _numbers(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    remembered = [value for p in parameters for value in optimizer.state[p].values()]
    numbers = [value for value in remembered if isinstance(value, Tensor | int | float)]
    return [torch.as_tensor(value).detach().clone() for value in [*parameters, *numbers]]
