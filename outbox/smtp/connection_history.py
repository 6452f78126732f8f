"""Replies of one connection so far, which decide what a refusal on it is about. Pure.

The same words mean another thing after other mail: a server that refuses MAIL at the first message refuses the sender,
and one that does so at the hundredth has reached a limit of this connection.
"""

from dataclasses import dataclass
from typing import Final

from outbox.smtp.refusal import About, Refusal, Stage

DEFERRALS_MAX: Final = 2  # in a row, after which a connection that took messages may have reached a limit of its own


@dataclass(slots=True)
class ConnectionHistory:
    """Counts of one connection: messages that the server accepted, and transactions that it refused."""

    accepted: int = 0
    refusals: int = 0
    deferrals: int = 0
    """Transactions that were deferred since the latest message that was accepted."""

    @property
    def is_used(self) -> bool:
        """Return True if the server has judged a message on this connection, so that it may have reached a limit."""
        return self.accepted + self.refusals > 0

    @property
    def is_exhausted(self) -> bool:
        """Return True if the connection took messages and now defers them.

        Whatever the words, a new connection finds out more, and costs little.
        """
        return self.accepted > 0 and self.deferrals >= DEFERRALS_MAX

    def note_accepted(self) -> None:
        """Count a message that the server accepted."""
        self.accepted += 1
        self.deferrals = 0

    def note_refusal(self, refusal: Refusal) -> About:
        """Count a refused transaction; return what the refusal is about, given what went over this connection before.

        The subject may be another one than `refusal.about`, which its words suggest.
        """
        about = self._subject_of(refusal)
        self.refusals += 1
        self.deferrals += not refusal.is_permanent
        return about

    def limit_shown_by(self, refusal: Refusal) -> int | None:
        """Return how many messages the server takes on one connection, if the refusal just noted may show that."""
        may_be_the_limit = refusal.stage == Stage.MAIL and refusal.about is not About.ROUTE
        return self.accepted if may_be_the_limit and self.refusals == 1 else None

    def _subject_of(self, refusal: Refusal) -> About:
        about = refusal.about
        if about is About.CLOSING and self.is_used and refusal.stage != Stage.DOT:
            return About.SESSION
        if about is About.SESSION and not self.is_used and refusal.stage != Stage.RSET:
            return About.ROUTE if refusal.is_permanent else About.RATE
        if about is About.ROUTE and refusal.stage == Stage.MAIL and self.accepted:
            return About.SESSION  # where it is no limit of this connection, the next one meets it at its first MAIL
        return about
