"""Record of a sink: its visits, the stages that they reached and the messages that it accepted."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

from outbox.sandbox.smtp_sink.script import Stage, Visit

_MESSAGE_ID: Final = b"\r\nmessage-id:"


class Accepted(NamedTuple):
    """Message for which the sink has taken responsibility."""

    at: float
    """Unix time."""
    visit: int
    peer_port: int
    sender: str
    recipients: tuple[str, ...]
    message: bytes
    """Content as the sender meant it: dots unstuffed, the final CRLF kept. Empty when bodies are not kept."""
    message_id: str
    mail_parameters: str = ""
    """Parameters of MAIL (RFC 5321 §4.1.2)."""
    rcpt_parameters: tuple[str, ...] = ()
    """Parameters of RCPT, for each recipient."""


class Record:
    """Everything that a sink has seen; it stays readable when the sink has stopped."""

    def __init__(
        self, on_accepted: Callable[[Accepted], None] | None, *, keep_messages: bool, keep_accepted: bool
    ) -> None:
        self._on_accepted = on_accepted
        self._keep_messages = keep_messages
        self._keep_accepted = keep_accepted
        self.messages = 0
        self.accepted: list[Accepted] = []
        self.addresses: Counter[str] = Counter()
        self.visits: list[Visit] = []
        self.events: list[tuple[float, int, Stage]] = []

    def new_visit(self, peer: tuple[str, int], *, tls: bool) -> Visit:
        """Add a connection."""
        visit = Visit(len(self.visits) + 1, peer, tls=tls)
        self.visits.append(visit)
        return visit

    def note_stage(self, visit: Visit, stage: Stage) -> None:
        """Add a question to the script."""
        self.events.append((time.time(), visit.number, stage))

    def keep(self, visit: Visit, content: bytes) -> None:
        """Accept a message: its content begins with a CRLF, ends with one, and its dots are stuffed."""
        recipients = tuple(visit.recipients)
        visit.accepted += 1
        self.messages += 1
        for recipient in recipients:
            self.addresses[recipient] += 1
        if self._on_accepted is None and not self._keep_accepted:
            return
        accepted = Accepted(
            time.time(),
            visit.number,
            visit.peer[1],
            visit.sender or "",
            recipients,
            content.replace(b"\r\n.", b"\r\n")[2:] if self._keep_messages else b"",
            message_id(content),
            _text(visit.mail_parameters),
            tuple(map(_text, visit.rcpt_parameters)),
        )
        if self._keep_accepted:
            self.accepted.append(accepted)
        if self._on_accepted is not None:
            self._on_accepted(accepted)


def message_id(content: bytes) -> str:
    """Return the Message-ID of a content that begins with a CRLF, "" if it has none."""
    end = content.find(b"\r\n\r\n")
    head = content if end < 0 else content[:end]
    begin = head.lower().find(_MESSAGE_ID)
    words = head[begin + len(_MESSAGE_ID) :].split(None, 1) if begin >= 0 else []
    return words[0].decode(errors="replace") if words else ""


def _text(parameters: bytes) -> str:
    return parameters.decode(errors="backslashreplace").strip()
