"""DKIM (RFC 6376) by dkimpy, the extra `outbox-mail[dkim]`: a key that was tried, and signatures made with it.

dkimpy does RSA in Python, 7 ms for a key of 2048 bits: who signs many emails does so off the loop.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.settings import DkimSettings

# What is signed where the message has it: what a reader sees or acts on (RFC 6376 §5.4.1), one-click unsubscription
# (RFC 8058 §4) and what Gmail wants signed. Not X- fields and what else is meant for the next server, which may take
# them out, as Amazon SES does.
SIGNED: Final = frozenset({
    b"from", b"sender", b"reply-to", b"to", b"cc", b"subject", b"date", b"message-id", b"in-reply-to", b"references",
    b"mime-version", b"content-type", b"content-transfer-encoding", b"content-id", b"content-description",
    b"list-id", b"list-help", b"list-unsubscribe", b"list-unsubscribe-post", b"list-subscribe", b"list-post",
    b"list-owner", b"list-archive", b"feedback-id", b"auto-submitted",
})  # fmt: skip
_PROBE: Final = b"From: a@example.com\r\n\r\n"


class UnsignableError(Exception):
    """A message that cannot be signed: it is no message (RFC 5322)."""


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose signature it is, and the key for it."""

    domain: bytes
    selector: bytes
    key: bytes
    public_key: str  # base64, as the DNS record says it

    @property
    def record(self) -> str:
        """The TXT record's value, which lets others verify."""
        return f"v=DKIM1; k=rsa; p={self.public_key}"

    def sign(self, message: bytes) -> bytes:
        """The DKIM-Signature field of the message, with its CRLF. From is over-signed: no second one can be added.

        Raises:
            UnsignableError: one sentence that says why.

        """
        import dkim

        try:
            signing: Any = dkim.DKIM(message, linesep=b"\r\n")
            there = [name.lower() for name, _ in signing.headers if name.lower() in SIGNED]
            field: bytes = signing.sign(
                self.selector,
                self.domain,
                self.key,
                canonicalize=(b"relaxed", b"relaxed"),
                include_headers=[*there, b"from"],
            )
        except Exception as error:
            # What is no message makes dkimpy stumble in many ways (IndexError, TypeError); no relay may fall with it.
            raise UnsignableError(f"it cannot be signed: {error}") from error
        return field


def load_signer(settings: "DkimSettings", directory: Path) -> Signer:
    """The key of the settings, tried once; its file may lie beside them in `directory`.

    Raises:
        ConfigurationError: one sentence that says what is wrong, and the mend.

    """
    try:
        from dkim.crypto import UnparsableKeyError, parse_pem_private_key
    except ImportError:
        raise ConfigurationError("dkim: needs dkimpy; install outbox-mail[dkim], or take the table out.") from None
    path = directory / settings.key_file
    try:
        key = path.read_bytes()
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
    """The SubjectPublicKeyInfo in base64 (RFC 6376 §3.6.1, RFC 5280 §4.1), out of modulus and exponent."""
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
