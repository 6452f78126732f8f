"""Transfer encodings of the parts of a message: quoted-printable and base64, by `binascii`.

No line of their output is longer than a line may be, begins with "From ", or is a lone dot, and none can be taken for
a boundary.
"""

import hashlib
import re
from binascii import b2a_base64, b2a_qp

from outbox.mail.header_fields import LINE_MAX


def boundary(message_id: str) -> str:
    """Return a boundary that no body can contain: quoted-printable and base64 never write `=_` (RFC 2045 §6.7)."""
    return "=_" + hashlib.blake2b(message_id.encode("utf-8", "replace"), digest_size=12).hexdigest()


def text_part(subtype: str, content: str, parameters: str = "") -> bytes:
    """Return a text as a part, up to and including the CRLF that belongs to the next boundary (RFC 2046 §5.1.1)."""
    if "\r" in content:
        content = content.replace("\r\n", "\n").replace("\r", "\n")
    raw = content.replace("\n", "\r\n").encode("utf-8", "replace")
    encoding, body = "quoted-printable", _quoted_printable(raw)
    groups = -(-len(raw) // 3)
    if 0 < groups * 4 + 2 * -(-groups // (LINE_MAX // 4)) < len(body):
        encoding, body = "base64", base64_lines(raw)
    head = f"Content-Type: text/{subtype}; charset=utf-8{parameters}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return head.encode("ascii") + body


_OVERLONG = re.compile(rb"(?m)^(.{74,75})(=(?:20|09)\r)$")


def _quoted_printable(raw: bytes) -> bytes:
    # With a CRLF at the end b2a_qp knows the line ends for its soft breaks, and protects trailing blanks.
    body = b2a_qp(raw + b"\r\n", quotetabs=False, istext=True)
    if b"=20\r\n" in body or b"=09\r\n" in body:
        # b2a_qp counts the blank before it protects it, so that such a line can come out one byte too long.
        body = _OVERLONG.sub(rb"\1=\r\n\2", body)
    # A lone dot after a soft break escapes b2a_qp, which protects those of the text. Dot-stuffing makes it
    # safe; here it costs nothing to keep it from ever being one line of its own.
    body = body.replace(b"\r\n.\r\n", b"\r\n=2E\r\n")
    if body.startswith(b"From "):
        body = b"=46rom =\r\n" + body[5:]
    # Old mailbox formats write ">From" for a line that begins with "From ", which breaks a DKIM signature.
    # The soft break keeps the line short; what follows it may again begin with "From ", hence the loop.
    while b"\r\nFrom " in body:
        body = body.replace(b"\r\nFrom ", b"\r\n=46rom =\r\n")
    return body


def base64_lines(raw: bytes) -> bytes:
    """Return base64 in lines of at most `LINE_MAX` (RFC 2045 §6.8)."""
    encoded = b2a_base64(raw, newline=False)
    return b"".join([encoded[at : at + LINE_MAX] + b"\r\n" for at in range(0, len(encoded), LINE_MAX)])
