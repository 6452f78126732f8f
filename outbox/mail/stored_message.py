"""Stored messages for people to read: subject, text, page and attachments, for `outbox show` and the board.

Any content of `email.message` is read within a fraction of a second, as far as the limits here and in `mime` allow:
rows written by hand or by an older version may hold anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from outbox.mail import mime

MESSAGE_MAX: Final = 32 * 1024 * 1024  # bytes that are read
TEXT_MAX: Final = 4 * 1024 * 1024  # bytes of a text or a page, decoded


@dataclass(frozen=True, slots=True)
class Attachment:
    """File in a message, or a picture that its page shows."""

    name: str
    """Name in the message, possibly "". It has no control characters, but must be escaped for HTML."""
    type: str
    size: int
    """Bytes, decoded."""
    cid: str
    """Content-ID without its brackets; "" if it has none."""
    content: Callable[[], bytes] = field(repr=False)
    """Return the decoded bytes; every call decodes them again."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """Message as far as it could be read."""

    headers: list[tuple[str, str]]
    """Names as written, values decoded and on one line each, in their order."""
    text: str | None
    html: str | None
    attachments: list[Attachment]
    notes: list[str]
    """Parts that were left out, each a clause such as `it has more than 500 parts`."""

    def header(self, name: str) -> str | None:
        """Return the value of the first header of that name, in any case; None if there is none."""
        wanted = name.lower()
        return next((value for known, value in self.headers if known.lower() == wanted), None)


def read_message(raw: bytes) -> StoredMessage:
    """Read a message. Never raises: malformed parts and parts beyond a limit are left out and named in `notes`."""
    message = mime.parse(raw[:MESSAGE_MAX])
    if len(raw) > MESSAGE_MAX:
        message.note(f"it is larger than {MESSAGE_MAX} bytes")
    bodies: dict[str, str] = {}
    attachments = []
    for part in message.parts:
        disposition, more = part.head.parameters("Content-Disposition")
        if disposition != "attachment" and part.type in ("text/plain", "text/html") and part.type not in bodies:
            if part.end - part.start > TEXT_MAX and len(part.content(TEXT_MAX + 1)) > TEXT_MAX:
                message.note(f"its {part.type} part is larger than {TEXT_MAX} bytes")
            bodies[part.type] = part.text(TEXT_MAX).replace("\r\n", "\n")
        elif part.start < part.end or disposition or len(message.parts) > 1:
            usual = "invite.ics" if part.type == "text/calendar" else ""  # an alternative has no name of its own
            attachments.append(_attachment(part, more.get("filename") or part.parameters.get("name", usual)))
    headers = [(one.name, one.text) for one in message.head.fields]
    return StoredMessage(headers, bodies.get("text/plain"), bodies.get("text/html"), attachments, message.notes)


def read_header(raw: bytes, name: str) -> str | None:
    """Return one header's value, without reading the rest; None if there is none."""
    head = mime.read_head(raw[: mime.HEAD_MAX + 1])
    return next(iter(head.values(name, at_most=1)), None)


def _attachment(part: mime.Part, name: str) -> Attachment:
    size = part.end - part.start if part.encoding not in ("base64", "quoted-printable") else len(part.content())
    cid = part.head.value("Content-ID").strip("<> ")
    return Attachment(mime.one_line(name), part.type, size, cid, part.content)
