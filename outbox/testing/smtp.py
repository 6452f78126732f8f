"""Mail server for a test: the sink of outbox in the background, for any kind of test."""

import re
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from outbox.sandbox.smtp_sink import Accept, Accepted, Action, Cut, Reply, Sink, Stage, Stall, Visit
from outbox.testing.loop_thread import Background
from outbox.testing.mail import Received

_REPLY: Final = re.compile(r"[245][0-9]{2}(?:[ -][^\r\n]*)?")
_KNOWS_RECIPIENTS: Final = (Stage.RCPT, Stage.DATA, Stage.CONTENT, Stage.DOT)


@dataclass
class _Rule:
    stage: Stage
    action: Action
    recipient: str | None
    times: int | None

    def fits(self, stage: Stage, visit: Visit) -> bool:
        if stage is not self.stage or self.times == 0:
            return False
        asked = visit.recipients[-1:] if stage is Stage.RCPT else visit.recipients
        return self.recipient is None or self.recipient.lower() in (one.lower() for one in asked)


class SmtpServer:
    """SMTP server on loopback: it keeps what it accepts and delivers nothing.

    It accepts all, unless it is told otherwise: `reply`, `stall` and `cut` take a stage of the dialogue (`CONNECT`,
    `EHLO`, `MAIL`, `RCPT`, `DATA`, `DOT`, `RSET`, `QUIT`), to whom it is limited (`recipient`, from RCPT on) and how
    often it happens (`times`; None is always). Of several that fit, the one that was told first comes first.
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self._changed = threading.Condition()
        self._received: list[Received] = []
        self._rules: list[_Rule] = []
        self._sink = Sink(self._decide, keep_accepted=False, on_accepted=self._keep)

    @property
    def url(self) -> str:
        """Return the URL for `smtp_url`: `smtp://127.0.0.1:40123`."""
        return self._sink.url

    @property
    def host(self) -> str:
        """Return the address at which it listens."""
        return self._sink.host

    @property
    def port(self) -> int:
        """Return the port at which it listens; a free one."""
        return self._sink.port

    @property
    def messages(self) -> list[Received]:
        """Return the messages accepted until now, in that order."""
        with self._changed:
            return list(self._received)

    def wait_for(self, n: int, *, within_s: float = 5.0) -> list[Received]:
        """Return the messages once there are `n` or more. Blocks: on a loop that sends itself, `asyncio.to_thread` it.

        Raises:
            AssertionError: they did not come within `within_s`; it says what did.

        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._received) >= n, within_s):
                came = "".join(f"\n  {mail.subject!r} to {', '.join(mail.recipients)}" for mail in self._received)
                raise AssertionError(f"{len(self._received)} of {n} emails came within {within_s:g} s{came}")
            return list(self._received)

    def reply(
        self, stage: str, text: str, *, recipient: str | None = None, times: int | None = None, then_cut: bool = False
    ) -> None:
        """Reply this at a stage instead of the usual: `reply("RCPT", "550 5.1.1 no such user", recipient="bob@…")`."""
        if not _REPLY.fullmatch(text):
            raise ValueError(f"{text!r} is no SMTP reply; write one such as 550 5.1.1 no such user.")
        self._add(stage, Reply(text, then_cut), recipient, times)

    def stall(self, stage: str, *, recipient: str | None = None, times: int | None = None) -> None:
        """Never answer at a stage, and keep the connection open."""
        self._add(stage, Stall(), recipient, times)

    def cut(
        self, stage: str, *, recipient: str | None = None, times: int | None = None, accepted: bool = False
    ) -> None:
        """End the connection without an answer at a stage; at `DOT` the message may be `accepted` all the same."""
        if accepted and stage.upper() != Stage.DOT:
            raise ValueError("Only at DOT can a message be accepted; say cut('DOT', accepted=True).")
        self._add(stage, Accept(Cut()) if accepted else Cut(), recipient, times)

    def _add(self, stage: str, action: Action, recipient: str | None, times: int | None) -> None:
        try:
            at = Stage(stage.upper())
        except ValueError:
            raise ValueError(f"{stage!r} is no stage; there are {', '.join(Stage)}.") from None
        if recipient is not None and at not in _KNOWS_RECIPIENTS:
            raise ValueError(f"At {at} nobody knows the recipient; it is known at {', '.join(_KNOWS_RECIPIENTS)}.")
        self._rules.append(_Rule(at, action, recipient, times))

    def _decide(self, stage: Stage, visit: Visit) -> Action | None:
        for rule in tuple(self._rules):
            if rule.fits(stage, visit):
                if rule.times is not None:
                    rule.times -= 1
                return rule.action
        return None

    def _keep(self, accepted: Accepted) -> None:
        with self._changed:
            self._received.append(Received.of(accepted))
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._background.run(self._sink.start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.run(self._sink.stop())
