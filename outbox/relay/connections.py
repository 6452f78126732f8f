"""SMTP connections of one relay: opened up to the limits, idle or busy, watched, and closed."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final

from outbox.relay.server_state import ServerState
from outbox.settings import Settings
from outbox.smtp.connection import SmtpConnection
from outbox.smtp.connection_owner import ConnectionOwner
from outbox.smtp.connector import Connector
from outbox.smtp.outgoing import Try
from outbox.smtp.route_trouble import RouteTroubleError

DEADLINE_CHECK_S: Final = 1.0
AFTER_STOP_S: Final = 0.05
STUCK_S: Final = 3.0
SILENCE_S: Final = 30.0  # a server that is silent for so long is reported as trouble


class Connections:
    """Connections that stand or are being opened. All state is touched on the event loop's thread only."""

    def __init__(
        self,
        connector: Connector,
        owner: ConnectionOwner,
        server: ServerState,
        settings: Settings,
        *,
        on_trouble: Callable[[RouteTroubleError], None],
        on_done: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`on_trouble` is called when one cannot be opened, `on_done` with each task that opened one."""
        self.connector = connector
        self.owner = owner
        self.server = server
        self.settings = settings
        self._all: set[SmtpConnection] = set()
        self._idle: list[SmtpConnection] = []
        self._openings: set[asyncio.Task[None]] = set()
        self._on_trouble = on_trouble
        self._on_done = on_done

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[SmtpConnection]:
        """Iterate over a copy: a connection may end while its neighbours are visited."""
        return iter(list(self._all))

    @property
    def opening(self) -> int:
        """Return how many are being opened."""
        return len(self._openings)

    @property
    def idle(self) -> int:
        """Return how many wait for mail."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """Return how many have an email in flight."""
        return sum(one.current is not None for one in self._all)

    @property
    def is_busy(self) -> bool:
        """Return True if any has an email in flight."""
        return any(one.current is not None for one in self._all)

    @property
    def working(self) -> int:
        """Return how many are open and stay so."""
        return sum(not one.is_draining for one in self._all)

    @property
    def is_unresponsive(self) -> bool:
        """Return True if none shows a sign of life: there is none, or each hangs."""
        return not self._openings and all(_is_silent(one, STUCK_S) for one in self._all)

    @property
    def is_stuck(self) -> bool:
        """Return True if each that there may be hangs."""
        return len(self._all) >= self.connections_max and self.is_unresponsive

    @property
    def connections_max(self) -> int:
        """Return how many there may be: as many as the settings allow, or the server if that is less."""
        return min(self.settings.connections_max, self.server.connection_limit.found or self.settings.connections_max)

    def broken(self) -> str | None:
        """Return what is wrong with the server, as far as the connections show."""
        if self.server.breaker.is_open:
            return f"SMTP: {self.server.breaker.reason}"
        stuck = sum(_is_silent(one, SILENCE_S) for one in self._all)
        if stuck:
            return f"the mail server has been silent for more than {SILENCE_S:g} s on {stuck} connections"
        return None

    def is_shut_out(self, now: float) -> bool:
        """Return True if there is none and the server grants none at this moment."""
        return not (self._all or self._openings) and not self.server.connection_limit.may_open(0, now)

    def note_idle(self, connection: SmtpConnection) -> None:
        """Remember one that waits for mail."""
        self._idle.append(connection)

    def start(self, tried: Try) -> None:
        """Give a try to one that waits for mail."""
        self._idle.pop().start(tried)

    def forget(self, connection: SmtpConnection) -> None:
        """Forget one that has ended."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def open(self, wanted: int, now: float) -> None:
        """Open more until so many are idle or being opened, or until no more may be opened now."""
        while len(self._openings) + len(self._idle) < wanted and self._may_open(now):
            self._open()

    def probe(self) -> None:
        """Find out if the server lets a client in, when there is no mail to find it out with."""
        if not self._openings:
            self._open(probing=True)

    def limit(self, reason: str, *, opening: int) -> float | None:
        """Accept that the server refused one; return in how many seconds one more may be opened.

        None: the server grants none at all, and the route is paused.

        `opening` is 1 if the refused one is one of those that are being opened.
        """
        are_opening = len(self._openings) > opening
        if not self.server.on_connection_limit(reason, working=self.working, are_opening=are_opening):
            return None
        return max(self.server.connection_limit.retry_at - time.monotonic(), 0.0)

    def limit_session(self, messages: int | None) -> None:
        """Note after how many messages the server closed one, and close each after so many once that is a limit."""
        if messages is not None and self.server.on_session_limit(messages):
            for connection in self:
                connection.limit_to(messages)

    def abandon_unsent(self, reason: str) -> None:
        """Drop those whose email is in flight and not past its dot: the session that claimed it is gone."""
        for connection in self:
            if connection.current is not None and connection.awaiting_reply is None:
                connection.abandon(reason)

    def close_politely(self) -> None:
        """Close each once nothing is in flight on it. Those that were idle wait for the end, and no more for mail."""
        for connection in self:
            connection.close_politely()
        self._idle.clear()

    async def end(self) -> None:
        """Close all now; what is past its dot and unanswered is in doubt from here on."""
        for task in self._openings:
            task.cancel()
        await asyncio.gather(*self._openings, return_exceptions=True)
        for connection in self:
            connection.give_up("the relay was stopped while it waited for the reply to the final dot")

    async def watch_deadlines(self) -> None:
        """End what is silent for too long, and what has been idle for so long that the server soon will; for ever."""
        while True:
            slept_at = time.monotonic()
            await asyncio.sleep(DEADLINE_CHECK_S)
            if time.monotonic() - slept_at > 2 * DEADLINE_CHECK_S:  # this process was stopped: first read what came
                await asyncio.sleep(AFTER_STOP_S)
            now = time.monotonic()
            for connection in self:
                connection.check_deadline()
                if connection.idle_since is not None and now - connection.idle_since > self.settings.idle_s:
                    connection.close_politely()
                    if connection in self._idle:
                        self._idle.remove(connection)

    def _may_open(self, now: float) -> bool:
        open_now, breaker = len(self._all) + len(self._openings), self.server.breaker
        if open_now >= self.settings.connections_max or not self.server.connection_limit.may_open(open_now, now):
            return False
        return not breaker.is_open or (breaker.may_connect(now) and not self._openings)

    def _open(self, *, probing: bool = False) -> None:
        opening = asyncio.get_running_loop().create_task(self._connect(probing=probing))
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        opening.add_done_callback(self._on_done)

    async def _connect(self, *, probing: bool) -> None:
        try:
            connection, transport = await self.connector.connect(self.owner)
        except RouteTroubleError as trouble:
            self._on_trouble(trouble)
            return
        if probing:
            self.server.breaker.succeed(time.monotonic())
        self._all.add(connection)
        if (limit := self.server.session_limit.at(time.monotonic())) is not None:
            connection.limit_to(limit)
        connection.attach(transport)


def _is_silent(connection: SmtpConnection, seconds: float) -> bool:
    return connection.current is not None and connection.silence_s >= seconds
