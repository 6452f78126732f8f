"""Limits on the connections of `outbox web`: their number in all and per client, and how long a client may be silent.

uvicorn limits only their number, by refusing every new one, the time of an idle one, and a head that comes in pieces.
So one client with 500 silent connections would shut out all others.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from outbox.web.security import Callers, client_of

CONNECTIONS_MAX: Final = 500
CLIENT_MAX: Final = 100  # connections of one client; above, a new one closes one that has waited for WAITED_S
WAITED_S: Final = 1.0  # a request that is arriving over a slow network is not cut
GREEDY: Final = 25  # a client with more loses connections before others do
REQUEST_MAX_S: Final = 10.0  # from the first byte of a request, or the connection, to its last
STALL_MAX_S: Final = 20.0  # ... in which a client must take
STALL_TAKEN_MIN: Final = 20_000  # ... so many bytes of an answer, or all that is left
UNREAD_MAX: Final = 64 * 1024 * 1024  # bytes of answers that wait in this process for clients to read them
REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 22\r\nRetry-After: 5\r\n"
    b"Connection: close\r\n\r\nToo many connections.\n"
)


class Connections:
    """Open connections of one server.

    When there is no room, a newcomer takes the place of the connection whose client has kept the server waiting
    longest: which has asked nothing yet, or not all, or is idle between requests, or does not read its answer. If there
    is none, a client with far more connections than the newcomer's loses its latest one. Else the newcomer is refused.

    Answers that clients do not read are bounded, too: a page may have megabytes, and its link any number of readers.
    """

    def __init__(
        self,
        callers: Callers,
        *,
        total_max: int = CONNECTIONS_MAX,
        client_max: int = CLIENT_MAX,
        unread_max: int = UNREAD_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.callers = callers
        self.total_max = total_max
        self.client_max = client_max
        self.unread_max = unread_max
        self.clock = clock
        self._open: dict[BoundedProtocol, None] = {}  # in order of arrival
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: "BoundedProtocol") -> bool:
        """Accept a connection, and evict another one if needed; return False to refuse it."""
        client = connection.peer
        if client and self._counts[client] >= self.client_max:
            since = self.clock() - WAITED_S
            _evict(self, [one for one in self._waiting() if one.peer == client and _since(one) <= since])
        if len(self._open) >= self.total_max:
            waiting = self._waiting()
            greedy = [one for one in waiting if self._counts[one.peer] > GREEDY]
            if not (_evict(self, greedy) or _evict(self, waiting) or _evict(self, self._latest_of_greediest(client))):
                return False
        self._open[connection] = None
        if client:
            self._counts[client] += 1
        return True

    def discard(self, connection: "BoundedProtocol") -> None:
        """Forget a connection that has ended; do nothing if it is unknown."""
        if connection not in self._open:
            return
        del self._open[connection]
        self._counts[connection.peer] -= 1
        if self._counts[connection.peer] <= 0:
            del self._counts[connection.peer]

    def bound_unread(self, answered: "BoundedProtocol") -> None:
        """Evict connections until the answers that wait to be read have `unread_max` bytes, or are this one alone.

        The client with most of these bytes loses the connection that has waited longest for it.
        """
        unread = {one: size for one in self._open if (size := one.transport.get_write_buffer_size())}
        of_client: Counter[str] = Counter()
        for one, size in unread.items():
            of_client[one.peer] += size
        left = sum(unread.values())
        unread.pop(answered, None)
        while left > self.unread_max and unread:
            victim = min(unread, key=lambda one: (-of_client[one.peer], _since(one)))
            _evict(self, [victim])
            left -= unread[victim]
            of_client[victim.peer] -= unread.pop(victim)

    def _waiting(self) -> "list[BoundedProtocol]":
        return [one for one in self._open if one.waiting_since is not None]

    def _latest_of_greediest(self, client: str) -> "list[BoundedProtocol]":
        greediest, most = self._counts.most_common(1)[0] if self._counts else ("", 0)
        if most <= max(GREEDY, 2 * self._counts[client]):
            return []
        return [next(one for one in reversed(self._open) if one.peer == greediest)]


def _since(connection: "BoundedProtocol") -> float:
    since = connection.waiting_since
    return math.inf if since is None else since


def _evict(connections: Connections, candidates: "list[BoundedProtocol]") -> bool:
    """Abort the connection that has waited longest for its client; return False if there is none."""
    if not candidates:
        return False
    victim = min(candidates, key=_since)
    connections.discard(victim)
    victim.transport.abort()
    return True


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 connection with deadlines for the request and for reading the answer."""

    open_connections: Connections
    peer = ""
    """Client that the connection counts for; "" is a trusted proxy, which has no limit of its own."""
    _since = 0.0  # when the server began to wait for the client
    _request_deadline: asyncio.TimerHandle | None = None
    _reading_check: asyncio.TimerHandle | None = None

    @property
    def waiting_since(self) -> float | None:
        """Return when the server began to wait for the client; None while the client waits for the server."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.transport.get_write_buffer_size():
            return self._since
        return None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection and wait for a request, or refuse it."""
        super().connection_made(transport)
        self._since = self.open_connections.clock()
        address = self.client[0] if self.client else ""
        self.peer = "" if self.open_connections.callers.is_proxy(address) else client_of(address)
        if not self.open_connections.admit(self):
            transport.write(REFUSAL)
            transport.close()
        self._request_deadline = self.loop.call_later(REQUEST_MAX_S, transport.abort)
        self._reading_check = self.loop.call_later(STALL_MAX_S, self._check_reading, 0)

    def data_received(self, data: bytes) -> None:
        """Receive some of a request, or all of it."""
        if self._request_deadline is None:
            self._request_deadline = self.loop.call_later(REQUEST_MAX_S, self.transport.abort)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            _cancel(self._request_deadline)
            self._request_deadline = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. If it is the body of a request, that gets no other answer, and no second one."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Keep what the client does not read yet, if there is room for it."""
        super().pause_writing()
        self.open_connections.bound_unread(self)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._since = self.open_connections.clock()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.open_connections.discard(self)
        _cancel(self._request_deadline)
        _cancel(self._reading_check)
        super().connection_lost(exc)

    def _check_reading(self, left_before: int) -> None:
        """Abort a connection whose client does not read its answer, even one that is closing."""
        left = self.transport.get_write_buffer_size()
        if left_before and left_before - left < min(left_before, STALL_TAKEN_MIN):
            self.transport.abort()
        else:
            self._reading_check = self.loop.call_later(STALL_MAX_S, self._check_reading, left)


def protocol(connections: Connections) -> type[BoundedProtocol]:
    """Return the protocol class of a server with these connections."""
    return type("BoundedProtocol", (BoundedProtocol,), {"open_connections": connections})


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
