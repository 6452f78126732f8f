"""State of the fleet, read from the database: counts, living relays, recent editions, and what needs a person."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from outbox import suggested
from outbox.database.connection import Connection
from outbox.database.locks import ALIVE, RELAY_LOCKS
from outbox.operations.attention import (
    COUNTED,
    EDITIONS_FOR,
    MISSING,
    ROUTES,
    SCHEDULES,
    UNDECIDED,
    Choice,
    Concern,
    RouteStatus,
    choices_of,
    headline,
    read_concerns,
)
from outbox.operations.deferrals import Deferral, read_deferrals
from outbox.operations.prune import BARE
from outbox.operations.route_rules import Unserved, read_unserved
from outbox.relay.pauses import Pause, read_pauses
from outbox.relay.rate_limit import FOUND, found_of

STATES: Final = ("pending", "sending", "sent", "in_doubt", "dead", "cancelled", "expired")
EDITIONS_MAX: Final = 10
NAMED_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """A relay that lives: its session holds its lock at this moment."""

    id: int
    host: str
    pid: int
    version: str
    started_at: datetime
    in_hand: int
    trouble: str | None
    """What keeps it from its work."""
    stale: int
    """How many of its verdicts came too late to matter: more than 0 wants to be looked at."""
    route: str = ""
    """The one that it serves; '' is the usual one."""


@dataclass(frozen=True, slots=True)
class RateStatus:
    """Rate that the mail server of a route takes, found from what it refused; the fleet sends at it."""

    route: str
    per_s: float
    """Emails a second of all relays together, at this moment."""
    since: datetime
    """When it was last exceeded."""
    said: str
    """Reply that showed it."""


@dataclass(frozen=True, slots=True)
class ScheduleStatus:
    """A schedule whose latest tick could not be followed so far."""

    report: str
    tick_at: datetime
    failures: int
    retry_at: datetime
    said: str


@dataclass(frozen=True, slots=True)
class EditionStatus:
    """An edition by what became of its recipients; `expected` is null until one run has seen all of them.

    Each report is counted once: as `sent`, `waiting` (pending or being sent), `in_doubt`, `failed` (dead or expired,
    and undecided), `cancelled` (a person decided not to send it), `suppressed` (the address is on the suppression list)
    or `collected` (it waits for a digest; a report in a digest is what the digest is). `missing` are recipients without
    a report, `waived` those to whom nothing is owed; `bounced` are of those that are sent.
    """

    report: str
    period: str
    expected: int | None
    made: int
    sent: int
    waiting: int
    in_doubt: int
    failed: int
    cancelled: int
    missing: int
    waived: int
    collected: int
    suppressed: int = 0
    bounced: int = 0
    done_elsewhere_at: datetime | None = None
    """When a person declared that another system made it."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """An email, or a recipient without a report (`missing`), that needs a person, with the last thing heard of it."""

    key: str
    state: str
    said: str
    command: str
    """Shows all that is known of it, and changes nothing."""
    choices: list[Choice]
    """What a person may decide."""


@dataclass(frozen=True, slots=True)
class Status:
    """One consistent look at everything."""

    counts: dict[str, int]
    oldest_due_s: float
    relays: list[RelayStatus]
    routes: list[RouteStatus]
    pauses: list[Pause]
    editions: list[EditionStatus]
    troubles: list[Trouble]
    schedules: list[ScheduleStatus] = field(default_factory=list)
    """Those in trouble only."""
    unserved: list[Unserved] = field(default_factory=list)
    rates: list[RateStatus] = field(default_factory=list)
    deferrals: list[Deferral] = field(default_factory=list)
    """Emails that wait after a try, by the reply."""
    concerns: list[Concern] = field(default_factory=list)
    """All that needs a person."""

    @property
    def limiting_rates(self) -> list[RateStatus]:
        """Rates of servers that take some mail: not of one that a relay reports as taking none, with the same reply."""
        troubles = [relay.trouble for relay in self.relays if relay.trouble]
        return [rate for rate in self.rates if not any(rate.said in trouble for trouble in troubles)]

    @property
    def attention(self) -> str:
        """Whether a person is needed, in one line."""
        return headline(self.concerns)

    def as_json(self) -> dict[str, Any]:
        """The counts at the top level, the rest beside them; times as ISO 8601 in UTC."""
        rest = {k: v for k, v in asdict(self).items() if k != "counts"}
        return {**self.counts, **rest, "attention": self.attention}


COUNTS: Final = "SELECT state, count(*) AS n FROM outbox.delivery GROUP BY state"

OLDEST_DUE: Final = """
SELECT coalesce(extract(epoch FROM now() - min(greatest(due_at, timestamptz 'epoch'))), 0)::float8
  FROM outbox.delivery WHERE settled_at IS NULL AND state IN ('pending', 'sending') AND due_at <= now()
"""

RELAYS: Final = f"""
SELECT r.id, r.host, r.pid, r.version, r.started_at,
       (SELECT count(*) FROM outbox.delivery d
         WHERE d.settled_at IS NULL AND d.state IN ('pending', 'sending') AND d.relay = r.id) AS in_hand,
       r.trouble, r.stale, r.route
{ALIVE} ORDER BY r.id
"""

RATES: Final = f"SELECT route, found_at, {FOUND} FROM outbox.pace WHERE found_rate IS NOT NULL ORDER BY route"

EDITIONS: Final = f"""
SELECT e.report, e.period, e.expected, c.*, e.done_elsewhere_at
  FROM (SELECT * FROM outbox.edition ORDER BY starts_at DESC, id DESC LIMIT $1) e CROSS JOIN LATERAL ({COUNTED}) c
 ORDER BY e.starts_at DESC, e.id DESC
"""

# What is in doubt and what failed, each in the order in which it was made, the newest first.
TROUBLES: Final = f"""
SELECT m.key, t.state, m.report IS NOT NULL,
       coalesce((SELECT left(a.reply, 2000) FROM outbox.attempt a WHERE a.email = t.email
                  ORDER BY a.settled_at DESC LIMIT 1), ''),
       m.bare
  FROM (
    (SELECT email, 'in_doubt' AS state FROM outbox.delivery
      WHERE settled_at IS NULL AND doubted_at IS NOT NULL ORDER BY email DESC LIMIT $1)
    UNION ALL
    (SELECT d.email, d.state FROM {UNDECIDED} ORDER BY d.state, d.email DESC LIMIT $1)
  ) t
 CROSS JOIN LATERAL (SELECT key, report, {{bare}} AS bare FROM outbox.email m WHERE m.id = t.email OFFSET 0) m
 ORDER BY array_position(array['in_doubt', 'dead', 'expired'], t.state), t.email DESC LIMIT $1
"""

UNREACHED: Final = f"""
SELECT e.report || '/' || e.period || '/' || u.key, u.reason
  FROM outbox.edition e CROSS JOIN LATERAL (
    SELECT u.recipient_key AS key, u.reason FROM {MISSING} ORDER BY u.recipient_key LIMIT $1) u
 WHERE e.created_at > now() - {EDITIONS_FOR} AND e.done_elsewhere_at IS NULL
 ORDER BY e.starts_at DESC, e.id DESC, u.key LIMIT $1
"""


# Who may not read messages is not told which of them are gone; `outbox resolve` says so in time. In two statements,
# since Postgres wants the right on every column that is named, whether it is read or not.
READS_MESSAGES: Final = "SELECT has_column_privilege('outbox.email', 'message', 'SELECT')"
BARE_OR_NOT: Final = {True: "m.message = ANY ($2::bytea[])", False: "$2::bytea[] IS NULL"}


async def read_status(connection: Connection) -> Status:
    """The whole picture from one snapshot, except the locks, which are always of this moment."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        found = {row["state"]: row["n"] for row in await connection.fetch(COUNTS)}
        oldest = await connection.fetchval(OLDEST_DUE)
        relays = [RelayStatus(*row) for row in await connection.fetch(RELAYS, RELAY_LOCKS)]
        routes = [RouteStatus(*row) for row in await connection.fetch(ROUTES)]
        rates = await read_rates(connection)
        pauses = await read_pauses(connection)
        unserved = await read_unserved(connection)
        schedules = [ScheduleStatus(*row) for row in await connection.fetch(SCHEDULES)]
        editions = [EditionStatus(*row) for row in await connection.fetch(EDITIONS, EDITIONS_MAX)]
        statement = TROUBLES.format(bare=BARE_OR_NOT[await connection.fetchval(READS_MESSAGES)])
        troubles = [_trouble(*row) for row in await connection.fetch(statement, NAMED_MAX, BARE)]
        missing = await connection.fetch(UNREACHED, NAMED_MAX - len(troubles))
        troubles += [_trouble(key, "missing", True, reason, False) for key, reason in missing]
        deferrals = await read_deferrals(connection)
        concerns = await read_concerns(connection)
    counts = {state: found.get(state, 0) for state in STATES}
    return Status(
        counts, oldest, relays, routes, pauses, editions, troubles, schedules, unserved, rates, deferrals, concerns
    )


async def read_rates(connection: Connection) -> list[RateStatus]:
    """Return the rates that mail servers take, where one is known."""
    rates: list[RateStatus] = []
    for row in await connection.fetch(RATES):
        found = found_of(row)
        if found is not None and found.rate_now is not None:
            rates.append(RateStatus(row["route"], found.rate_now, row["found_at"], found.said))
    return rates


def _trouble(key: str, state: str, is_of_report: bool, said: str, is_gone: bool) -> Trouble:
    choices = choices_of(key, state, is_gone=is_gone, is_of_report=is_of_report)
    return Trouble(key, state, said, suggested.command("show", keys=[key]), choices)
