"""Last step before an email is sent: it is checked, and gets the additions of its route.

`check` refuses messages that must not be sent. A route may add header fields before the stored message, replace the
default ones, and add its signature and a return path. The same email gets the same fields with every try. None of this
is stored: an email that takes another route gets the additions of that route.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

from outbox.mail.header_fields import DEFAULT_FIELDS
from outbox.mail.structured_fields import extra_field, header_field, is_free_text
from outbox.smtp import content
from outbox.smtp.dkim import Signer, UnsignableError, load_signer

if TYPE_CHECKING:
    from outbox.settings import Settings
    from outbox.smtp.outgoing import Claim

# The default fields as outbox writes them, now and before: a route may give them another value. A value that an
# application chose stays.
_DEFAULTS: Final = (*(f"{name}: {value}" for name, value in DEFAULT_FIELDS.items()), "X-Auto-Response-Suppress: All")
_SAFE: Final = "!#$&'*+-./:=?@^_`{|}~"  # in a field that programs read, beside letters and digits
_PLACEHOLDER: Final = re.compile(r"\{email_id\}|\{key\}")


def check(claim: "Claim") -> None:
    """Set the claim's `wire_bytes`, and its `fault` if the message must not be sent.

    This comes before anything parses or signs the message. Idempotent, on any thread.
    """
    if claim.wire_bytes is not None:
        return
    lone = content.lone_line_ends(claim.message)
    fault = content.address_refusal(claim.sender, claim.recipient) or content.refusal(claim.message, lone=lone)
    claim.fault = claim.fault or fault
    claim.wire_bytes = len(claim.message) + lone


@dataclass(frozen=True, slots=True)
class Letterhead:
    """Header fields with their placeholders, the DKIM signer and the bounce address of a route; each is optional."""

    fields: Mapping[str, str]
    signer: Signer | None = None
    return_path: str | None = None

    @classmethod
    def of(cls, settings: "Settings") -> Self | None:
        """Return what the settings of a route ask for; None if they ask for nothing.

        Raises:
            ConfigurationError: the DKIM key cannot be used.

        """
        signer = None if settings.dkim is None else load_signer(settings.dkim, settings.directory)
        if not (settings.headers or signer or settings.return_path):
            return None
        return cls(settings.headers, signer, settings.return_path)

    @property
    def is_slow(self) -> bool:
        """Return True if `prepare` takes milliseconds, so that the event loop should not wait for it."""
        return self.signer is not None

    def sender_of(self, claim: "Claim") -> str:
        """Return the address for MAIL FROM."""
        if self.return_path is None:
            return claim.sender
        return self.return_path.replace("{token}", claim.token)

    def prepare(self, claim: "Claim") -> None:
        """Write the claim's head: the signature, then the fields, all before its message. Idempotent, on any thread.

        A claim that must not be sent, or cannot be signed, has no head and a `fault`.
        """
        check(claim)
        if claim.head is not None or claim.fault is not None:
            return
        self._drop_defaults(claim)
        try:
            head = self._fields_of(claim)
        except ValueError as error:  # a field that the email's key makes too long
            claim.fault = f"its route's headers cannot be written: {error}"
            return
        if self.signer is not None:
            try:
                head = self.signer.sign(claim.message, head=head) + head
            except UnsignableError as error:
                claim.fault = str(error)
                return
        claim.fault = content.refusal(head)
        claim.head = head

    def _drop_defaults(self, claim: "Claim") -> None:
        """Remove from the message the default fields that the route gives another value."""
        given = {name.lower() for name in self.fields}
        for line in (line for line in _DEFAULTS if line.partition(":")[0].lower() in given):
            written = f"\r\n{line}\r\n".encode()
            at = claim.message.find(written, 0, content.header_end(claim.message))
            after = at + len(written)
            if at < 0 or claim.message[after : after + 1] in (b" ", b"\t"):
                continue
            claim.message = claim.message[: at + 2] + claim.message[after:]
            claim.wire_bytes = len(claim.message) + content.lone_line_ends(claim.message)

    def _fields_of(self, claim: "Claim") -> bytes:
        """Return the fields, without those that the message has itself."""
        if not self.fields:
            return b""
        there = b"\n" + content.header_of(claim.message).lower()
        lines = [
            _line_of(name, _filled(name, value, claim))
            for name, value in self.fields.items()
            if f"\n{name.lower()}:".encode() not in there
        ]
        return "".join(f"{line}\r\n" for line in lines).encode()


def _line_of(name: str, value: str) -> str:
    return header_field(name, value) if name.lower() == "reply-to" else extra_field(name, value)


def _filled(name: str, value: str, claim: "Claim") -> str:
    """Return the value for an email; where programs read the field, the key is percent-encoded."""
    key = claim.key if is_free_text(name) else quote(claim.key, safe=_SAFE)
    values = {"{email_id}": str(claim.email), "{key}": key}
    return _PLACEHOLDER.sub(lambda found: values[found[0]], value)
