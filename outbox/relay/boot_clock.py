"""Clock that also runs while the machine sleeps."""

import sys
import time


def boot_clock_s() -> float:
    """Return the seconds since boot, also while the machine slept: a paused relay must notice the pause."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
