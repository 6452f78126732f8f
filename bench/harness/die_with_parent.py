"""Processes that end with the one that made them; knows nothing else, so that both venvs can have it."""

import ctypes
import signal
import sys
from typing import Final

_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> None:
    """The kernel kills this process when the thread that made it ends; Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
