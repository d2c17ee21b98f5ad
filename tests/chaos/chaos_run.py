"""One start of a run that is to be killed: when, how, and what is left of it."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from batch_recorder import read_events

__all__ = ["KILLS", "MOMENTS", "Attempt", "files_in_shared_memory", "last_batch"]

KILLS = ("one rank", "all ranks", "the session", "SIGTERM")
MOMENTS = ("importing", "training", "evaluating", "saving", "uploading")

_END_SECONDS = 30  # that all processes have, once one rank has failed
_STOP_SECONDS = 60  # that a stop may take: a batch, a checkpoint, and an upload that is tried again
_MARK = "CHAOS_ATTEMPT"
_SHARED_MEMORY = Path("/dev/shm")


class Attempt:
    """A command in a session of its own, all of whose processes are known by their environment."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self.began = time.monotonic()
        self._mark = uuid.uuid4().hex
        self._log = log
        with log.open("wb") as output:
            self.process = psutil.Popen(
                command,
                cwd=cwd,
                env={**environment, _MARK: self._mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Those that live, whatever session they are in."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if (
                    process.environ().get(_MARK) == self._mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in order; not what they have started themselves."""
        ranks = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = process.parent()
                if "RANK" in process.environ() and parent and "RANK" not in parent.environ():
                    ranks[int(process.environ()["RANK"])] = process
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_for(self, what: str, seconds: float, happens: Callable[[], bool]) -> None:
        """Looks often enough to meet a file that lives for a tenth of a second."""
        deadline = time.monotonic() + seconds
        for n_looks in itertools.count():
            if happens():
                return
            if n_looks % 100 == 0:
                status = self.process.poll()
                assert status is None, f"ended with {status} before {what}:\n{self.said}"
                assert time.monotonic() < deadline, f"no {what} in {seconds:g} s:\n{self.said}"
            time.sleep(0.005)

    def kill(self, how: str, chance: random.Random, has_trained: bool) -> None:
        """Ends it in one of the ways of `KILLS`, and waits until no process of it is left."""
        if how == "SIGTERM":
            self.process.terminate()
            self.end(_STOP_SECONDS)
            # Python that still starts has no handler yet.
            allowed = {0} if has_trained else {0, -signal.SIGTERM, 128 + signal.SIGTERM}
            assert self.process.returncode in allowed, self.said
            return
        ranks = self.ranks()
        if how == "the session" or not ranks:
            self.kill_what_is_left()
        else:
            for victim in ranks if how == "all ranks" else [chance.choice(ranks)]:
                victim.kill()
        self.end(_END_SECONDS)
        assert self.process.returncode != 0, self.said

    def end(self, seconds: float) -> None:
        """Waits for its own end; no process may be left."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                described = [" ".join(process.cmdline()) for process in left]
                raise AssertionError(f"left after {seconds:g} s: {described}\n{self.said}")
            time.sleep(0.05)
        self.process.wait(5)

    def kill_what_is_left(self) -> None:
        """Also what is being started meanwhile."""
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)


def last_batch(records: Path, kind: str = "batch") -> int:
    """The highest number of a batch that rank 0 has trained, or evaluated after; 0 for none."""
    events = read_events(records, rank=0) if records.exists() else ()
    return max((event["batch"] for event in events if event["kind"] == kind), default=0)


def files_in_shared_memory() -> dict[tuple[str, int], str]:
    """Name and inode (names are used again) to the folders in which their datasets cache."""
    found = {}
    for path in _SHARED_MEMORY.glob("[0-9]*_*"):
        with contextlib.suppress(FileNotFoundError):
            caches = path.with_name(path.name.split("_")[0] + "_locals")
            folders = caches.read_bytes().decode(errors="ignore") if caches.exists() else ""
            found[path.name, path.stat().st_ino] = folders
    return found
