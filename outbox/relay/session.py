"""A relay's Postgres session: its identity, its pulse and its only way to write.

One session, one advisory lock, one row in `outbox.relay`. While the lock is held the relay lives; the server ends
the session of a client that is silent for `lease_s`, so the session is a lease. A lost session never comes back:
the next one is a new identity.

`lock_proof` tests the database before, `registration` writes the row and takes the lock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Self

import asyncpg

from outbox.database.connection import CHANNEL, LOST_SESSION, Connection
from outbox.database.failover_rules import Row, ServerId, Standing
from outbox.database.pooler import say_pooler
from outbox.database.refusal import reason_of, shows_shared_session
from outbox.database.schema import require_current
from outbox.database.timeline import timeline_of
from outbox.errors import UnsafeDatabaseError
from outbox.relay.lease_connection import close_quietly, connect_leased
from outbox.relay.lock_proof import prove_locks
from outbox.relay.quarantine import Quarantine
from outbox.relay.registration import end_formers, register_at_barrier
from outbox.settings.urls import DatabaseUrl

PLANNED_ANEW_FROM: Final = 64  # an email's id; for fewer rows any plan is quick


@dataclass(frozen=True, slots=True)
class SessionEvents:
    """Callbacks of a session, on the event loop's thread."""

    notified: Callable[[], None] = lambda: None
    """A notification without a payload came."""
    heard: Callable[[str], None] = lambda _: None
    """A notification with this payload came."""
    answered: Callable[[], None] = lambda: None
    """Postgres has answered a statement of the open session."""
    lost: Callable[[], None] = lambda: None
    """The session is lost."""


@dataclass(slots=True, eq=False)
class Session:
    """A live relay identity. `lost` is why it ended, or None while it is not known to have."""

    connection: Connection
    relay: int
    timeline: int
    started_at: datetime
    """When this Postgres was started."""
    events: SessionEvents
    barrier: Row
    """Barrier at the time when the session began."""
    met: frozenset[str]
    """The other relays that had registered on this server before, and not ended."""
    lost: str | None = None
    planned_for: int = 0
    """Largest id of an email at the time when the statements were last planned, as far as it is known."""
    opened_at: float = field(default_factory=time.monotonic)
    quarantine: Quarantine = field(init=False)
    """Rows that this session cannot read or write."""

    def __post_init__(self) -> None:
        """Begin with no row in quarantine."""
        self.quarantine = Quarantine((self.relay,))

    @classmethod
    async def open(
        cls,
        url: DatabaseUrl,
        *,
        lease_s: float,
        events: SessionEvents,
        former: "Session | None" = None,
        route: str = "",
        statements: Sequence[str],
        standing: Standing,
    ) -> Self:
        """Open a new identity that is proven to hold a real lock and listens.

        `former`, the last session of this relay, is ended first, and so are other sessions of its instance on this
        server. `standing` decides if the relay raises the barrier (`failover_barrier`).

        `statements` are what it will run while it holds the lock. They are prepared before: asyncpg prepares in two
        steps, and the server takes a client that stops between them for a busy one, whose session no idle timeout ends.

        Raises:
            DatabaseUnavailableError: no connection now.
            UnsafeDatabaseError: locks or settings do not hold here; do not relay.
            SchemaError: no schema, or another version's.

        """
        connection = await _connect(url, lease_s)
        with connection.terminated_on_error(), connection.end_if_silent(lease_s) as silence:
            await require_current(connection)
            timeline = await timeline_of(connection)
            await _end_formers(connection, former, timeline, standing, within_s=lease_s / 2)
            started_at = await connection.fetchval("SELECT pg_postmaster_start_time()")
            for statement in statements:
                await connection.plan(statement)
                silence.restart()
            # Listen first, look at the table afterwards: a notification in between is then not lost.
            await connection.add_listener(
                CHANNEL, lambda *notified: events.heard(notified[3]) if notified[3] else events.notified()
            )
            server, last = (timeline, started_at), former.relay if former is not None else None
            registered = await register_at_barrier(connection, server, route, last=last, standing=standing)
            session = cls(
                connection,
                registered.relay,
                timeline,
                started_at,
                events=events,
                barrier=registered.barrier,
                met=registered.met,
            )
            connection.add_termination_listener(lambda _: session.lose("Postgres ended the session"))
            connection.add_log_listener(session._hear)
            connection.add_query_logger(lambda done: None if done.exception else events.answered())
        return session

    @property
    def server(self) -> ServerId:
        """Return the identity of this Postgres: another timeline or another start may mean that it forgot something."""
        return self.timeline, self.started_at

    def lose(self, reason: str) -> None:
        """Treat the session as gone from now on, whatever the server thinks. Idempotent."""
        if self.lost is None:
            self.lost = reason
            self.connection.terminate()
            self.events.lost()

    @contextmanager
    def lost_on_error(self) -> Iterator[None]:
        """Lose the session on an error of Postgres or of its connection; other errors are raised."""
        try:
            yield
        except (*LOST_SESSION, asyncpg.PostgresError) as error:
            self.lose(str(error) or type(error).__name__)

    async def plan_for(self, emails: Sequence[int]) -> None:
        """Have the statements planned anew if the emails' ids say that the tables are twice as large as they were.

        A plan that was made for empty tables reads whole indexes in nested loops, and Postgres keeps it until the next
        ANALYZE, which may be a minute away or never come.
        """
        largest = max(emails, default=0)
        if largest > 2 * self.planned_for + PLANNED_ANEW_FROM and self.lost is None:
            self.planned_for = largest
            await self.connection.execute("DISCARD PLANS")

    def _hear(self, _connection: Connection, message: Any) -> None:
        # "canceling wait for synchronous replication": the commit is on this server only and may vanish in a
        # failover. No warning is harmless to a mark, so each one ends the session.
        if message.severity_en == "WARNING":  # `severity` is translated (lc_messages), this never is
            self.lose(f"Postgres warned: {message.message}")

    async def close(self) -> None:
        """End the session in order, and its lock with it."""
        if self.lost is not None:
            return
        self.lost = "closed"
        await close_quietly(self.connection)  # if it does not come to that, a sweep of another relay ends it


async def _connect(url: DatabaseUrl, lease_s: float) -> Connection:
    """Return a connection to a database whose locks are proven."""
    try:
        await prove_locks(url, lease_s=lease_s)
        return await connect_leased(url, lease_s)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if not shows_shared_session(error):
            raise
        raise UnsafeDatabaseError(say_pooler(url, reason_of(error))) from error


async def _end_formers(
    connection: Connection, former: Session | None, timeline: int, standing: Standing, *, within_s: float
) -> None:
    """End earlier sessions of this relay; a relay that has had none on any server has nothing to end."""
    if former is None and standing.server is None:
        return
    last = former.relay if former is not None and former.timeline == timeline else None
    await end_formers(connection, last, timeline, instance=standing.instance, within_s=within_s)
