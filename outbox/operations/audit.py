"""Audit of one edition: the outcome of each recipient's email, by name. It changes nothing.

An edition is well when everything is sent or decided, by the same rule as everywhere (`attention`).

The report's source names the expected recipients, as for generate; the outcomes are read from the same snapshot.
An email counts for a recipient if its key, its envelope and its report are as expected, not by its key alone.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ARRAY, Text, bindparam, text

from outbox.database.values import storable
from outbox.generate.edition import find_edition
from outbox.generate.recipients import WINDOW_MAX, Recipient, checked, label_of, windows
from outbox.generate.session import GenerateSession
from outbox.generate.source import source_of
from outbox.generate.waiver import read_waived
from outbox.operations.email_columns import last_reply
from outbox.operations.wording import state_label
from outbox.reports.period import Period
from outbox.settings import DIGEST, Settings

IN_DOUBT, FAILED, WAITING, MISSING = NEEDED = ("in_doubt", "failed", "waiting", "missing")
SUPPRESSED, CANCELLED, WAIVED = SETTLED = ("suppressed", "cancelled", "waived")
KINDS = (*NEEDED, *SETTLED)
BOUNCED = "bounced"
MISADDRESSED, DETACHED = "misaddressed", "without its report"  # states of emails that are not the report's


@dataclass(frozen=True, slots=True)
class Unsent:
    """Recipient whose email is not sent: the state of its delivery, or `missing`, and the last reply or reason."""

    key: str
    address: str
    state: str
    said: str


@dataclass(slots=True)
class Unsents:
    """Unsent emails of one kind: all are counted, and the first `names_max` (or all) are named."""

    names_max: int | None
    count: int = 0
    named: list[Unsent] = field(default_factory=list)

    def add(self, unsent: Unsent) -> None:
        """Count it, and name it if there is room."""
        self.count += 1
        if self.names_max is None or len(self.named) < self.names_max:
            self.named.append(unsent)


@dataclass(slots=True)
class Audit:
    """Outcome of an edition. `made` is false if no run ever opened it; `reports` is the number of its reports.

    Every expected recipient is counted once: as sent, or as one of `KINDS`. Those of `SETTLED` are decided: the address
    is on the suppression list, or a person cancelled or discarded the email, or waived it. `bounced` are of those that
    are sent: a server took them, and they came back.
    """

    report: str
    period: Period
    made: bool
    reports: int
    names_max: int | None
    may_be_empty: bool
    done_elsewhere_at: datetime | None
    """When a person declared that another system made it."""
    unsent: dict[str, Unsents] = field(init=False)
    bounced: Unsents = field(init=False)
    expected: int = field(default=0, init=False)
    generated: int = field(default=0, init=False)
    """Expected recipients who have a report or an email."""
    sent: int = field(default=0, init=False)
    _reported: int = field(default=0, init=False)
    """Expected recipients who have a report."""

    def __post_init__(self) -> None:
        self.unsent = {kind: Unsents(self.names_max) for kind in KINDS}
        self.bounced = Unsents(self.names_max)

    @property
    def name(self) -> str:
        """Return the name for people: `progress 2026-W48`."""
        return f"{self.report} {self.period.key}"

    @property
    def left(self) -> int:
        """Return how many reports are those of former recipients."""
        return max(self.reports - self._reported, 0)

    def count_unusable(self, recipient: Recipient, *, is_waived: bool) -> None:
        """Count an expected recipient whose key cannot be stored, so that there is no report."""
        self.expected += 1
        kind = WAIVED if is_waived else MISSING
        self.unsent[kind].add(replace(_missing(recipient), state=kind))

    def count(self, recipient: Recipient, row: Any, objection: tuple[str, str] | None) -> None:
        """Count an expected recipient by what became of the email, unless there is an objection to it."""
        self.expected += 1
        self._reported += row.reported
        self.generated += row.state is not None
        key, address = recipient.key, row.recipient or storable(recipient.email)
        if row.waived is not None and (not row.reported or row.outcome == CANCELLED):
            self.unsent[WAIVED].add(Unsent(key, address, WAIVED, row.waived))
        elif objection is not None:
            self.unsent[FAILED].add(Unsent(key, storable(recipient.email), *objection))
        elif row.state == "sent":
            self.sent += 1
            if row.said is not None:
                self.bounced.add(Unsent(key, row.recipient, BOUNCED, row.said))
        elif row.state is None:
            self.unsent[MISSING].add(_missing(recipient))
        elif row.suppressed is not None:
            self.unsent[SUPPRESSED].add(Unsent(key, address, SUPPRESSED, row.suppressed))
        else:
            kind = WAITING if row.outcome == "collected" else row.outcome
            self.unsent[kind].add(Unsent(key, address, row.state, row.said or ""))

    @property
    def is_well(self) -> bool:
        """Return True if each expected recipient's email is sent or settled; False if no run opened the edition.

        Of an edition that another system made, the emails that outbox has made count, and no recipient is missing.
        """
        if self.done_elsewhere_at is not None:
            return not self._open
        has_recipients = self.expected > 0 or self.may_be_empty
        return self.made and has_recipients and self.sent + self._settled == self.expected

    @property
    def _open(self) -> dict[str, int]:
        """Return how many emails are neither sent nor decided, by kind."""
        kinds = NEEDED if self.done_elsewhere_at is None else (IN_DOUBT, FAILED, WAITING)
        return {kind: self.unsent[kind].count for kind in kinds if self.unsent[kind].count}

    @property
    def _settled(self) -> int:
        return sum(self.unsent[kind].count for kind in SETTLED)

    @property
    def sentence(self) -> str:
        """Return whether all is well, in one sentence."""
        return self._problem or self._success

    @property
    def _problem(self) -> str | None:
        parts = ", ".join(f"{count:,} {state_label(kind)}" for kind, count in self._open.items())
        missed = sum(self._open.values())
        if self.done_elsewhere_at is not None:
            which = f"{missed:,} of the {self.generated:,} emails that outbox made of {self.name}"
            return f"Not well: {which} are not sent: {parts}; the edition was done elsewhere." if missed else None
        if not self.made:
            command = DIGEST if self.report == DIGEST else f"generate {self.report}"
            return f"Not well: {self.name} was never generated; run `outbox {command} --period {self.period.key}`."
        if not (self.expected or self.may_be_empty):
            return (
                f"Not well: the source of {self.name} names no recipient, and its settings do not allow that; "
                f"`outbox generate {self.report} --period {self.period.key}` says what the reason may be."
            )
        if not self.is_well:
            return f"Not well: {missed:,} of {self.expected:,} emails of {self.name} are not sent: {parts}."
        return None

    @property
    def _success(self) -> str:
        if self.done_elsewhere_at is not None:
            at = f"{self.done_elsewhere_at:%Y-%m-%d %H:%M} UTC"
            return f"All is well: {self.name} was done elsewhere, as declared on {at}, so nothing more is to be sent."
        if not self.expected:
            return f"All is well: the source of {self.name} names no recipient, so nothing was to be sent."
        if self._settled == self.unsent[SUPPRESSED].count != 0:
            but = f"all but {self._settled:,} of its {self.expected:,} recipients, who are on the suppression list"
            return f"All is well: {self.name} is sent to {but}."
        if self._settled:
            parts = [f"{self.unsent[kind].count:,} {kind}" for kind in SETTLED if self.unsent[kind].count]
            but = f"all but {self._settled:,} of its {self.expected:,} recipients: {', '.join(parts)}"
            return f"All is well: {self.name} is sent to {but}."
        return f"All is well: {self.name} is sent to all of its {self.expected:,} recipients."

    def as_json(self) -> dict[str, Any]:
        """Return the counts at the top level, the names beside them; times as ISO 8601 in UTC."""
        return {
            "report": self.report,
            "period": self.period.key,
            "starts_at": self.period.starts_at,
            "ends_at": self.period.ends_at,
            "made": self.made,
            "expected": self.expected,
            "generated": self.generated,
            "sent": self.sent,
            **{kind: found.count for kind, found in self.unsent.items()},
            BOUNCED: self.bounced.count,
            "done_elsewhere_at": self.done_elsewhere_at,
            "no_longer_expected": self.left,
            "is_well": self.is_well,
            "sentence": self.sentence,
            "names": {
                kind: [asdict(one) for one in found.named]
                for kind, found in {**self.unsent, BOUNCED: self.bounced}.items()
            },
        }


async def audit(settings: Settings, name: str, period_key: str | None = None, *, names_max: int | None = None) -> Audit:
    """Compare the recipients of the source with what the outbox holds, in one snapshot that nothing can be written in.

    Without `period_key` it is the period that a generate would make at this moment. Memory holds a window of
    recipients, all keys and the names. A key that comes twice counts once, as for generate.

    Raises:
        OutboxError: the settings, the source or the database make it impossible; the sentence says which.

    """
    settings.require("database_url")
    report = settings.report(name)
    async with GenerateSession.open(settings, application="outbox audit") as session:
        source = await source_of(settings, name, session.queries)
        await session.use_timezone(report.timezone)
        async with session.snapshot():
            async with session.ours() as connection:
                edition, period = await find_edition(connection, name, report, period_key)
            (reports,) = (await session.fetch(REPORTS, {"edition": edition}))[0]
            waived, elsewhere_at = frozenset[str](), None
            if edition is not None:
                waived = await read_waived(session, edition)
                elsewhere_at = (await session.fetch(ELSEWHERE, {"edition": edition}))[0][0]
            found = Audit(name, period, edition is not None, reports, names_max, report.is_empty_allowed, elsewhere_at)
            expected = Expected(_sender(settings), has_reports=reports > 0, waived=waived)
            async for window in windows(source.recipients(period), WINDOW_MAX):
                await _look(session, edition, found, window, expected)
    return found


@dataclass(frozen=True, slots=True)
class Expected:
    """Conditions for an email to be one of the edition. Without a `sender` in the settings any sender is accepted.

    If the edition has no reports at all, retention has removed them, and emails may be without a report. `waived` are
    the keys of the recipients to whom nothing is owed.
    """

    sender: str | None
    has_reports: bool
    waived: frozenset[str]

    def objection(self, recipient: Recipient, row: Any) -> tuple[str, str] | None:
        """Return the state and the reason if the email is not the one that this recipient is due; None if it is."""
        if row.email is None:
            return None
        try:
            address = checked(recipient).email
        except ValueError as error:
            return MISADDRESSED, f"{_email(row)} stands for a recipient whose address cannot be used: {error}"
        if row.recipient != address:
            return MISADDRESSED, f"{_email(row)} goes to {row.recipient} and not to {address}"
        if self.sender is not None and row.sender != self.sender:
            return MISADDRESSED, f"{_email(row)} is from {row.sender} and not from {self.sender}"
        if not row.belongs and (row.of_report or self.has_reports):
            return DETACHED, f"{_email(row)} belongs to {'another' if row.of_report else 'no'} report"
        return None


def _email(row: Any) -> str:
    """Return the key and the state of an email as text."""
    return f"the email {row.email_key} ({state_label(row.state)})"


def _sender(settings: Settings) -> str | None:
    return None if settings.sender is None else settings.sender_mailbox.address


ELSEWHERE: Final = text("SELECT done_elsewhere_at FROM outbox.edition WHERE id = :edition")
REPORTS: Final = text("SELECT count(*) FROM outbox.report WHERE edition = CAST(:edition AS integer)")

# Through the email's key, which stays when the report has been deleted. A delivery that is not there although
# its report or email is has no state that could be trusted, so it is not sent. A report that is collected has the
# email of the digest that took it up. `belongs`: the email is the report's; `of_report`: it is some report's.
LOOK: Final = text(f"""
SELECT n.key, r.id IS NOT NULL AS reported, m.id AS email, m.key AS email_key, m.recipient, m.sender,
       m.report IS NOT NULL AS of_report, coalesce(m.report = coalesce(i.digest, r.id), false) AS belongs,
       CASE WHEN i.report IS NOT NULL AND i.digest IS NULL THEN 'collected'
            WHEN r.id IS NOT NULL OR m.id IS NOT NULL THEN coalesce(d.state, 'without a delivery') END AS state,
       CASE WHEN i.report IS NOT NULL AND i.digest IS NULL THEN 'it waits for the next digest'
            WHEN d.paused IS NOT NULL THEN 'held back while ' || d.paused || ' is paused'
            WHEN d.state <> 'sent'
            THEN coalesce({last_reply("d.email")}, '')
            ELSE (SELECT left(a.reply, 2000) FROM outbox.attempt a
                   WHERE a.email = d.email AND a.verdict = 'bounced' AND EXISTS (SELECT FROM outbox.bounce b
                         WHERE b.email = d.email AND b.kind IN ('hard', 'complained') OFFSET 0)
                   ORDER BY a.settled_at DESC, a.attempt DESC LIMIT 1)
        END AS said,
       CASE WHEN i.report IS NOT NULL AND i.digest IS NULL
            THEN coalesce(outbox.suppressed(i.address, e.report), outbox.suppressed(i.address, 'digest'))
            WHEN d.state = 'cancelled'
            THEN (SELECT CASE a.verdict WHEN 'suppressed' THEN left(a.reply, 2000) END FROM outbox.attempt a
                   WHERE a.email = d.email ORDER BY a.settled_at DESC, a.attempt DESC LIMIT 1)
        END AS suppressed,
       CASE WHEN r.id IS NOT NULL
            THEN coalesce((SELECT o.outcome FROM outbox.report_outcome o
                            WHERE o.report = r.id AND o.email IS NOT DISTINCT FROM m.id OFFSET 0), 'failed')
            WHEN m.id IS NOT NULL
            THEN coalesce((SELECT o.outcome FROM outbox.delivery_outcome o WHERE o.email = m.id OFFSET 0), 'failed')
        END AS outcome,
       (SELECT left(w.who || ' decided that nothing is owed' || coalesce(', because ' || nullif(w.why, ''), ''), 2000)
          FROM outbox.waiver w
         WHERE w.edition = CAST(:edition AS integer) AND w.recipient_key = n.key) AS waived
  FROM unnest(:keys) AS n (key)
  LEFT JOIN LATERAL (SELECT id, edition, recipient_key FROM outbox.report
                      WHERE edition = CAST(:edition AS integer) AND recipient_key = n.key OFFSET 0) r ON true
  LEFT JOIN outbox.edition e ON e.id = r.edition
  LEFT JOIN LATERAL (SELECT report, address, digest FROM outbox.digest_item WHERE report = r.id OFFSET 0) i ON true
  LEFT JOIN LATERAL (
    SELECT own.id, own.key, own.report, own.sender, own.recipient FROM outbox.email own
     WHERE own.key = :prefix || n.key AND i.digest IS NULL
     UNION ALL
    SELECT its.id, its.key, its.report, its.sender, its.recipient FROM outbox.email its WHERE its.report = i.digest
  ) m ON true
  LEFT JOIN LATERAL (SELECT email, state, paused, attempt FROM outbox.delivery WHERE email = m.id OFFSET 0) d ON true
""").bindparams(bindparam("keys", type_=ARRAY(Text)))


async def _look(
    session: GenerateSession, edition: int | None, found: Audit, window: Iterable[Recipient], expected: Expected
) -> None:
    """Count a window of recipients. A key that comes twice in it counts once."""
    wanted: dict[str, Recipient] = {}
    for recipient in window:
        if recipient.key and storable(recipient.key) == recipient.key:
            wanted.setdefault(recipient.key, recipient)
        else:
            found.count_unusable(recipient, is_waived=label_of(recipient) in expected.waived)
    prefix = f"{found.report}/{found.period.key}/"
    rows = await session.fetch(LOOK, {"edition": edition, "prefix": prefix, "keys": list(wanted)})
    rows_by_key = {row.key: row for row in rows}
    for key, recipient in wanted.items():  # in the order of the source
        row = rows_by_key[key]
        found.count(recipient, row, expected.objection(recipient, row))


def _missing(recipient: Recipient) -> Unsent:
    """Return a recipient without a report, with the reason if key or address cannot be used."""
    said = ""
    try:
        checked(recipient)
    except ValueError as error:
        said = str(error)
    return Unsent(storable(recipient.key) or "(no key)", storable(recipient.email), MISSING, said)
