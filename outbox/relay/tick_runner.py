"""Runs the ticks of a relay: in one statement, or in parts after a row made one fail."""

from typing import Any, Final

import asyncpg

from outbox.database.connection import is_lock_timeout
from outbox.database.lock_wait import BlockerWatch
from outbox.log import Events
from outbox.relay import ledger
from outbox.relay.claim_plan import ClaimOrder
from outbox.relay.isolate import tick_in_parts
from outbox.relay.ledger import Tick
from outbox.relay.quarantine import UNDECODABLE, is_of_a_row
from outbox.relay.session import Session
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.relay")

BLOCKER_LOOK_S: Final = 0.5


class _RowError(Exception):
    """A tick failed, and its error is one that comes from what a row holds."""


class TickRunner:
    """Runner of a relay's ticks. After a row has made one fail they go in parts, until one finds no such row."""

    def __init__(self, url: DatabaseUrl) -> None:
        self._url = url
        self.in_parts = False

    async def run(self, session: Session, order: ClaimOrder, work: dict[str, Any]) -> Tick:
        """Tick. If a row makes that fail, tick in parts, now and until no such row is found any more.

        Raises:
            ConnectionError: an answer cannot be read; it is unknown what was committed.
            PostgresError: of the database, not of a row.

        """
        try:
            if not self.in_parts:
                return await self._run_whole(session, order, work)
        except _RowError as error:
            log.warning("tick_failed", "a row makes the tick fail, and is looked for: {reason}", reason=error)
        quarantine = session.quarantine
        found = quarantine.count
        try:
            done = await tick_in_parts(
                session.connection,
                session.relay,
                quarantine,
                room=order.room,
                suspects=order.suspects,
                budget=order.budget,
                bytes_max=order.bytes_max,
                **work,
            )
        except UNDECODABLE as error:
            raise ConnectionError(f"an answer of Postgres cannot be read ({error})") from error
        self.in_parts = quarantine.count > found or bool(done.locked) or not order.room
        return done

    async def _run_whole(self, session: Session, order: ClaimOrder, work: dict[str, Any]) -> Tick:
        pid = session.connection.get_server_pid()
        watch = BlockerWatch(self._url, pid, first_s=BLOCKER_LOOK_S, every_s=BLOCKER_LOOK_S)
        try:
            async with watch:
                return await ledger.tick(
                    session.connection,
                    session.relay,
                    **work,
                    room=order.room,
                    suspects=order.suspects,
                    since=order.since,
                    urgent_since=order.urgent_since,
                    urgent_max=order.urgent_max,
                    budget=order.budget,
                    bytes_max=order.bytes_max,
                    left_out=session.quarantine.left_out,
                )
        except asyncpg.PostgresError as error:  # nothing was committed
            is_locked = is_lock_timeout(error)
            if not (is_locked or is_of_a_row(error)) or session.lost is not None:
                raise
            self.in_parts = True
            raise _RowError(f"{watch.holder} has locked it" if is_locked else error) from error
        except UNDECODABLE as error:  # it was committed: the next session finds out what has become of it
            self.in_parts = True
            raise ConnectionError(f"an answer of Postgres cannot be read ({error})") from error
