"""Whether a process's relays live and are ready, for those who may restart it: systemd, Kubernetes, a load balancer.

*It lives* while its event loop turns and its corridor makes progress: within four leases it took a turn (each of which
ticks or waits for something to do, a third of a lease at most) or ended a try to get a session. A relay that waits for
Postgres with tries lives; one whose loop or corridor hangs does not, and only a restart helps.

*It is ready* while it lives, each relay holds its session, and no mail server is known to be broken. They opened them
on a schema that fits; what became of that since is looked at by whoever asks (`fleet`).
"""

import asyncio
import time
from typing import Final

from outbox.monitoring.systemd import Notifier
from outbox.relay.session_keeper import OPEN_LEASES_MAX
from outbox.relay.supervisor import Relays

BEAT_S: Final = 0.5
LOOP_HUNG_S: Final = 10.0
STATUS_EVERY_S: Final = 5.0


class Health:
    """What is known of the health of a process's relays, kept by `watch` on their loop and read from any thread."""

    def __init__(self, relays: Relays, notifier: Notifier) -> None:
        self.relays = relays
        self.notifier = notifier
        self.progress_within_s = (OPEN_LEASES_MAX + 1) * relays.settings.lease_s
        self._beat_at = time.monotonic()
        self._hindrances = {relay.serves: ["it has only begun"] for relay in relays.each}

    def faults(self) -> list[str]:
        """Why it does not live; nothing if it does."""
        now = time.monotonic()
        if now - self._beat_at > LOOP_HUNG_S:
            return [f"the event loop has not turned for {now - self._beat_at:.0f} s"]
        still_s = now - self.relays.turned_at
        return [f"the relay has made no progress for {still_s:.0f} s"] if still_s > self.progress_within_s else []

    def hindrances(self) -> list[str]:
        """Why it is not ready; nothing if it is. At most `BEAT_S` old while the loop turns."""
        return self.faults() or self._said()

    def _said(self) -> list[str]:
        """What hinders each relay, with its route where that is not the usual one."""
        found = self._hindrances
        return [f"route {route}: {said}" if route else said for route, all_said in found.items() for said in all_said]

    def is_ready(self, route: str) -> bool:
        """Whether the relay of that route is."""
        return not (self.faults() or self._hindrances[route])

    async def watch(self) -> None:
        """For ever: look at the relays, and tell the service manager; who is not called does not tell it."""
        told_ready = False
        watchdog_s = self.notifier.watchdog_s
        pings_at = status_at = 0.0
        while True:
            now = self._beat_at = time.monotonic()
            before, self._hindrances = self._hindrances, self.relays.not_ready_reasons()
            if not told_ready and self.relays.holds_session:
                told_ready = True
                self.notifier.ready()
            if self.relays.stopping:
                self.notifier.stopping()
            if watchdog_s is not None and now >= pings_at and not self.faults():
                pings_at = now + watchdog_s / 3
                self.notifier.progress()
            if now >= status_at or self._hindrances != before:
                status_at = now + STATUS_EVERY_S
                self.notifier.status("; ".join(self._said()) or f"relaying; {self.relays.summary()}")
            await asyncio.sleep(min(BEAT_S, (watchdog_s or 1.0) / 3))
