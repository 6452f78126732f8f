"""Runs the ticks of a relay: in one statement, or in parts after a row made one fail."""

from typing import Final

import asyncpg

from outbox.database.lock_wait import BlockerWatch
from outbox.database.locks import is_lock_timeout
from outbox.log import Events
from outbox.relay.isolate import TickInParts
from outbox.relay.quarantine import UNDECODABLE, is_of_a_row
from outbox.relay.session import Session
from outbox.relay.tick import TickRequest, TickResult, tick
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.relay")

BLOCKER_LOOK_S: Final = 0.5


class _RowError(Exception):
    """A tick failed, and its error is one that comes from what a row holds."""


class TickRunner:
    """Runner of a relay's ticks. After a row has made one fail they go in parts, until one finds no such row."""

    def __init__(self, url: DatabaseUrl, *, route: str, server: str) -> None:
        """`server` is the name of the mail server of the `route`."""
        self._url = url
        self._route = route
        self._server = server
        self.in_parts = False

    async def run(self, session: Session, request: TickRequest) -> TickResult:
        """Tick. If a row makes that fail, tick in parts, now and until no such row is found any more.

        Raises:
            ConnectionError: an answer cannot be read; it is unknown what was committed.
            PostgresError: of the database, not of a row.

        """
        request = request._replace(route=self._route, server=self._server)
        try:
            if not self.in_parts:
                return await self._run_whole(session, request)
        except _RowError as error:
            log.warning("tick_failed", "a row makes the tick fail, and is looked for: {reason}", reason=error)
        quarantine = session.quarantine
        found = quarantine.count
        try:
            done = await TickInParts(session.connection, session.relay, quarantine, request).run()
        except UNDECODABLE as error:
            raise ConnectionError(f"an answer of Postgres cannot be read ({error})") from error
        self.in_parts = quarantine.count > found or bool(done.locked) or not request.claims_max
        return done

    async def _run_whole(self, session: Session, request: TickRequest) -> TickResult:
        pid = session.connection.get_server_pid()
        watch = BlockerWatch(self._url, pid, first_s=BLOCKER_LOOK_S, every_s=BLOCKER_LOOK_S)
        try:
            async with watch:
                return await tick(session.connection, session.relay, request)
        except asyncpg.PostgresError as error:  # nothing was committed
            is_locked = is_lock_timeout(error)
            if not (is_locked or is_of_a_row(error)) or session.lost is not None:
                raise
            self.in_parts = True
            raise _RowError(f"{watch.holder} has locked it" if is_locked else error) from error
        except UNDECODABLE as error:  # it was committed: the next session finds out what has become of it
            self.in_parts = True
            raise ConnectionError(f"an answer of Postgres cannot be read ({error})") from error
