"""Extensions that a server offers beyond RFC 5321, and the parameters for them: sizes, 8-bit bytes, UTF-8, bounces.

Pure: `connector` and `lmtp` read the offers, `commands` writes the parameters.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

_XTEXT: Final = re.compile(r"[^!-*,-<>-~]")  # RFC 3461 §4: what "+" and two digits stand for
_QUCHAR: Final = re.compile(r"[^!-*,-<>-\[\]-~]")  # RFC 6533 §3: what \x{…} stands for
_SIZE: Final = re.compile(r"[0-9]{1,20}")  # RFC 1870 §4; int() refuses thousands of digits

NO_SMTPUTF8: Final = (
    "{whose} is not ASCII, and this server does not offer SMTPUTF8 (RFC 6531), so it was not sent: "
    "write in ASCII, or send it by a server that offers it"
)
NO_8BITMIME: Final = (
    "the message has 8-bit bytes, and this server does not offer 8BITMIME (RFC 6152), so it was not sent: "
    "encode its body as quoted-printable or base64"
)
NO_UTF8: Final = (
    "the message's header is neither ASCII nor UTF-8, so no server could read it and it was not sent: "
    "encode it (RFC 2047)"
)
TOO_LARGE: Final = (
    "the message has {bytes} bytes and this server takes at most {bytes_max} (RFC 1870), so it was not sent: "
    "make it smaller, or send it by a server that takes more"
)


@dataclass(frozen=True, slots=True)
class Offers:
    """The extensions of a server that matter here. `size_max` 0 is no limit that is known."""

    pipelining: bool = False
    size: bool = False
    size_max: int = 0
    eight_bit: bool = False
    utf8: bool = False
    dsn: bool = False

    @classmethod
    def of(cls, extensions: Mapping[str, str]) -> Self:
        """Return the offers in the reply to EHLO or LHLO: keywords in small letters, with their parameters."""
        return cls(
            pipelining="pipelining" in extensions,
            size="size" in extensions,
            size_max=size_limit(extensions.get("size", "")),
            eight_bit="8bitmime" in extensions,
            utf8="smtputf8" in extensions and "8bitmime" in extensions,  # RFC 6531 §3.1: it needs the other
            dsn="dsn" in extensions,
        )


def size_limit(parameter: str) -> int:
    """Return the limit in bytes that a server offers with SIZE; 0 for none or an invalid number (RFC 1870)."""
    return int(parameter) if re.fullmatch(_SIZE, parameter.strip()) else 0


def body_parameters(offers: Offers, header: bytes, *, is_ascii: bool, addresses: str) -> str:
    """Return the parameters of MAIL for an email; `is_ascii` says whether its message is, header and body.

    Raises:
        ValueError: the server does not offer what the email needs; one sentence for the trail, with the fix.

    """
    if is_ascii and header.isascii() and addresses.isascii():
        return ""
    if addresses.isascii() and header.isascii():
        if not offers.eight_bit:
            raise ValueError(NO_8BITMIME)
        return " BODY=8BITMIME"
    try:
        header.decode()
    except UnicodeDecodeError:
        raise ValueError(NO_UTF8) from None
    if not offers.utf8:
        whose = "the message's header" if addresses.isascii() else "an address of it"
        raise ValueError(NO_SMTPUTF8.format(whose=whose))
    return " BODY=8BITMIME SMTPUTF8"


def original_recipient(address: str) -> str:
    """Return the value of ORCPT, so that a bounce names the recipient even if the address changes on the way.

    RFC 3461 §4.2; with RFC 6533's address type, in its 7-bit form, where it is not ASCII.
    """
    if address.isascii():
        return "rfc822;" + _XTEXT.sub(lambda found: f"+{ord(found[0]):02X}", address)
    return "utf-8;" + _QUCHAR.sub(lambda found: f"\\x{{{ord(found[0]):02X}}}", address)
