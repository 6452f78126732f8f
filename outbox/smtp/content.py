"""Mail data: a stored message as it is sent, checked, with CRLF line ends, in pieces.

A message comes from the database, where it may have been written by hand or by an older version. Before anything
parses, signs or sends it, `refusal` says why it must not be sent, and `pieces` turns each lone CR or LF into CRLF. Some
servers accept a lone LF as a line end, and `<LF>.<CR><LF>` as the end of the message, so that the rest would become a
second message (SMTP smuggling, CVE-2023-51764).

Pure and bounded: no function copies a whole message, and all are linear in its length.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

LINE_MAX: Final = 998  # octets without the CRLF: RFC 5321 §4.5.3.1.6, RFC 5322 §2.1.1
ADDRESS_MAX: Final = 320  # octets: RFC 5321 §4.5.3.1 has 64 for the local part and 255 for the domain
PIECE_BYTES: Final = 64 * 1024

NUL: Final = (
    "the message has a NUL byte, which SMTP does not allow (RFC 5321 §2.3.7), so it was not sent: "
    "remove it, and enqueue the email under another key"
)
LONG_LINE: Final = (
    f"the message has a line of more than {LINE_MAX} octets (RFC 5321 §4.5.3.1.6), so it was not sent: "
    "encode its body as quoted-printable or base64, fold its header, and enqueue the email under another key"
)
BAD_ADDRESS: Final = (
    "the {which} has a control character, a space or an angle bracket, which could be taken for another SMTP command, "
    "so it was not sent: correct the address, and enqueue the email under another key"
)
LONG_ADDRESS: Final = (
    f"the {{which}} has more than {ADDRESS_MAX} octets (RFC 5321 §4.5.3.1), so it was not sent: "
    "correct the address, and enqueue the email under another key"
)
NO_RECIPIENT: Final = "the recipient is empty, so it was not sent: enqueue the email under another key"

# C0, the space, DEL, C1, Unicode's line and paragraph separators, and the brackets around a path.
_NOT_IN_ADDRESS: Final = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029<>]")
_EMPTY_LINE: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_LINE_END: Final = (b"\r", b"\n")


def refusal(message: bytes, *, lone: int | None = None) -> str | None:
    """Return why the message must not be sent, as one sentence with the fix; None if it may be.

    `lone` is the number of its `lone_line_ends`, if the caller knows it.
    """
    if b"\0" in message:
        return NUL
    if not (lone_line_ends(message) if lone is None else lone):
        return LONG_LINE if _has_long_line(message) else None
    return LONG_LINE if any(map(_has_long_line, pieces(message))) else None


def address_refusal(sender: str, recipient: str) -> str | None:
    """Return why an envelope must not be written to MAIL and RCPT; None if it may be. `sender` may be empty."""
    for which, address in (("sender", sender), ("recipient", recipient)):
        if _NOT_IN_ADDRESS.search(address):
            return BAD_ADDRESS.format(which=which)
        if len(address) > ADDRESS_MAX or len(address.encode()) > ADDRESS_MAX:
            return LONG_ADDRESS.format(which=which)
    return None if recipient else NO_RECIPIENT


def lone_line_ends(message: bytes) -> int:
    """Return how many CR and LF belong to no CRLF. Each is one byte in the message and two on the wire."""
    return message.count(b"\r") + message.count(b"\n") - 2 * message.count(b"\r\n")


def pieces(message: bytes, begin: int = 0, *, clean: bool | None = None) -> Iterator[bytes]:
    """Yield the message from `begin` on with CRLF line ends, in pieces of at most twice `PIECE_BYTES`.

    A piece ends at a line end, unless it is the last or the line is longer than a piece. `clean` is True if the caller
    knows that there are no `lone_line_ends`.
    """
    if clean is None:
        clean = not lone_line_ends(message)
    end = len(message)
    while begin < end:
        cut = _cut(message, begin, end)
        piece = message[begin:cut]
        begin = cut
        yield piece if clean else piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


def _cut(message: bytes, begin: int, end: int) -> int:
    """Return the end of the piece that begins at `begin`, never between a CR and its LF."""
    cut = begin + PIECE_BYTES
    if cut >= end:
        return end
    last = max(message.rfind(line_end, begin, cut) for line_end in _LINE_END) + 1 or cut
    return last + 1 if message[last - 1 : last + 1] == b"\r\n" else last


def dot_stuffed(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the parts, which have CRLF line ends, with each leading dot of a line doubled (RFC 5321 §4.5.2).

    The last line is terminated; the final dot is not written.
    """
    begins_line = True
    held: bytes | None = None  # until the next part shows that it is not the last
    for part in parts:
        if not part:
            continue
        if held is not None:
            yield held
        held = part.replace(b"\n.", b"\n..") if b"\n." in part else part
        if begins_line and held.startswith(b"."):
            held = b"." + held
        begins_line = part.endswith(b"\n")
    if held is None:
        yield b"\r\n"
    else:
        yield held if begins_line else held + b"\r\n"


def header_end(message: bytes) -> int:
    """Return the offset of the body, after the empty line; the length of the message if there is no empty line."""
    if message.startswith(_LINE_END):
        return 2 if message.startswith(b"\r\n") else 1
    clean = message.find(b"\r\n\r\n")  # fast, and correct unless a lone CR or LF comes before
    found = _EMPTY_LINE.search(message, 0, len(message) if clean < 0 else clean + 4)
    return len(message) if found is None else found.end()


def header_of(message: bytes) -> bytes:
    """Return the header with CRLF line ends, and the empty line after it if there is one."""
    end = header_end(message)
    return b"".join(pieces(message[:end]))


def _has_long_line(text: bytes) -> bool:
    """Return True if a line is too long. Jump to the last line end within reach, so that most lines are skipped."""
    at, end = 0, len(text)
    while end - at > LINE_MAX:
        found = text.rfind(b"\n", at, at + LINE_MAX + len(b"\r\n"))
        if found < 0:
            return True
        at = found + 1
    return False
