"""Last step before an email is sent: it is checked, and gets the additions of its route.

`check` refuses messages that must not be sent. A route may add header fields before the stored message, replace the
default ones, and add its signature and a return path. The same email gets the same fields with every try. The result is
a `Prepared`, which is not stored: an email that takes another route gets the additions of that route.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self
from urllib.parse import quote

from outbox.mail.header_fields import DEFAULT_FIELDS
from outbox.mail.structured_fields import extra_field, header_field, is_free_text
from outbox.smtp import content
from outbox.smtp.dkim import Signer, UnsignableError, load_signer

if TYPE_CHECKING:
    from outbox.settings import Settings
    from outbox.smtp.outgoing import OutgoingEmail

# The default fields as outbox writes them, now and before: a route may give them another value. A value that an
# application chose stays.
_DEFAULTS: Final = (*(f"{name}: {value}" for name, value in DEFAULT_FIELDS.items()), "X-Auto-Response-Suppress: All")
_SAFE: Final = "!#$&'*+-./:=?@^_`{|}~"  # in a field that programs read, beside letters and digits
_PLACEHOLDER: Final = re.compile(r"\{email_id\}|\{key\}")


class Prepared(NamedTuple):
    """Bytes of an email on its route: `head`, then `message`; or the problem for which it must not be sent."""

    message: bytes
    """The stored message, without the default fields that the route gives another value."""
    wire_bytes: int
    """Size of the message with CRLF line ends."""
    head: bytes = b""
    """Signature and header fields that go before the message."""
    problem: str | None = None


def check(outgoing: "OutgoingEmail") -> Prepared:
    """Return the email as a route without additions sends it. Pure, on any thread.

    This comes before anything parses or signs the message.
    """
    message = outgoing.message
    lone = content.lone_line_ends(message)
    problem = content.address_refusal(outgoing.sender, outgoing.recipient) or content.refusal(message, lone=lone)
    return Prepared(message, len(message) + lone, problem=problem)


@dataclass(frozen=True, slots=True)
class RouteHeaders:
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

    def sender_of(self, outgoing: "OutgoingEmail") -> str:
        """Return the address for MAIL FROM."""
        if self.return_path is None:
            return outgoing.sender
        return self.return_path.replace("{token}", outgoing.token)

    def prepare(self, outgoing: "OutgoingEmail") -> Prepared:
        """Return the email as this route sends it: the signature, then the fields, then its message.

        An email that must not be sent, or cannot be signed, has a problem. Pure, on any thread.
        """
        checked = check(outgoing)
        if checked.problem is not None:
            return checked
        prepared = self._without_defaults(checked)
        try:
            head = self._fields_of(outgoing, prepared.message)
        except ValueError as error:  # a field that the email's key makes too long
            return prepared._replace(problem=f"its route's headers cannot be written: {error}")
        if self.signer is not None:
            try:
                head = self.signer.sign(prepared.message, head=head) + head
            except UnsignableError as error:
                return prepared._replace(problem=str(error))
        return prepared._replace(head=head, problem=content.refusal(head))

    def _without_defaults(self, prepared: Prepared) -> Prepared:
        """Return the email without the default fields that the route gives another value."""
        given = {name.lower() for name in self.fields}
        message = prepared.message
        for line in (line for line in _DEFAULTS if line.partition(":")[0].lower() in given):
            written = f"\r\n{line}\r\n".encode()
            at = message.find(written, 0, content.header_end(message))
            after = at + len(written)
            if at >= 0 and message[after : after + 1] not in (b" ", b"\t"):
                message = message[: at + 2] + message[after:]
        if message is prepared.message:
            return prepared
        return Prepared(message, len(message) + content.lone_line_ends(message))

    def _fields_of(self, outgoing: "OutgoingEmail", message: bytes) -> bytes:
        """Return the fields, without those that the message has itself."""
        if not self.fields:
            return b""
        there = b"\n" + content.header_of(message).lower()
        lines = [
            _line_of(name, _filled(name, value, outgoing))
            for name, value in self.fields.items()
            if f"\n{name.lower()}:".encode() not in there
        ]
        return "".join(f"{line}\r\n" for line in lines).encode()


def prepare(outgoing: "OutgoingEmail", headers: RouteHeaders | None) -> Prepared:
    """Return the email as a route with these headers, or without any, sends it."""
    return check(outgoing) if headers is None else headers.prepare(outgoing)


def _line_of(name: str, value: str) -> str:
    return header_field(name, value) if name.lower() == "reply-to" else extra_field(name, value)


def _filled(name: str, value: str, outgoing: "OutgoingEmail") -> str:
    """Return the value for an email; where programs read the field, the key is percent-encoded."""
    key = outgoing.key if is_free_text(name) else quote(outgoing.key, safe=_SAFE)
    values = {"{email_id}": str(outgoing.email), "{key}": key}
    return _PLACEHOLDER.sub(lambda found: values[found[0]], value)
