"""What `outbox watch` reads, again and again, and how fast the relays send. What it looks like is `screen`'s.

A look must not burden the database that it looks at. What costs the same whatever there is, is read at each look; what
grows with the emails that wait, or were ever sent, is read again only after twenty times as long as it took, or after a
hundred where it hardly changes. So watching takes a small part of one backend, and a small outbox is shown as it is.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.locks import ALIVE, RELAY_LOCKS
from outbox.database.opening import connect
from outbox.database.schema import require_current
from outbox.errors import OutboxError
from outbox.operations.attention import COUNTED as COUNTED_OF
from outbox.operations.attention import ROUTES, Concern, RouteStatus, read_concerns
from outbox.operations.deferrals import DEFERRED, LOOKED_AT_MAX, Deferral, deferrals_of
from outbox.operations.route_rules import Unserved, read_unserved
from outbox.settings import Settings

REST: Final = 20.0  # times as long as a count took: it is not asked for again before
REST_SETTLED: Final = 100.0  # the same, for what hardly changes any more
COUNT_MAX_S: Final = 10  # a count that takes longer is given up
SILENCE_MAX_S: Final = 60.0  # a look that takes longer met a cut network
EDITIONS_MAX: Final = 6
IN_DOUBT_MAX: Final = 5
RATE_OVER_S: Final = 10.0  # relays tell their counts at their sweeps, every few seconds


@dataclass(frozen=True, slots=True)
class RelaySeen:
    """A relay that lives. `sent` is how many emails servers have taken from it, as of its last sweep."""

    id: int
    host: str
    pid: int
    sent: int
    last_reply: str | None
    trouble: str | None
    route: str = ""


@dataclass(frozen=True, slots=True)
class PauseSeen:
    """What a person holds back: a report, or everything (`""`)."""

    report: str
    since: datetime
    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Open:
    """What is not settled, by why it waits. `in_hand` is by relay; what is `sending` is in hand, too."""

    due: int = 0
    oldest_due_at: datetime | None = None
    in_hand: Mapping[int, int] = field(default_factory=dict)
    put_off: int = 0
    next_at: datetime | None = None
    in_doubt: int = 0
    paused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EditionSeen:
    """An edition, and what became of its reports; the counts are None while they are not known."""

    id: int
    report: str
    period: str
    expected: int | None
    completed_at: datetime | None
    done_elsewhere_at: datetime | None = None
    """When a person declared that another system made it."""
    made: int | None = None
    sent: int | None = None
    waiting: int | None = None
    """Pending or being sent."""
    in_doubt: int | None = None
    failed: int | None = None
    """Dead or expired, and nobody has decided."""
    cancelled: int | None = None
    """A person decided not to send it: cancelled, discarded or waived."""
    missing: int | None = None
    """Recipients without a report, as the latest run of generate found them."""
    waived: int | None = None
    """Recipients without a report to whom nothing is owed."""
    collected: int | None = None
    """Reports that wait for a digest."""
    suppressed: int | None = None
    """Cancelled, since the address is on the suppression list."""
    bounced: int | None = None
    """Of those that are sent."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen; times are the database's. A count that took too long is None."""

    at: datetime
    relays: list[RelaySeen] = field(default_factory=list)
    routes: list[RouteStatus] = field(default_factory=list)
    pauses: list[PauseSeen] = field(default_factory=list)
    editions: list[EditionSeen] = field(default_factory=list)
    in_doubt: list[str] = field(default_factory=list)
    """The keys of a few, for a person to decide."""
    open: Open | None = None
    settled: Mapping[str, int] | None = None
    settled_at: datetime | None = None
    given_today: int | None = None
    """Emails of the last 24 hours that count for `daily_max`, where there is one."""
    unserved: list[Unserved] = field(default_factory=list)
    concerns: list[Concern] = field(default_factory=list)
    """All that needs a person."""
    deferrals: list[Deferral] | None = None
    """Emails that wait after a try, by the reply."""


NOW: Final = "SELECT now()"

RELAYS: Final = f"SELECT r.id, r.host, r.pid, r.sent, r.last_reply, r.trouble, r.route {ALIVE} ORDER BY r.id"

PAUSES: Final = """
SELECT report, since, left(who, 500) AS who, left(why, 2000) AS why FROM outbox.pause ORDER BY report
"""

EDITIONS: Final = """
SELECT id, report, period, expected, completed_at, done_elsewhere_at FROM outbox.edition
 ORDER BY starts_at DESC, id DESC LIMIT $1
"""

# By the index of what is in doubt alone.
IN_DOUBT: Final = """
SELECT m.key FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE d.settled_at IS NULL AND d.doubted_at IS NOT NULL ORDER BY d.due_at, d.email LIMIT $1
"""

GIVEN: Final = """
SELECT coalesce(sum(emails), 0)::bigint FROM outbox.allowance
 WHERE route = $1 AND since > now() - interval '24 hours 15 minutes'
"""

# One walk over what is open; what is settled is not looked at.
OPEN: Final = """
SELECT CASE WHEN state <> 'pending' THEN state WHEN paused IS NOT NULL THEN 'paused' WHEN relay IS NOT NULL THEN 'held'
            WHEN due_at > now() THEN 'put_off' ELSE 'due' END AS why,
       CASE WHEN state <> 'in_doubt' THEN relay END AS relay, paused, count(*) AS n,
       min(due_at) FILTER (WHERE due_at < 'infinity') AS first_at
  FROM outbox.delivery WHERE settled_at IS NULL GROUP BY 1, 2, 3
"""

COUNTED: Final = f"SELECT c.* FROM outbox.edition e CROSS JOIN LATERAL ({COUNTED_OF}) c WHERE e.id = $1"

SETTLED: Final = """
SELECT state, count(*) AS n FROM outbox.delivery WHERE settled_at IS NOT NULL GROUP BY state
"""

SETTLED_OF_NEWEST: Final = """
SELECT state, count(*) AS n FROM (SELECT state, settled_at FROM outbox.delivery ORDER BY email DESC LIMIT $1) d
 WHERE settled_at IS NOT NULL GROUP BY state
"""


@dataclass(slots=True)
class Seldom:
    """A count that rests for many times as long as it took before it is asked for again. None: not yet, or given up."""

    value: list[Any] | None = None
    counted_at: datetime | None = None
    _again_at: float = 0.0

    async def ask(
        self, connection: Connection, now: datetime, statement: str, *arguments: Any, rest: float = REST
    ) -> None:
        """Count, if it is time to, on one core; `now` is the database's."""
        began_at = time.monotonic()
        if began_at < self._again_at:
            return
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL statement_timeout = '{COUNT_MAX_S}s'")
                await connection.execute("SET LOCAL max_parallel_workers_per_gather = 0")
                self.value, self.counted_at = await connection.fetch(statement, *arguments), now
        except asyncpg.QueryCanceledError:
            self.value = None
        ended_at = time.monotonic()
        self._again_at = ended_at + rest * (ended_at - began_at)


@dataclass(slots=True)
class Rates:
    """How fast relays send: from what they had sent a few seconds ago."""

    seen: deque[tuple[float, Mapping[int, int]]] = field(default_factory=deque)

    def note(self, now: float, sent: Mapping[int, int]) -> None:
        """Remember how many emails each relay has sent by `now`, a steady clock's seconds."""
        self.seen.append((now, sent))
        while len(self.seen) > 2 and self.seen[1][0] <= now - RATE_OVER_S:  # noqa: PLR2004 - two make a rate
            self.seen.popleft()

    def per_s(self, relay: int) -> float | None:
        """Emails per second of late; None of one that was first seen just now."""
        told = [(at, sent[relay]) for at, sent in self.seen if relay in sent]
        if not told or told[-1][0] <= told[0][0]:
            return None
        return (told[-1][1] - told[0][1]) / (told[-1][0] - told[0][0])


class Watcher:
    """Looks through one connection, which is made anew when it was lost. An outage is news here, not an error.

    With `newest` what is settled is counted among so many of the newest emails, else among all.
    """

    def __init__(self, settings: Settings, *, newest: int | None = None) -> None:
        settings.require("database_url")
        assert settings.database_url is not None
        self.database_url = settings.database_url
        self.look: Look | None = None
        """The latest that there was."""
        self.looked_at = 0.0
        self.asked_at: float | None = None
        """When a look was begun that has no end yet."""
        self.trouble: str | None = None
        """Why there is none of this moment."""
        self.seen = asyncio.Event()
        """Set when there is something new to show."""
        self.rates = Rates()
        self._route = settings.smtp_url.name if settings.smtp_url is not None and settings.daily_max else None
        self._connection: Connection | None = None
        self._open = Seldom()
        self._deferred = Seldom()
        self._settled = Seldom()
        self._settled_of = (SETTLED,) if newest is None else (SETTLED_OF_NEWEST, newest)
        self._counted: dict[int, Seldom] = {}

    async def connect(self) -> None:
        """A connection to a database whose schema is this code's.

        Raises:
            OutboxError: there is none to be had, or another schema.

        """
        connection = await connect(self.database_url, application="outbox watch")
        try:
            await require_current(connection)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection

    async def look_again(self) -> None:
        """Look, or say in `trouble` why that cannot be."""
        self.asked_at = time.monotonic()
        try:
            async with asyncio.timeout(SILENCE_MAX_S):
                if self._connection is None:
                    await self.connect()
                await self._read()
            self.trouble = None
        except TimeoutError:
            self._lose(f"Postgres did not answer within {SILENCE_MAX_S:g} s")
        except (OutboxError, asyncpg.PostgresError, *LOST_SESSION) as error:
            self._lose(str(error) or type(error).__name__)
        finally:
            self.asked_at = None

    def waited_s(self, now: float) -> float:
        """How long the look that is under way has shown nothing new; 0 if none is."""
        return 0.0 if self.asked_at is None else now - max(self.asked_at, self.looked_at)

    def close(self) -> None:
        """End the session, whatever it is at."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    def _lose(self, why: str) -> None:
        self.trouble = " ".join(why.split())
        self.seen.set()
        self.close()

    async def _read(self) -> None:
        """One snapshot, except the locks, which are always of this moment; what may be dear comes last."""
        assert self._connection is not None
        connection = self._connection
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            look = await self._read_cheap(connection)
            self._show(look)
            await self._open.ask(connection, look.at, OPEN)
            await self._deferred.ask(connection, look.at, DEFERRED, LOOKED_AT_MAX)
            self._show(look)
            for edition in look.editions:
                rest = REST if edition.completed_at is None else REST_SETTLED
                await self._counted[edition.id].ask(connection, look.at, COUNTED, edition.id, rest=rest)
            await self._settled.ask(connection, look.at, *self._settled_of, rest=REST_SETTLED)
        self._show(look)

    def _show(self, look: Look) -> None:
        """This look, with the counts as they are known by now."""
        self._counted = {edition.id: self._counted.get(edition.id, Seldom()) for edition in look.editions}
        editions = [
            replace(edition, **counts[0]) if (counts := self._counted[edition.id].value) else edition
            for edition in look.editions
        ]
        self.look = replace(
            look,
            editions=editions,
            open=None if self._open.value is None else open_of(self._open.value),
            deferrals=None if self._deferred.value is None else deferrals_of(self._deferred.value),
            settled=None if self._settled.value is None else {row["state"]: row["n"] for row in self._settled.value},
            settled_at=self._settled.counted_at,
        )
        self.looked_at = time.monotonic()
        self.seen.set()

    async def _read_cheap(self, connection: Connection) -> Look:
        at = await connection.fetchval(NOW)
        relays = [RelaySeen(*row) for row in await connection.fetch(RELAYS, RELAY_LOCKS)]
        self.rates.note(time.monotonic(), {relay.id: relay.sent for relay in relays})
        return Look(
            at,
            relays,
            [RouteStatus(*row) for row in await connection.fetch(ROUTES)],
            [PauseSeen(*row) for row in await connection.fetch(PAUSES)],
            [EditionSeen(*row) for row in await connection.fetch(EDITIONS, EDITIONS_MAX)],
            [row["key"] for row in await connection.fetch(IN_DOUBT, IN_DOUBT_MAX)],
            unserved=await read_unserved(connection),
            concerns=await read_concerns(connection),
            given_today=None if self._route is None else await connection.fetchval(GIVEN, self._route),
        )


def open_of(rows: Iterable[Mapping[str, Any]]) -> Open:
    """The rows of `OPEN` by why they wait."""
    found: dict[str, int] = {}
    first_at: dict[str, datetime] = {}
    in_hand: dict[int, int] = {}
    paused: dict[str, int] = {}
    for row in rows:
        why, n = row["why"], row["n"]
        found[why] = found.get(why, 0) + n
        if row["first_at"] is not None:
            first_at[why] = row["first_at"]
        if row["relay"] is not None:
            in_hand[row["relay"]] = in_hand.get(row["relay"], 0) + n
        if why == "paused":
            paused[row["paused"]] = n
    return Open(
        due=found.get("due", 0),
        oldest_due_at=first_at.get("due"),
        in_hand=in_hand,
        put_off=found.get("put_off", 0),
        next_at=first_at.get("put_off"),
        in_doubt=found.get("in_doubt", 0),
        paused=paused,
    )
