"""The one rule that decides what needs a person. Every surface shows what `concerns_of` returns.

`outbox status`, `watch`, `doctor`, the board and the metrics ask here, about a snapshot. Emails, recipients and
editions that need a person are in the view `outbox.needs_attention`; here routes, relays and schedules are added, and
the words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from outbox import suggestions
from outbox.mail.delivery_state import DeliveryState
from outbox.operations.snapshot import ATTENTION_MAX, Attention, FailingRoute, FailingSchedule, LivingRelay, Snapshot
from outbox.settings import command_of

WAITED_MAX_S: Final = 60.0  # due for so long without a living relay, an email needs a person


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
    """One thing that needs a person. `count` is of emails or recipients, up to `ATTENTION_MAX`; 0 if of neither."""

    kind: Kind
    subject: str
    """The edition, route, relay or report that it is about; '' for all emails."""
    count: int
    sentence: str
    """The problem, in a sentence with a full stop."""
    fix: str
    """The fix: a command, or words."""

    @property
    def title(self) -> str:
        """Return the sentence in a few words, for a heading."""
        one, many = _TITLES[self.kind]
        return (
            one if self.count == 1 or not many else many.format(f"{self.count:,}{'+' * (self.count >= ATTENTION_MAX)}")
        )


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
    """Return one line that says if a person is needed; all surfaces show it."""
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
class Choice:
    """Decision that a person may take: its name, the command, and what it does and risks."""

    name: str
    command: str
    effect: str


_EFFECTS: Final = {
    (DeliveryState.IN_DOUBT, "--sent"): "it arrived; if it did not, nobody gets it",
    (DeliveryState.IN_DOUBT, "--resend"): "it did not arrive; if it did, the recipient gets it twice",
    (DeliveryState.IN_DOUBT, "--discard"): "it is not sent again, whether it arrived or not",
    (DeliveryState.DEAD, "retry"): "it is sent again, with a full set of tries; first correct what the reply names",
    (DeliveryState.DEAD, "--discard"): "it is not sent, and nothing more is to be done",
    (DeliveryState.EXPIRED, "retry"): "it is sent although it is late",
    (DeliveryState.EXPIRED, "waive"): "nothing is owed to this recipient for this edition",
    (DeliveryState.CANCELLED, "retry"): "it is sent after all",
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
        found.append(Choice(name, suggestions.command(verb, keys=[key], after=after), effect))
    return found


def concerns_of(snapshot: Snapshot) -> list[Concern]:
    """Return all that needs a person, the gravest first; nothing if all is well."""
    return sorted(_concerns(snapshot), key=lambda one: list(Kind).index(one.kind))


def _concerns(snapshot: Snapshot) -> Iterator[Concern]:
    yield from map(_counted, snapshot.attention)
    yield from map(_of_route, snapshot.routes)
    for route in snapshot.unserved:
        what, fix = route.sentence.rstrip(".").split(": ", 1)
        yield Concern(Kind.UNSERVED, route.route, route.waiting, f"{what}.", fix)
    if not snapshot.relays and snapshot.oldest_due_s > WAITED_MAX_S:
        sentence = f"No relay is alive, and an email has been due for {snapshot.oldest_due_s:.0f} s."
        yield Concern(Kind.NO_RELAY, "", 0, sentence, "start `outbox relay` on every server")
    yield from (_of_relay(relay, relay.trouble) for relay in snapshot.relays if relay.trouble)
    yield from map(_of_schedule, snapshot.schedules)


def _of_relay(relay: LivingRelay, trouble: str) -> Concern:
    sentence = f"Relay {relay.id} on {relay.host} makes no progress: {trouble.rstrip('.')}."
    return Concern(Kind.RELAY, str(relay.id), 0, sentence, "correct that; its log and `outbox doctor` say more")


def _of_schedule(schedule: FailingSchedule) -> Concern:
    sentence = (
        f"The schedule of {schedule.report} failed {suggestions.times(schedule.failures)}: {schedule.said.rstrip('.')}."
    )
    return Concern(Kind.SCHEDULE, schedule.report, 0, sentence, "see `outbox schedule`")


def _counted(one: Attention) -> Concern:
    report, period, count = one.report, one.period, one.count
    edition = f"{report} {period}".strip()
    found = Concern(Kind(one.kind), edition, count, "", "")
    again = suggestions.command(*command_of(report), suggestions.option("--period", period))
    match found.kind:
        case Kind.IN_DOUBT:
            what = "the mail server may have accepted it, or not" if count == 1 else "some of them may have arrived"
            sentence = f"{found.title}: {what}."
            fix = "`outbox list --state in_doubt` lists all, and `outbox show KEY` says what each decision risks"
        case Kind.FAILED:
            sentence = f"{found.title} and will not be tried again."
            fix = "`outbox list --state dead --state expired` lists all, and `outbox show KEY` says what can be done"
        case Kind.MISSING:
            waive = suggestions.command("waive", suggestions.option("--edition", edition), "--why …")
            sentence = f"{found.title} in {edition}."
            audit = suggestions.command("audit", suggestions.word(report), suggestions.word(period))
            fix = f"correct the reasons that `{audit}` names and run `{again}`, or decide with `{waive}`"
        case Kind.EMPTY:
            sentence = f"The source of {report} names no recipient for {period}, so nobody gets an email."
            fix = f"run `{again}`, which says what the reason may be, or allow it with may_be_empty = true"
        case _:
            sentence, fix = f"No run of generate has come to the end of {edition}.", f"run `{again}`"
    return replace(found, sentence=sentence, fix=fix)


def _of_route(route: FailingRoute) -> Concern:
    reason = route.reason.removeprefix(f"{route.name}: ").rstrip(".")
    since = f"{route.since:%Y-%m-%d %H:%M:%S} UTC"
    sentence = f"Route {route.name} has been failing since {since}: {reason}."
    fix = "correct what the reply names; relays keep trying, and no email is lost"
    return Concern(Kind.ROUTE, route.name, 0, sentence, fix)
