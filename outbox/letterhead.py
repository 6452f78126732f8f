"""What a route adds to every email at the last gate: fields before the stored message, its signature, the return path.

The same email gets the same fields with every try. Nothing of it is stored: an email that takes another route bears
that one's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from outbox.fields import extra_field
from outbox.signature import Signer, UnsignableError, load_signer

if TYPE_CHECKING:
    from outbox.ledger import Claim
    from outbox.settings import Settings

BARE_LF: Final = re.compile(rb"(?<!\r)\n")


@dataclass(frozen=True, slots=True)
class Letterhead:
    """The fields with their placeholders, who signs, and the address to which emails bounce, if these are wanted."""

    fields: Mapping[str, str]
    signer: Signer | None = None
    return_path: str | None = None

    @classmethod
    def of(cls, settings: "Settings") -> Self | None:
        """What the settings of a route ask for; None where that is nothing.

        Raises:
            ConfigurationError: the DKIM key cannot be used.

        """
        signer = None if settings.dkim is None else load_signer(settings.dkim, settings.directory)
        if not (settings.headers or signer or settings.return_path):
            return None
        return cls(settings.headers, signer, settings.return_path)

    @property
    def is_slow(self) -> bool:
        """Whether `prepare` takes milliseconds, so that the loop should not wait for it."""
        return self.signer is not None

    def sender_of(self, claim: "Claim") -> str:
        """MAIL FROM."""
        if self.return_path is None:
            return claim.sender
        return self.return_path.replace("{token}", claim.token)

    def prepare(self, claim: "Claim") -> None:
        """Write the claim's head: the signature, then the fields, all before its message. Idempotent, on any thread.

        What cannot be signed has no head and a `fault`: it must not be sent.
        """
        if claim.head is not None or claim.fault is not None:
            return
        head = self._fields_of(claim)
        if self.signer is not None:
            try:
                head = self.signer.sign(head + claim.message) + head
            except UnsignableError as error:
                claim.fault = str(error)
                return
        claim.head = head

    def _fields_of(self, claim: "Claim") -> bytes:
        """The fields; one that the message has itself is left to it."""
        if not self.fields:
            return b""
        there = b"\n" + claim.message.partition(b"\r\n\r\n")[0].lower()
        values = {"{email_id}": str(claim.email), "{key}": claim.key}
        lines = [
            extra_field(name, re.sub(r"\{email_id\}|\{key\}", lambda found: values[found[0]], value))
            for name, value in self.fields.items()
            if f"\n{name.lower()}:".encode() not in there
        ]
        return "".join(f"{line}\r\n" for line in lines).encode()


def with_crlf(message: bytes) -> bytes:
    """The message with CRLF for each bare line feed, as it goes over the wire (RFC 5321 §2.3.8)."""
    if message.count(b"\n") != message.count(b"\r\n"):
        return BARE_LF.sub(b"\r\n", message)
    return message
