"""What is going on, read from the database: counts, the living relays, recent editions, and what needs a person."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from outbox import suggested
from outbox.database import ALIVE, EMAIL_OF_REPORT, RELAY_LOCKS
from outbox.pace import FOUND, found_of
from outbox.pause import Pause, read_pauses
from outbox.prune import BARE
from outbox.routing import Unserved, read_unserved

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
class RouteStatus:
    """A way to a mail server that is in trouble: nobody connects but one probe at a time."""

    name: str
    since: datetime
    reason: str
    failures: int


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
    """An edition as it goes; `expected` is null until one run has seen all recipients.

    A report that is in a digest is sent when that is; `collected` are those that wait for one. `suppressed` are not
    sent since their address is on the suppression list, and not in `not_sent`; `bounced` are of those that are sent.
    """

    report: str
    period: str
    expected: int | None
    made: int
    sent: int
    not_sent: int
    collected: int
    suppressed: int = 0
    bounced: int = 0


@dataclass(frozen=True, slots=True)
class Trouble:
    """A delivery that waits for a person, the last thing heard of it, and a command that decides.

    The command ends with the first of `choices`; each of the others may stand in its place.
    """

    key: str
    state: str
    said: str
    command: str
    choices: list[str]


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

    def as_json(self) -> dict[str, Any]:
        """The counts at the top level, the rest beside them; times as ISO 8601 in UTC."""
        rest = {k: v for k, v in asdict(self).items() if k != "counts"}
        return {**self.counts, **rest}


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

# A pause that nobody has tried to end for a minute is nobody's any more: its relays are gone or use another server.
ROUTES: Final = """
SELECT name, since, reason, failures FROM outbox.route WHERE retry_at > now() - interval '1 minute' ORDER BY since
"""

RATES: Final = f"SELECT route, found_at, {FOUND} FROM outbox.pace WHERE found_rate IS NOT NULL ORDER BY route"

# What failed longer ago than any period lasts is of a schedule that nobody follows any more.
SCHEDULES: Final = """
SELECT report, tick_at, failures, retry_at, coalesce(said, '')
  FROM outbox.schedule WHERE done_at IS NULL AND failures > 0 AND tick_at > now() - interval '32 days' ORDER BY report
"""

EDITIONS: Final = f"""
SELECT e.report, e.period, e.expected, count(r.id) AS made,
       count(*) FILTER (WHERE d.state = 'sent') AS sent,
       count(*) FILTER (WHERE d.state <> 'sent' AND s.verdict IS DISTINCT FROM 'suppressed') AS not_sent,
       count(*) FILTER (WHERE i.report IS NOT NULL AND i.digest IS NULL) AS collected,
       count(*) FILTER (WHERE s.verdict = 'suppressed') AS suppressed,
       count(*) FILTER (WHERE d.state = 'sent' AND EXISTS (
           SELECT FROM outbox.bounce b
            WHERE b.email = d.email AND b.kind IN ('hard', 'complained') OFFSET 0)) AS bounced
  FROM (SELECT * FROM outbox.edition ORDER BY starts_at DESC, id DESC LIMIT $1) e
  LEFT JOIN outbox.report r ON r.edition = e.id
  {EMAIL_OF_REPORT}
  LEFT JOIN LATERAL (SELECT a.verdict FROM outbox.attempt a WHERE a.email = d.email AND d.state = 'cancelled'
                      ORDER BY a.settled_at DESC LIMIT 1) s ON true
 GROUP BY e.id, e.report, e.period, e.expected, e.starts_at
 ORDER BY e.starts_at DESC, e.id DESC
"""

TROUBLES: Final = """
SELECT m.key, d.state,
       coalesce((SELECT left(a.reply, 2000) FROM outbox.attempt a WHERE a.email = d.email
                  ORDER BY a.settled_at DESC LIMIT 1), ''),
       {bare}
  FROM (SELECT d.email, d.state FROM outbox.delivery d
         WHERE d.state IN ('in_doubt', 'dead')
           AND NOT EXISTS (SELECT FROM outbox.attempt a
                            WHERE a.email = d.email AND a.attempt = d.attempt AND a.verdict = 'resolved' OFFSET 0)
         ORDER BY d.state DESC, d.email DESC LIMIT $1) d
  JOIN outbox.email m ON m.id = d.email
 ORDER BY d.state DESC, d.email DESC
"""


# Who may not read messages is not told which of them are gone; `outbox resolve` says so in time. In two statements,
# since Postgres wants the right on every column that is named, whether it is read or not.
READS_MESSAGES: Final = "SELECT has_column_privilege('outbox.email', 'message', 'SELECT')"
BARE_OR_NOT: Final = {True: "m.message = ANY ($2::bytea[])", False: "$2::bytea[] IS NULL"}


async def read_status(connection: Any) -> Status:
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
    counts = {state: found.get(state, 0) for state in STATES}
    return Status(counts, oldest, relays, routes, pauses, editions, troubles, schedules, unserved, rates)


async def read_rates(connection: Any) -> list[RateStatus]:
    """Return the rates that mail servers take, where one is known."""
    rates: list[RateStatus] = []
    for row in await connection.fetch(RATES):
        found = found_of(row)
        if found is not None and found.rate_now is not None:
            rates.append(RateStatus(row["route"], found.rate_now, row["found_at"], found.said))
    return rates


def _trouble(key: str, state: str, said: str, bare: bool) -> Trouble:
    choices = (["--sent"] if state == "in_doubt" else []) + ([] if bare else ["--resend"]) + ["--discard"]
    return Trouble(key, state, said, suggested.command("resolve", keys=[key], after=choices[:1]), choices)
