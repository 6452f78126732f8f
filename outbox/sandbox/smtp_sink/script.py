"""Script of a sink: at every stage of a connection it may replace the usual reply by an action."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum


class Stage(StrEnum):
    """Point of a connection at which the script is asked, before anything is answered or decided."""

    CONNECT = "CONNECT"
    """Before the banner."""
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    """When the credentials are complete and right."""
    MAIL = "MAIL"
    RCPT = "RCPT"
    """Once per recipient; the one asked about is `visit.recipients[-1]`."""
    DATA = "DATA"
    """Before the 354."""
    CONTENT = "CONTENT"
    """When the first bytes after the 354 have arrived; by default there is no reply here."""
    DOT = "DOT"
    """When the final dot has arrived."""
    RSET = "RSET"
    QUIT = "QUIT"


@dataclass(slots=True)
class Visit:
    """State of one connection, as a script sees it."""

    number: int
    peer: tuple[str, int]
    tls: bool = False
    authenticated: bool = False
    refused_logins: int = 0
    sender: str | None = None
    """Sender of the open transaction; None outside of one."""
    recipients: list[str] = field(default_factory=list)
    accepted: int = 0
    """Messages accepted on this connection."""
    messages_begun: int = 0
    """MAIL commands on this connection, including the one that a script is being asked about."""
    behind: bytes = b""
    """First bytes of the input that had come behind what a script is being asked about."""
    flooded: int = 0
    """Bytes of a `Flood` that were written."""
    mail_parameters: bytes = b""
    rcpt_parameters: list[bytes] = field(default_factory=list)
    """Parameters of RCPT, for each recipient."""

    def begin_transaction(self, sender: str, parameters: bytes) -> None:
        """Open a transaction (MAIL)."""
        self.sender, self.mail_parameters = sender, parameters
        self.rcpt_parameters = []
        self.messages_begun += 1

    def add_recipient(self, recipient: str, parameters: bytes) -> None:
        """Add a recipient to the transaction (RCPT)."""
        self.recipients.append(recipient)
        self.rcpt_parameters.append(parameters)

    def drop_recipient(self) -> None:
        """Remove the recipient that was added last, since it was refused."""
        self.recipients.pop()
        self.rcpt_parameters.pop()

    def end_transaction(self) -> None:
        """Forget sender and recipients; the parameters stay readable."""
        self.sender = None
        self.recipients = []


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this instead. The stage takes effect only if the first digit is that of the usual reply."""

    text: bytes | str
    then_cut: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """End the connection with a FIN and without a reply."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End the connection with a RST and without a reply."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Never reply, and keep the connection open; with `deaf`, read nothing more, so that the client's buffers fill."""

    deaf: bool = False


@dataclass(frozen=True, slots=True)
class Flood:
    """Write this over and over, for as long as the client reads it."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait for the event, then do `then`, or the usual thing; at DOT also if the client is gone by then."""

    event: asyncio.Event
    then: "Action | None" = None


@dataclass(frozen=True, slots=True)
class Trickle:
    """Write the reply, or the usual one, in pieces; the stage takes effect with the last."""

    reply: bytes | str | None = None
    chunk: int = 1
    delay_s: float = 0.01


@dataclass(frozen=True, slots=True)
class Accept:
    """Accept the message, then do this instead of sending the usual 250. Only at DOT."""

    then: "Action | None" = None


Action = Reply | Cut | Reset | Stall | Flood | Hold | Trickle | Accept
Script = Callable[[Stage, Visit], Action | None]
"""Function that is asked at every stage of every connection; None stands for the usual reply."""


def reply_bytes(text: bytes | str) -> bytes:
    """Return the bytes of a scripted reply; a str without an end of line gets one."""
    if isinstance(text, bytes):
        return text
    return text.encode() if text.endswith("\n") else text.encode() + b"\r\n"
