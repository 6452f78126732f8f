"""An email on its way to a server, and the try that brings it there.

`OutgoingEmail` is a claimed delivery and never changes; a connection and the relay's modules change a `Try` by its
methods only. Neither knows Postgres or the server.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from outbox.smtp.route_headers import Prepared


class OutgoingEmail(NamedTuple):
    """Claimed delivery with all that sending it needs. The claim lives as long as the relay's session.

    `relay`, `email` and `attempt` are as they were at the claim. A tuple, since a relay makes thousands a second, and
    a frozen dataclass takes three times as long.
    """

    relay: int
    email: int
    key: str
    attempt: int
    withdrawn: int
    sender: str
    recipient: str
    message_id: str
    message: bytes
    suspect: bool = False
    urgent: bool = False
    traceparent: str | None = None
    token: str = ""
    """Token that is sent with the email and proves that a bounce is about it (`verp`)."""
    size: int = 0
    """Bytes of message and envelope, for the memory budget of the process."""
    is_fetched: bool = True
    """False for a large message whose bytes are not here yet; `fetch_messages` returns another value that has them."""
    claimed_at: float = 0.0
    """Time of the claim, of the monotonic clock in seconds."""


@dataclass(slots=True, eq=False)
class Try:
    """One try of an email, from its claim to its verdict, over as many connections as that takes.

    The fence of its verdict is (`outgoing.relay`, `attempt`). The mark gives it its number, and another server may
    number it anew after a failover.
    """

    outgoing: OutgoingEmail
    prepared: Prepared | None = None
    """The bytes that its route sends; None until they are made."""
    attempt: int = field(init=False)
    """Number of the try once it is marked; before, that of the latest one that the row counts."""
    marked: bool = field(default=False, init=False)
    cuts: int = field(default=0, init=False)
    """Number of connections that ended before its mark."""
    started_at: float = field(default=0.0, init=False)
    """Time at which a connection began it, of the monotonic clock in seconds."""
    dot_sent_at: float = field(default=0.0, init=False)
    """Time at which its final dot was written; 0 before."""

    def __post_init__(self) -> None:
        self.attempt = self.outgoing.attempt

    @property
    def number(self) -> int:
        """Return the attempt that its verdict is about; the row does not count it before the mark."""
        return self.attempt if self.marked else self.attempt + 1

    @property
    def counted(self) -> int:
        """Return how many tries of the email count, with this one."""
        return self.number - self.outgoing.withdrawn

    def start(self, now: float) -> None:
        """Note that a connection begins it."""
        self.started_at = now

    def prepare(self, prepared: Prepared) -> None:
        """Take the bytes that its route sends."""
        self.prepared = prepared

    def mark(self, attempt: int) -> None:
        """Take the number that the mark gave it. The mark is committed, or its commit is unknown."""
        self.marked = True
        self.attempt = attempt

    def note_dot(self, now: float) -> None:
        """Note that its final dot is written."""
        self.dot_sent_at = now

    def note_cut(self) -> None:
        """Note that a connection ended before the mark."""
        self.cuts += 1

    def renumber(self, email: int, attempt: int) -> None:
        """Take the id and the attempt that the email has on another server, after a failover."""
        self.outgoing = self.outgoing._replace(email=email)
        self.attempt = attempt
