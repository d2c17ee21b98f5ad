"""What Composer leaves out when a run goes on in the middle, or at the end, of an epoch."""

from __future__ import annotations

import warnings
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist, reproducibility

__all__ = ["ExactResume"]


class ExactResume(Callback):
    """Restores each rank's random generators before the first batch, for dropout and the like.

    Composer does so at the beginning of an epoch only, where the corpus is streamed. On another
    number of ranks each keeps the seed that the Trainer gave it: there is no state for all of them,
    and no order of draws to repeat.

    Args:
        random_states: As in the checkpoint, one for each rank.
    """

    def __init__(self, random_states: list[dict[str, Any]]) -> None:
        self._random_states = random_states

    def fit_start(self, state: State, logger: Logger) -> None:
        """Nothing draws random numbers between here and the first batch."""
        if len(self._random_states) == dist.get_world_size():
            reproducibility.load_rng_state(self._random_states)
        if state.timestamp.batch_in_epoch == state.dataloader_len:
            # The last batch of an epoch was saved, and nothing but the end of that epoch is left.
            warnings.filterwarnings("ignore", message="No batches were trained for global rank")
            warnings.filterwarnings(
                "ignore", message="The ``compute`` method of metric .* was called"
            )
