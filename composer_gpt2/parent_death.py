"""A process that must not outlive the one that started it."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["signal_at_parent_death"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_at_parent_death(number: int) -> None:
    """Has the kernel send this signal to the calling process when its parent dies.

    It holds across ``exec``, not for children. Linux only; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
