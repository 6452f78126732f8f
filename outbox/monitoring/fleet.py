"""Numbers of the fleet for the metrics, read now and then over a connection of its own.

Nothing here walks over what is settled, and what is open is counted to `COUNT_MAX` only. A look is kept for at least
`FRESH_S`, and for twenty times as long as it took: frequent scrapes keep Postgres busy for a twentieth of the time.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import asyncpg

from outbox.database.connection import LOST_SESSION
from outbox.database.lanes import LANES
from outbox.database.opening import connect
from outbox.database.plans import BY_INDEX
from outbox.database.schema import require_current
from outbox.errors import OutboxError, SchemaError
from outbox.operations.attention import concerns_of, counts_of
from outbox.operations.deferrals import read_deferrals
from outbox.operations.snapshot import EDITIONS_FOR, read_snapshot, snapshot_of
from outbox.settings.urls import DatabaseUrl

FRESH_S: Final = 5.0
COST_MAX: Final = 20  # a look is kept for so many times as long as it took
LOOK_MAX_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
SCHEMA_EVERY_S: Final = 60.0
COUNT_MAX: Final = 100_000
STATES: Final = ("pending", "paused", "sending", "in_doubt")


@dataclass(frozen=True, slots=True)
class EditionGauge:
    """Newest edition of a report whose period has begun. `made` is counted to `COUNT_MAX`."""

    report: str
    period: str
    expected: int | None
    made: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Fleet:
    """Numbers of one moment. `trouble` is why there are no others."""

    trouble: str | None = None
    schema_fits: bool = True
    deliveries: dict[str, int] = field(default_factory=dict)
    oldest_due_s: float = 0.0
    relays: int = 0
    routes_paused: int = 0
    routes_unserved: int = 0
    editions_incomplete: int = 0
    attention: Mapping[str, int] = field(default_factory=dict)
    """Number of what needs a person, by kind: emails, recipients, routes, relays and so on."""
    deferred: int = 0
    editions: tuple[EditionGauge, ...] = ()


# Each by an index of what is open: in the order of when it is due, but for what is never due by itself.
COUNTS: Final = f"""
WITH RECURSIVE {LANES}
SELECT u.state, u.n FROM (
    SELECT count(*) FILTER (WHERE d.state = 'pending'), count(*) FILTER (WHERE d.state = 'sending') FROM (
    SELECT d.state FROM lane l CROSS JOIN LATERAL (
        SELECT state FROM outbox.delivery
         WHERE settled_at IS NULL AND route = l.route AND priority = l.priority AND due_at < 'infinity'
           AND state IN ('pending', 'sending')
         ORDER BY due_at LIMIT $1) d
     LIMIT $1) d
) AS c (pending, sending) CROSS JOIN LATERAL (VALUES ('pending', c.pending), ('sending', c.sending)) AS u (state, n)
UNION ALL
SELECT 'in_doubt', count(*) FROM (
    SELECT FROM outbox.delivery WHERE settled_at IS NULL AND doubted_at IS NOT NULL ORDER BY due_at LIMIT $1) d
UNION ALL
SELECT 'paused', count(*) FROM (
    SELECT FROM outbox.delivery WHERE settled_at IS NULL AND paused IS NOT NULL AND state = 'pending' LIMIT $1) d
"""

INCOMPLETE: Final = f"""
SELECT count(*) FROM outbox.edition WHERE completed_at IS NULL AND created_at > now() - {EDITIONS_FOR}
"""

# The newest that has begun: one that was made early for a period of the future does not hide it.
EDITIONS: Final = f"""
SELECT e.report, e.period, e.expected,
       (SELECT count(*) FROM (SELECT FROM outbox.report r WHERE r.edition = e.id LIMIT $1) r),
       e.completed_at IS NOT NULL
  FROM (SELECT DISTINCT ON (report) * FROM outbox.edition WHERE created_at > now() - {EDITIONS_FOR}
         ORDER BY report, starts_at > now(), starts_at DESC, id DESC LIMIT 100) e
"""


async def read_fleet(url: DatabaseUrl) -> Fleet:
    """Read all numbers of one moment.

    Raises:
        OutboxError: the database does not answer, or its schema does not fit.

    """
    server_settings = {
        "statement_timeout": str(int(LOOK_MAX_S * 1000)),
        "default_transaction_read_only": "on",
    }
    ends_at = time.monotonic() + LOOK_MAX_S
    async with asyncio.timeout(LOOK_MAX_S):
        connection = await connect(url, application="outbox metrics", settings=server_settings, timeout_s=LOOK_MAX_S)
    with connection.end_if_silent(max(ends_at - time.monotonic(), 0.0)):
        try:
            await require_current(connection)
            async with snapshot_of(connection):
                await connection.execute(BY_INDEX)
                snapshot = await read_snapshot(connection)
                found: dict[str, int] = dict(await connection.fetch(COUNTS, COUNT_MAX))
                return Fleet(
                    deliveries={state: found.get(state, 0) for state in STATES},
                    oldest_due_s=snapshot.oldest_due_s,
                    relays=len(snapshot.relays),
                    routes_paused=len(snapshot.routes),
                    routes_unserved=len(snapshot.unserved),
                    editions_incomplete=await connection.fetchval(INCOMPLETE),
                    attention=counts_of(concerns_of(snapshot)),
                    deferred=sum(one.count for one in await read_deferrals(connection)),
                    editions=tuple(EditionGauge(*row) for row in await connection.fetch(EDITIONS, COUNT_MAX)),
                )
        finally:
            await connection.close(timeout=CLOSE_TIMEOUT_S)


class FleetReader:
    """Reader for any thread that may block: one reads at a time, and the others get its result."""

    def __init__(self, url: DatabaseUrl) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._seen = Fleet("nobody has looked yet")
        self._fresh_until = 0.0
        self._seen_at = -SCHEMA_EVERY_S

    def look(self) -> Fleet:
        """Return the numbers of now or a little ago; a problem with the database raises no error."""
        with self._lock:
            began_at = time.monotonic()
            if began_at >= self._fresh_until:
                self._seen = asyncio.run(self._look())
                self._seen_at = ended_at = time.monotonic()
                self._fresh_until = ended_at + max(FRESH_S, COST_MAX * (ended_at - began_at))
            return self._seen

    def schema_fault(self) -> str | None:
        """Return why the schema does not fit, as of the last `SCHEMA_EVERY_S`; None if it fits, or if not known."""
        with self._lock:
            is_old = time.monotonic() >= self._seen_at + SCHEMA_EVERY_S
        seen = self.look() if is_old else self._seen
        return None if seen.schema_fits else seen.trouble

    def last_schema_fault(self) -> str | None:
        """Return what `schema_fault` would, as of the last look, and never block."""
        seen = self._seen
        return None if seen.schema_fits else seen.trouble

    async def _look(self) -> Fleet:
        try:
            return await read_fleet(self.url)
        except SchemaError as error:
            return Fleet(str(error), schema_fits=False)
        except (OutboxError, *LOST_SESSION, asyncpg.PostgresError) as error:
            return Fleet(str(error) or type(error).__name__)
