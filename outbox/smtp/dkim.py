"""DKIM signatures (RFC 6376), with dkimpy from the extra `outbox-mail[dkim]`.

dkimpy signs the header. It does RSA in Python, 7 ms for a key of 2048 bits, so this runs outside the event loop. The
body is hashed here, piece by piece: dkimpy would split it into one object for each line, and its regular expressions
take a time that grows with the square of a run of blanks.
"""

import base64
import hashlib
import re
from codecs import BOM_UTF8
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outbox.errors import ConfigurationError
from outbox.smtp import content

if TYPE_CHECKING:
    from outbox.settings import DkimSettings

# Fields that a reader sees or a mail program acts on. Each is signed as often as the message has it and once more, so
# that the signature breaks if another is added (RFC 6376 §5.4.2 and §8.15; M3AAWG Email Authentication Recommended Best
# Practices): of two, readers show the first and verifiers hash the last. One-click unsubscription needs both of its
# fields signed (RFC 8058 §4).
OVERSIGNED: Final = (
    b"from", b"sender", b"reply-to", b"to", b"cc", b"subject", b"date", b"message-id", b"in-reply-to", b"references",
    b"mime-version", b"content-type", b"content-transfer-encoding", b"content-disposition", b"content-description",
    b"content-id", b"list-id", b"list-help", b"list-unsubscribe", b"list-unsubscribe-post", b"list-subscribe",
    b"list-post", b"list-owner", b"list-archive", b"importance", b"priority", b"sensitivity",
    b"disposition-notification-to", b"return-receipt-to", b"mail-reply-to", b"mail-followup-to",
)  # fmt: skip
# Signed where the message has them, and not once more, since a server on the way may add its own, as Amazon SES does a
# Feedback-ID. Not signed at all: Resent- fields, which whoever resends an email adds (RFC 5322 §3.6.6); Comments and
# Keywords (RFC 6376 §5.4.1); X- fields, which are meant for the next server, and which Amazon SES takes out.
SIGNED: Final = frozenset(OVERSIGNED) | {b"feedback-id", b"auto-submitted"}
HEADER_MAX: Final = 256 * 1024
"""Largest header that is signed, in bytes: four times the limit of the schema."""
_PROBE: Final = b"From: a@example.com\r\n\r\n"
_BLANKS: Final = re.compile(rb"[\t ]+")
_EMPTY_LINES: Final = b"\r\n" * 4096


class UnsignableError(Exception):
    """Error for a message that cannot be signed, because it is not an RFC 5322 message."""


@dataclass(frozen=True, slots=True)
class Signer:
    """Domain, selector and key of a signature."""

    domain: bytes
    selector: bytes
    key: bytes
    public_key: str  # base64, as the DNS record says it

    @property
    def record(self) -> str:
        """Return the value of the TXT record with which others verify."""
        return f"v=DKIM1; k=rsa; p={self.public_key}"

    def sign(self, message: bytes, *, head: bytes = b"") -> bytes:
        """Return the DKIM-Signature field, with its CRLF, of `head` and the message after it.

        None of the OVERSIGNED fields can be added later. `head` is whole header lines.

        Raises:
            UnsignableError: one sentence that says why.

        """
        import dkim

        end = content.header_end(message)
        if len(head) + end > HEADER_MAX:
            raise UnsignableError(
                f"it cannot be signed: its header has {len(head) + end} bytes, and at most {HEADER_MAX} are signed; "
                "enqueue the email with a shorter header"
            )
        try:
            signing: Any = dkim.DKIM(head + content.header_of(message), linesep=b"\r\n")
            _give_body_hash(signing, body_hash(content.pieces(message, end)))
            there = [name.lower() for name, _ in signing.headers if name.lower() in SIGNED]
            field: bytes = signing.sign(
                self.selector,
                self.domain,
                self.key,
                canonicalize=(b"relaxed", b"relaxed"),
                include_headers=[*there, *OVERSIGNED],
            )
        except Exception as error:
            # What is no message makes dkimpy stumble in many ways (IndexError, TypeError); no relay may fall with it.
            raise UnsignableError(f"it cannot be signed: {error}") from error
        return field


def _give_body_hash(signing: Any, digest: bytes) -> None:
    """Make dkimpy write this hash instead of the hash of its own body, which is empty."""
    generate = signing.gen_header

    def gen_header(fields: Iterable[tuple[bytes, bytes]], *rest: Any, **named: Any) -> bytes:
        header: bytes = generate([(tag, digest if tag == b"bh" else value) for tag, value in fields], *rest, **named)
        return header

    signing.gen_header = gen_header


def body_hash(pieces: Iterable[bytes]) -> bytes:
    """Return the base64 SHA-256 of a body in relaxed canonical form (RFC 6376 §3.4.4).

    Each piece ends at the end of a line, but for the last one. Blanks become one space before those at the end of a
    line are taken off: the other way round would take a time that grows with the square of a line's blanks.
    """
    digest = hashlib.sha256()
    empty_lines = 0  # seen but not hashed yet: those at the end of the body do not count
    written = False
    for piece in pieces:
        text = _BLANKS.sub(b" ", piece) if b"\t" in piece or b"  " in piece else piece
        if not text.endswith(b"\n"):
            text += b"\r\n"
        text = text.replace(b" \r\n", b"\r\n")
        lines = text.rstrip(b"\r\n")
        if lines:
            if written:
                empty_lines += 1  # the end of the last line that was hashed
            while empty_lines > 0:
                digest.update(_EMPTY_LINES[: 2 * empty_lines])
                empty_lines -= len(_EMPTY_LINES) // 2
            digest.update(lines)
            written, empty_lines = True, 0
            ends = (len(text) - len(lines)) // 2 - 1
        else:
            ends = len(text) // 2
        empty_lines += ends
    if written:
        digest.update(b"\r\n")
    return base64.b64encode(digest.digest())


def load_signer(settings: "DkimSettings", directory: Path) -> Signer:
    """Load the key of the settings and sign once with it; its path is relative to `directory`.

    Raises:
        ConfigurationError: one sentence that says what is wrong and how to fix it.

    """
    try:
        from dkim.crypto import UnparsableKeyError, parse_pem_private_key
    except ImportError:
        raise ConfigurationError(
            "dkim: needs the extra `dkim`, since dkimpy is not installed; run: pip install 'outbox-mail[dkim]', "
            "or take the table out."
        ) from None
    path = directory / settings.key_file
    try:
        key = path.read_bytes().removeprefix(BOM_UTF8).replace(b"\r\n", b"\n")  # as saved on Windows
    except OSError as error:
        raise ConfigurationError(
            f"dkim.key_file: {path} cannot be read ({error.strerror}); name a file that this user can read."
        ) from None
    try:
        numbers = parse_pem_private_key(key)
        signer = Signer(settings.domain.encode(), settings.selector.encode(), key, _public_key(numbers))
        signer.sign(_PROBE)
    except (UnparsableKeyError, UnsignableError, ValueError, KeyError, TypeError, IndexError, ArithmeticError):
        # whatever dkimpy's parser stumbles over, and Python's arithmetic after it
        raise ConfigurationError(
            f"dkim.key_file: {path} holds no RSA private key in PEM without a passphrase; "
            "make one with `openssl genrsa -out dkim.pem 2048`."
        ) from None
    return signer


def _public_key(numbers: dict[str, int]) -> str:
    """Return the SubjectPublicKeyInfo in base64 (RFC 6376 §3.6.1, RFC 5280 §4.1), out of modulus and exponent."""
    rsa = _der(0x30, _integer(numbers["modulus"]) + _integer(numbers["publicExponent"]))
    algorithm = bytes.fromhex("300d06092a864886f70d0101010500")  # rsaEncryption, without parameters
    return base64.b64encode(_der(0x30, algorithm + _der(0x03, b"\0" + rsa))).decode()


def _integer(number: int) -> bytes:
    return _der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:  # noqa: PLR2004 - X.690 §8.1.3: the short form
        return bytes([tag, length]) + content
    said = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(said)]) + said + content
