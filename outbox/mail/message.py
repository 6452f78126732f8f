"""RFC 5322 bytes of one email; knows nothing of reports, rows or servers.

The same arguments give the same bytes, for ever: a re-send must be recognisable as the same mail (same
Message-ID *and* Date). The output is pure ASCII, but for an address that is not, which stands there in UTF-8 (RFC
6532). It has CRLF line ends and is not dot-stuffed: `conversation` does that.

The standard library's `email` package is not used. It costs 40 ms to import and folds and encodes in Python
what `binascii` does in C; the tests hold every message against its parsers instead.
"""

import hashlib
import re
from binascii import b2a_base64, b2a_qp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Self
from urllib.parse import quote

from outbox.mail.header_fields import (
    ENCODED_WORD_MAX,
    LINE_MAX,
    SUBJECT_MAX,
    check_header,
    default_fields,
    encoded_words,
    one_line,
    runs,
    text_field,
)
from outbox.mail.mailbox import Mailbox, check_address, comparable, mailbox_header, mailboxes_header, parse_sender
from outbox.mail.structured_fields import extra_fields

# Those of `mailbox` are part of this module's names.
__all__ = ["Attachment", "Mailbox", "build", "check_address", "comparable", "parse_sender"]

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_BRACKETED_ID = re.compile(r"<?([!-;=?-~]{1,900})>?")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*(; [!-~ ]+)?")
_TYPE_MAX, _NAME_MAX = 200, 255  # characters
_CONTENT_ID = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.@-]{1,200}")
_HAS_NAME = re.compile(r";\s*name\*?[0-9*]*\s*=", re.IGNORECASE)
_SEPARATORS = re.compile(r"[/\\]")
# What hides the end of a file's name, such as .exe (Unicode Standard Annex 9, §2).
_DIRECTIONS = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_METHOD = re.compile(r"^METHOD(?:;[^:\r\n]*)?:[ \t]*([A-Za-z-]{1,40})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Attachment:
    """File that goes with an email. With a `cid` it is shown in the html instead: `<img src="cid:logo">` (RFC 2392).

    `name` is no path: separators become `_`, and control characters are taken out, those of text direction, too. `type`
    is a MIME type, `text/csv; charset=utf-8`. ValueError for a name, type or cid that cannot be written.
    """

    name: str
    content: bytes
    type: str = "application/octet-stream"
    cid: str | None = None

    def __post_init__(self) -> None:
        if not file_name(self.name).strip(". ") or len(self.name) > _NAME_MAX:
            raise ValueError(f"An attachment needs a name of at most {_NAME_MAX} characters, such as report.pdf.")
        if (
            len(self.type) > _TYPE_MAX
            or not _TYPE.fullmatch(self.type)
            or self.type.partition("/")[0].lower() in ("multipart", "message")
        ):
            raise ValueError(f"{self.type!r} cannot be an attachment's type; write one such as application/pdf.")
        if self.cid is not None and not _CONTENT_ID.fullmatch(self.cid):
            raise ValueError(f"{self.cid!r} cannot be a cid; use letters, digits, dots and hyphens.")

    @classmethod
    def read(cls, path: str | PathLike[str], *, type: str | None = None, cid: str | None = None) -> Self:  # noqa: A002
        """A file as it is; its type is guessed from its name if none is given. OSError if it cannot be read."""
        from mimetypes import guess_type

        there = Path(path)
        return cls(there.name, there.read_bytes(), type or guess_type(there.name)[0] or "application/octet-stream", cid)


def file_name(text: str) -> str:
    """Return a file's name as others may store it: without path separators (RFC 2183 §2.3) and control characters."""
    return one_line(_SEPARATORS.sub("_", _DIRECTIONS.sub("", text)))


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
    """The whole message, from the first header to the CRLF at its end: both bodies as multipart/alternative, or the
    one that there is; pictures with a cid beside the html (multipart/related), an iCalendar object as the last
    alternative, other attachments after all (mixed).

    `recipient` may be none at all (then nothing is said of it) or several, who see each other.

    Names, the subject and extra values go through `one_line`; in names any white space is a space. Bodies come back as
    they were given; nothing is added at their end, but every line end (CRLF, CR or LF) is CRLF. Lone surrogates become
    `?`. `message_id` and `list_id` may come with or without angle brackets. An extra value is written in the syntax of
    its field (`structured`).

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
    """The header fields and content of the outermost part, and in it all others."""
    pictures = [one for one in attachments if one.cid is not None]
    files = [one for one in attachments if one.cid is None]
    if text is None and html is None:
        raise ValueError("An email needs a text or an html body.")
    shown = _part("html", html) if html is not None else b""
    if pictures:
        if html is None:
            raise ValueError(f"The picture {pictures[0].cid} has no html to be shown in.")
        kind = 'related; type="text/html"'
        shown = _multipart(kind, [shown, *(_attached(one) for one in pictures)], message_id)
    bodies = [*([_part("plain", text)] if text is not None else []), *([shown] if shown else [])]
    if calendar is not None:
        calendar = calendar.lstrip("\ufeff\r\n ")
        bodies.append(_part("calendar", calendar, f"; method={calendar_method(calendar)}"))
    whole = bodies[0] if len(bodies) == 1 else _multipart("alternative", bodies, message_id)
    if files:
        whole = _multipart("mixed", [whole, *(_attached(one) for one in files)], message_id)
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
    boundary = _boundary(message_id if kind == "alternative" else f"{kind} {message_id}")
    delimiter = b"--" + boundary.encode("ascii")
    # What is in a line of its own in a parameter's list is folded there (RFC 5322 §2.2.3).
    subtype, _, parameters = kind.partition("; ")
    head = f'Content-Type: multipart/{subtype}; boundary="{boundary}"' + (f";\r\n {parameters}" if parameters else "")
    pieces = [head.encode("ascii"), b"\r\n\r\n"]
    for part in parts:
        pieces += (delimiter, b"\r\n", part)
    return b"".join((*pieces, delimiter, b"--\r\n"))


def _attached(attachment: Attachment) -> bytes:
    """Return a file as a part, base64 (RFC 2045 §6.8).

    Its name is in Content-Disposition after RFC 2183 and RFC 2231, and in Content-Type as an encoded word, which no
    standard allows and Outlook, for one, reads: it does not know RFC 2231.
    """
    disposition = "attachment" if attachment.cid is None else "inline"
    name = file_name(attachment.name)
    named = [] if _HAS_NAME.search(attachment.type) else [_plain_name(name)]
    lines = [
        ";\r\n ".join([f"Content-Type: {attachment.type}", *named]),
        "Content-Transfer-Encoding: base64",
        ";\r\n ".join([f"Content-Disposition: {disposition}", *_file_name(name)]),
        *([] if attachment.cid is None else [f"Content-ID: <{attachment.cid}>"]),
        "\r\n",
    ]
    return "\r\n".join(lines).encode("ascii") + _base64(attachment.content)


_CHARSET = "utf-8''"  # RFC 2231 §4: charset, no language


def _is_plain(name: str) -> bool:
    return name.isascii() and len(name) <= ENCODED_WORD_MAX and "=?" not in name


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _plain_name(name: str) -> str:
    """Return the parameter with a file's name for mail programs that do not know RFC 2231."""
    return f"name={_quoted(name)}" if _is_plain(name) else 'name="' + "\r\n ".join(encoded_words(name)) + '"'


def _file_name(name: str) -> list[str]:
    """Return the parameters with a file's name: quoted if it is ASCII and short, else percent-encoded, in pieces."""
    if _is_plain(name):
        return [f"filename={_quoted(name)}"]
    characters = [quote(character.encode("utf-8", "replace"), safe="") for character in name]
    pieces = list(runs(characters, ENCODED_WORD_MAX - len("filename*99*=") - len(_CHARSET)))
    if len(pieces) == 1:
        return [f"filename*={_CHARSET}{pieces[0]}"]
    return [f"filename*{number}*={_CHARSET if number == 0 else ''}{run}" for number, run in enumerate(pieces)]


def _boundary(message_id: str) -> str:
    """A boundary that no body can contain: quoted-printable and base64 never write `=_` (RFC 2045 §6.7)."""
    return "=_" + hashlib.blake2b(message_id.encode("utf-8", "replace"), digest_size=12).hexdigest()


def _part(subtype: str, content: str, parameters: str = "") -> bytes:
    """Return a body part up to and including the CRLF that belongs to the next boundary (RFC 2046 §5.1.1)."""
    if "\r" in content:
        content = content.replace("\r\n", "\n").replace("\r", "\n")
    raw = content.replace("\n", "\r\n").encode("utf-8", "replace")
    encoding, body = "quoted-printable", _quoted_printable(raw)
    groups = -(-len(raw) // 3)
    if 0 < groups * 4 + 2 * -(-groups // (LINE_MAX // 4)) < len(body):
        encoding, body = "base64", _base64(raw)
    head = f"Content-Type: text/{subtype}; charset=utf-8{parameters}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return head.encode("ascii") + body


_OVERLONG = re.compile(rb"(?m)^(.{74,75})(=(?:20|09)\r)$")


def _quoted_printable(raw: bytes) -> bytes:
    # With a CRLF at the end b2a_qp knows the line ends for its soft breaks, and protects trailing blanks.
    body = b2a_qp(raw + b"\r\n", quotetabs=False, istext=True)
    if b"=20\r\n" in body or b"=09\r\n" in body:
        # b2a_qp counts the blank before it protects it, so that such a line can come out one byte too long.
        body = _OVERLONG.sub(rb"\1=\r\n\2", body)
    # A lone dot after a soft break escapes b2a_qp, which protects those of the text. Stuffing in `send` makes it
    # safe; here it costs nothing to keep it from ever being one line of its own.
    body = body.replace(b"\r\n.\r\n", b"\r\n=2E\r\n")
    if body.startswith(b"From "):
        body = b"=46rom =\r\n" + body[5:]
    # Old mailbox formats write ">From" for a line that begins with "From ", which breaks a DKIM signature.
    # The soft break keeps the line short; what follows it may again begin with "From ", hence the loop.
    while b"\r\nFrom " in body:
        body = body.replace(b"\r\nFrom ", b"\r\n=46rom =\r\n")
    return body


def _base64(raw: bytes) -> bytes:
    encoded = b2a_base64(raw, newline=False)
    return b"".join([encoded[at : at + LINE_MAX] + b"\r\n" for at in range(0, len(encoded), LINE_MAX)])


def _rfc5322_date(date: datetime) -> str:
    """The date in its own offset; one with seconds (a local mean time) cannot be written and becomes UTC."""
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
