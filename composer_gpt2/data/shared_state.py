"""What the reading processes of one machine share about a dataset, besides what streaming shares.

mosaicml-streaming keeps the state of a dataset (which shards are here, whose turn it is) in shared
memory, ``/dev/shm/<number>_<name>`` on Linux. It lacks two things, which are here: that all
processes learn of a failure in one of them, and that nothing of a killed run is left behind.

A dataset of this package is known by a mark at the end of its segment ``<number>_locals``, and is
alive while any of its processes holds a lock on that segment; the kernel frees it on any death.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN, TICK
from streaming.base.shared import SharedArray, SharedMemory, get_shm_prefix
from streaming.base.shared.prefix import (
    _check_and_find_retrying,
    _check_self,
    _get_path,
    _pack_locals,
    _unpack_locals,
)
from streaming.base.world import World

__all__ = ["SharedFailure", "registration"]

_FAILURE = "failure"
_MARK = b"composer-gpt2"  # behind what streaming reads
_OURS = {_FAILURE, BARRIER_FILELOCK, CACHE_FILELOCK}
_SHARED_MEMORY = Path("/dev/shm")
_NUMBER = "[0-9]" * 6 + "*"
_TEXT_BYTES = 4096


class SharedFailure:
    """The first failure of any process that reads the dataset on this machine.

    streaming polls it in all its loops as if it were the ``threading.Event`` that it makes itself.
    """

    def __init__(self, number: int) -> None:
        self._bytes = SharedArray(_TEXT_BYTES, np.uint8, _get_path(number, _FAILURE))

    def is_set(self) -> bool:
        """Whether there was a failure."""
        return bool(self._bytes[0])

    def set(self, text: str) -> None:
        """Tells all processes; the first text stays."""
        if not self.is_set():
            data = np.frombuffer(text.encode()[: _TEXT_BYTES - 1], np.uint8)
            # The first byte last: who sees it sees the whole text.
            self._bytes[1 : len(data)] = data[1:]
            self._bytes[0] = data[0]

    @property
    def text(self) -> str:
        """What happened."""
        return self._bytes[:].tobytes().rstrip(b"\0").decode(errors="ignore")


@contextmanager
def registration(is_local_leader: bool) -> Iterator[None]:
    """Surrounds the making of a dataset, which takes the next free number in shared memory.

    Only one dataset of the machine is made at a time (streaming lets two take the same number), and
    what dead ones left behind is removed first. Ranks other than the first take its number;
    streaming's own guess it. File locks lie beside the memory, and go with it, in place of TMPDIR,
    where streaming leaves two for each dataset for ever and skips its checks where it finds them.

    Args:
        is_local_leader: Whether this is the first rank of the machine, which does the above.

    Raises:
        ValueError: Another living dataset caches in one of the folders of this one.
    """
    # Beside the memory it guards; one file for each user, since nobody else may write to it.
    lock = os.path.join(_lock_folder(), f"composer-gpt2-{os.getuid()}.lock")
    with FileLock(lock) if is_local_leader else nullcontext():
        if is_local_leader:
            _remove_leftovers()
        streaming_dataset.get_shm_prefix = _take_number
        original, streaming_dataset.gettempdir = streaming_dataset.gettempdir, _lock_folder
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Reused local directory"):
                raise
            raise ValueError(
                "A cache folder must be used by one dataset at a time, but another one, of this or "
                f"of another running process, uses the same ({str(error).partition('. ')[0]}); set "
                "`local` or COMPOSER_GPT2_CACHE to another folder."
            ) from error
        finally:
            streaming_dataset.get_shm_prefix = get_shm_prefix
            streaming_dataset.gettempdir = original


def _take_number(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """What streaming's ``get_shm_prefix`` does, but that the first rank of a machine decides.

    There each rank takes the first number that is free when it looks, which is another one than the
    leader's if a dataset of another run is made or ends in between.
    """
    _check_self(streams_local)
    is_distributed = dist.is_available() and dist.is_initialized()
    if is_distributed:
        dist.barrier()  # the first rank has removed what a killed run left in this cache
    # For its errors also where the number is not used: all ranks shall raise them.
    number = _find_number(streams_local, streams_remote, retry)
    if is_distributed:
        dist.barrier()  # all have looked
    segment = None
    if world.is_local_leader:
        data = _pack_locals(streams_local, number) + _MARK
        segment = SharedMemory(_get_path(number, LOCALS), True, len(data))
        segment.buf[: len(data)] = data
    if is_distributed:
        numbers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, (world.node, world.is_local_leader, number))
        number = next(n for node, leads, n in numbers if leads and node == world.node)
    if segment is None:
        segment = SharedMemory(_get_path(number, LOCALS), False)
    atexit.register(_remove_locks, number)  # by all ranks: one that ends later makes them again
    if _SHARED_MEMORY.is_dir():  # macOS has none and cannot lock segments
        # Until this process and its children have ended, however they end.
        fcntl.flock(segment.shm._fd, fcntl.LOCK_SH)  # pyright: ignore[reportAttributeAccessIssue]
    return number, segment


def _find_number(streams_local: list[str], streams_remote: list[str | None], retry: int) -> int:
    """The first free number; an error if another dataset caches in one of the folders.

    streaming's own opens the memory of all other datasets, and leaves it open.
    """
    if not _SHARED_MEMORY.is_dir():
        return max(
            _check_and_find_retrying(streams_local, streams_remote, shm_name=name, retry=retry)
            for name in SHM_TO_CLEAN
        )
    cached = {local for local, remote in zip(streams_local, streams_remote, strict=True) if remote}
    for attempt in range(1 + retry):
        theirs: set[str] = set()
        for path in _SHARED_MEMORY.glob(f"{_NUMBER}_{LOCALS}"):
            with suppress(FileNotFoundError, PermissionError):
                theirs.update(_unpack_locals(path.read_bytes())[0])
        if not cached & theirs:
            break
        if attempt == retry:
            raise ValueError(f"Reused local directory: {sorted(cached & theirs)}.")
        sleep(TICK)  # it may just be ending
    taken = {int(path.name.split("_")[0]) for path in _SHARED_MEMORY.glob(f"{_NUMBER}_*")}
    return next(number for number in itertools.count() if number not in taken)


def _lock_folder() -> str:
    return str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else tempfile.gettempdir()


def _remove_locks(number: int) -> None:
    for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
        Path(_lock_folder(), _get_path(number, name)).unlink(missing_ok=True)


def _remove_leftovers() -> None:
    """Removes what dead datasets of this package and user left in shared memory.

    What has no ``locals`` beside it is dead too: they are made under the lock of
    :func:`registration` and removed last. (That a process has the memory mapped says nothing:
    streaming maps that of all other datasets while it looks for a free number.)
    """
    numbers: dict[str, dict[str, Path]] = {}
    for path in _SHARED_MEMORY.glob(f"{_NUMBER}_*"):
        number, name = path.name.split("_", 1)
        numbers.setdefault(number, {})[name] = path
    for paths in numbers.values():
        locals_path = paths.pop(LOCALS, None)
        # Those end the block if it has just ended, or is another user's, or lives.
        with suppress(FileNotFoundError, PermissionError, BlockingIOError):
            if locals_path is None:
                # Names that streaming's own datasets have not: their locks are in TMPDIR.
                _unlink(paths[name] for name in _OURS & paths.keys())
                continue
            with locals_path.open("rb") as file:
                if file.read().endswith(_MARK):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _unlink([*paths.values(), locals_path])


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.stat().st_uid == os.getuid():
            path.unlink()
