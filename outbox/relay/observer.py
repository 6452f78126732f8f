"""Interface for metrics and traces. A relay without observers does nothing for them, not even read a clock."""

from typing import Protocol

from outbox.smtp.outgoing import Try
from outbox.smtp.verdict import Outcome


class Observer(Protocol):
    """Observer of a relay, called on the event loop's thread in the middle of the hot path: it must not block.

    All times are of the monotonic clock, in seconds.
    """

    def judged(self, tried: Try, attempt: int, outcome: Outcome, now: float) -> None:
        """Observe that a try of a claim has ended; its outcome goes into the next tick."""

    def ticking(self) -> None:
        """Observe that a tick begins, with all outcomes that there are."""

    def ticked(self, began_at: float, now: float) -> None:
        """Observe that this tick is committed."""

    def session_lost(self) -> None:
        """Observe that the session is lost, and with it the tick that was running, if one was."""
