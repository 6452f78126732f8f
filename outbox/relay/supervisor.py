"""The relays of one process, one for each route, which start and stop together.

Each has a session, a lock, an identity, a breaker and limits of its own, so a problem of one route does not reach the
others. They share the event loop, the memory for large messages, and the rule for suspects.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from outbox.database.pause_list import Pause
from outbox.relay.memory_budget import Budget
from outbox.relay.observer import Observer
from outbox.relay.relay import Relay
from outbox.relay.suspects import SuspectRule
from outbox.relay.until_empty import summary_of
from outbox.settings import Settings


class Relays:
    """Relays of the usual route and of each that the settings name, in this order."""

    def __init__(
        self,
        settings: Settings,
        *,
        until_empty: bool = False,
        observers: Callable[[Settings, str], Sequence[Observer]] = lambda *_: (),
    ) -> None:
        """`observers` returns the observers of a route's relay; it gets the settings of the route, and its name."""
        settings.require("database_url", "smtp_url")
        assert settings.database_url is not None
        self.database_url = settings.database_url
        self.settings = settings
        on_route = {route: settings.on_route(route) for route in ("", *settings.routes)}
        budget = Budget.of(max(each.message_bytes_max for each in on_route.values()))
        suspects = SuspectRule()
        self.each = [
            Relay(
                settings,
                route,
                until_empty=until_empty,
                observers=observers(of_route, route),
                budget=budget,
                suspects=suspects,
            )
            for route, of_route in on_route.items()
        ]
        self._running = list(self.each)

    async def run(self) -> None:
        """Relay on each route until stopped, or until all are empty if so asked.

        Raises:
            OutboxError: the database cannot be used at the start. If one relay ends by this or by a bug, the others
                finish what is in flight first.

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
        errors = [error for task in tasks if (error := task.exception()) is not None]
        if errors:
            raise errors[0]

    async def _run(self, relay: Relay) -> None:
        try:
            await relay.run()
        finally:
            self._running.remove(relay)

    def stop(self) -> None:
        """Let all relays drain at the same time."""
        for relay in self.each:
            relay.stop()

    @property
    def stopping(self) -> bool:
        """Return True if all relays drain or have stopped."""
        return all(relay.stopping for relay in self.each)

    @property
    def turned_at(self) -> float:
        """Return when the relay that has been in its turn for the longest began it."""
        return min((relay.sessions.turned_at for relay in self._running), default=time.monotonic())

    @property
    def holds_session(self) -> bool:
        """Return True if each relay holds its session, as far as it knows."""
        return all(relay.sessions.holds_session for relay in self.each)

    @property
    def alive(self) -> int:
        """Return how many relays the fleet has, of all routes and processes, as of the last sweep."""
        return max(relay.alive for relay in self.each)

    @property
    def counts(self) -> Counter[str]:
        """Return how many emails there were so far, by what became of them."""
        return sum((Counter(dict(relay.counts)) for relay in self.each), Counter())

    @property
    def left_in_doubt(self) -> int:
        """Return how many verdicts are unknown or unwritten at the end."""
        return sum(relay.left_in_doubt for relay in self.each)

    @property
    def left_held(self) -> list[Pause]:
        """Return the pauses under which mail was left, each once."""
        found = {one.report: one for relay in self.each for one in relay.end_of_work.left_held}
        return list(found.values())

    @property
    def left_refused(self) -> dict[str, str]:
        """Return the refusals, by route, for which an `until_empty` ended before the outbox was empty."""
        found = {relay.server.name: relay.end_of_work.left_refused for relay in self.each}
        return {route: why for route, why in found.items() if why is not None}

    def not_ready_reasons(self) -> dict[str, list[str]]:
        """Return what keeps each relay, by its route, from sending whatever is due; a relay without any is ready."""
        return {relay.serves: relay.not_ready_reasons() for relay in self.each}

    def summary(self) -> str:
        """Return what they have done so far, in words."""
        return summary_of(self.counts)
