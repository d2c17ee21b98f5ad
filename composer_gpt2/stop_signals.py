"""A run that is told to stop finishes its batch, saves and ends; told again, it ends at once.

Python runs its signal handlers between two of its own instructions. A rank that waits for others in
gloo or NCCL comes to none for minutes, so a thread of its own takes the signals here.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from composer import Callback, Logger, State
from composer.utils import dist

__all__ = ["PARENT_DIED", "StopAtBatchEnd", "StopSignals", "Stopped"]

PARENT_DIED = signal.SIGUSR1
"""What a rank gets when the launcher dies.

Not SIGTERM: who stops a whole service sends that to launcher and ranks alike, and one more, because
the launcher has died of its own, would be a second one.
"""

_NAMES = {
    int(signal.SIGINT): "SIGINT",
    int(signal.SIGTERM): "SIGTERM",
    int(PARENT_DIED): "the end of the launcher",
}
_ONE_REQUEST_SECONDS = 5.0


class Stopped(Exception):
    """The run has stopped because it was told to.

    Attributes:
        signal_name: What told it, such as ``SIGTERM``.
        batch: The last one trained; it is saved if the run has a saver.
    """

    def __init__(self, signal_name: str, batch: int) -> None:
        super().__init__(f"Stopped by {signal_name} after batch {batch}")
        self.signal_name = signal_name
        self.batch = batch


class StopSignals:
    """Takes SIGTERM and SIGINT, and the death of the launcher, as a request to stop.

    A second signal ends the process at once, with exit status 128 + its number: the same signal
    again, or another one more than 5 s later. One that comes sooner belongs to the first: the
    launcher sends SIGTERM to the ranks that a terminal's Ctrl-C has reached already.

    A context manager, for the main thread.

    Attributes:
        received: The first signal, such as ``SIGTERM``; ``None`` before.
        waits_for_batch: Whether somebody looks at ``received`` at the end of each batch.
        stop_now: Called with the first signal, in another thread, if nobody does: there is nothing
            to finish yet. It must not return.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.waits_for_batch = False
        self.stop_now: Callable[[str], object] = lambda _: os._exit(0)

    def __enter__(self) -> StopSignals:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # A handler must be set, but all is done by who reads the pipe.
        self._handlers = {n: signal.signal(n, lambda *_: None) for n in _NAMES}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=self._forget_in_child)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._writer)

    def _listen(self, reader: int) -> None:
        numbers = b""
        while 0 not in numbers:
            numbers = os.read(reader, 64)
            for number in numbers:
                if number in _NAMES:
                    self._take(number)
        os.close(reader)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self.received is None:
            self._first, self._since = number, now
            self.received = _NAMES[number]
            if not self.waits_for_batch:
                self.stop_now(self.received)
            _say(f"{self.received}: stopping after this batch; a second signal stops at once.")
        elif number != PARENT_DIED and (
            number == self._first or now - self._since > _ONE_REQUEST_SECONDS
        ):
            _say(f"{_NAMES[number]}: stopped at once, without a checkpoint.")
            os._exit(128 + number)

    def _forget_in_child(self) -> None:
        """A loader process lives until its rank has finished; a Ctrl-C of the terminal hits it too.

        It also must not write to the pipe, where its signals would count as the rank's.
        """
        if signal.getsignal(signal.SIGTERM) is not self._handlers[signal.SIGTERM]:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(PARENT_DIED, signal.SIG_DFL)


class StopAtBatchEnd(Callback):
    """Ends training with :class:`Stopped` at the first end of a batch after a request to stop.

    All ranks agree on that by a reduction of one number a batch. An evaluation is not finished:
    it ends with its current batch. One that is due at the batch is begun all the same, for it draws
    a random number, and a resumed run must go on with those of a run that was never stopped.

    Args:
        signals: Where requests come in.
        save: Called on all ranks; saves the batch unless it is saved, and waits for uploads.
            ``None`` if the run has no checkpoints.
    """

    def __init__(
        self, signals: StopSignals, save: Callable[[State, Logger], object] | None
    ) -> None:
        self._signals = signals
        self._save = save

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: D102 (Composer's event)
        self._signals.waits_for_batch = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # noqa: D102
        assert state.max_duration is not None
        if state.timestamp < state.max_duration:  # the last batch ends the run by itself
            self._stop_if_asked(state, logger)

    def eval_batch_end(self, state: State, logger: Logger) -> None:  # noqa: D102
        self._stop_if_asked(state, logger)

    def _stop_if_asked(self, state: State, logger: Logger) -> None:
        asked = [name == self._signals.received for name in _NAMES.values()]
        flags = state.device.tensor_to_device(torch.tensor(asked, dtype=torch.uint8))
        dist.all_reduce(flags, reduce_operation="MAX")
        names = [name for name, flag in zip(_NAMES.values(), flags.tolist(), strict=True) if flag]
        if names:
            if self._save is not None:
                self._save(state, logger)
            raise Stopped(names[0], state.timestamp.batch.value)


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        os.write(2, f"{text}\n".encode())  # the main thread may hold the lock of sys.stderr
