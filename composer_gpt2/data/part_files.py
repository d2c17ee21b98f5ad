"""Files that are still being written: what they are called, and how those of dead processes go.

A file gets its name in a cache folder only when it is whole. Until then it is a part file, which
says whose it is; a process that is killed leaves it behind.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["part_file", "remove_dead_parts", "sync_to_disk"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last is a limit on the size of files
_UNTOUCHED_SECONDS = 3600.0


@contextmanager
def part_file(path: str) -> Iterator[str]:
    """Where to write what will be ``path``; it gets that name if the ``with`` ends well.

    Raises:
        OSError: The disk is full; the message names it and what should have been written.
    """
    part = f"{path}.part-{socket.gethostname()}-{os.getpid()}"
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"{path} must be written, but the disk mounted at {_mount_point(path)} takes no more "
            f"({error.strerror}); free space there, set `local` or COMPOSER_GPT2_CACHE to a folder "
            "on another disk, or set cache_limit",
        ) from error
    finally:
        if os.path.lexists(part):
            os.remove(part)


def remove_dead_parts(folder: str) -> None:
    """Removes from ``folder`` the part files that nobody will finish.

    Those are the ones whose process on this host is dead. Whether one of another host or container
    that shares the folder is alive cannot be seen: its parts go when untouched for an hour.
    """
    for path in Path(folder).glob("*.part-*"):
        host, _, process_id = path.name.rpartition(".part-")[2].rpartition("-")
        try:
            if host == socket.gethostname():
                dead = not _is_alive(int(process_id))
            else:
                dead = time.time() - path.lstat().st_mtime > _UNTOUCHED_SECONDS
            if dead:
                path.unlink()
        except FileNotFoundError:
            continue  # finished, or removed by another run


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut.

    Raises:
        OSError: There is no such file, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _mount_point(path: str) -> str:
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path
