"""An application's own emails: made here, put into the outbox in the application's own transaction.

    with Session(engine) as session, session.begin():
        session.add(user)
        outbox.enqueue(session, outbox.Email(key=f"welcome/{user.id}", sender="Shop <shop@example.com>",
                                             to=user.email, subject="Welcome", text="Hello"))

What is rolled back was never there; what is committed is sent by whichever relay comes first, once.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from outbox.mail.attachment import Attachment
from outbox.mail.header_fields import check_one_line
from outbox.mail.mailbox import Mailbox, parse_mailbox
from outbox.mail.message import build
from outbox.suggestions import did_you_mean

if TYPE_CHECKING:
    from jinja2 import Environment

Mailboxes = str | Sequence[str]

KEY_MAX: Final = 500  # characters
KEY_OCTETS_MAX: Final = 990  # in UTF-8; with `#100` it fits the column, and its index
RECIPIENTS_MAX: Final = 100
_FURTHER: Final = re.compile(r".*#[0-9]+", re.DOTALL)
# Control characters, and surrogates, which Postgres cannot hold.
_NOT_IN_KEYS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# `<report>/<period>/<recipient key>`, as generate writes it; `outbox.check_key` in SQL is the same.
_OF_REPORTS: Final = re.compile(
    r"[^/]*/[0-9]{4}-(?:W[0-9]{2}|[0-9]{2}|[0-9]{2}-[0-9]{2}|Q[1-4])/.*", re.DOTALL | re.IGNORECASE | re.ASCII
)
# Times that every client of the database can read.
_TIMES: Final = (datetime(1970, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC))
_ROUTE: Final = re.compile(r"[a-z][a-z0-9_-]*")
_FILES: Final = {
    "subject": "subject.txt.j2",
    "text": "email.txt.j2",
    "html": "email.html.j2",
    "calendar": "calendar.ics.j2",
}


class Pieces(NamedTuple):
    """Envelope, and the message around its Message-ID, which the database makes."""

    sender: str
    recipients: list[str]
    head: bytes
    domain: str
    tail: bytes


@dataclass(frozen=True, kw_only=True)
class Email:
    """One email to one or several people, whole and checked; ValueError says what cannot be sent, and the fix.

    - `key`: makes it one email, for ever: of two with one key the first is sent, whatever the second says. At most
      `KEY_MAX` characters, none of them a control character. It may not end in `#` and digits, since further recipients
      are told apart so, nor begin as those of reports do (`NAME/2026-W43/`).
    - `sender`, `to`, `cc`, `bcc`, `reply_to`: an address or `Name <user@example.com>`; several are a sequence.
      Each recipient is sent to by itself, and is refused by itself; those of `bcc` stand in no header. At most
      `RECIPIENTS_MAX` together.
    - `subject`, `text`, `html`: either body may be missing. Or `template`, the name of a directory below `templates`
      with `subject.txt.j2`, `email.txt.j2`, `email.html.j2` and `calendar.ics.j2`, rendered with `context` (Jinja; only
      html is escaped; a name that is not there is an error). What is given beside it goes before its file.
    - `calendar`: an invitation beside the bodies, an iCalendar object with its METHOD (RFC 5545, RFC 6047).
    - `attachments`: files; one with a `cid` is shown in the html by `<img src="cid:…">`.
    - `headers`: further header fields. Those that programs read, such as References and List-Unsubscribe, are folded
      and never encoded; all others may be any text on one line.
    - `send_at`, `send_before`: aware times; before the one it is not due, after the other it expires.
    - `priority`: `urgent` goes before others that wait for the same route.
    - `route`: one of the settings' routes by name, `""` is the usual one; without it the rules say it by the recipient.
    """

    key: str
    sender: str
    to: Mailboxes = ()
    cc: Mailboxes = ()
    bcc: Mailboxes = ()
    reply_to: Mailboxes = ()
    subject: str | None = None
    text: str | None = None
    html: str | None = None
    calendar: str | bytes | None = None
    template: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    templates: str | PathLike[str] = "templates"
    attachments: Sequence[Attachment] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    send_at: datetime | None = None
    send_before: datetime | None = None
    priority: Literal["normal", "urgent"] = "normal"
    route: str | None = None
    pieces: Pieces = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        said = self._rendered() if self.template is not None else {}
        subject, text, html, calendar = (
            given if given is not None else said.get(name)
            for name, given in (
                ("subject", self.subject), ("text", self.text), ("html", self.html), ("calendar", self._calendar()),
            )
        )  # fmt: skip
        if subject is None:
            raise ValueError("An email needs a subject; an empty one is said as subject=''.")
        object.__setattr__(self, "pieces", self._pieces(subject, text, html, calendar))

    def _check(self) -> None:
        self._check_key()
        if self.priority not in ("normal", "urgent"):
            raise ValueError(f"The priority {self.priority!r} is unknown; write normal or urgent.")
        if self.route and not _ROUTE.fullmatch(self.route):
            raise ValueError(f"The route {self.route!r} is not a valid name; write one such as bulk.")
        for name in ("sender", "to", "cc", "bcc", "reply_to"):
            if getattr(self, name) is None:  # as a row gives it where nobody wrote an address
                raise ValueError(f"{name} is None; give an address, such as user@example.com, or leave it out.")
        if self.subject is not None:
            check_one_line("The subject", self.subject)
        for name, value in self.headers.items():
            check_one_line(f"The header {name}", value)
        self._check_times()

    def _check_times(self) -> None:
        for name, at in (("send_at", self.send_at), ("send_before", self.send_before)):
            if at is not None and at.utcoffset() is None:
                raise ValueError(f"{name} has no timezone; give an aware time, such as datetime.now(UTC).")
            if at is not None and not _TIMES[0] <= at < _TIMES[1]:
                raise ValueError(f"{name} is {at.isoformat()}; give a time from 1970 to 2999, or leave it out.")
        if self.send_at is not None and self.send_before is not None and self.send_before <= self.send_at:
            raise ValueError("send_before is not after send_at, so it could never be sent.")

    def _check_key(self) -> None:
        if not self.key.strip() or len(self.key) > KEY_MAX or _NOT_IN_KEYS.search(self.key):
            raise ValueError(
                f"An email needs a key of at most {KEY_MAX} characters, without control characters, such as "
                "order-4711/receipt."
            )
        if len(self.key.encode()) > KEY_OCTETS_MAX:
            raise ValueError(f"The key has more than {KEY_OCTETS_MAX} octets in UTF-8; write a shorter one.")
        if _OF_REPORTS.fullmatch(self.key):
            raise ValueError(
                f"The key {self.key!r} is one of a report's email: REPORT/PERIOD/… is kept for reports; begin it "
                "otherwise, such as invoice/4711/2026-11."
            )
        if _FURTHER.fullmatch(self.key):
            raise ValueError(
                f"The key {self.key!r} ends in # and digits, as those of further recipients do; end it otherwise."
            )

    def _rendered(self) -> dict[str, str]:
        """What the template's files say; those that are not there are left out."""
        from jinja2 import TemplateError, TemplateNotFound

        from outbox.reports.jinja import is_html
        from outbox.reports.template_errors import explain

        made, directory = {}, Path(self.templates)
        _check_files(directory, str(self.template))
        for name, file in _FILES.items():
            if getattr(self, name) is not None:
                continue
            try:
                environment = _environment(directory, escapes=is_html(file))
                template = environment.get_template(f"{self.template}/{file}")
            except TemplateNotFound:
                continue
            except TemplateError as error:
                raise ValueError(f"The template {self.template} cannot be used: {explain(error)}") from error
            try:
                made[name] = template.render(self.context)
            except Exception as error:
                raise ValueError(f"The template {self.template} failed: {explain(error)}") from error
        if "subject" in made:
            made["subject"] = " ".join(made["subject"].split())
        return made

    def _calendar(self) -> str | None:
        """Return the calendar as text; libraries give it as bytes in UTF-8 (RFC 5545 §3.1.4)."""
        if not isinstance(self.calendar, bytes):
            return self.calendar
        try:
            return self.calendar.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"The calendar is not UTF-8 ({error.reason}); encode it so (RFC 5545 §3.1.4).") from None

    def _pieces(self, subject: str, text: str | None, html: str | None, calendar: str | None) -> Pieces:
        sender = parse_mailbox(self.sender)
        to, cc, bcc, reply_to = (_mailboxes(some) for some in (self.to, self.cc, self.bcc, self.reply_to))
        recipients = list(dict.fromkeys(one.address for one in (*to, *cc, *bcc)))
        if not recipients:
            raise ValueError("An email needs a recipient: give to, cc or bcc.")
        if len(recipients) > RECIPIENTS_MAX or len(reply_to) > RECIPIENTS_MAX:
            raise ValueError(
                f"An email has at most {RECIPIENTS_MAX} recipients, and as many reply_to; make several emails of it."
            )
        domain = sender.address.rpartition("@")[2]
        stand_in = f"{secrets.token_hex(16)}@{domain}"
        message = build(
            sender=sender, recipient=to, cc=cc, reply_to=reply_to, subject=subject, text=text, html=html,
            date=datetime.now(UTC), message_id=stand_in, headers=self.headers, attachments=self.attachments,
            calendar=calendar,
        )  # fmt: skip
        head, _, tail = message.partition(stand_in.encode())
        return Pieces(sender.address, recipients, head, domain, tail)


def _check_files(directory: Path, template: str) -> None:
    """Return if there is a directory for this template, and no file in it with a misspelt name.

    Raises:
        ValueError: there is none, or a file in it would be ignored.

    """
    from outbox.reports.template_files import misspelt_in

    try:
        misspelt = misspelt_in(directory, template)
    except OSError:
        wanted = f"{directory}/{template}/email.txt.j2"
        others = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
        guess = did_you_mean(template, others)
        raise ValueError(f"There is no template {template} in {directory}{guess}; write {wanted}.") from None
    for name, meant in misspelt.items():
        raise ValueError(
            f"{directory / template / name}: outbox reads no file of this name (did you mean {meant}?); rename it."
        )


def _mailboxes(said: Mailboxes) -> list[Mailbox]:
    return [parse_mailbox(one) for one in ((said,) if isinstance(said, str) else said)]


@cache
def _environment(directory: Path, *, escapes: bool) -> "Environment":
    from outbox.reports.jinja import FileLoader, environment

    return environment([FileLoader(directory, checks_trust=False)], escapes=escapes)
