"""Test send: one email is sent now, past the outbox, over the connection and the dialogue that the relay uses.

There is no row, so there is no mark to wait for: the final dot follows the content at once, and the verdict is shown
and not stored. `redirect_to` counts as in the relay.
"""

import asyncio
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from outbox.errors import ConfigurationError, OutboxError
from outbox.mail import message
from outbox.mail.mailbox import Mailbox, check_address
from outbox.settings import Settings
from outbox.smtp.connection import Expected, SmtpConnection
from outbox.smtp.connector import Connector
from outbox.smtp.helo import name_of_host
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.refusal import About, Refusal
from outbox.smtp.replies import Reply
from outbox.smtp.route_trouble import RouteTroubleError
from outbox.smtp.verdict import Accepted, InDoubt, Verdict, Withdrawn

SILENCE_MAX_S: Final = 60.0  # a person waits; the relay has more patience
LOOK_S: Final = 0.5

TEXT: Final = """This is a test of outbox on {host}.

It came through the same mail server, with the same sender, as the reports will.
"""
HTML: Final = "<!doctype html><html><body><p>{}</p></body></html>\n"


@dataclass(frozen=True, slots=True)
class TestSend:
    """Result of a test send: the server's replies in their order, each with its command, and the verdict."""

    server: str
    tls: str
    sender: str
    recipient: str
    redirect_to: str | None
    message_id: str
    replies: tuple[tuple[str, str], ...]
    verdict: Verdict

    @property
    def is_sent(self) -> bool:
        """Return True if the server is responsible for the email now."""
        return isinstance(self.verdict, Accepted)

    @property
    def sentence(self) -> str:
        """Return the outcome in one sentence."""
        said = self.verdict.reply.rstrip(".")
        match self.verdict:
            case Accepted():
                return f"The mail server took it: {said}."
            case InDoubt():
                return f"Nobody knows whether it was sent: {said}; look into the mailbox."
            case _:
                return f"It was not sent: {said}."

    def as_json(self) -> dict[str, Any]:
        """Return all of it for scripts."""
        return {
            "server": self.server,
            "tls": self.tls,
            "sender": self.sender,
            "recipient": self.recipient,
            "redirect_to": self.redirect_to,
            "message_id": self.message_id,
            "replies": [{"to": command, "reply": reply} for command, reply in self.replies],
            "sent": self.is_sent,
            "verdict": type(self.verdict).__name__.lower(),
            "reply": self.verdict.reply,
        }


def address_of(text: str) -> str:
    """Return the address in the form that SMTP takes.

    Raises:
        ConfigurationError: it is not an email address.

    """
    try:
        return check_address(text)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def mail_to(sender: Mailbox, address: str) -> tuple[str, bytes]:
    """Return the Message-ID and the bytes of a short email that names itself a test."""
    domain = sender.address.rpartition("@")[2]
    message_id = f"<test.{secrets.token_hex(8)}@{domain}>"
    plain = TEXT.format(host=name_of_host())
    return message_id, message.build(
        sender=sender,
        recipient=Mailbox("", address),
        subject=f"Test of outbox on {name_of_host()}",
        text=plain,
        html=HTML.format("</p><p>".join(plain.strip().split("\n\n"))),
        date=datetime.now(UTC),
        message_id=message_id,
    )


async def send(settings: Settings, *, sender: str, recipient: str, message_id: str, content: bytes) -> TestSend:
    """Send these bytes now, and wait for each reply for `SILENCE_MAX_S` at most.

    Raises:
        OutboxError: there is no connection, no TLS or no login.

    """
    address = settings.smtp_url
    assert address is not None
    patience = {
        key: min(getattr(settings, key), SILENCE_MAX_S)
        for key in ("connect_timeout_s", "command_timeout_s", "data_done_timeout_s")
    }
    owner = _Owner(
        Try(OutgoingEmail(0, 0, "test", 0, 0, sender, recipient, message_id, content, token="test"))  # noqa: S106
    )
    try:
        connector = Connector.of(address, settings.model_copy(update=patience), on_reply=owner.on_reply)
        connection, transport = await connector.connect(owner)
    except RouteTroubleError as trouble:
        raise OutboxError(f"It was not sent: {str(trouble).rstrip('.')}; see `outbox doctor`.") from trouble
    tls = _encryption(transport, is_verified=settings.wants_verified_tls, is_local=address.path is not None)
    connection.attach(transport)
    while not owner.is_over.is_set():
        connection.check_deadline()
        try:
            await asyncio.wait_for(owner.is_over.wait(), LOOK_S)
        except TimeoutError:
            continue
    return TestSend(
        server=str(address),
        tls=tls,
        sender=sender,
        recipient=recipient,
        redirect_to=settings.redirect_to,
        message_id=message_id,
        replies=tuple((command, address.without_login(reply)) for command, reply in owner.replies),
        verdict=owner.verdict,
    )


def _encryption(transport: asyncio.Transport, *, is_verified: bool, is_local: bool) -> str:
    cipher = transport.get_extra_info("cipher")
    if is_local:
        return "none: it stays on this machine"
    if cipher is None:
        return "none: it goes in the clear"
    return f"{cipher[1]} ({cipher[0]}), certificate {'verified' if is_verified else 'not verified'}"


@dataclass(slots=True)
class _Owner:
    """Owner of a connection with one email, which is in no outbox. It keeps the replies and the verdict."""

    tried: Try | None
    replies: list[tuple[str, str]] = field(default_factory=list)
    verdict: Verdict = Withdrawn("nothing was said")  # noqa: RUF009 - a frozen value
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def on_reply(self, expected: Expected | None, reply: Reply) -> None:
        if expected is not Expected.QUIT:
            is_dot = expected in (Expected.DOT, Expected.LONE_DOT)
            command = "" if expected is None else "the dot" if is_dot else expected.name
            self.replies.append((command, f"{reply.code} {reply.text}"))

    def take(self) -> Try | None:
        tried, self.tried = self.tried, None
        return tried

    def ask_mark(self, connection: SmtpConnection, tried: Try) -> None:
        tried.mark(0)
        connection.send_final_dot()

    def on_verdict(self, _tried: Try, verdict: Verdict) -> None:
        self.verdict = verdict

    def on_refusal(self, _connection: SmtpConnection, _tried: Try, refusal: Refusal, about: About) -> None:
        is_about_email = about in (About.UNCLEAR, About.RELAYING, About.ROUTE)
        self.verdict = refusal.verdict if is_about_email else Withdrawn(refusal.reply)

    def return_unsent(self, _tried: Try, reason: str) -> None:
        self.verdict = Withdrawn(reason)

    def idle(self, connection: SmtpConnection) -> None:
        connection.close_politely()

    def paused(self, reason: str) -> None:
        """Do nothing: the verdict has the reason."""

    def closed(self, _connection: SmtpConnection, _trouble: str | None) -> None:
        self.is_over.set()
