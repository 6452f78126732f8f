"""Message of one email as RFC 5322 bytes; imports nothing about reports, rows or servers.

The same arguments always give the same bytes: a message that is sent again must be recognisable as the same one (same
Message-ID *and* Date). The output is ASCII, except for an address that is not, which is written in UTF-8 (RFC 6532).
Lines end with CRLF and are not dot-stuffed: `smtp.content` does that.

The standard library's `email` is not used. Its import costs 40 ms, and it folds and encodes in Python what `binascii`
does in C. The tests compare every message with its parsers.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from outbox.mail.attachment import Attachment, attachment_part
from outbox.mail.body_encoding import boundary, text_part
from outbox.mail.header_fields import (
    ENCODED_WORD_MAX,
    SUBJECT_MAX,
    check_header,
    default_fields,
    text_field,
)
from outbox.mail.mailbox import Mailbox, mailbox_header, mailboxes_header
from outbox.mail.structured_fields import extra_fields

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_BRACKETED_ID = re.compile(r"<?([!-;=?-~]{1,900})>?")
_METHOD = re.compile(r"^METHOD(?:;[^:\r\n]*)?:[ \t]*([A-Za-z-]{1,40})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)


def build(
    *,
    sender: Mailbox,
    recipient: Mailbox | Sequence[Mailbox],
    subject: str,
    text: str | None,
    html: str | None,
    date: datetime,
    message_id: str,
    cc: Sequence[Mailbox] = (),
    reply_to: Sequence[Mailbox] = (),
    list_id: str | None = None,
    headers: Mapping[str, str] = {},
    attachments: Sequence[Attachment] = (),
    calendar: str | None = None,
) -> bytes:
    """Return the whole message, from the first header to the CRLF at its end.

    Two bodies are multipart/alternative; a single one stands alone. Pictures with a cid stand beside the html
    (multipart/related), an iCalendar object is the last alternative, other attachments follow (multipart/mixed).

    `recipient` may be several mailboxes, which see each other, or none: then there is no To.

    Names, the subject and extra values go through `one_line`; in names any white space is a space. Bodies come back as
    they were given; nothing is added at their end, but every line end (CRLF, CR or LF) is CRLF. Lone surrogates become
    `?`. `message_id` and `list_id` may come with or without angle brackets. An extra value is written in the syntax of
    its field (`structured_fields`).

    Raises:
        ValueError: the date is naive; an address, an id or the name of a header cannot be written; an extra header is
            one that this function writes itself, or is given twice; the subject has more than SUBJECT_MAX characters;
            or `check_header` refuses the header.

    """
    if len(subject) > SUBJECT_MAX:
        raise ValueError(f"The subject has {len(subject):,} characters, more than {SUBJECT_MAX}; shorten it.")
    lines = [
        mailbox_header("From", sender),
        *mailboxes_header("To", (recipient,) if isinstance(recipient, Mailbox) else recipient),
        *mailboxes_header("Cc", cc),
        *mailboxes_header("Reply-To", reply_to),
        text_field("Subject", subject, word_max=ENCODED_WORD_MAX),
        f"Date: {_rfc5322_date(date)}",
        f"Message-ID: {_bracketed(message_id)}",
        *([] if list_id is None else [f"List-Id: {_bracketed(list_id)}"]),  # RFC 2919
        *default_fields(headers),
        *extra_fields(headers),
        "MIME-Version: 1.0",
        "",
    ]
    header = "\r\n".join(lines).encode()
    check_header(header)
    return header + _body(text, html, calendar, attachments, message_id)


def _body(
    text: str | None, html: str | None, calendar: str | None, attachments: Sequence[Attachment], message_id: str
) -> bytes:
    """Return the header fields and content of the outermost part, with all other parts in it."""
    pictures = [one for one in attachments if one.cid is not None]
    files = [one for one in attachments if one.cid is None]
    if text is None and html is None:
        raise ValueError("An email needs a text or an html body.")
    shown = text_part("html", html) if html is not None else b""
    if pictures:
        if html is None:
            raise ValueError(f"The picture {pictures[0].cid} has no html to be shown in.")
        kind = 'related; type="text/html"'
        shown = _multipart(kind, [shown, *(attachment_part(one) for one in pictures)], message_id)
    bodies = [*([text_part("plain", text)] if text is not None else []), *([shown] if shown else [])]
    if calendar is not None:
        calendar = calendar.lstrip("\ufeff\r\n ")
        bodies.append(text_part("calendar", calendar, f"; method={calendar_method(calendar)}"))
    whole = bodies[0] if len(bodies) == 1 else _multipart("alternative", bodies, message_id)
    if files:
        whole = _multipart("mixed", [whole, *(attachment_part(one) for one in files)], message_id)
    return whole


def calendar_method(calendar: str) -> str:
    """Return the METHOD of an iCalendar object, such as REQUEST, which its part has to repeat (RFC 6047 §2.4).

    ValueError if it is no such object, or has no METHOD or two.
    """
    methods: set[str] = {found.upper() for found in _METHOD.findall(calendar)}
    if not calendar[:15].upper() == "BEGIN:VCALENDAR" or len(methods) != 1:
        raise ValueError(
            "The calendar is no iCalendar object with one METHOD, without which it is no invitation; begin it with "
            "BEGIN:VCALENDAR and write METHOD:REQUEST into it, or give it as an Attachment."
        )
    return methods.pop()


def _multipart(kind: str, parts: Sequence[bytes], message_id: str) -> bytes:
    line = boundary(message_id if kind == "alternative" else f"{kind} {message_id}")
    delimiter = b"--" + line.encode("ascii")
    # What is in a line of its own in a parameter's list is folded there (RFC 5322 §2.2.3).
    subtype, _, parameters = kind.partition("; ")
    head = f'Content-Type: multipart/{subtype}; boundary="{line}"' + (f";\r\n {parameters}" if parameters else "")
    pieces = [head.encode("ascii"), b"\r\n\r\n"]
    for part in parts:
        pieces += (delimiter, b"\r\n", part)
    return b"".join((*pieces, delimiter, b"--\r\n"))


def _rfc5322_date(date: datetime) -> str:
    """Return the date in its own offset; an offset with seconds (local mean time) cannot be written and becomes UTC."""
    offset = date.utcoffset()
    if offset is None:
        raise ValueError(f"A message needs a date with a timezone, and {date.isoformat()} has none.")
    minutes, seconds = divmod(offset.total_seconds(), 60)
    if seconds:
        date, minutes = date.astimezone(UTC), 0
    hours, minutes = divmod(abs(int(minutes)), 60)
    sign = "-" if offset.days < 0 and not seconds else "+"
    day = f"{_DAYS[date.weekday()]}, {date.day:02} {_MONTHS[date.month - 1]} {date.year:04}"
    return f"{day} {date.hour:02}:{date.minute:02}:{date.second:02} {sign}{hours:02}{minutes:02}"


def _bracketed(identifier: str) -> str:
    match = _BRACKETED_ID.fullmatch(identifier)
    if match is None:
        raise ValueError(f"{identifier!r} cannot be an id in a header: use printable ASCII without spaces.")
    return f"<{match[1]}>"
