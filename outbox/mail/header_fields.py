"""Header fields: permitted names, text encoded for a field, and folded lines.

It knows no message: `message` writes its own fields with it, `structured_fields` those that others ask for.
"""

import re
from binascii import b2a_base64
from collections.abc import Iterable, Iterator, Sequence
from typing import AnyStr

LINE_MAX = 76  # RFC 2047 §2 and RFC 2045 §6.7 for encoded text; RFC 5322 §2.1.1 would allow 78
HARD_LINE_MAX = 998  # octets; RFC 5322 §2.1.1, without the CRLF
HEADER_MAX = 65_536  # octets of a message's header; the database has the same bound
SUBJECT_MAX = 998  # characters
ENCODED_WORD_MAX = 66  # leaves room for "Subject: " on the first line

# C0, DEL, C1, Unicode's line and paragraph separators: whatever a reader may take for the end of a header.
BREAKS = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+")
# What no single line of text has; a tab is white space.
_NOT_IN_LINE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
FIELD_NAME = re.compile(r"[!-9;-~]{1,64}")
OURS = frozenset({
    "from", "to", "cc", "bcc", "reply-to", "subject", "date", "message-id", "list-id", "mime-version", "content-type",
    "content-transfer-encoding",
})  # fmt: skip
# Every email has these unless the caller gives the field another value. RFC 3834: out-of-office robots keep silent; the
# same for Exchange, but it still sends non-delivery reports, which "All" would suppress ([MS-OXCMAIL] 2.1.3.2.20).
DEFAULT_FIELDS = {"Auto-Submitted": "auto-generated", "X-Auto-Response-Suppress": "OOF, AutoReply"}
# What is written by those who sign and carry a message: nobody who makes one may say it.
CARRIERS = frozenset({"dkim-signature", "return-path", "delivered-to", "received", "x-outbox-redirected-from"})

# RFC 2047 §5 (3): inside a display name only these may stand for themselves; so they serve for subjects too.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!*+-/")
_Q = tuple("_" if byte == ord(" ") else chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in range(256))


def one_line(text: str) -> str:
    """The text as a header can hold it: every run of spaces, line breaks and control characters is one space.

    At the ends there is no white space of any kind, no-break spaces included.
    """
    return BREAKS.sub(" ", text).strip()


def default_fields(given: Iterable[str]) -> list[str]:
    """Return the lines of the default fields, without those whose names are given."""
    names = {name.lower() for name in given}
    return [f"{name}: {value}" for name, value in DEFAULT_FIELDS.items() if name.lower() not in names]


def check_one_line(what: str, text: str) -> None:
    """Raise ValueError if a text has a line break or another control character; a tab is allowed."""
    if _NOT_IN_LINE.search(text):
        raise ValueError(f"{what} has a line break or another control character; write it on one line.")


def text_field(field: str, text: str, *, word_max: int) -> str:
    """Return an unstructured field: ASCII that can be folded at its spaces as it is, other text as encoded words."""
    text = one_line(text)
    if len(field) + len(": ") + len(text) <= LINE_MAX and text.isascii() and "=?" not in text:
        return f"{field}: {text}"
    words = text.split(" ")
    if not text.isascii() or "=?" in text or max(map(len, words)) > word_max:
        words = encoded_words(text)
    return folded(field, words)


def check_header(header: bytes) -> None:
    """Raise ValueError if the header is too large, or has a line that is too long, for servers and parsers."""
    if len(header) > HEADER_MAX:
        raise ValueError(f"The header has {len(header):,} octets, more than {HEADER_MAX:,}; shorten its fields.")
    longest = max(header.split(b"\r\n"), key=len)
    if len(longest) > HARD_LINE_MAX:
        name = longest.partition(b":")[0][:76].decode("ascii", "replace")
        raise ValueError(
            f"A line of the header has more than {HARD_LINE_MAX} octets (it begins with {name!r}); put spaces into the "
            "value, where it can be folded, or shorten it."
        )


def folded(field: str, words: Sequence[str]) -> str:
    """The header with its words spread over lines of at most LINE_MAX, as far as single words allow."""
    line = f"{field}: {words[0]}"
    lines = []
    for word in words[1:]:
        if len(line) + 1 + len(word) > LINE_MAX:
            lines.append(line)
            line = ""
        line += f" {word}"
    return "\r\n".join([*lines, line])


def encoded_words(text: str) -> list[str]:
    """Return RFC 2047 encoded words: Q where it is shorter, else B; never cut inside a character."""
    characters = [character.encode("utf-8", "replace") for character in text]
    quoted = ["".join([_Q[byte] for byte in character]) for character in characters]
    room = ENCODED_WORD_MAX - len("=?utf-8?q??=")
    if sum(map(len, quoted)) < -(-sum(map(len, characters)) // 3) * 4:
        return [f"=?utf-8?q?{run}?=" for run in runs(quoted, room)]
    return [f"=?utf-8?b?{b2a_base64(run, newline=False).decode()}?=" for run in runs(characters, room // 4 * 3)]


def runs(pieces: Sequence[AnyStr], size_max: int) -> Iterator[AnyStr]:
    """The pieces joined in order into runs of at most `size_max`."""
    run = pieces[0]
    for piece in pieces[1:]:
        if len(run) + len(piece) > size_max:
            yield run
            run = piece
        else:
            run += piece
    yield run
