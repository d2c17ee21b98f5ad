"""What the reading processes of one machine share about a dataset, besides what streaming shares.

mosaicml-streaming keeps the state of a dataset (which shards are here, whose turn it is) in shared
memory, ``/dev/shm/<number>_<name>`` on Linux. It lacks two things, which are here: that all
processes learn of a failure in one of them, and that a killed run does not block the next one.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from glob import glob
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedArray, SharedMemory, get_shm_prefix
from streaming.base.shared.prefix import (
    _check_and_find_retrying,
    _get_path,
    _unpack_locals,
)
from streaming.base.world import World

__all__ = ["SharedFailure", "mark_in_use", "registration"]

_SHARED_MEMORY = "/dev/shm"
_TEXT_BYTES = 4096


class SharedFailure:
    """The first failure of any process that reads the dataset on this machine.

    streaming polls it in all its loops as if it were the ``threading.Event`` that it makes itself.
    """

    def __init__(self, name: str) -> None:
        self._bytes = SharedArray(_TEXT_BYTES, np.uint8, name)

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

    def clear(self) -> None:
        """Forgets what a dead process left under this name."""
        self._bytes[:] = 0

    @property
    def text(self) -> str:
        """What happened."""
        return self._bytes[:].tobytes().rstrip(b"\0").decode(errors="ignore")


def mark_in_use(segment: SharedMemory) -> None:
    """Locks a segment until this process and its children have ended, however they end."""
    if os.path.isdir(_SHARED_MEMORY):  # macOS has none and cannot lock segments
        fcntl.flock(segment.shm._fd, fcntl.LOCK_SH)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def registration(folders: Collection[str], is_local_leader: bool) -> Iterator[None]:
    """Surrounds the making of a dataset, which takes the next free number in shared memory.

    Only one dataset of the machine is made at a time (streaming lets two take the same number), and
    what dead ones left behind for the same folders is removed first. Ranks other than the first
    take its number; streaming's own guess it.

    Args:
        folders: Absolute paths of the folders in which the dataset will cache.
        is_local_leader: Whether this is the first rank of the machine, which does the above.

    Raises:
        ValueError: Another living dataset caches in one of them.
    """
    # Beside the memory it guards; one file for each user, since nobody else may write to it.
    folder = _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else tempfile.gettempdir()
    path = os.path.join(folder, f"composer-gpt2-{os.getuid()}.lock")
    with FileLock(path) if is_local_leader else nullcontext():
        if is_local_leader:
            _remove_leftovers(folders)
        streaming_dataset.get_shm_prefix = _take_number
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Reused local directory"):
                raise
            raise ValueError(
                "A cache folder must be used by one dataset at a time, but another one, of this or "
                f"of another running process, uses one of {folders}; set `local` or "
                "COMPOSER_GPT2_CACHE to another folder."
            ) from error
        finally:
            streaming_dataset.get_shm_prefix = get_shm_prefix


def _take_number(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """What streaming's ``get_shm_prefix`` does, but that the first rank of a machine decides.

    There each rank takes the first number that is free when it looks, which is another one than the
    leader's if a dataset of another run is made or ends in between.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return get_shm_prefix(streams_local, streams_remote, world, retry)
    number, segment = -1, None
    if world.is_local_leader:
        number, segment = get_shm_prefix(streams_local, streams_remote, world, retry)
    else:
        for name in SHM_TO_CLEAN:  # for its errors, which all ranks shall raise
            _check_and_find_retrying(streams_local, streams_remote, shm_name=name, retry=retry)
        for _ in range(2):  # before and after the leader registers
            dist.barrier()
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, (world.node, number))
    if segment is None:
        number = max(number for node, number in numbers if node == world.node)
        segment = SharedMemory(_get_path(number, LOCALS), False)
    return number, segment


def _remove_leftovers(folders: Collection[str]) -> None:
    """Removes the shared memory of dead datasets that cached in one of ``folders``.

    streaming would take them for living and refuse to start. A dataset is dead when nobody holds
    the lock of :func:`mark_in_use`. (That a process has the memory mapped says nothing: streaming
    maps that of all other datasets while it looks for a free number.)
    """
    for locals_path in glob(f"{_SHARED_MEMORY}/[0-9]*_locals"):
        try:
            with open(locals_path, "rb") as file:
                theirs, _ = _unpack_locals(file.read())
                if not set(theirs) & set(folders):
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError, PermissionError):
            continue  # it lives, or has just ended, or is another user's
        # `locals` last: streaming's other ranks look at it first and wait while it is there.
        others = set(glob(f"{locals_path.removesuffix('locals')}*")) - {locals_path}
        for path in [*others, locals_path]:
            os.remove(path)
