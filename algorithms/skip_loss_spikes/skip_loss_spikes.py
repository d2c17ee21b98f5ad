"""No update from a batch whose loss or gradient norm stands out from those before it.

A bad document, or many of one kind in a batch, can throw a model back by hundreds of batches. What
is usual is known from the last batches; an update that is far from it is left out.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from composer import State
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from typing_extensions import override

from composer_gpt2.contract import Receipt
from composer_gpt2.update_skipping import (
    Update,
    UpdateSkipper,
    drop_gradients,
    measure_effect,
)

__all__ = ["SkipLossSpikes", "newest_z_score"]


def newest_z_score(values: Sequence[float]) -> float:
    """How far the last value lies above the mean of all, itself included, in standard deviations.

    Being one of ``n`` values it reaches ``sqrt(n - 1)`` at most. 0 if all values are equal. ::

        >>> newest_z_score([1.0, 1.0, 1.0, 1.0, 2.0])
        2.0

    Args:
        values: In the order of time; at least one, all finite.

    Source: ``update_detector`` in llm.c, https://github.com/karpathy/llm.c/blob/master/llmc/outlier_detector.h
    """
    deviation = statistics.pstdev(values)
    return (values[-1] - statistics.fmean(values)) / deviation if deviation else 0.0


@dataclass(eq=False)
class SkipLossSpikes(UpdateSkipper):
    """Leaves the update of a batch out if its loss or its gradient norm is unusually high.

    Changes: nothing, until such a batch comes. Then no weight and nothing that the optimizer
    remembers changes; the batch is counted, and schedules and data go on. Loss and norm are those
    of the global batch, before clipping, so that all ranks decide alike.

    As in llm.c, nothing is skipped until ``window`` batches have been seen, and what was skipped
    enters the window like all others: a level that stays becomes usual. Unlike there, values that
    are not finite do not enter it, and are not judged: ``skip_nonfinite`` is for them.

    Example::

        Trainer(..., algorithms=[SkipLossSpikes(loss_z_threshold=6.0, norm_z_threshold=6.0)])

    Args:
        loss_z_threshold: In standard deviations, see :func:`newest_z_score`; None (or infinity)
            does not look at the loss. llm.c's ``-sl``.
        norm_z_threshold: The same of the gradient norm. llm.c's ``-sg``.
        window: Batches that say what is usual, the newest included.

    Source: llm.c, https://github.com/karpathy/llm.c/blob/master/train_gpt2.cu
    """

    loss_z_threshold: float | None = None
    norm_z_threshold: float | None = None
    window: int = 128

    name = "skip_loss_spikes"

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2 batches, got {self.window}.")
        highest = math.sqrt(self.window - 1)
        for key in ("loss_z_threshold", "norm_z_threshold"):
            threshold = getattr(self, key)
            if threshold == math.inf:
                setattr(self, key, None)
            elif threshold is not None and not 0 < threshold < highest:
                raise ValueError(
                    f"{key} must be above 0 and below the highest score in a window of "
                    f"{self.window}, sqrt({self.window} - 1) = {highest:.4g}, got {threshold}; "
                    "null does not look at it."
                )
        self._forget_values()

    @property
    @override
    def skips_nothing(self) -> bool:
        return self.loss_z_threshold is None and self.norm_z_threshold is None

    @override
    def prepare(self, state: State) -> None:
        super().prepare(state)
        self._forget_values()

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        n_parameters = sum(len(group["params"]) for o in optimizers for group in o.param_groups)
        thresholds = [
            f"{what} with a z-score above {threshold:g}"
            for what, threshold in self._thresholds().items()
            if threshold is not None
        ]
        changed = f"skips updates of a {' or a '.join(thresholds)} among {self.window} batches"
        return Receipt(
            self.name,
            self.settings,
            "skips nothing: it has no threshold" if self.skips_nothing else changed,
            0 if self.skips_nothing else n_parameters,
            measure_effect(self.name, optimizers, 1e4, drop_gradients),
        )

    @override
    def reason_to_skip(self, update: Update, state: State) -> str | None:
        self._newest = {"loss": update.loss, "gradient norm": update.gradient_norm}
        for what, threshold in self._thresholds().items():
            values, newest = self._values[what], self._newest[what]
            if threshold is None or len(values) < self.window or not math.isfinite(newest):
                continue
            score = newest_z_score([*list(values)[1:], newest])
            if score > threshold:
                return f"{what} {newest:.4g} with a z-score of {score:.3g}, above {threshold:g}"
        return None

    @override
    def after_batch(self, state: State) -> None:
        """Counts, and remembers what the batch had."""
        super().after_batch(state)
        for what, value in self._newest.items():
            if math.isfinite(value):
                self._values[what].append(value)

    @override
    def state_dict(self) -> dict[str, Any]:
        values = {what: list(values) for what, values in self._values.items()}
        return {**super().state_dict(), "values": values}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the values of the checkpoint; of those, a smaller window has the newest."""
        super().load_state_dict(state)
        for what, values in state["values"].items():
            self._values[what].extend(values)

    def _thresholds(self) -> dict[str, float | None]:
        return {"loss": self.loss_z_threshold, "gradient norm": self.norm_z_threshold}

    def _forget_values(self) -> None:
        self._values = {w: collections.deque(maxlen=self.window) for w in self._thresholds()}
        self._newest: dict[str, float] = {}  # of the batch that is being trained
