"""Everything that is known about one email: its facts, its state, each try and each decision.

The token of its report, the only key to the page, is in the message alone. No message can make this fail or hang: it is
read by `mail.stored_message`, whose limits hold for any bytes.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from outbox import suggestions
from outbox.database.connection import Connection
from outbox.database.pause_list import Pause, read_pauses
from outbox.database.values import storable
from outbox.errors import OutboxError
from outbox.mail.delivery_state import DeliveryState
from outbox.mail.removed_message import REMOVED
from outbox.mail.stored_message import StoredMessage, read_header, read_message
from outbox.operations.attention import Choice, choices_of
from outbox.operations.email_columns import DUE_AT
from outbox.operations.suppression_list import remedy
from outbox.operations.waive import read_absence
from outbox.operations.wording import removal_label

# In these states an email would be sent, or could be sent again.
MAY_BE_SENT: Final = (DeliveryState.PENDING, DeliveryState.CANCELLED, DeliveryState.EXPIRED, DeliveryState.DEAD)


@dataclass(frozen=True, slots=True)
class Try:
    """One line of an email's trail: a try of a relay, or a decision, which has no relay."""

    attempt: int
    verdict: str
    relay: int | None
    host: str | None
    pid: int | None
    reply: str
    marked_at: datetime | None
    settled_at: datetime


@dataclass(frozen=True, slots=True)
class Story:
    """Email from its making on. `due_at` is null if it is not due by itself; `gone` is why its bytes are gone."""

    key: str
    sender: str
    to: str
    message_id: str
    report: str | None
    period: str | None
    recipient: str | None
    title: str | None
    subject: str | None
    size: int
    """Size of the message in bytes."""
    gone: str | None
    created_at: datetime
    made_by: str | None
    """The process that made it, as `host, pid 4711`."""
    state: str
    attempts: int
    relay: int | None
    host: str | None
    paused: str | None
    due_at: datetime | None
    send_before: datetime | None
    marked_at: datetime | None
    settled_at: datetime | None
    doubted_at: datetime | None
    route: str
    """Route that it takes; '' is the usual one."""
    urgent: bool
    tries: list[Try]
    pauses: list[Pause]
    """Pauses that hold it back."""
    suppressed: str | None
    """Reason why no email goes to its address now."""
    message: bytes

    def as_json(self) -> dict[str, Any]:
        """Return all but the bytes; times as ISO 8601 in UTC."""
        return {name: value for name, value in asdict(self).items() if name != "message"}

    @property
    def remedies(self) -> list[str]:
        """Return the commands that a person may type in its present state."""
        if self.suppressed and self.state in MAY_BE_SENT:
            return [remedy(self.to, self.suppressed, self.report)]
        if self.state == DeliveryState.PENDING:
            return [one.remedy for one in self.pauses] + [suggestions.command("cancel", keys=[self.key])]
        return [choice.command for choice in self.choices]

    @property
    def choices(self) -> list[Choice]:
        """Return the decisions that a person may take in its present state."""
        is_of_report = self.report is not None
        return choices_of(self.key, self.state, is_gone=self.gone is not None, is_of_report=is_of_report)

    def whole(self) -> bytes:
        """Return the message as it is sent.

        Raises:
            OutboxError: it is gone.

        """
        if self.gone:
            raise OutboxError(f"{self.key} cannot be shown: {self.gone}.")
        return self.message

    def content(self) -> StoredMessage:
        """Return what can be read of the message; its `notes` say what was left out.

        Raises:
            OutboxError: it is gone.

        """
        return read_message(self.whole())

    def part(self, kind: str) -> str:
        """Return the text (`plain`) or the page (`html`) of the message, decoded.

        Raises:
            OutboxError: it has none, or is gone.

        """
        content = self.content()
        found = content.text if kind == "plain" else content.html
        return found if found is not None else _none(self.key, kind)


def _none(key: str, kind: str) -> str:
    shown = suggestions.command("show", keys=[key], after=["--eml -"])
    raise OutboxError(f"{key} has no {kind} part; `{shown}` shows all that it has.")


STORY: Final = f"""
SELECT m.id, m.key, m.sender, m.recipient, m.message_id, m.message, m.created_at, m.made_by,
       e.report, e.period, r.recipient_key, r.title,
       coalesce(d.state, 'without a delivery') AS state, coalesce(d.attempt, 0) AS attempts,
       d.relay, l.host, d.paused,
       {DUE_AT} AS due_at,
       d.send_before, d.marked_at, d.settled_at, d.doubted_at, coalesce(d.route, '') AS route,
       coalesce(d.priority > 0, false) AS urgent, outbox.suppressed(m.recipient, e.report) AS suppressed
  FROM outbox.email m
  LEFT JOIN outbox.delivery d ON d.email = m.id
  LEFT JOIN outbox.relay l ON l.id = d.relay
  LEFT JOIN outbox.report r ON r.id = m.report LEFT JOIN outbox.edition e ON e.id = r.edition
 WHERE m.key = $1
"""

TRIES: Final = """
SELECT a.attempt, a.verdict, a.relay, l.host, l.pid, left(a.reply, 10000) AS reply, a.marked_at, a.settled_at
  FROM outbox.attempt a LEFT JOIN outbox.relay l ON l.id = a.relay
 WHERE a.email = $1 ORDER BY a.settled_at, a.attempt
"""


async def read_story(connection: Connection, key: str) -> Story:
    """Read all that the database has about an email, of one moment.

    Raises:
        OutboxError: there is none of that key.

    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        row = await connection.fetchrow(STORY, key) if storable(key) == key else None
        if row is None:
            reason = await read_absence(connection, key)
            raise OutboxError(reason or f"{key} is no email's key; {_nearest(key)} finds it.")
        tries = [Try(*found) for found in await connection.fetch(TRIES, row["id"])]
        pauses = await read_pauses(connection) if row["state"] == DeliveryState.PENDING else []
    known = {name: value for name, value in row.items() if name not in ("id", "recipient", "recipient_key")}
    return Story(
        **known,
        to=row["recipient"],
        recipient=row["recipient_key"],
        subject=_subject(row["message"]),
        size=len(row["message"]),
        gone=removal_label(row["message"]),
        tries=tries,
        pauses=[one for one in pauses if one.report in ("", row["report"])],
    )


def _subject(message: bytes) -> str | None:
    return None if message in REMOVED else read_header(message, "Subject") or ""


def _nearest(key: str) -> str:
    """Return the command that most likely finds the email: by an address, or by the report of a mistyped key."""
    if "@" in key and "/" not in key:
        return f"`{suggestions.command('list', suggestions.option('--to', key))}`"
    report, _, rest = key.partition("/")
    if rest:
        return f"`{suggestions.command('list', suggestions.option('--report', report))}`, or --to with the address,"
    return "`outbox list --to ADDRESS`"
