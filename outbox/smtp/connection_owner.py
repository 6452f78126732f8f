"""Interface between a connection and the owner of its mail: the relay's pool, or a test send."""

from typing import TYPE_CHECKING, Protocol

from outbox.smtp.outgoing import Try
from outbox.smtp.refusal import About, Refusal
from outbox.smtp.verdict import Verdict

if TYPE_CHECKING:
    from outbox.smtp.connection import SmtpConnection


class ConnectionOwner(Protocol):
    """Source of a connection's mail, and receiver of its events.

    All calls are synchronous and on the loop's thread. Each try that was taken or started comes back by exactly one of
    `on_verdict`, `on_refusal`, `return_unsent` and `ask_mark`; after the last, by a verdict once its dot is written.
    """

    def take(self) -> Try | None:
        """Return the next try; None if nothing is ready, or if no more is wanted of this connection."""

    def ask_mark(self, connection: "SmtpConnection", tried: Try) -> None:
        """Have the try marked, since its content is written: then call `send_final_dot`, else `abandon`."""

    def on_verdict(self, tried: Try, verdict: Verdict) -> None:
        """Take the verdict that ends a try; `tried.marked` is the side of the mark on which it ended."""

    def on_refusal(self, connection: "SmtpConnection", tried: Try, refusal: Refusal, about: About) -> None:
        """Decide about a try whose transaction was refused for a reason that may be another one than the email's.

        `about` is the subject, given what went over the connection before. It is neither RECIPIENT nor MESSAGE.
        """

    def return_unsent(self, tried: Try, reason: str) -> None:
        """Take back a try whose connection ended before its mark was asked for, without a reply about it."""

    def idle(self, connection: "SmtpConnection") -> None:
        """Note that the connection has nothing to do; `start` gives it something."""

    def paused(self, reason: str) -> None:
        """Note that the server takes nothing from any client for now; `closed` follows."""

    def closed(self, connection: "SmtpConnection", trouble: str | None) -> None:
        """Note that the connection is over; `trouble` is what was wrong with the server, None if nothing was."""
