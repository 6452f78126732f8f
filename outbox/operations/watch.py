"""Snapshots for `outbox watch` and the board, again and again, and how fast the relays send.

Reading must not burden the database that it reads. What costs the same however much there is, is read each time; what
grows with the emails that wait, or were ever sent, is read again only after twenty times as long as it took, or after a
hundred where it hardly changes. So watching takes a small part of one backend, and a small outbox is shown as it is.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, Final, Generic, TypeVar

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.opening import connect
from outbox.database.refusal import DatabaseRefusedError
from outbox.database.schema import require_current
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.operations.deferrals import Deferral, read_deferrals
from outbox.operations.email_counts import Waiting, read_settled, read_waiting
from outbox.operations.snapshot import (
    EditionOutcome,
    Snapshot,
    counted,
    read_outcomes,
    read_snapshot,
    snapshot_of,
)
from outbox.relay.rate_limit import DAY_AGO
from outbox.settings import Settings

T = TypeVar("T")

REST: Final = 20.0  # times as long as a count took: it is not asked for again before
REST_SETTLED: Final = 100.0  # the same, for what hardly changes any more
COUNT_MAX_S: Final = 10  # a count that takes longer is given up
SILENCE_MAX_S: Final = 60.0  # a look that takes longer met a cut network
EDITIONS_MAX: Final = 6
IN_DOUBT_MAX: Final = 5
RATE_OVER_S: Final = 10.0  # relays write their counts at their sweeps, every few seconds


GIVEN: Final = f"""
SELECT coalesce(sum(emails), 0)::bigint FROM outbox.allowance
 WHERE route = $1 AND since > {DAY_AGO}
"""


@dataclass(slots=True)
class Seldom(Generic[T]):
    """Count that is repeated only after many times as long as it took. None: not counted yet, or given up."""

    value: T | None = None
    counted_at: datetime | None = None
    _again_at: float = 0.0

    async def ask(
        self, connection: Connection, now: datetime, read: Callable[[Any], Awaitable[T]], *, rest: float = REST
    ) -> None:
        """Count if it is time to, on one core; `now` is the database's."""
        began_at = time.monotonic()
        if began_at < self._again_at:
            return
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL statement_timeout = '{COUNT_MAX_S}s'")
                await connection.execute("SET LOCAL max_parallel_workers_per_gather = 0")
                self.value, self.counted_at = await read(connection), now
        except asyncpg.QueryCanceledError:
            self.value = None
        ended_at = time.monotonic()
        self._again_at = ended_at + rest * (ended_at - began_at)


@dataclass(slots=True)
class Rates:
    """Speed of relays, from what they had sent a few seconds ago."""

    seen: deque[tuple[float, Mapping[int, int]]] = field(default_factory=deque)

    def note(self, now: float, sent: Mapping[int, int]) -> None:
        """Remember how many emails each relay has sent by `now`, a steady clock's seconds."""
        self.seen.append((now, sent))
        while len(self.seen) > 2 and self.seen[1][0] <= now - RATE_OVER_S:  # noqa: PLR2004 - two make a rate
            self.seen.popleft()

    def per_s(self, relay: int) -> float | None:
        """Return the emails per second of the last `RATE_OVER_S`; None for a relay that was first seen just now."""
        known = [(at, sent[relay]) for at, sent in self.seen if relay in sent]
        if not known or known[-1][0] <= known[0][0]:
            return None
        return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])

    def total_per_s(self) -> float:
        """Return the emails per second of all relays that were alive at the last look."""
        return sum(self.per_s(relay) or 0.0 for relay in (self.seen[-1][1] if self.seen else ()))


class Watcher:
    """Reader of snapshots through one connection, which is opened again when it was lost. An outage is no error here.

    With `newest` what is settled is counted among so many of the newest emails, else among all.
    """

    def __init__(self, settings: Settings, *, newest: int | None = None) -> None:
        settings.require("database_url")
        assert settings.database_url is not None
        self.database_url = settings.database_url
        self.snapshot: Snapshot | None = None
        """The latest that there was."""
        self.looked_at = 0.0
        self.asked_at: float | None = None
        """Moment at which the look in progress began; None if there is none."""
        self.trouble: str | None = None
        """Reason why there is no snapshot of this moment."""
        self.seen = asyncio.Event()
        """Set when there is something new to show."""
        self.rates = Rates()
        self._route = settings.smtp_url.name if settings.smtp_url is not None and settings.daily_max else None
        self._connection: Connection | None = None
        self._newest = newest
        self._waiting = Seldom[Waiting]()
        self._deferrals = Seldom[list[Deferral]]()
        self._settled = Seldom[dict[str, int]]()
        self._outcomes: dict[int, Seldom[dict[int, EditionOutcome]]] = {}

    async def open(self) -> None:
        """Open the connection. If the database does not answer, `trouble` has the reason: it may come back.

        Raises:
            OutboxError: the database refuses, or has the schema of another version.

        """
        try:
            await self._connected()
        except DatabaseRefusedError:
            raise
        except (DatabaseUnavailableError, *LOST_SESSION) as error:
            self._lose(str(error) or type(error).__name__)

    async def _connected(self) -> Connection:
        """Return the connection, which is opened if there is none."""
        if self._connection is None:
            connection = await connect(self.database_url, application="outbox watch")
            with connection.terminated_on_error(), connection.end_if_silent(SILENCE_MAX_S):
                await require_current(connection)
            self._connection = connection
        return self._connection

    async def look_again(self) -> None:
        """Read a snapshot, or note in `trouble` why that fails."""
        self.asked_at = time.monotonic()
        try:
            connection = await self._connected()
            with connection.end_if_silent(SILENCE_MAX_S):
                await self._read(connection)
            self.trouble = None
        except (OutboxError, asyncpg.PostgresError, *LOST_SESSION) as error:
            # `close` ends the rollback of a look that was cancelled, whose error then hides the cancellation.
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError from error
            self._lose(str(error) or type(error).__name__)
        finally:
            self.asked_at = None

    def waited_s(self, now: float) -> float:
        """Return how long the look in progress has shown nothing new; 0 if none is."""
        return 0.0 if self.asked_at is None else now - max(self.asked_at, self.looked_at)

    def close(self) -> None:
        """End the session, whatever it is doing."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    def _lose(self, why: str) -> None:
        self.trouble = " ".join(why.split())
        self.seen.set()
        self.close()

    async def _read(self, connection: Connection) -> None:
        """Read one snapshot, what may be expensive last."""
        async with snapshot_of(connection):
            found = await self._read_cheap(connection)
            self._show(found)
            await self._waiting.ask(connection, found.at, read_waiting)
            await self._deferrals.ask(connection, found.at, read_deferrals)
            self._show(found)
            for edition in found.editions:
                rest = REST if edition.completed_at is None else REST_SETTLED
                of = partial(read_outcomes, editions=[edition.id])
                await self._outcomes[edition.id].ask(connection, found.at, of, rest=rest)
            await self._settled.ask(connection, found.at, partial(read_settled, newest=self._newest), rest=REST_SETTLED)
        self._show(found)

    def _show(self, found: Snapshot) -> None:
        """Publish this snapshot, with the counts as they are known by now."""
        self._outcomes = {edition.id: self._outcomes.get(edition.id, Seldom()) for edition in found.editions}
        outcomes = {id_: (one.value or {}).get(id_) for id_, one in self._outcomes.items()}
        self.snapshot = replace(
            found,
            editions=counted(found.editions, outcomes),
            waiting=self._waiting.value,
            deferrals=self._deferrals.value,
            settled=self._settled.value,
            settled_at=self._settled.counted_at,
        )
        self.looked_at = time.monotonic()
        self.seen.set()

    async def _read_cheap(self, connection: Connection) -> Snapshot:
        found = await read_snapshot(connection, editions_max=EDITIONS_MAX, in_doubt_max=IN_DOUBT_MAX)
        self.rates.note(time.monotonic(), {relay.id: relay.sent for relay in found.relays})
        if self._route is None:
            return found
        return replace(found, given_today=await connection.fetchval(GIVEN, self._route))
