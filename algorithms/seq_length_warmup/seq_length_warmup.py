"""Sequence-length warm-up: train on short sequences first and on longer and longer ones.

The length of a batch is a function of the time of the run alone, so a resumed run goes on exactly
where it stopped. Tokens that are cut off are not trained and not counted as trained.

Shapes: ``B`` batch, ``T`` tokens of a sequence as the batch arrives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from composer import Event, Logger, State
from composer.core import Batch
from composer.utils import dist
from torch import Tensor
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from typing_extensions import override

from composer_gpt2.batches import check_token_batch, split_sequences
from composer_gpt2.contract import (
    NoEffectError,
    Plan,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    installation_order,
)
from composer_gpt2.durations import parse_duration

__all__ = [
    "SequenceLengthWarmup",
    "distinct_lengths",
    "sequence_length_at",
    "set_batch_sequence_length",
]

Schedule = Literal["linear", "step"]

_log = logging.getLogger(__name__)


def sequence_length_at(
    progress: float | Fraction,
    *,
    min_seq_length: int,
    max_seq_length: int,
    step_size: int = 8,
    schedule: Schedule = "linear",
    dividing: int | None = None,
) -> int:
    """The length at a point of the warm-up: one of :func:`distinct_lengths`, never falling.

    ``linear`` is ``min + progress * (max - min)`` rounded down to the next of these lengths;
    ``step`` gives each of them but the last an equal part of the warm-up. ::

        >>> [sequence_length_at(p / 4, min_seq_length=8, max_seq_length=64) for p in range(5)]
        [8, 16, 32, 48, 64]

    Args:
        progress: How much of the warm-up is over, from 0; from 1 on the length is the maximum.
        min_seq_length: Tokens at the start.
        max_seq_length: Tokens at the end.
        step_size: Lengths in between are multiples of it.
        schedule: ``"linear"`` or ``"step"``.
        dividing: If given, only lengths that divide this number.

    Raises:
        ValueError: As :func:`distinct_lengths`.
    """
    lengths = distinct_lengths(
        min_seq_length=min_seq_length,
        max_seq_length=max_seq_length,
        step_size=step_size,
        schedule=schedule,
        dividing=dividing,
    )
    if progress >= 1:
        return max_seq_length
    if schedule == "step":
        return lengths[int(progress * (len(lengths) - 1))]
    reached = min_seq_length + progress * (max_seq_length - min_seq_length)
    return max((length for length in lengths if length <= reached), default=lengths[0])


def distinct_lengths(
    *,
    min_seq_length: int,
    max_seq_length: int,
    step_size: int = 8,
    schedule: Schedule = "linear",
    dividing: int | None = None,
) -> list[int]:
    """All lengths that a warm-up may use, shortest first: as many shapes as a compiler meets.

    ``linear`` has ``min``, the multiples of ``step_size`` above it, and ``max``. ``step`` doubles:
    ``min``, ``2 min``, ``4 min``, ... rounded down to multiples of ``step_size``, and ``max``. A
    run with few batches skips some.

    Args:
        min_seq_length: Tokens at the start.
        max_seq_length: Tokens at the end.
        step_size: Lengths in between are multiples of it.
        schedule: ``"linear"`` or ``"step"``.
        dividing: If given, lengths that do not divide this number are left out.

    Raises:
        ValueError: The range is empty, the schedule unknown, or ``max_seq_length`` is left out.
    """
    _check_range(min_seq_length, max_seq_length, step_size, schedule)
    if schedule == "linear":
        first = (min_seq_length // step_size + 1) * step_size
        between = range(first, max_seq_length, step_size)
    else:
        doublings = (max_seq_length // min_seq_length).bit_length()
        between = [(min_seq_length << k) // step_size * step_size for k in range(1, doublings)]
    lengths = {min_seq_length, *between, max_seq_length}
    lengths = sorted(n for n in lengths if min_seq_length <= n <= max_seq_length)
    if dividing is None:
        return lengths
    if dividing % max_seq_length:
        raise ValueError(
            "max_seq_length must divide the length of the sequences that are reshaped, got "
            f"{max_seq_length} of {dividing}; choose a divisor or truncate=True."
        )
    return [length for length in lengths if dividing % length == 0]


def set_batch_sequence_length(
    batch: Batch, length: int, *, truncate: bool = True
) -> dict[str, Tensor]:
    """A batch with sequences of ``length`` tokens; all its tensors change together.

    Args:
        batch: A dict with ``input_ids``; each value is a tensor of the same shape ``(B, T)``.
        length: At most ``T``.
        truncate: True keeps the first tokens, shape ``(B, length)``. False cuts each sequence
            into ``T / length`` shorter ones that follow each other, shape
            ``(B * T / length, length)``, and keeps all tokens.

    Raises:
        NoEffectError: The batch, or one of its values, is not of this kind.
        ValueError: ``length`` is not possible.
    """
    _, T = check_token_batch(batch, "seq_length_warmup")
    if not 1 <= length <= T:
        raise ValueError(
            f"length must be from 1 to the {T} tokens of the batch's sequences, got {length}."
        )
    if truncate:
        return {name: value[:, :length].contiguous() for name, value in batch.items()}
    if T % length:
        raise ValueError(
            f"length must divide the {T} tokens of the batch's sequences, so that none is lost, "
            f"got {length}; choose a divisor or truncate=True."
        )
    return split_sequences(batch, T // length, "seq_length_warmup")


@dataclass(eq=False)
class SequenceLengthWarmup(SpeedupAlgorithm):
    """Lets the length of sequences grow over the first part of a run.

    It changes: the shape of batches (``AFTER_DATALOADER``); with ``truncate``, the tokens counted
    in ``state.timestamp``, which become those trained (``BATCH_END``); without, the micro-batch
    size while a batch is trained, so that its tokens stay the same. Samples are counted as the
    dataset has them. The metric ``seq_length_warmup/length`` has the length of each batch.

    Example::

        Trainer(..., algorithms=[SequenceLengthWarmup(duration="0.3dur", min_seq_length=64)])

    Args:
        duration: When the full length is reached, in any unit of Composer but iterations:
            ``0.3dur``, ``4200ba``, ``2e9tok``, ``3ep``, ``5000sp``, ``600sec``. A fraction is of
            the run, in the unit of its ``max_duration``.
        min_seq_length: Tokens of a sequence at the start, at least 2.
        max_seq_length: Tokens from the end of the warm-up on; a longer batch is cut or reshaped to
            it until the run ends, a shorter one sets the maximum itself. Default: the length of
            the batch, and after the warm-up nothing is done.
        step_size: Lengths in between are multiples of it (8: what tensor cores like).
        truncate: True drops what is longer. False makes more, shorter sequences of it; lengths
            that do not divide the batch's are left out of the schedule then.
        schedule: ``"linear"``, or ``"step"`` for doubling lengths: few distinct shapes.

    Source: Li et al., 2022, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup
    for Training GPT Models", https://arxiv.org/abs/2108.06084.
    """

    duration: str = "0.3dur"
    min_seq_length: int = 8
    max_seq_length: int | None = None
    step_size: int = 8
    truncate: bool = True
    schedule: Schedule = "linear"

    name = "seq_length_warmup"
    stage = Stage.BATCH
    conflicts_with = {"SeqLengthWarmup": "both set the length of the same batches"}  # noqa: RUF012

    def __post_init__(self) -> None:
        try:
            value, unit = parse_duration(self.duration)
        except ValueError as error:
            raise ValueError(f"duration {error}.") from None
        if unit == "dur" and value > 1:
            raise ValueError(
                "duration must end within the run, at 1dur or before, got "
                f"{self.duration!r}; the maximum would not be reached."
            )
        if self.min_seq_length < 2:
            raise ValueError(
                "min_seq_length must be at least 2, a token and the next one to predict, got "
                f"{self.min_seq_length}."
            )
        longest = self.max_seq_length if self.max_seq_length is not None else self.min_seq_length
        _check_range(self.min_seq_length, longest, self.step_size, self.schedule)
        self._forget_batch()

    @property
    @override
    def drops_tokens(self) -> bool:
        return self.truncate and not self._is_instant()

    def check_plan(self, plan: Plan) -> None:
        """Refuses lengths that the corpus cannot give."""
        T = plan.sequence_length
        if self.max_seq_length is not None and self.max_seq_length > T:
            raise ValueError(
                f"max_seq_length must be at most the corpus's sequence_length {T}, got "
                f"{self.max_seq_length}; leave it out to end at the corpus's."
            )
        problem = self._problem(T)
        if problem:
            raise ValueError(problem)

    def prepare(self, state: State) -> None:
        """Starts afresh."""
        self._forget_batch()

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        # Nothing changes in the model, and the length of the corpus is not known yet.
        T = int(module.config.n_positions)
        if self._problem(T):
            T = 2 * (self.max_seq_length or self.min_seq_length)
        return self._receipt(T, "would have")

    @override
    def measure_run(self, state: State) -> Receipt | None:
        T = getattr(getattr(state.dataloader, "dataset", None), "sequence_length", None)
        if T is None:  # another data set's; the first batch tells
            return None
        for algorithm in installation_order(state.algorithms):
            if algorithm.stage < self.stage:
                T = algorithm.sequence_length_after(T)
        return self._receipt(T, "have")

    def acts_on_batch(self, state: State) -> bool:
        """True until the warm-up is over; to the end of the run if there is a maximum."""
        return self.max_seq_length is not None or self._progress(state) < 1

    def apply_to_batch(self, batch: Batch, state: State) -> Batch:
        """Cuts or reshapes the batch to the length of this time."""
        length = self._plan_batch(batch, state)
        return set_batch_sequence_length(batch, length, truncate=self.truncate)

    def match(self, event: Event, state: State) -> bool:
        """As the base class; before a batch is trained, sees that it has the planned length.

        Raises:
            NoEffectError: It has not.
        """
        if event is Event.BATCH_START and state.batch is not None and self.acts_on_batch(state):
            shape = check_token_batch(state.batch, self.name)
            if shape != self._planned_shape:
                raise NoEffectError(
                    f"{self.name} must have set the shape of batch {state.timestamp.batch.value} "
                    f"to {self._planned_shape}, got {shape}: its apply_to_batch() did not run to "
                    "its end. The run stops rather than train without it."
                )
        return super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """As the base class; leaves batches that are short enough alone and logs the lengths."""
        if event is not Event.AFTER_DATALOADER:
            super().apply(event, state, logger)
            return
        length = self._plan_batch(state.batch, state)
        logger.log_metrics({f"{self.name}/length": length})
        if length == state.batch["input_ids"].shape[1]:
            self._acted_on = state.timestamp.batch  # the base class would miss a change
        else:
            super().apply(event, state, logger)

    def after_batch(self, state: State) -> None:
        """Counts the tokens that were trained."""
        if self._planned_shape is None:
            return
        B, length = self._planned_shape
        self._planned_shape = None
        if self.truncate:
            # Composer counted the batch as the loader gave it. Ranks may have different batches.
            n_tokens = state.device.tensor_to_device(torch.tensor(B * length))
            dist.all_reduce(n_tokens)
            trained = int(n_tokens.item())
            before = state.previous_timestamp
            assert before is not None  # Composer sets it with the timestamp of the batch's end
            state.timestamp = state.timestamp.copy(
                token=before.token + trained,
                token_in_epoch=before.token_in_epoch + trained,
                token_in_iteration=before.token_in_iteration + trained,
            )

    def _forget_batch(self) -> None:
        self._planned_shape: tuple[int, int] | None = None  # of the batch that is being trained
        self._announced = False

    def _receipt(self, T: int, have: str) -> Receipt:
        """Cuts a random batch of sequences of ``T`` tokens to each length of the schedule."""
        lengths = self._lengths(T)
        if self._is_instant():
            lengths = lengths[-1:]
        _measure(lengths, T, self.truncate)
        cut = [length for length in lengths if length < T]
        how = "truncates" if self.truncate else "reshapes"
        changed = (
            f"{how} batches, {self.schedule} over {self.duration}; sequences of {T:,} tokens "
            f"{have} {len(lengths)} distinct lengths"
        )
        probe = {
            "shortest": float(lengths[0]),
            "longest": float(lengths[-1]),
            "distinct lengths": float(len(lengths)),
        }
        return Receipt(
            self.name,
            self.settings,
            changed if cut else "changes no batch: its duration is 0",
            len(cut),
            probe,
        )

    def _plan_batch(self, batch: Batch, state: State) -> int:
        """The length for this batch, which is kept in mind until the batch has been trained."""
        B, T = check_token_batch(batch, self.name)
        lengths = self._lengths(T)
        length = sequence_length_at(self._progress(state), **self._range(T))
        self._planned_shape = (B if self.truncate else B * T // length, length)
        if not self._announced:
            _log.info(
                f"{self.name}: sequences of {T} tokens, {len(lengths)} distinct lengths from "
                f"{lengths[0]} to {lengths[-1]} over {self.duration}, now {length}"
            )
            self._announced = True
        return length

    def _range(self, T: int) -> dict[str, Any]:
        """The arguments of the schedule for sequences of ``T`` tokens."""
        return {
            "min_seq_length": self.min_seq_length,
            "max_seq_length": T if self.max_seq_length is None else min(T, self.max_seq_length),
            "step_size": self.step_size,
            "schedule": self.schedule,
            "dividing": None if self.truncate else T,
        }

    def _lengths(self, T: int) -> list[int]:
        problem = self._problem(T)
        if problem:
            raise NoEffectError(problem)
        return distinct_lengths(**self._range(T))

    def _problem(self, T: int) -> str | None:
        """Why sequences of ``T`` tokens have no schedule."""
        if self.min_seq_length > T:
            return (
                f"seq_length_warmup's min_seq_length must be at most the {T} tokens of a sequence, "
                f"got {self.min_seq_length}; nothing could grow. Lower it."
            )
        lengths = self._range(T)
        longest = lengths["max_seq_length"]
        if not self._is_instant() and self.min_seq_length == longest == T:
            return (
                f"seq_length_warmup's min_seq_length must be below the {T} tokens of a sequence, "
                f"got {self.min_seq_length}; nothing would grow. Lower it, or leave it out."
            )
        if self.truncate or (self._is_instant() and self.max_seq_length is None):
            return None
        if T % longest:
            return (
                "seq_length_warmup's max_seq_length must divide the sequences' "
                f"{T} tokens with truncate=False, got {longest}; choose a divisor or truncate=True."
            )
        if self.min_seq_length < longest and len(distinct_lengths(**lengths)) == 1:
            return (
                f"seq_length_warmup with truncate=False needs a length from {self.min_seq_length} "
                f"(min_seq_length) that is below {longest}, divides the sequences' {T} tokens and "
                f"is a multiple of step_size {self.step_size}, got none; use step_size=1, "
                "truncate=True or another sequence length."
            )
        return None

    def _is_instant(self) -> bool:
        return parse_duration(self.duration).value == 0

    def _progress(self, state: State) -> Fraction:
        """How much of the warm-up is over, exactly: 1 where it ends."""
        value, unit = parse_duration(self.duration)
        duration = Fraction(str(value))  # 0.3 is 3/10
        if unit == "dur":
            assert state.max_duration is not None  # Composer trains no batch without
            unit = state.max_duration.unit.value
            duration *= state.max_duration.value
        return _elapsed(state, unit) / duration if duration else Fraction(1)


def _elapsed(state: State, unit: str) -> Fraction:
    """The time of the run in a unit, with the part of an epoch or second that is over."""
    now = state.timestamp
    if unit == "sec":
        return Fraction(now.total_wct.total_seconds())
    if unit == "ep":
        if state.dataloader_len is None:
            raise ValueError(
                "a warm-up in epochs needs a data loader that knows its length, got one that does "
                "not; give the duration in ba, sp or tok."
            )
        n_batches = state.dataloader_len.value
        return now.epoch.value + Fraction(now.batch_in_epoch.value, n_batches)
    return Fraction(now.get(unit).value)


def _check_range(
    min_seq_length: int, max_seq_length: int, step_size: int, schedule: Schedule
) -> None:
    if not 1 <= min_seq_length <= max_seq_length:
        raise ValueError(
            "min_seq_length must be from 1 to max_seq_length, got "
            f"{min_seq_length} and {max_seq_length}."
        )
    if step_size < 1:
        raise ValueError(f"step_size must be at least 1 token, got {step_size}.")
    if schedule not in ("linear", "step"):
        raise ValueError(f"schedule must be 'linear' or 'step', got {schedule!r}.")


def _measure(lengths: list[int], T: int, truncate: bool) -> None:
    """Sees on random tokens that batches get these lengths, with the right tokens in order."""
    tokens = torch.randint(50257, (2, T), generator=torch.Generator().manual_seed(0))
    rows = tokens.tolist()
    for length in lengths:
        got = set_batch_sequence_length({"input_ids": tokens}, length, truncate=truncate)
        pieces = 1 if truncate else T // length
        expected = [row[i * length : (i + 1) * length] for row in rows for i in range(pieces)]
        if got["input_ids"].tolist() != expected:
            raise NoEffectError(
                f"seq_length_warmup must give sequences of {length} tokens, got the shape "
                f"{tuple(got['input_ids'].shape)} or other tokens from {tuple(tokens.shape)}."
            )
