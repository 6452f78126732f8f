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
from outbox.smtp.connection import Conversation, Expected, Throttle
from outbox.smtp.connector import Route, RouteTroubleError
from outbox.smtp.helo import name_of_host
from outbox.smtp.outgoing import Claim
from outbox.smtp.replies import Reply
from outbox.smtp.reply_class import Refusal
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
    desk = _Desk(trial)
    try:
        route = Route(settings.smtp_url, settings.model_copy(update=patience), talk=_Overheard)
        conversation, transport = await route.connect(desk)
    except RouteTroubleError as trouble:
        raise OutboxError(f"It was not sent: {str(trouble).rstrip('.')}; see `outbox doctor`.") from trouble
    trial.tls = _encryption(
        transport,
        is_verified=settings.wants_verified_tls,
        is_local=settings.smtp_url.path is not None,
    )
    desk.claim = Claim(0, 0, "test", 0, 0, sender, recipient, message_id, content, token="test")  # noqa: S106
    conversation.attach(transport)
    while not desk.is_over.is_set():
        conversation.check_deadline()
        try:
            await asyncio.wait_for(desk.is_over.wait(), LOOK_S)
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


class _Overheard(Conversation):
    """A conversation that tells its desk what the server says to each command."""

    def _answer(self, reply: Reply) -> None:
        asked = self._expected[0] if self._expected else None
        cast("_Desk", self.desk).hear(asked, reply)
        super()._answer(reply)


@dataclass(slots=True)
class _Desk:
    """The desk of one email that is in no outbox."""

    trial: Trial
    claim: Claim | None = None
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, asked: Expected | None, reply: Reply) -> None:
        if asked is not Expected.QUIT:
            command = "" if asked is None else "the dot" if asked in (Expected.DOT, Expected.LONE_DOT) else asked.name
            self.trial.replies.append((command, f"{reply.code} {reply.text}"))

    def take(self) -> Claim | None:
        claim, self.claim = self.claim, None
        return claim

    def ask_mark(self, conversation: Conversation, claim: Claim) -> None:
        claim.marked = True
        conversation.hand_over()

    def judged(self, _claim: Claim, verdict: Verdict) -> None:
        self.trial.verdict = verdict

    def untouched(self, _claim: Claim, reason: str) -> None:
        self.trial.verdict = Withdrawn(reason)

    def idle(self, conversation: Conversation) -> None:
        conversation.close_politely()

    def paused(self, reason: str) -> None:
        """The verdict says it too."""

    def throttled(self, _conversation: Conversation, _kind: Throttle, reason: str) -> None:
        self.trial.verdict = Withdrawn(reason)

    def is_own_limit(self, _claim: Claim) -> bool:
        return False

    def session_full(self, _conversation: Conversation, _messages: int | None) -> None:
        """The verdict says it too."""

    def route_refused(self, _claim: Claim, refusal: Refusal) -> None:
        self.trial.verdict = refusal.verdict

    def requeue(self, _claim: Claim, reason: str) -> None:
        self.trial.verdict = Withdrawn(reason)

    def closed(self, _conversation: Conversation, _trouble: str | None) -> None:
        self.is_over.set()
