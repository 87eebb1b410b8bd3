"""A process that goes with the one that started it, however that ends."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on SIGKILL ends this process when its parent ends, in whatever way: nobody would end it any more.

    Of Linux. Not inherited by children, and kept over exec.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
