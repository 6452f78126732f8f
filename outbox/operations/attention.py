"""The one rule that decides what needs a person. Every surface shows what `read_concerns` returns.

`outbox status`, `watch`, `doctor`, the board and the metrics ask here; `audit` and `list` classify the emails of an
edition with `OUTCOME`, which uses the same tables. What people have decided (a resolved dead letter, a cancelled email,
a waiver) no longer needs a person. Neither does what is older than `EDITIONS_FOR`: completion looks no further back.

The statements read what is open or undecided, by its indexes: none of them grows with what was ever sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final

from outbox import suggested
from outbox.database.connection import Connection
from outbox.database.locks import ALIVE, RELAY_LOCKS
from outbox.database.plans import EMAIL_OF_REPORT
from outbox.generate.schedule_state import making, times
from outbox.operations.route_rules import read_unserved
from outbox.relay.ledger import LANES

COUNT_MAX: Final = 10_000
WAITED_MAX_S: Final = 60.0  # due for so long without a living relay, an email needs a person
EDITIONS_FOR: Final = "interval '40 days'"


class Kind(StrEnum):
    """Reason why a person is needed, the gravest first."""

    IN_DOUBT = "in_doubt"
    FAILED = "failed"
    MISSING = "missing"
    UNFINISHED = "unfinished"
    EMPTY = "empty"
    ROUTE = "route"
    UNSERVED = "unserved"
    NO_RELAY = "no_relay"
    RELAY = "relay"
    SCHEDULE = "schedule"


@dataclass(frozen=True, slots=True)
class Concern:
    """One thing that needs a person. `count` is of emails or recipients, counted to `COUNT_MAX`; 0 if of neither."""

    kind: Kind
    subject: str
    """The edition, route, relay or report that it is about; '' for all emails."""
    count: int
    sentence: str
    """What is wrong, with a full stop."""
    fix: str
    """What to do: a command, or words."""

    @property
    def title(self) -> str:
        """The sentence in a few words, for a heading."""
        one, many = _TITLES[self.kind]
        return one if self.count == 1 or not many else many.format(f"{self.count:,}{'+' * (self.count >= COUNT_MAX)}")


_TITLES: Final = {
    Kind.IN_DOUBT: ("1 email is in doubt", "{} emails are in doubt"),
    Kind.FAILED: ("1 email failed", "{} emails failed"),
    Kind.MISSING: ("1 recipient has no report", "{} recipients have no report"),
    Kind.UNFINISHED: ("An edition is not finished", ""),
    Kind.EMPTY: ("An edition has no recipients", ""),
    Kind.ROUTE: ("The mail server is in trouble", ""),
    Kind.UNSERVED: ("No relay serves a route", ""),
    Kind.NO_RELAY: ("No relay is alive", ""),
    Kind.RELAY: ("A relay makes no progress", ""),
    Kind.SCHEDULE: ("A schedule fails", ""),
}


def headline(concerns: Sequence[Concern]) -> str:
    """Return the one line in which all surfaces say whether a person is needed."""
    if not concerns:
        return "Nothing needs a person."
    return f"Needs a person: {'; '.join(dict.fromkeys(_lower(one.title) for one in concerns))}."


def counts_of(concerns: Sequence[Concern]) -> dict[str, int]:
    """Return how much needs a person by kind, each kind included: emails and recipients by their number."""
    found = dict.fromkeys(map(str, Kind), 0)
    for one in concerns:
        found[one.kind] += one.count or 1
    return found


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]


@dataclass(frozen=True, slots=True)
class RouteStatus:
    """Mail server in trouble: relays connect with one probe at a time only."""

    name: str
    since: datetime
    reason: str
    failures: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Decision that a person may take: its name, the command, and what it does and risks."""

    name: str
    command: str
    effect: str


_EFFECTS: Final = {
    ("in_doubt", "--sent"): "it arrived; if it did not, nobody gets it",
    ("in_doubt", "--resend"): "it did not arrive; if it did, the recipient gets it twice",
    ("in_doubt", "--discard"): "it is not sent again, whether it arrived or not",
    ("dead", "retry"): "it is sent again, with a full set of tries; first correct what the reply names",
    ("dead", "--discard"): "it is not sent, and nothing more is to be done",
    ("expired", "retry"): "it is sent although it is late",
    ("expired", "waive"): "nothing is owed to this recipient for this edition",
    ("cancelled", "retry"): "it is sent after all",
    ("missing", "waive"): "nothing is owed to this recipient for this edition",
}


def choices_of(key: str, state: str, *, is_gone: bool = False, is_of_report: bool = True) -> list[Choice]:
    """Return the decisions about an email in this state, in the same words on every surface.

    `is_gone`: its message was removed, so that it cannot be sent again. `missing` is the state of a recipient without
    a report.
    """
    found = []
    for (of, name), effect in _EFFECTS.items():
        if of != state or (is_gone and name in ("retry", "--resend")) or (name == "waive" and not is_of_report):
            continue
        verb, after = ("resolve", [name]) if name.startswith("--") else (name, [])
        found.append(Choice(name, suggested.command(verb, keys=[key], after=after), effect))
    return found


# A pause that nobody has tried to end for a minute is obsolete: its relays are gone or use another server.
ROUTES: Final = """
SELECT name, since, reason, failures FROM outbox.route WHERE retry_at > now() - interval '1 minute' ORDER BY since
"""

# Failures about which nobody has decided, of editions that are not history, as `f`, with their delivery `d`, email `m`
# and report `r`. Each `OFFSET 0` makes the planner look up row by row, whatever the statistics say.
UNDECIDED: Final = """
outbox.failure f
 CROSS JOIN LATERAL (SELECT * FROM outbox.delivery WHERE email = f.email OFFSET 0) d
 CROSS JOIN LATERAL (SELECT id, key, report FROM outbox.email WHERE id = f.email OFFSET 0) m
  LEFT JOIN LATERAL (SELECT edition, recipient_key FROM outbox.report WHERE id = m.report OFFSET 0) r ON true
 WHERE d.state IN ('dead', 'expired')
   AND NOT EXISTS (SELECT FROM outbox.edition e
                    WHERE e.id = r.edition AND e.created_at <= now() - interval '40 days' OFFSET 0)
   AND NOT EXISTS (SELECT FROM outbox.waiver w
                    WHERE w.edition = r.edition AND w.recipient_key = r.recipient_key OFFSET 0)"""

# Recipients without a report and without a waiver, as `u`, of the edition `e`.
MISSING: Final = """
outbox.unreached u
 WHERE u.edition = e.id
   AND NOT EXISTS (SELECT FROM outbox.report r
                    WHERE r.edition = u.edition AND r.recipient_key = u.recipient_key OFFSET 0)
   AND NOT EXISTS (SELECT FROM outbox.waiver w
                    WHERE w.edition = u.edition AND w.recipient_key = u.recipient_key OFFSET 0)"""

# Recipients without a report and without a waiver of an edition `e` whose latest look was of a version before 8, which
# recorded only how many recipients there are.
UNNAMED: Final = """
greatest(e.expected - (SELECT count(*) FROM outbox.report r WHERE r.edition = e.id)
         - (SELECT count(*) FROM outbox.waiver w
             WHERE w.edition = e.id AND NOT EXISTS (
                   SELECT FROM outbox.report r
                    WHERE r.edition = w.edition AND r.recipient_key = w.recipient_key OFFSET 0)), 0)"""

# What became of the email of a report. The statement has the tables report `r`, digest_item `i`, delivery `d`, and `s`
# with the last verdict of a cancelled email. `cancelled` is what a person has decided not to send: cancelled, discarded
# or waived. Audit uses it too.
OUTCOME: Final = """
CASE WHEN i.report IS NOT NULL AND i.digest IS NULL THEN 'collected'
     WHEN d.state IN ('sent', 'in_doubt') THEN d.state
     WHEN d.state IN ('pending', 'sending') THEN 'waiting'
     WHEN d.state = 'cancelled' THEN CASE s.verdict WHEN 'suppressed' THEN 'suppressed' ELSE 'cancelled' END
     WHEN d.state = 'dead' AND NOT EXISTS (SELECT FROM outbox.failure f WHERE f.email = d.email OFFSET 0)
     THEN 'cancelled'
     WHEN d.state IN ('dead', 'expired')
          AND EXISTS (SELECT FROM outbox.waiver w
                       WHERE w.edition = r.edition AND w.recipient_key = r.recipient_key OFFSET 0)
     THEN 'cancelled'
     ELSE 'failed' END"""
LAST_VERDICT: Final = """
(SELECT a.verdict FROM outbox.attempt a WHERE a.email = d.email AND d.state = 'cancelled'
  ORDER BY a.settled_at DESC LIMIT 1)"""

# An edition `e` by what became of its recipients: each report counts once, then recipients without one. `bounced` are
# of those that are sent.
COUNTED: Final = f"""
SELECT count(*) AS made,
       count(*) FILTER (WHERE o.outcome = 'sent') AS sent,
       count(*) FILTER (WHERE o.outcome = 'waiting') AS waiting,
       count(*) FILTER (WHERE o.outcome = 'in_doubt') AS in_doubt,
       count(*) FILTER (WHERE o.outcome = 'failed') AS failed,
       count(*) FILTER (WHERE o.outcome = 'cancelled') AS cancelled,
       (SELECT count(*) FROM {MISSING}) AS missing,
       (SELECT count(*) FROM outbox.waiver w WHERE w.edition = e.id
           AND NOT EXISTS (SELECT FROM outbox.report r
                            WHERE r.edition = w.edition AND r.recipient_key = w.recipient_key OFFSET 0)) AS waived,
       count(*) FILTER (WHERE o.outcome = 'collected') AS collected,
       count(*) FILTER (WHERE o.outcome = 'suppressed') AS suppressed,
       count(*) FILTER (WHERE o.outcome = 'sent' AND o.bounced) AS bounced
  FROM (
    SELECT {OUTCOME} AS outcome,
           EXISTS (SELECT FROM outbox.bounce b
                    WHERE b.email = d.email AND b.kind IN ('hard', 'complained') OFFSET 0) AS bounced
      FROM outbox.report r
      {EMAIL_OF_REPORT}
      LEFT JOIN LATERAL {LAST_VERDICT} s ON true
     WHERE r.edition = e.id) o"""

# $1 is COUNT_MAX.
COUNTS: Final = f"""
SELECT 'in_doubt' AS kind, '' AS report, '' AS period, count(*) AS n FROM (
    SELECT FROM outbox.delivery WHERE settled_at IS NULL AND doubted_at IS NOT NULL ORDER BY due_at LIMIT $1) d
 UNION ALL
SELECT 'failed', '', '', count(*) FROM (SELECT FROM {UNDECIDED} LIMIT $1) f
 UNION ALL
SELECT 'missing', e.report, e.period, found.n
  FROM outbox.edition e CROSS JOIN LATERAL (
    SELECT CASE WHEN e.looked_at IS NULL AND e.completed_at IS NULL THEN {UNNAMED} ELSE (
           SELECT count(*) FROM (SELECT FROM {MISSING} LIMIT $1) u) END AS n) found
 WHERE e.created_at > now() - {EDITIONS_FOR} AND e.done_elsewhere_at IS NULL
 UNION ALL
SELECT 'unfinished', e.report, e.period, 1 FROM outbox.edition e
 WHERE e.expected IS NULL AND e.completed_at IS NULL
   AND e.created_at > now() - {EDITIONS_FOR} AND e.created_at < now() - interval '1 hour'
 UNION ALL
SELECT 'empty', e.report, e.period, 1 FROM outbox.edition e
 WHERE e.expected = 0 AND NOT e.may_be_empty AND e.completed_at IS NULL AND e.created_at > now() - {EDITIONS_FOR}
"""

# Living relays, with what keeps each from its work.
RELAYS: Final = f"SELECT r.id, r.host, r.trouble {ALIVE} ORDER BY r.id"

# How long the oldest email has been due. Only asked where no relay is alive.
OLDEST_DUE: Final = f"""
WITH RECURSIVE {LANES}
SELECT coalesce(extract(epoch FROM now() - min(greatest(d.due_at, timestamptz 'epoch'))), 0)::float8
  FROM lane l CROSS JOIN LATERAL (
    SELECT due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND route = l.route AND priority = l.priority AND due_at <= now()
       AND state IN ('pending', 'sending')
     ORDER BY due_at LIMIT 1) d
"""

# What failed longer ago than any period lasts belongs to a schedule that no relay follows any more.
SCHEDULES: Final = """
SELECT report, tick_at, failures, retry_at, coalesce(said, '')
  FROM outbox.schedule WHERE done_at IS NULL AND failures > 0 AND tick_at > now() - interval '32 days' ORDER BY report
"""


async def read_concerns(connection: Connection) -> list[Concern]:
    """Return all that needs a person, the gravest first; nothing if all is well."""
    found = [_counted(*row) for row in await connection.fetch(COUNTS, COUNT_MAX) if row["n"]]
    found += [_of_route(RouteStatus(*row)) for row in await connection.fetch(ROUTES)]
    for route in await read_unserved(connection):
        what, fix = route.sentence.rstrip(".").split(": ", 1)
        found.append(Concern(Kind.UNSERVED, route.route, route.waiting, f"{what}.", fix))
    relays = await connection.fetch(RELAYS, RELAY_LOCKS)
    if not relays and (waited_s := await connection.fetchval(OLDEST_DUE)) > WAITED_MAX_S:
        sentence = f"No relay is alive, and an email has been due for {waited_s:.0f} s."
        found.append(Concern(Kind.NO_RELAY, "", 0, sentence, "start `outbox relay` on every server"))
    for relay in relays:
        if relay["trouble"]:
            sentence = f"Relay {relay['id']} on {relay['host']} makes no progress: {relay['trouble'].rstrip('.')}."
            fix = "correct that; its log and `outbox doctor` say more"
            found.append(Concern(Kind.RELAY, str(relay["id"]), 0, sentence, fix))
    for row in await connection.fetch(SCHEDULES):
        sentence = f"The schedule of {row['report']} failed {times(row['failures'])}: {row[4].rstrip('.')}."
        found.append(Concern(Kind.SCHEDULE, row["report"], 0, sentence, "see `outbox schedule`"))
    return sorted(found, key=lambda one: list(Kind).index(one.kind))


def _counted(kind: str, report: str, period: str, count: int) -> Concern:
    edition = f"{report} {period}".strip()
    found = Concern(Kind(kind), edition, count, "", "")
    again = suggested.command(*making(report), suggested.option("--period", period))
    match found.kind:
        case Kind.IN_DOUBT:
            what = "the mail server may have accepted it, or not" if count == 1 else "some of them may have arrived"
            sentence = f"{found.title}: {what}."
            fix = "`outbox list --state in_doubt` lists all, and `outbox show KEY` says what each decision risks"
        case Kind.FAILED:
            sentence = f"{found.title} and will not be tried again."
            fix = "`outbox list --state dead --state expired` lists all, and `outbox show KEY` says what can be done"
        case Kind.MISSING:
            waive = suggested.command("waive", suggested.option("--edition", edition), "--why …")
            sentence = f"{found.title} in {edition}."
            audit = suggested.command("audit", suggested.word(report), suggested.word(period))
            fix = f"correct the reasons that `{audit}` names and run `{again}`, or decide with `{waive}`"
        case Kind.EMPTY:
            sentence = f"The source of {report} names no recipient for {period}, so nobody gets an email."
            fix = f"run `{again}`, which says what the reason may be, or allow it with may_be_empty = true"
        case _:
            sentence, fix = f"No run of generate has come to the end of {edition}.", f"run `{again}`"
    return replace(found, sentence=sentence, fix=fix)


def _of_route(route: RouteStatus) -> Concern:
    reason = route.reason.removeprefix(f"{route.name}: ").rstrip(".")
    since = f"{route.since:%Y-%m-%d %H:%M:%S} UTC"
    sentence = f"Route {route.name} has been failing since {since}: {reason}."
    fix = "correct what the reply names; relays keep trying, and no email is lost"
    return Concern(Kind.ROUTE, route.name, 0, sentence, fix)
