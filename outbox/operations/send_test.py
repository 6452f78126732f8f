"""One email that is sent now, to see whether it can be: the real connection and dialogue, and no outbox.

Without a row there is no mark to wait for: the dot follows the content at once, and what becomes of it is said, not
kept. What is redirected in the relay is redirected here.
"""

import asyncio
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, cast

from outbox.errors import ConfigurationError, OutboxError
from outbox.mail import message
from outbox.settings import Settings
from outbox.smtp.connection import Expected, SmtpConnection
from outbox.smtp.connector import Route
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


@dataclass(slots=True)
class Trial:
    """How it went: the server's replies in their order, and what the try ended in."""

    server: str
    sender: str
    recipient: str
    redirect_to: str | None
    message_id: str
    tls: str = ""
    replies: list[tuple[str, str]] = field(default_factory=list)
    verdict: Verdict = Withdrawn("nothing was said")  # noqa: RUF009 - a frozen value

    @property
    def is_sent(self) -> bool:
        """Whether the server is responsible for it now."""
        return isinstance(self.verdict, Accepted)

    @property
    def sentence(self) -> str:
        """What came of it."""
        said = self.verdict.reply.rstrip(".")
        match self.verdict:
            case Accepted():
                return f"The mail server took it: {said}."
            case InDoubt():
                return f"Nobody knows whether it was sent: {said}; look into the mailbox."
            case _:
                return f"It was not sent: {said}."

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
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
    """The address in the form that SMTP takes.

    Raises:
        ConfigurationError: it is none.

    """
    try:
        return message.check_address(text)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def mail_to(sender: message.Mailbox, address: str) -> tuple[str, bytes]:
    """A short email that says what it is: its Message-ID and its bytes."""
    domain = sender.address.rpartition("@")[2]
    message_id = f"<test.{secrets.token_hex(8)}@{domain}>"
    plain = TEXT.format(host=name_of_host())
    return message_id, message.build(
        sender=sender,
        recipient=message.Mailbox("", address),
        subject=f"Test of outbox on {name_of_host()}",
        text=plain,
        html=HTML.format("</p><p>".join(plain.strip().split("\n\n"))),
        date=datetime.now(UTC),
        message_id=message_id,
    )


async def send(settings: Settings, *, sender: str, recipient: str, message_id: str, content: bytes) -> Trial:
    """Send these bytes now, and wait for the server's word, for `SILENCE_MAX_S` a reply at most.

    Raises:
        OutboxError: there is no connection to be had, or no TLS or login.

    """
    assert settings.smtp_url is not None
    patience = {
        key: min(getattr(settings, key), SILENCE_MAX_S)
        for key in ("connect_timeout_s", "command_timeout_s", "data_done_timeout_s")
    }
    trial = Trial(str(settings.smtp_url), sender, recipient, settings.redirect_to, message_id)
    owner = _Owner(trial)
    try:
        route = Route.of(settings.smtp_url, settings.model_copy(update=patience), connection_class=_RecordingConnection)
        connection, transport = await route.connect(owner)
    except RouteTroubleError as trouble:
        raise OutboxError(f"It was not sent: {str(trouble).rstrip('.')}; see `outbox doctor`.") from trouble
    trial.tls = _encryption(
        transport,
        is_verified=settings.wants_verified_tls,
        is_local=settings.smtp_url.path is not None,
    )
    owner.tried = Try(
        OutgoingEmail(0, 0, "test", 0, 0, sender, recipient, message_id, content, token="test")  # noqa: S106
    )
    connection.attach(transport)
    while not owner.is_over.is_set():
        connection.check_deadline()
        try:
            await asyncio.wait_for(owner.is_over.wait(), LOOK_S)
        except TimeoutError:
            continue
    trial.replies = [(command, settings.smtp_url.without_login(reply)) for command, reply in trial.replies]
    return trial


def _encryption(transport: asyncio.Transport, *, is_verified: bool, is_local: bool) -> str:
    cipher = transport.get_extra_info("cipher")
    if is_local:
        return "none: it stays on this machine"
    if cipher is None:
        return "none: it goes in the clear"
    return f"{cipher[1]} ({cipher[0]}), certificate {'verified' if is_verified else 'not verified'}"


class _RecordingConnection(SmtpConnection):
    """Connection that reports the server's reply to each command to its owner."""

    def _answer(self, reply: Reply) -> None:
        expected = self._expected[0] if self._expected else None
        cast("_Owner", self.owner).on_reply(expected, reply)
        super()._answer(reply)


@dataclass(slots=True)
class _Owner:
    """Owner of a connection with one email, which is in no outbox."""

    trial: Trial
    tried: Try | None = None
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def on_reply(self, expected: Expected | None, reply: Reply) -> None:
        if expected is not Expected.QUIT:
            is_dot = expected in (Expected.DOT, Expected.LONE_DOT)
            command = "" if expected is None else "the dot" if is_dot else expected.name
            self.trial.replies.append((command, f"{reply.code} {reply.text}"))

    def take(self) -> Try | None:
        tried, self.tried = self.tried, None
        return tried

    def ask_mark(self, connection: SmtpConnection, tried: Try) -> None:
        tried.mark(0)
        connection.send_final_dot()

    def on_verdict(self, _tried: Try, verdict: Verdict) -> None:
        self.trial.verdict = verdict

    def on_refusal(self, _connection: SmtpConnection, _tried: Try, refusal: Refusal, about: About) -> None:
        is_about_email = about in (About.UNCLEAR, About.RELAYING, About.ROUTE)
        self.trial.verdict = refusal.verdict if is_about_email else Withdrawn(refusal.reply)

    def return_unsent(self, _tried: Try, reason: str) -> None:
        self.trial.verdict = Withdrawn(reason)

    def idle(self, connection: SmtpConnection) -> None:
        connection.close_politely()

    def paused(self, reason: str) -> None:
        """Do nothing: the verdict has the reason."""

    def closed(self, _connection: SmtpConnection, _trouble: str | None) -> None:
        self.is_over.set()
