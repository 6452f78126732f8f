"""Trigger of claims: after a notification, or after news that emails may have become due, the relay claims at once."""

import asyncio
import time
from collections.abc import Callable

from outbox.relay.notifications import Notifications
from outbox.relay.timers import Timers


class ClaimTrigger:
    """Trigger of one relay. `is_blocked` returns True while a pause keeps it from claiming or sending."""

    def __init__(self, timers: Timers, wake: Callable[[], None], *, is_blocked: Callable[[], bool]) -> None:
        self._timers = timers
        self._wake = wake
        self._is_blocked = is_blocked
        self._notifications = Notifications()

    def fire(self) -> None:
        """Claim at once."""
        self._timers.poll_now()
        if self._is_blocked():
            self._timers.pulse_now()  # the news may be that the route works again, or that a pause is over
        self._wake()

    def on_notification(self) -> None:
        """Claim soon, since another process has notified the relays: at once, or after a rest."""
        self._fire_in(self._notifications.hear(time.monotonic()))

    def begin_look(self) -> None:
        """Note that a look for work begins."""
        self._notifications.begin_look()

    def end_look(self, now: float, *, found: bool) -> None:
        """Note if the look has found work; look again for the notifications that came meanwhile."""
        self._fire_in(self._notifications.end_look(now, found=found))

    def _fire_in(self, wait_s: float | None) -> None:
        if wait_s == 0:
            self.fire()
        elif wait_s is not None:
            asyncio.get_running_loop().call_later(wait_s, self.fire)
