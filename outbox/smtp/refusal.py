"""A 4xx or 5xx reply as a value: the command that it answers, and what it is about. Pure."""

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final

from outbox.smtp.verdict import REPLY_CHARACTERS_MAX, Deferred, Refused

TAKES_NOTHING: Final = 454  # Amazon SES, and `maildir`: no mail at all for now, in reply to any command or the dot


class Stage(StrEnum):
    """Command that a reply answers; CONNECT is the greeting, DOT the end of the content."""

    CONNECT = "CONNECT"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    DOT = "DOT"
    RSET = "RSET"


class About(Enum):
    """Subject of a refusal, which decides what it costs and whom."""

    RECIPIENT = auto()
    """This recipient: a try of the email, or a dead letter."""
    MESSAGE = auto()
    """This message: a try of the email, or a dead letter."""
    UNCLEAR = auto()
    """This recipient or message, unless several different ones get the same reply in a row: then the route."""
    RELAYING = auto()
    """The route, unless the server accepts other mail from the same sender at that time: then this recipient. Not used
    for MAIL, where no recipient is named yet."""
    ROUTE = auto()
    """The sender, this host, the login or our own syntax: the mail stays pending, and a person must act."""
    SESSION = auto()
    """This connection, which has reached a limit: another connection takes the email at once."""
    RATE = auto()
    """The pace: nothing is wrong with the email; it is sent later."""
    CONNECTIONS = auto()
    """The number of connections: fewer of them take the mail."""
    CLOSING = auto()
    """The server, which closes the connection or has temporary trouble of its own."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 4xx or 5xx reply that ended an email's transaction, and what it is about."""

    about: About
    stage: str
    code: int
    text: str
    redirected_to: str | None = None

    @property
    def reply(self) -> str:
        """The reply as the attempt's trail keeps it."""
        reply = f"{self.code} {self.text}"[:REPLY_CHARACTERS_MAX]
        if self.stage != Stage.DOT:
            reply = f"{reply} (to {self.stage})"
        return f"redirected to {self.redirected_to}: {reply}" if self.redirected_to else reply

    @property
    def is_syntax(self) -> bool:
        """Return True if the server did not understand a command, or took it as out of sequence."""
        return 500 <= self.code <= 504 or self.code == 555 or self.text.startswith("5.5.")  # noqa: PLR2004

    @property
    def follows_recipient(self) -> bool:
        """Return True if the recipient was named before, so that the reply may be about it."""
        return self.stage in (Stage.RCPT, Stage.DATA, Stage.DOT)

    @property
    def verdict(self) -> Deferred | Refused:
        """The verdict on the email if the refusal is about its recipient or message."""
        return Refused(self.reply) if self.is_permanent else Deferred(self.reply)

    @property
    def is_permanent(self) -> bool:
        """Return True for a 5xx reply (RFC 5321 §4.2.1)."""
        return self.code >= 500  # noqa: PLR2004
