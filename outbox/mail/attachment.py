"""Attachments of an email, and their parts of the message.

The standard library's `email` would write them differently: it does not repeat the name in Content-Type, where Outlook
looks for it, and its bytes may change with the version of Python.
"""

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self
from urllib.parse import quote

from outbox.mail.body_encoding import base64_lines
from outbox.mail.header_fields import ENCODED_WORD_MAX, encoded_words, one_line, runs

_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*(; [!-~ ]+)?")
_TYPE_MAX, _NAME_MAX = 200, 255  # characters
_CONTENT_ID = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.@-]{1,200}")
_HAS_NAME = re.compile(r";\s*name\*?[0-9*]*\s*=", re.IGNORECASE)
_SEPARATORS = re.compile(r"[/\\]")
# What hides the end of a file's name, such as .exe (Unicode Standard Annex 9, §2).
_DIRECTIONS = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


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
        """Return a file as an attachment; without a type it is guessed from the name. OSError if it cannot be read."""
        from mimetypes import guess_type

        there = Path(path)
        return cls(there.name, there.read_bytes(), type or guess_type(there.name)[0] or "application/octet-stream", cid)


def file_name(text: str) -> str:
    """Return a file's name as others may store it: without path separators (RFC 2183 §2.3) and control characters."""
    return one_line(_SEPARATORS.sub("_", _DIRECTIONS.sub("", text)))


def attachment_part(attachment: Attachment) -> bytes:
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
    return "\r\n".join(lines).encode("ascii") + base64_lines(attachment.content)


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
