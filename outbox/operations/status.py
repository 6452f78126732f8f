"""State of the fleet, read once and whole: the snapshot with all counts, and by name what needs a person."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from outbox import suggestions
from outbox.database.connection import Connection
from outbox.database.pause_list import Pause, read_pauses
from outbox.mail.delivery_state import DeliveryState
from outbox.mail.removed_message import REMOVED
from outbox.operations.attention import Choice, Concern, choices_of, concerns_of, headline
from outbox.operations.deferrals import Deferral, read_deferrals
from outbox.operations.email_columns import last_reply
from outbox.operations.email_counts import read_waiting
from outbox.operations.route_rules import Unserved
from outbox.operations.snapshot import (
    EDITIONS_FOR,
    Edition,
    FailingRoute,
    FailingSchedule,
    LivingRelay,
    counted,
    read_outcomes,
    read_snapshot,
    snapshot_of,
)
from outbox.relay.rate_limit import FOUND, found_of

EDITIONS_MAX: Final = 10
NAMED_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class RateStatus:
    """Rate that the mail server of a route takes, found from what it refused; the fleet sends at it."""

    route: str
    per_s: float
    """Emails a second of all relays together, at this moment."""
    since: datetime
    """Moment at which it was last exceeded."""
    said: str
    """Reply that showed it."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Email, or recipient without a report (`missing`), that needs a person, with the last reply or the reason."""

    key: str
    state: str
    said: str
    command: str
    """Shows all that is known of it, and changes nothing."""
    choices: list[Choice]
    """Decisions that a person may take."""


@dataclass(frozen=True, slots=True)
class Status:
    """Everything that `outbox status` shows, of one moment."""

    counts: dict[str, int]
    oldest_due_s: float
    relays: list[LivingRelay]
    routes: list[FailingRoute]
    pauses: list[Pause]
    editions: list[Edition]
    troubles: list[Trouble]
    schedules: list[FailingSchedule] = field(default_factory=list)
    """Only those that failed."""
    unserved: list[Unserved] = field(default_factory=list)
    rates: list[RateStatus] = field(default_factory=list)
    deferrals: list[Deferral] = field(default_factory=list)
    """Emails that wait after a try, by the reply."""
    concerns: list[Concern] = field(default_factory=list)
    """All that needs a person."""
    in_flight: Mapping[int, int] = field(default_factory=dict)
    """Number of emails in flight by relay."""

    @property
    def limiting_rates(self) -> list[RateStatus]:
        """Return the rates except those of servers that accept no mail, as a relay reports with the same reply."""
        troubles = [relay.trouble for relay in self.relays if relay.trouble]
        return [rate for rate in self.rates if not any(rate.said in trouble for trouble in troubles)]

    @property
    def attention(self) -> str:
        """Return one line that says if a person is needed."""
        return headline(self.concerns)

    def as_json(self) -> dict[str, Any]:
        """Return the counts at the top level, the rest beside them; times as ISO 8601 in UTC."""
        rest = {name: value for name, value in asdict(self).items() if name not in ("counts", "in_flight")}
        relays = [_relay_as_json(relay, self.in_flight.get(relay.id, 0)) for relay in self.relays]
        editions = [_edition_as_json(edition) for edition in self.editions]
        return {**self.counts, **rest, "relays": relays, "editions": editions, "attention": self.attention}


def _relay_as_json(relay: LivingRelay, in_flight: int) -> dict[str, Any]:
    return {
        "id": relay.id,
        "host": relay.host,
        "pid": relay.pid,
        "version": relay.version,
        "started_at": relay.started_at,
        "in_hand": in_flight,
        "trouble": relay.trouble,
        "stale": relay.stale,
        "route": relay.route,
    }


def _edition_as_json(edition: Edition) -> dict[str, Any]:
    assert edition.outcome is not None
    named = {"report": edition.report, "period": edition.period, "expected": edition.expected}
    return {**named, **asdict(edition.outcome), "done_elsewhere_at": edition.done_elsewhere_at}


# Reads every delivery that there ever was.
COUNTS: Final = "SELECT state, count(*) AS n FROM outbox.delivery GROUP BY state"

RATES: Final = f"SELECT route, found_at, {FOUND} FROM outbox.pace WHERE found_rate IS NOT NULL ORDER BY route"

# What is in doubt and what failed, each in the order in which it was made, the newest first. $1 is how many.
TROUBLES: Final = f"""
SELECT m.key, t.state, m.report IS NOT NULL,
       coalesce({last_reply("t.email")}, ''),
       m.bare
  FROM (
    (SELECT email, state FROM outbox.needs_attention WHERE kind = 'in_doubt' ORDER BY email DESC LIMIT $1)
    UNION ALL
    (SELECT email, state FROM outbox.needs_attention WHERE kind = 'failed' ORDER BY state, email DESC LIMIT $1)
  ) t
 CROSS JOIN LATERAL (SELECT key, report, {{bare}} AS bare FROM outbox.email m WHERE m.id = t.email OFFSET 0) m
 ORDER BY array_position(array['in_doubt', 'dead', 'expired'], t.state), t.email DESC LIMIT $1
"""

# Recipients without a report, the newest editions first. $1 is how many: no edition is read further, since the index of
# `missing_report` has their order. Which editions count is the rule of `needs_attention`.
MISSING: Final = f"""
SELECT e.report || '/' || e.period || '/' || a.recipient_key, a.reason
  FROM outbox.edition e CROSS JOIN LATERAL (
    SELECT recipient_key, reason FROM outbox.missing_report WHERE edition = e.id ORDER BY recipient_key LIMIT $1) a
 WHERE e.created_at > now() - {EDITIONS_FOR} AND e.done_elsewhere_at IS NULL
 ORDER BY e.starts_at DESC, e.id DESC, a.recipient_key LIMIT $1
"""


# A role that may not read messages does not see which of them are gone; `outbox resolve` says so in time. There are two
# statements, since Postgres requires the right on every column that is named, read or not.
READS_MESSAGES: Final = "SELECT has_column_privilege('outbox.email', 'message', 'SELECT')"
BARE_OR_NOT: Final = {True: "m.message = ANY ($2::bytea[])", False: "$2::bytea[] IS NULL"}


async def read_status(connection: Connection) -> Status:
    """Read the whole picture from one snapshot, except the locks, which are always of this moment."""
    async with snapshot_of(connection):
        snapshot = await read_snapshot(connection, editions_max=EDITIONS_MAX)
        found: dict[str, int] = dict(await connection.fetch(COUNTS))
        return Status(
            counts={state.value: found.get(state, 0) for state in DeliveryState},
            oldest_due_s=snapshot.oldest_due_s,
            relays=snapshot.relays,
            routes=snapshot.routes,
            pauses=await read_pauses(connection),
            editions=counted(snapshot.editions, await read_outcomes(connection, [one.id for one in snapshot.editions])),
            troubles=await _read_troubles(connection),
            schedules=snapshot.schedules,
            unserved=snapshot.unserved,
            rates=await read_rates(connection),
            deferrals=await read_deferrals(connection),
            concerns=concerns_of(snapshot),
            in_flight=(await read_waiting(connection)).in_flight,
        )


async def _read_troubles(connection: Connection) -> list[Trouble]:
    statement = TROUBLES.format(bare=BARE_OR_NOT[await connection.fetchval(READS_MESSAGES)])
    found = [_trouble(*row) for row in await connection.fetch(statement, NAMED_MAX, REMOVED)]
    missing = await connection.fetch(MISSING, NAMED_MAX - len(found))
    return found + [_trouble(key, "missing", True, reason, False) for key, reason in missing]


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
    return Trouble(key, state, said, suggestions.command("show", keys=[key]), choices)
