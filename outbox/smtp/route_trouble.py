"""Errors of a connection that cannot be opened: no message is to blame."""

from typing import Final

from outbox.smtp.refusal import About, Stage
from outbox.smtp.reply_class import classify

REFUSED_MIN: Final = 400  # RFC 5321 §4.2.1: 4xx and 5xx are refusals


class RouteTroubleError(Exception):
    """The server cannot be used now: no connection, or no EHLO, TLS or AUTH. No message is to blame.

    `code` and `text` are the server's reply, and `stage` is what it answers (`refusal.Stage`); 0 and "" if the
    trouble is not about a reply.
    """

    def __init__(self, message: str, *, code: int = 0, text: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.code, self.text, self.stage = code, text, stage

    @property
    def is_refusal(self) -> bool:
        """Return True if the server refuses this host, in its greeting or its reply to EHLO: a person must act."""
        return self.stage in (Stage.CONNECT, Stage.EHLO) and self._about is About.ROUTE

    @property
    def is_limit(self) -> bool:
        """Return True if a connection was refused since there are too many, or were too many in a short time."""
        return self.code >= REFUSED_MIN and self._about in (About.CONNECTIONS, About.RATE)

    @property
    def _about(self) -> About:
        return classify(self.stage, self.code, self.text)


class LoginRefusedError(RouteTroubleError):
    """The server refused user and password. Another try before `until` (monotonic clock) may lock the account."""

    def __init__(self, message: str, *, code: int = 0, text: str = "", until: float) -> None:
        super().__init__(message, code=code, text=text, stage=Stage.AUTH)
        self.until = until
