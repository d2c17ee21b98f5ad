"""A rank that fails ends all ranks, and what the user sees last is why.

Left alone, the other ranks wait for the lost one until ``dist_timeout``, or fail in turn with
"Connection closed by peer", and the launcher shows live what rank 0 says and the rest at the end.
So each rank has a thread that looks, twice a second, into the store through which the ranks have
found each other: for the notice of a failure, and for ranks of its machine that are gone without
one. The thread goes on while its rank is blocked inside gloo or NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from types import TracebackType

import psutil
from torch.distributed import DistError, PrefixStore, TCPStore

from composer_gpt2.restarts import FAILURE_FILE

__all__ = ["Notice", "RankWatch"]

_POLL_SECONDS = 0.5
_CULPRIT_SECONDS = 2.0  # that the victim of another rank's failure leaves it to speak first
_SPEAKER_SECONDS = 10.0  # that a rank has to print and end before the next one does it
_CONNECT_SECONDS = 20.0  # that a failed rank waits for rank 0 to come up
_START_SECONDS = 300.0  # between the starts of the first and the last rank
_STORE_SECONDS = 10.0


@dataclass(frozen=True)
class Notice:
    """Why all ranks end."""

    rank: int
    """The first that failed."""
    status: int
    """The exit status of the run."""
    text: str
    """What the user is told: a message, or a traceback."""


class RankWatch:
    """Ends this rank as soon as another one has failed, and the others if this one does.

    A context manager around all that a rank does. An exception that leaves it is a failure. On each
    machine one rank prints the notice, the first that is alive; the others end in silence. A run of
    one rank has nothing to watch, and its exceptions take their normal way.
    """

    def __init__(self) -> None:
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        first = self._rank - int(os.environ.get("LOCAL_RANK", 0))
        self._local_ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self._processes: dict[int, psutil.Process | None] = {}  # of this machine; None: gone
        self._connected = threading.Event()
        self._left = threading.Event()
        self._own_notice: Notice | None = None
        self._is_victim = False

    def __enter__(self) -> RankWatch:
        if self._world_size > 1:
            # Python's resource tracker removes the shared memory of a rank that ends at once. It
            # would say so below the notice; it starts later and takes over these options.
            sys.warnoptions.append("ignore:resource_tracker")
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
            if self._world_size > 1:
                self.fail(text, 1)
            _write(Notice(self._rank, 1, text))
        elif self._world_size > 1 and self._connected.is_set():
            self._leave()

    def fail(self, text: str, status: int) -> int:
        """Ends all ranks with this text and exit status, unless another rank failed before.

        Returns:
            The status, in a run of one rank; otherwise nothing, for the process ends.
        """
        notice = Notice(self._rank, status, text)
        if self._world_size == 1:
            _speak(notice)
            return status
        if "gloo" in text or "NCCL" in text:  # most likely the victim of another rank
            self._is_victim = True
            time.sleep(_CULPRIT_SECONDS)
        self._own_notice = notice
        if not self._connected.wait(_CONNECT_SECONDS):
            _speak(notice)
            os._exit(status)
        self._thread.join()  # it ends the process
        raise AssertionError

    def _watch(self) -> None:
        try:
            self._connect(_START_SECONDS)
            while not self._left.wait(_POLL_SECONDS):
                try:
                    self._look()
                except DistError:
                    if not self._is_gone(0):
                        self._connect(_STORE_SECONDS)  # the machine, or the job, was suspended
                        continue
                    raise
        except DistError:
            self._end(Notice(0, 1, _vanished(0, "; the store of the ranks went with it")))

    def _connect(self, seconds: float) -> None:
        # The server is the one that torch.distributed starts in rank 0, or will find there.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set_timeout(datetime.timedelta(seconds=_STORE_SECONDS))
        self._store = PrefixStore("composer_gpt2", store)
        self._store.set(f"process/{self._rank}", str(os.getpid()))
        self._connected.set()

    def _look(self) -> None:
        for rank in self._local_ranks:
            if rank not in self._processes and self._has(f"process/{rank}"):
                pid = int(self._store.get(f"process/{rank}"))
                self._processes[rank] = psutil.Process(pid) if psutil.pid_exists(pid) else None
        gone = [rank for rank in self._processes if self._is_gone(rank)]
        # In this order: who is gone has left its notice before.
        if self._has("notice"):
            self._end(Notice(**json.loads(self._store.get("notice"))))
        for rank in gone:
            if not self._has(f"left/{rank}"):
                self._publish(Notice(rank, 1, _vanished(rank)))
        if self._own_notice is not None:
            notice = self._own_notice
            if self._is_victim:
                notice = replace(notice, text=notice.text + self._where_others_are())
            self._publish(notice)
        elif self._has("where") and not self._is_victim:
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            self._store.set(f"where/{self._rank}", "".join(traceback.format_stack(frame)))

    def _has(self, key: str) -> bool:
        return self._store.check([key])  # pyright: ignore[reportAttributeAccessIssue] (no stub)

    def _publish(self, notice: Notice) -> None:
        self._store.compare_set("notice", "", json.dumps(asdict(notice)))

    def _where_others_are(self) -> str:
        """The stacks of ranks that have not failed when this one gave up waiting: one hangs."""
        self._store.set("where", "")
        time.sleep(2 * _POLL_SECONDS)
        slow = [rank for rank in range(self._world_size) if self._has(f"where/{rank}")]
        stacks = "".join(
            f"\nRank {rank} was at:\n{self._store.get(f'where/{rank}').decode().rstrip()}"
            for rank in slow
        )
        if not slow:
            return ""
        names = ", ".join(str(rank) for rank in slow)
        return f"{stacks}\nRank {self._rank} gave up waiting for rank {names} (dist_timeout)."

    def _end(self, notice: Notice) -> None:
        """Ends this process: after its text if it is the speaker of its machine."""
        speaker = next(
            rank
            for rank in self._local_ranks
            if rank == self._rank or (rank in self._processes and not self._is_gone(rank))
        )
        if speaker != self._rank:
            deadline = time.monotonic() + _SPEAKER_SECONDS
            while not self._is_gone(speaker) and time.monotonic() < deadline:
                time.sleep(0.1)
            if self._is_gone(speaker):
                if notice.status == 0:
                    os._exit(0)
                # The launcher shows what ranks said that ended otherwise, below the notice.
                os.kill(os.getpid(), signal.SIGKILL)
        _speak(notice)
        if self._rank == 0:
            time.sleep(2 * _POLL_SECONDS)  # the others read the notice in this process
        os._exit(notice.status)

    def _is_gone(self, rank: int) -> bool:
        """Whether the process of a rank has ended, as far as can be seen on this machine."""
        if rank not in self._processes:
            return False
        process = self._processes[rank]
        try:
            return (
                process is None
                or not process.is_running()
                or process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True

    def _leave(self) -> None:
        """Says that this rank has ended well; the one with the store waits for the others."""
        self._left.set()
        self._thread.join()
        with contextlib.suppress(DistError):
            self._store.set(f"left/{self._rank}", "")
            if self._rank == 0:
                self._store.wait([f"left/{rank}" for rank in range(self._world_size)])


def _vanished(rank: int, more: str = "") -> str:
    return (
        f"Rank {rank} has ended without a word{more}. It was killed (by the system, if memory ran "
        "out: see dmesg) or crashed in native code; the launcher says its exit code, -9 if it was "
        "killed."
    )


def _speak(notice: Notice) -> None:
    _write(notice)
    sys.stdout.flush()
    print(notice.text, file=sys.stderr, flush=True)


def _write(notice: Notice) -> None:
    if FAILURE_FILE in os.environ:
        with open(os.environ[FAILURE_FILE], "w", encoding="utf-8") as file:
            json.dump(asdict(notice), file)
