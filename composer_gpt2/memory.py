"""What becomes of freed memory on a CPU: kept for the next batch, unless nothing there fits it.

glibc gives large blocks back to the system as soon as they are free and fetches them anew, page by
page, a moment later. Kept instead, they are reused; but what the first batches leave behind, before
the optimizer has its state, and what an evaluation leaves, fits nothing that comes after.
"""

from __future__ import annotations

import ctypes
import platform

from composer import Callback, Logger, State

__all__ = ["ReturnUnusedMemory", "keep_freed_memory"]

_UNSETTLED_BATCHES = 2  # optimizers make their state at the end of the first one


def keep_freed_memory() -> None:
    """Has glibc reuse large blocks instead of returning them to the system after each use.

    Logits are hundreds of megabytes; fetched from the kernel anew each time, their pages cost more
    than the arithmetic on them (benchmarks/cpu_allocator_*.md). It takes more memory at the peak.
    Other C libraries are left alone.
    """
    if _has_glibc():
        m_mmap_max, m_trim_threshold = -4, -1  # <malloc.h>
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)  # no block has a mapping of its own
        libc.mallopt(m_trim_threshold, -1)  # and the heap never shrinks


class ReturnUnusedMemory(Callback):
    """Returns freed memory after the first batches and after evaluations; what is used comes back.

    Numbers do not change. Other C libraries than glibc are left alone.
    """

    def __init__(self) -> None:
        self._n_batches = 0

    def batch_end(self, state: State, logger: Logger) -> None:  # noqa: D102 (Composer's event)
        self._n_batches += 1  # of this process: a resumed run begins anew
        if self._n_batches <= _UNSETTLED_BATCHES:
            _return_freed_memory()

    def eval_end(self, state: State, logger: Logger) -> None:  # noqa: D102
        _return_freed_memory()


def _return_freed_memory() -> None:
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
