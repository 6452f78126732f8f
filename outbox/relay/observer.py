"""Who looks on while a relay works. A relay without observers does nothing for them."""

from typing import Protocol

from outbox.smtp.outgoing import Try
from outbox.smtp.verdict import Outcome


class Observer(Protocol):
    """Told on the loop's thread, in the middle of the hot path: who counts there waits for nothing.

    All times are of the monotonic clock, in seconds.
    """

    def judged(self, tried: Try, attempt: int, outcome: Outcome, now: float) -> None:
        """A try of a claim has ended, and its outcome goes into the next tick."""

    def ticking(self) -> None:
        """A tick begins, with all outcomes that there are."""

    def ticked(self, began_at: float, now: float) -> None:
        """That tick is committed."""

    def session_lost(self) -> None:
        """The relay has lost its session, and with it the tick that was under way, if one was."""
