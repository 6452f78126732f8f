"""Facts about the fleet, each read by one statement. `outbox status`, `watch`, the board and the metrics show parts.

`read_snapshot` reads what costs the same however many emails there are. What grows with the emails that wait or were
ever sent has functions of its own (here, in `email_counts` and in `deferrals`), which a reader calls when it can afford
them, in the same transaction (`snapshot_of`).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from outbox.database.connection import Connection
from outbox.database.lanes import LANES
from outbox.database.locks import ALIVE, RELAY_LOCKS
from outbox.database.pause_list import Pause, read_pauses
from outbox.database.plans import by_index
from outbox.operations.deferrals import Deferral
from outbox.operations.email_counts import Waiting
from outbox.operations.route_rules import Unserved, read_unserved

ATTENTION_MAX: Final = 10_000  # emails or recipients of a kind are counted so far
EDITIONS_FOR: Final = "interval '40 days'"  # older ones are history


@dataclass(frozen=True, slots=True)
class LivingRelay:
    """Relay that lives: its session holds its lock at this moment."""

    id: int
    host: str
    pid: int
    version: str
    started_at: datetime
    sent: int
    """Emails that servers have accepted from it, as of its last sweep."""
    last_reply: str | None
    trouble: str | None
    """Reason why it makes no progress."""
    stale: int
    """Verdicts that came too late to matter: more than 0 needs a look at its log."""
    route: str = ""
    """Route that it serves; '' is the usual one."""


@dataclass(frozen=True, slots=True)
class FailingRoute:
    """Mail server in trouble: relays connect with one probe at a time only."""

    name: str
    since: datetime
    reason: str
    failures: int


@dataclass(frozen=True, slots=True)
class FailingSchedule:
    """Schedule whose latest tick failed so far."""

    report: str
    tick_at: datetime
    failures: int
    retry_at: datetime
    said: str


@dataclass(frozen=True, slots=True)
class EditionOutcome:
    """Counts of an edition's recipients by what became of them.

    Each report is counted once: as `sent`, `waiting` (pending or being sent), `in_doubt`, `failed` (dead or expired,
    and undecided), `cancelled` (a person decided not to send it), `suppressed` (the address is on the suppression list)
    or `collected` (it waits for a digest; a report in a digest is what the digest is). `missing` are recipients without
    a report, `waived` those to whom nothing is owed; `bounced` are of those that are sent.
    """

    made: int = 0
    sent: int = 0
    waiting: int = 0
    in_doubt: int = 0
    failed: int = 0
    cancelled: int = 0
    missing: int = 0
    waived: int = 0
    collected: int = 0
    suppressed: int = 0
    bounced: int = 0


@dataclass(frozen=True, slots=True)
class Edition:
    """Edition of a report; `expected` is None until one run of generate has seen all recipients."""

    id: int
    report: str
    period: str
    expected: int | None
    completed_at: datetime | None = None
    done_elsewhere_at: datetime | None = None
    """Moment at which a person declared that another system made it."""
    outcome: EditionOutcome | None = None
    """None if it is not counted."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Emails, recipients or an edition (`count` 1) that need a person, by kind; counted to `ATTENTION_MAX`."""

    kind: str
    report: str
    period: str
    count: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of the fleet; times are the database's. The counts in the second part are None while they are not known."""

    at: datetime
    relays: list[LivingRelay] = field(default_factory=list)
    routes: list[FailingRoute] = field(default_factory=list)
    unserved: list[Unserved] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    schedules: list[FailingSchedule] = field(default_factory=list)
    editions: list[Edition] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    in_doubt: list[str] = field(default_factory=list)
    """Keys of a few emails, for a person to decide about."""
    oldest_due_s: float = 0.0
    """Seconds for which the oldest email has been due, and is not sent."""

    waiting: Waiting | None = None
    deferrals: list[Deferral] | None = None
    """Emails that wait after a try, by the reply."""
    settled: Mapping[str, int] | None = None
    settled_at: datetime | None = None
    given_today: int | None = None
    """Emails of the last 24 hours that count for `daily_max`, if there is one."""


NOW: Final = "SELECT now()"

RELAYS: Final = f"""
SELECT r.id, r.host, r.pid, r.version, r.started_at, r.sent, r.last_reply, r.trouble, r.stale, r.route {ALIVE}
 ORDER BY r.id
"""

# A route that no relay has tried for a minute is obsolete: its relays are gone or use another server.
ROUTES: Final = """
SELECT name, since, reason, failures FROM outbox.route WHERE retry_at > now() - interval '1 minute' ORDER BY since
"""

# What failed longer ago than any period lasts belongs to a schedule that no relay follows any more.
SCHEDULES: Final = """
SELECT report, tick_at, failures, retry_at, coalesce(said, '')
  FROM outbox.schedule WHERE done_at IS NULL AND failures > 0 AND tick_at > now() - interval '32 days' ORDER BY report
"""

# $1 is how many, the newest first.
EDITIONS: Final = """
SELECT id, report, period, expected, completed_at, done_elsewhere_at FROM outbox.edition
 ORDER BY starts_at DESC, id DESC LIMIT $1
"""

# $1 is ATTENTION_MAX.
ATTENTION: Final = f"""
SELECT 'in_doubt' AS kind, '' AS report, '' AS period, count(*) AS n FROM (
    SELECT FROM outbox.needs_attention WHERE kind = 'in_doubt' ORDER BY due_at LIMIT $1) d
 UNION ALL
SELECT 'failed', '', '', count(*) FROM (SELECT FROM outbox.needs_attention WHERE kind = 'failed' LIMIT $1) f
 UNION ALL
(SELECT a.kind, e.report, e.period, count(*)
  FROM outbox.edition e CROSS JOIN LATERAL (
    SELECT kind FROM outbox.needs_attention
     WHERE kind IN ('missing', 'unfinished', 'empty') AND edition = e.id LIMIT $1) a
 WHERE e.created_at > now() - {EDITIONS_FOR}
 GROUP BY a.kind, e.id, e.report, e.period ORDER BY e.id)
"""

# $1 is how many. By the index of what is in doubt alone.
IN_DOUBT: Final = """
SELECT m.key FROM (
    SELECT email, due_at FROM outbox.needs_attention WHERE kind = 'in_doubt' ORDER BY due_at, email LIMIT $1) d
 CROSS JOIN LATERAL (SELECT key FROM outbox.email WHERE id = d.email OFFSET 0) m
 ORDER BY d.due_at, d.email
"""

OLDEST_DUE: Final = f"""
WITH RECURSIVE {LANES}
SELECT coalesce(extract(epoch FROM now() - min(greatest(d.due_at, timestamptz 'epoch'))), 0)::float8
  FROM lane l CROSS JOIN LATERAL (
    SELECT due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND route = l.route AND priority = l.priority AND due_at <= now()
       AND state IN ('pending', 'sending')
     ORDER BY due_at LIMIT 1) d
"""


def snapshot_of(connection: Connection) -> AbstractAsyncContextManager[Any]:
    """Return a transaction in which all reads see one moment, except advisory locks, which are always of now."""
    transaction: AbstractAsyncContextManager[Any] = connection.transaction(isolation="repeatable_read", readonly=True)
    return transaction


async def read_snapshot(connection: Connection, *, editions_max: int = 0, in_doubt_max: int = 0) -> Snapshot:
    """Read all but the counts, with the newest editions and a few of the emails in doubt by name."""
    return Snapshot(
        at=await connection.fetchval(NOW),
        relays=[LivingRelay(*row) for row in await connection.fetch(RELAYS, RELAY_LOCKS)],
        routes=[FailingRoute(*row) for row in await connection.fetch(ROUTES)],
        unserved=await read_unserved(connection),
        pauses=await read_pauses(connection, waiting_max=0),
        schedules=[FailingSchedule(*row) for row in await connection.fetch(SCHEDULES)],
        editions=[Edition(*row) for row in await connection.fetch(EDITIONS, editions_max)] if editions_max else [],
        attention=[Attention(*row) for row in await connection.fetch(ATTENTION, ATTENTION_MAX) if row["n"]],
        in_doubt=[key for (key,) in await connection.fetch(IN_DOUBT, in_doubt_max)] if in_doubt_max else [],
        oldest_due_s=await connection.fetchval(OLDEST_DUE),
    )


# Reads every report of these editions.
OUTCOMES: Final = """
SELECT edition, made, sent, waiting, in_doubt, failed, cancelled, missing, waived, collected, suppressed, bounced
  FROM outbox.edition_outcome WHERE edition = ANY ($1::int[])
"""


async def read_outcomes(connection: Connection, editions: Sequence[int]) -> dict[int, EditionOutcome]:
    """Count what became of these editions, by their ids.

    By index: where statistics know only a large edition, a new one would be expected to be as large, and all reports
    that there ever were would be read for it.
    """
    async with by_index(connection):
        rows = await connection.fetch(OUTCOMES, list(editions))
    return {edition: EditionOutcome(*counts) for edition, *counts in rows}


def counted(editions: Iterable[Edition], outcomes: Mapping[int, EditionOutcome | None]) -> list[Edition]:
    """Return the editions with those outcomes that are known."""
    return [replace(edition, outcome=outcomes.get(edition.id)) for edition in editions]
