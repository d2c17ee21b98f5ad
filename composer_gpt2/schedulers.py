"""Learning-rate schedules that Composer does not have."""

from __future__ import annotations

import math

from composer import State, Time
from composer.optim import ComposerScheduler
from composer.optim.scheduler import _convert_time

__all__ = ["CosineDecayToFloorScheduler"]


class CosineDecayToFloorScheduler(ComposerScheduler):
    """Linear warm-up, a cosine down to a floor, and the floor to the end of the run.

    Composer's cosine with warm-up ends with the run. Here the decay may end before: GPT* spends the
    last 6,000 of its 51,000 batches at the floor, nanoGPT calls it ``lr_decay_iters``.

    Args:
        t_warmup: Time from 0 to the peak rate.
        t_decay: Time, from the start of the run, at which the floor is reached.
        alpha_f: The floor as a fraction of the peak rate.

    Raises:
        ValueError: While training: the two times do not have one unit, or the decay does not end
            after the warm-up.
    """

    def __init__(self, t_warmup: str | Time, t_decay: str | Time = "0.9dur", alpha_f: float = 0.1):
        self.t_warmup = t_warmup
        self.t_decay = t_decay
        self.alpha_f = alpha_f

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The fraction of the peak rate at this time of the run."""
        warmup = _convert_time(self.t_warmup, state, ssr=ssr)
        decay = _convert_time(self.t_decay, state, ssr=ssr)
        if warmup.unit != decay.unit or not warmup < decay:
            raise ValueError(
                f"t_decay must be a time after t_warmup ({self.t_warmup}), in the same unit, got "
                f"{self.t_decay}."
            )
        now = state.timestamp.get(decay.unit)
        if now < warmup:
            return now.value / warmup.value
        progress = min(1.0, (now.value - warmup.value) / (decay.value - warmup.value))
        return self.alpha_f + (1 - self.alpha_f) * (1 + math.cos(math.pi * progress)) / 2
