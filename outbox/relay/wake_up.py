"""Wake-up call of a relay's main loop: there is something to do now, or at a certain time."""

import asyncio
import time


class WakeUp:
    """Event of one main loop. Times are of `time.monotonic`, in seconds."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.set = self._event.set
        """Wakes the main loop; if it is at work, it does not sleep before its next turn."""

    async def sleep_until(self, at: float) -> None:
        """Return when woken or at that time, and forget the call. The other tasks have their turn in any case."""
        left_s = at - time.monotonic()
        if self._event.is_set() or left_s <= 0:
            await asyncio.sleep(0)
        else:
            await self._sleep(left_s)
        self._event.clear()

    async def sleep_for_next(self, until: float) -> None:
        """Return at the next call or at that time. The call is kept: the next `sleep_until` returns at once."""
        self._event.clear()
        await self._sleep(until - time.monotonic())
        self._event.set()

    async def _sleep(self, longest_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(longest_s, self._event.set)
        await self._event.wait()
        timer.cancel()
