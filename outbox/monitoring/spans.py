"""The traces of sending: a span for each try, in the context in which its email was made."""

from outbox.smtp.outgoing import Claim
from outbox.smtp.verdict import Outcome
from outbox.tracing import Tracing


class Spans:
    """Looks on (`observer.Observer`) and writes a span for each try that has ended."""

    def __init__(self, tracing: Tracing, route: str) -> None:
        self.tracing = tracing
        self.route = route

    def judged(self, claim: Claim, attempt: int, outcome: Outcome, now: float) -> None:
        """A span from the claim to here."""
        self.tracing.sent(
            claim.traceparent,
            began_s_ago=now - claim.claimed_at,
            fault=None if outcome.state == "sent" else f"{outcome.verdict}: {outcome.reply}",
            key=claim.key,
            email=claim.email,
            attempt=attempt,
            relay=claim.relay,
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
