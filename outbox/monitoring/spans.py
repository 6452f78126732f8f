"""The traces of sending: a span for each try, in the context in which its email was made."""

from outbox.smtp.outgoing import Try
from outbox.smtp.verdict import Outcome
from outbox.tracing import Tracing


class Spans:
    """Looks on (`observer.Observer`) and writes a span for each try that has ended."""

    def __init__(self, tracing: Tracing, route: str) -> None:
        self.tracing = tracing
        self.route = route

    def judged(self, tried: Try, attempt: int, outcome: Outcome, now: float) -> None:
        """A span from the claim to here."""
        self.tracing.sent(
            tried.outgoing.traceparent,
            began_s_ago=now - tried.outgoing.claimed_at,
            fault=None if outcome.state == "sent" else f"{outcome.verdict}: {outcome.reply}",
            key=tried.outgoing.key,
            email=tried.outgoing.email,
            attempt=attempt,
            relay=tried.outgoing.relay,
            route=self.route,
            verdict=outcome.verdict,
            state=outcome.state,
        )

    def ticking(self) -> None:
        """Nothing: commits belong to no email."""

    def ticked(self, began_at: float, now: float) -> None:
        """Nothing, as above."""

    def session_lost(self) -> None:
        """Nothing: what it meant for emails is judged."""
