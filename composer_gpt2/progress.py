"""What a run says while it goes: a line every few batches, and one for each evaluation.

Composer's console logger prints nine lines at a time, and its progress bar needs a terminal.
"""

from __future__ import annotations

import datetime
import sys
import time

from composer import Callback, Logger, State
from composer.core import Event, Time
from composer.utils import create_interval_scheduler, dist
from tqdm import tqdm

__all__ = ["ProgressLines"]

_SHORT_NAMES = {
    "LanguageCrossEntropy": "loss",
    "LanguagePerplexity": "perplexity",
    "BitsPerByte": "bits per byte",
}


class ProgressLines(Callback):
    """Prints loss, learning rate, trained tokens a second and time left, on rank 0 to stderr.

    Args:
        interval: Time between training lines, such as ``10ba``; the first batch always has one.
            ``None`` for none, beside a progress bar; evaluations have theirs all the same.
    """

    def __init__(self, interval: str | Time | None = "10ba") -> None:
        self._is_due = None
        if interval is not None:
            self._is_due = create_interval_scheduler(
                interval, checkpoint_events=False, final_events={Event.BATCH_END}
            )
        self._since = 0.0  # seconds: the last line, later by what evaluations have taken since
        self._tokens = 0  # trained by then
        self._evaluation_began = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: D102 (Composer's event)
        self._since, self._tokens = time.monotonic(), state.timestamp.token.value

    def batch_end(self, state: State, logger: Logger) -> None:  # noqa: D102
        if self._is_due is None:
            return
        first = state.timestamp.batch.value == 1
        if not (first or self._is_due(state, Event.BATCH_END)):
            return
        now, tokens = time.monotonic(), state.timestamp.token.value
        tokens_per_second = (tokens - self._tokens) / (now - self._since)
        self._since, self._tokens = now, tokens
        done = float(state.get_elapsed_duration() or 0.0)
        left = ""
        if 0 < done < 1 and not first:  # the first batch is slow: a forecast from it is wrong
            seconds = tokens * (1 / done - 1) / tokens_per_second
            left = f" | {datetime.timedelta(seconds=round(seconds))} left"
        learning_rate = state.optimizers[0].param_groups[0]["lr"]
        self._print(
            f"batch {state.timestamp.batch.value} ({done:.1%})"
            f" | loss {state.total_loss_dict['loss/train/total']:.4f}"
            f" | lr {learning_rate:.2e} | {tokens_per_second:,.0f} tokens/s{left}"
        )

    def eval_start(self, state: State, logger: Logger) -> None:  # noqa: D102
        self._evaluation_began = time.monotonic()

    def eval_end(self, state: State, logger: Logger) -> None:  # noqa: D102
        seconds = time.monotonic() - self._evaluation_began
        self.leave_out(seconds)
        values = [
            f"{_SHORT_NAMES.get(name, name)} {float(value):.4f}"
            for name, value in state.eval_metric_values.items()
        ]
        at = f"evaluation at batch {state.timestamp.batch.value}"
        self._print(" | ".join([at, *values, f"{seconds:.1f} s"]))

    def leave_out(self, seconds: float) -> None:
        """Does not count time that something else than training has just taken."""
        self._since += seconds

    def _print(self, line: str) -> None:
        if dist.get_global_rank() == 0:
            tqdm.write(line, file=sys.stderr)  # does not tear a progress bar
