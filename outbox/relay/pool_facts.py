"""Facts about a pool that change nothing: for the relay's turn, its note in Postgres, health and metrics."""

import time
from typing import Final

from outbox.relay.connections import Connections
from outbox.relay.ready_queue import ReadyQueue
from outbox.relay.sender_holds import PROBES_MAX
from outbox.relay.server_state import ServerState

READY_MIN: Final = 8  # claims that a relay without connections starts with


class PoolFacts:
    """Connections of one relay, the tries that wait for them, and what is known of the server, seen together."""

    def __init__(self, connections: Connections, ready: ReadyQueue, server: ServerState, *, batch_max: int) -> None:
        self._connections = connections
        self._ready = ready
        self._server = server
        self._batch_max = batch_max

    @property
    def is_empty(self) -> bool:
        """Return True if there is no connection, none is being opened, and no try waits for one."""
        return not (self._ready or self._connections or self._connections.opening)

    @property
    def is_connected(self) -> bool:
        """Return True if there is a connection."""
        return bool(self._connections)

    @property
    def is_unresponsive(self) -> bool:
        """Return True if no connection shows a sign of life: there is none, or each hangs."""
        return self._connections.is_unresponsive

    def trouble(self) -> str | None:
        """Return what keeps mail from going out: the server, as far as the connections show, or a limit."""
        limits = self._server.limits
        return self._connections.broken() or limits(time.monotonic(), is_connected=self.is_connected)

    def broken(self) -> str | None:
        """Return what is wrong with the server, as far as the connections and its replies show."""
        return self._connections.broken() or self._server.deferring()

    def connection_counts(self) -> dict[str, int]:
        """Return how many connections are `busy`, `idle` and `opening`. May be called on any thread."""
        idle, all_of_them = self._connections.idle, len(self._connections)
        return {"busy": max(all_of_them - idle, 0), "idle": idle, "opening": self._connections.opening}

    def capacity(self, now: float) -> int:
        """Return how many more claims the connections can take soon; while the route is paused 0, or 1 for a probe."""
        breaker, limiter = self._server.breaker, self._server.limiter
        connections, batch_max = self._connections, self._batch_max
        if connections.is_stuck or connections.is_shut_out(now) or limiter.is_used_up(now):
            return 0
        if breaker.is_open and (not connections or breaker.refusals):
            is_free = not (self._ready or connections.opening or connections.is_busy)
            probes = min(PROBES_MAX, batch_max) if breaker.refusals else 1
            return probes if is_free and breaker.may_connect(now) else 0
        open_soon = len(connections) + connections.opening
        wanted = min(max(2 * open_soon, READY_MIN), 2 * connections.connections_max)
        capacity = max(0, min(wanted - len(self._ready), batch_max))
        return min(capacity, limiter.capacity(len(self._ready))) if limiter.is_bounded else capacity

    def next_start_at(self, now: float) -> float | None:
        """Return when the rate lets the next try start; None where the rate is not what it waits for.

        Where no connection waits, those that work take their next try by themselves.
        """
        limiter = self._server.limiter
        at = limiter.next_at(now)
        return at if self._ready.has_next and limiter.is_bounded and (at > now or self._connections.idle) else None
