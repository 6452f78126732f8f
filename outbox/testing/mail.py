"""Email as a test reads it: parsed by the standard library, as a recipient's program would."""

from dataclasses import dataclass, field
from datetime import datetime
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default
from functools import cached_property
from typing import NamedTuple, cast

from outbox.sandbox.smtp_sink import Accepted


class File(NamedTuple):
    """Attachment: its name, its MIME type, and its bytes."""

    name: str
    type: str
    content: bytes


class Mail:
    """Email of either kind: `raw`, the RFC 5322 bytes, and what they say."""

    raw: bytes

    @cached_property
    def headers(self) -> EmailMessage:
        """Return the parsed message: `mail.headers["Reply-To"]`, and all else that `EmailMessage` has."""
        return BytesParser(policy=default).parsebytes(self.raw)

    @property
    def subject(self) -> str:
        """Return the subject in plain words, without its encoding."""
        return str(self.headers["Subject"] or "")

    @property
    def to(self) -> list[str]:
        """Return the addresses of the To header, without their names."""
        header = self.headers["To"]
        return [one.addr_spec for one in header.addresses] if header is not None else []

    @property
    def text(self) -> str:
        """Return the plain body, with plain line feeds; "" if there is none."""
        return self._body("plain")

    @property
    def html(self) -> str:
        """Return the HTML body; "" if there is none."""
        return self._body("html")

    @property
    def attachments(self) -> list[File]:
        """Return the attached files, and those that the HTML shows (`cid:…`)."""
        files = [part for part in self.headers.walk() if part.get_filename() is not None]
        return [
            File(part.get_filename() or "", part.get_content_type(), cast("bytes", part.get_payload(decode=True)))
            for part in files
        ]

    def _body(self, kind: str) -> str:
        part = self.headers.get_body((kind,))
        return "" if part is None else str(part.get_content()).replace("\r\n", "\n")


@dataclass(frozen=True)
class Received(Mail):
    """Email that the mail server accepted: the envelope (`sender`, `recipients`) and the message.

    A recipient of `bcc` stands in the envelope only.
    """

    sender: str
    recipients: list[str]
    raw: bytes = field(repr=False)

    @classmethod
    def of(cls, accepted: Accepted) -> "Received":
        """Return the email of what the sink accepted."""
        return cls(accepted.sender, list(accepted.recipients), accepted.message)


@dataclass(frozen=True)
class Stored(Mail):
    """Email in the outbox for one recipient, with the state of its delivery.

    `state` is `pending`, `sending`, `sent`, `in_doubt`, `dead`, `expired` or `cancelled`; `attempts` counts tries;
    `reply` is what the mail server said last, "" before the first try. `page` is a report's page, else None.
    """

    key: str
    sender: str
    recipient: str
    state: str
    attempts: int
    reply: str
    due_at: datetime
    page: str | None = field(repr=False)
    raw: bytes = field(repr=False)
