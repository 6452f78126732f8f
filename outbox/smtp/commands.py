"""Bytes of a mail transaction: MAIL and RCPT with their parameters, and the content up to its final dot. Pure."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from outbox.smtp.content import PIECE_BYTES, dot_stuffed, header_of, pieces
from outbox.smtp.extensions import TOO_LARGE, Offers, body_parameters, original_recipient
from outbox.smtp.outgoing import OutgoingEmail
from outbox.smtp.route_headers import Prepared, RouteHeaders


@dataclass(frozen=True, slots=True)
class Commands:
    """Writer of the commands for a server with these `offers`, on a route with these `headers`.

    With `redirect_to` that address gets every email instead of its recipient, and a header line before all others names
    the recipient.
    """

    offers: Offers
    headers: RouteHeaders | None = None
    redirect_to: str | None = None
    asks_bounces: bool = False
    """Ask for a bounce in the parameters of MAIL and RCPT (RFC 3461), where the server offers that."""

    def mail(self, outgoing: OutgoingEmail, prepared: Prepared) -> bytes:
        """Return the MAIL command.

        Raises:
            ValueError: the server does not take such an email; one sentence for the trail, with the fix.

        """
        size = self.size_of(outgoing, prepared)
        if size > (self.offers.size_max or sys.maxsize):
            raise ValueError(TOO_LARGE.format(bytes=size, bytes_max=self.offers.size_max))
        sender = outgoing.sender if self.headers is None else self.headers.sender_of(outgoing)
        parameters = f" SIZE={size}" if self.offers.size else ""
        parameters += self._body_parameters(sender, outgoing, prepared)
        if self.asks_bounces and self.offers.dsn:
            # RET=HDRS: a bounce with the whole report would show it to all who read bounces.
            parameters += f" RET=HDRS ENVID={outgoing.token}" if outgoing.token else " RET=HDRS"
        return f"MAIL FROM:<{sender}>{parameters}\r\n".encode()

    def rcpt(self, outgoing: OutgoingEmail) -> bytes:
        """Return the RCPT command."""
        recipient = self.redirect_to or outgoing.recipient
        if not (self.asks_bounces and self.offers.dsn):
            return f"RCPT TO:<{recipient}>\r\n".encode()
        # Not DELAY: a server that goes on trying reports nothing that a person could act on.
        return f"RCPT TO:<{recipient}> NOTIFY=FAILURE ORCPT={original_recipient(recipient)}\r\n".encode()

    def content(self, outgoing: OutgoingEmail, prepared: Prepared) -> Iterator[bytes]:
        """Yield everything between 354 and the final dot: dots doubled (RFC 5321 §4.5.2), the last line ended."""
        return dot_stuffed(self._parts(outgoing, prepared))

    def size_of(self, outgoing: OutgoingEmail, prepared: Prepared) -> int:
        """Return how many bytes go over the wire between 354 and the dot, dots undoubled (RFC 1870 §5)."""
        size = len(prepared.head) + prepared.wire_bytes
        return size + len(_redirected_from(outgoing)) if self.redirect_to else size

    def _body_parameters(self, sender: str, outgoing: OutgoingEmail, prepared: Prepared) -> str:
        is_ascii = prepared.message.isascii()
        addresses = sender + outgoing.recipient + (self.redirect_to or "")
        if is_ascii and addresses.isascii():
            return ""
        header = header_of(prepared.message)
        if self.redirect_to:
            header = _redirected_from(outgoing) + header
        addresses = sender + (self.redirect_to or outgoing.recipient)
        return body_parameters(self.offers, header, is_ascii=is_ascii, addresses=addresses)

    def _parts(self, outgoing: OutgoingEmail, prepared: Prepared) -> Iterable[bytes]:
        """Yield the content in parts; short content is one part, since each part is a write."""
        head = _redirected_from(outgoing) + prepared.head if self.redirect_to else prepared.head
        message = prepared.message
        clean = prepared.wire_bytes == len(message)
        if len(message) > PIECE_BYTES:
            yield head
            yield from pieces(message, clean=clean)
        elif clean:
            yield head + message
        else:
            yield head + b"".join(pieces(message, clean=False))


def _redirected_from(outgoing: OutgoingEmail) -> bytes:
    """Return the header line that names the recipient of a redirected email; first, so that no signature breaks."""
    return f"X-Outbox-Redirected-From: {outgoing.recipient}\r\n".encode()
