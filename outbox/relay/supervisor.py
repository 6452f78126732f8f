"""The relays of one process, one for each route: started, stopped and looked at together, and else strangers.

Each has a session, a lock, an identity, a breaker and limits of its own. What one route suffers, the others do not
notice: they meet in this process's event loop only.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from outbox.relay.memory_budget import Budget
from outbox.relay.observer import Observer
from outbox.relay.pauses import Pause
from outbox.relay.relay import Relay
from outbox.settings import Settings


class Relays:
    """A relay for the usual route and one for each that the settings name, in this order."""

    def __init__(
        self,
        settings: Settings,
        *,
        until_empty: bool = False,
        observers: Callable[[Settings, str], Sequence[Observer]] = lambda *_: (),
    ) -> None:
        """`observers` gives who looks on at the relay of a route, whose settings it is given."""
        settings.require("database_url", "smtp_url")
        assert settings.database_url is not None
        self.database_url = settings.database_url
        self.settings = settings
        self.each = [
            Relay(settings, route, until_empty=until_empty, observers=observers(settings.on_route(route), route))
            for route in ("", *settings.routes)
        ]
        budget = Budget.of(max(relay.share.budget.bytes_max for relay in self.each))
        for relay in self.each:
            relay.beside = self.each
            relay.share = budget.share(relay.share.in_flight, relay.share.wake)
        self._going = list(self.each)

    async def run(self) -> None:
        """Relay on each route until stopped, or until all are empty if so asked.

        Raises:
            OutboxError: the database cannot be used at the start. Should one end by that or a fault of ours, the others
                finish what is in hand first.

        """
        tasks = [asyncio.get_running_loop().create_task(self._run(relay)) for relay in self.each]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if not all(task.done() for task in tasks):  # one has failed
                self.stop()
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        faults = [fault for task in tasks if (fault := task.exception()) is not None]
        if faults:
            raise faults[0]

    async def _run(self, relay: Relay) -> None:
        try:
            await relay.run()
        finally:
            self._going.remove(relay)

    def stop(self) -> None:
        """Let all drain at once."""
        for relay in self.each:
            relay.stop()

    @property
    def stopping(self) -> bool:
        """Whether all are told to stop, or have."""
        return all(relay.stopping for relay in self.each)

    @property
    def turned_at(self) -> float:
        """When the one that has been in its turn for the longest took it."""
        return min((relay.turned_at for relay in self._going), default=time.monotonic())

    @property
    def holds_session(self) -> bool:
        """Whether each holds its session, as far as it knows."""
        return all(relay.holds_session for relay in self.each)

    @property
    def alive(self) -> int:
        """How many relays the fleet has, of all routes and processes, as of the last sweep."""
        return max(relay.alive for relay in self.each)

    @property
    def counts(self) -> Counter[str]:
        """What they have done so far, by verdicts."""
        return sum((Counter(dict(relay.counts)) for relay in self.each), Counter())

    @property
    def left_in_doubt(self) -> int:
        """How many verdicts are unknown or unwritten at the end."""
        return sum(relay.left_in_doubt for relay in self.each)

    @property
    def left_held(self) -> list[Pause]:
        """The pauses under which mail was left, each once."""
        found = {one.report: one for relay in self.each for one in relay.left_held}
        return list(found.values())

    @property
    def left_refused(self) -> dict[str, str]:
        """The refusals, by route, for which an `until_empty` ended before it was so."""
        return {relay.server.name: why for relay in self.each if (why := relay.given_up) is not None}

    def hindrances(self) -> dict[str, list[str]]:
        """What keeps each, by its route, from sending whatever is due, as far as it knows; nothing is: it is ready."""
        return {relay.serves: relay.hindrances() for relay in self.each}

    def summary(self) -> str:
        """What they have done so far, in words."""
        return ", ".join(f"{n} {verdict}" for verdict, n in sorted(self.counts.items())) or "nothing was sent"
