"""``composer-gpt2 train``: the Composer launcher, started again after a failure.

A run goes on from its newest checkpoint by itself, so starting the same command again is all that
is needed. It is not repeated where that cannot help: after a mistake of the user, a request to
stop, or two failures with no checkpoint in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from composer_gpt2.parent_death import signal_at_parent_death
from composer_gpt2.recipe import Recipe, load_recipe

__all__ = ["FAILURE_FILE", "train_with_restarts"]

FAILURE_FILE = "COMPOSER_GPT2_FAILURE_FILE"
"""Environment variable of the ranks: the file that gets the notice of a failure, as JSON."""

# Heavy imports are inside the functions: this process waits for others all its life.

_FINAL = (0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # done, a mistake, stopped at once
_LONGEST_PAUSE_SECONDS = 60.0


def train_with_restarts(
    files: Sequence[str],
    overrides: Sequence[str],
    *,
    n_ranks: int | None = None,
    max_restarts: int = 0,
    first_pause_seconds: float = 1.0,
) -> int:
    """Trains a recipe in ranks of this machine, and starts them again when they fail.

    SIGTERM and SIGINT are passed on to the ranks, which save and end; that is no failure.

    Args:
        files: As for :func:`composer_gpt2.recipe.load_recipe`.
        overrides: Likewise.
        n_ranks: Processes that train together; ``None``: one for each GPU, without any just one.
        max_restarts: Starts after the first one, at most.
        first_pause_seconds: Before the first restart; each further pause is twice as long, up to
            a minute.

    Returns:
        The exit status of the last attempt: 0 if it came to its end or was stopped, 2 after a
        mistake of the user, 128 + n if a rank was killed by signal n.

    Raises:
        RecipeError: The recipe has mistakes.
    """
    recipe = load_recipe(files, overrides)
    command = [
        str(Path(sys.executable).with_name("composer")),
        *(() if n_ranks is None else ("-n", str(n_ranks))),
        *("-m", "composer_gpt2.train"),
        *(argument for file in files for argument in ("-f", file)),
        *overrides,
    ]
    newest_before: int | None = None
    with _Ranks() as ranks:
        for n_restarts in range(max_restarts + 1):
            attempt = ranks.run(command)
            if attempt.status in _FINAL or ranks.stopping.is_set():
                return attempt.status
            _say(attempt.reason)
            left = max_restarts - n_restarts
            if left == 0:
                break
            newest = _newest_batch(recipe)
            place = "the beginning" if newest is None else f"batch {newest}"
            if n_restarts > 0 and newest == newest_before:
                _say(f"No checkpoint since the failure before that, still {place}: giving up.")
                break
            newest_before = newest
            pause = min(first_pause_seconds * 2**n_restarts, _LONGEST_PAUSE_SECONDS)
            _say(f"Going on from {place} in {pause:g} s; restarts left after that: {left - 1}.")
            if ranks.stopping.wait(pause):
                return 0
            if n_restarts == 0 and not recipe.autoresume:
                command.append("autoresume=true")
    return attempt.status


@dataclass(frozen=True)
class _Attempt:
    """How the ranks ended: the exit status as a shell has it, and what happened."""

    status: int
    reason: str


class _Ranks:
    """Runs the launcher, and passes signals on to the ranks: it would leave them alone."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._launcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Ranks:
        self._handlers = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> _Attempt:
        with tempfile.TemporaryDirectory() as folder:
            notice_file = Path(folder) / "failure.json"
            # A session of its own, so that a Ctrl-C of the terminal does not reach the launcher,
            # which kills ranks that take more than 30 s to save.
            self._launcher = subprocess.Popen(
                command,
                env={**os.environ, FAILURE_FILE: str(notice_file)},
                start_new_session=True,
                preexec_fn=lambda: signal_at_parent_death(signal.SIGTERM),
            )
            if self.stopping.is_set():
                self._launcher.terminate()
            code = self._launcher.wait()
            self._launcher = None
            if code > 192:  # the launcher exits with the code of the first rank that failed: -9
                code -= 256
            status = code if code >= 0 else 128 - code
            ended = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            if not notice_file.exists():
                return _Attempt(status, f"The ranks ended with {ended}.")
            notice = json.loads(notice_file.read_text(encoding="utf-8"))
        why = notice["text"].splitlines()[-1]
        return _Attempt(status, f"Rank {notice['rank']} failed, {ended}: {why}")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping.set()
        if self._launcher is not None:
            launcher = psutil.Process(self._launcher.pid)
            for process in launcher.children() or [launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def _newest_batch(recipe: Recipe) -> int | None:
    from composer_gpt2.build import name_run
    from composer_gpt2.checkpoints import newest_batch

    if recipe.save_interval is None:
        return None
    return newest_batch(str(name_run(recipe).save_folder))


def _say(text: str) -> None:
    print(f"composer-gpt2 train: {text}", file=sys.stderr, flush=True)
