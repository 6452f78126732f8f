"""History of a relay's recent verdicts, for a database that lacks them after a failover. Pure: `now` is an argument.

`failover` writes them again on another server.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from outbox.mail.delivery_state import DeliveryState
from outbox.relay.settlement import Settlement
from outbox.smtp.outgoing import Try
from outbox.smtp.verdict import Outcome

REMEMBERED_S: Final = 60.0
REMEMBERED_MAX: Final = 100_000
REMEMBERED_BYTES_MAX: Final = 48 * 1024 * 1024  # of all remembered verdicts; above, the oldest are forgotten
MESSAGES_BYTES_MAX: Final = 16 * 1024 * 1024  # of messages in doubt; above, only envelopes are remembered
VERDICT_BYTES: Final = 700  # of a verdict besides its text
RETURN_S: Final = 3600.0  # for so long after a change of servers the old one may come back, which lacks all since then


class RecentVerdict(NamedTuple):
    """Verdict on a try, under the email's key, since ids may be given again on another server."""

    key: str
    sender: str
    recipient: str
    message_id: str
    message: bytes | None
    """Kept of what is in doubt only: a dead letter that a failover loses cannot be sent again."""
    relay: int
    attempt: int
    outcome: Outcome

    @classmethod
    def on(cls, tried: Try, attempt: int, outcome: Outcome) -> "RecentVerdict":
        """Return the verdict on a try."""
        email = tried.outgoing
        message = email.message if outcome.state == DeliveryState.IN_DOUBT else None
        return cls(
            email.key, email.sender, email.recipient, email.message_id, message, email.relay, attempt, outcome
        )  # fmt: skip

    @property
    def message_bytes(self) -> int:
        """Return the size of the message that is kept with it."""
        return len(self.message or b"")

    @property
    def bytes(self) -> int:
        """Return about how many bytes of memory it takes without its message."""
        text = len(self.key) + len(self.sender) + len(self.recipient) + len(self.message_id) + len(self.outcome.reply)
        return VERDICT_BYTES + text


@dataclass(slots=True)
class VerdictHistory:
    """Verdicts of a relay in the last `REMEMBERED_S` before its session was lost, within `REMEMBERED_BYTES_MAX`.

    For `RETURN_S` after a change of servers no verdict grows old: the former server has none of those since then.
    """

    lost_at: float | None = None
    """Time since which no session knows them: until one does, no verdict grows old, however long that takes."""
    keep_until: float = 0.0
    """Time until which no verdict grows old."""
    _verdicts: deque[tuple[float, RecentVerdict]] = field(default_factory=deque)
    _bytes: int = 0
    _message_bytes: int = 0

    def note(self, tried: Try, attempt: int, outcome: Outcome, now: float) -> None:
        """Remember a verdict that must not be forgotten: sent, dead or in doubt.

        Others only lead to a next try, except that another server may have the mark of a try that was withdrawn.
        """
        self._forget_old(now)
        if outcome.state == DeliveryState.PENDING and not (tried.marked and outcome.verdict == "withdrawn"):
            return
        verdict = RecentVerdict.on(tried, attempt, outcome)
        if self._message_bytes + verdict.message_bytes > MESSAGES_BYTES_MAX:  # a person decides if it is lost
            verdict = verdict._replace(message=None, outcome=outcome._replace(delay_s=None))
        self._verdicts.append((now, verdict))
        self._bytes += verdict.bytes
        self._message_bytes += verdict.message_bytes
        while self._bytes > REMEMBERED_BYTES_MAX or len(self._verdicts) > REMEMBERED_MAX:
            self._forget_oldest()

    def _forget_old(self, now: float) -> None:
        if self.lost_at is not None or now < self.keep_until:
            return
        while self._verdicts and now - self._verdicts[0][0] > REMEMBERED_S:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, verdict = self._verdicts.popleft()
        self._bytes -= verdict.bytes
        self._message_bytes -= verdict.message_bytes

    def note_lost(self, now: float) -> None:
        """Note that the session that knows the verdicts is lost, unless that is known already."""
        if self.lost_at is None:
            self.lost_at = now

    def note_known(self) -> None:
        """Note that a session knows all verdicts again."""
        self.lost_at = None

    def note_move(self, moved_s: float, now: float) -> None:
        """Note that the fleet came from another server so many seconds ago."""
        if moved_s < RETURN_S:
            self.keep_until = max(self.keep_until, now + RETURN_S - moved_s)

    def recall(
        self, unsettled: Iterable[Settlement], awaiting_reply: Iterable[Try], now: float, *, doubt_s: float | None
    ) -> list[RecentVerdict]:
        """Return what the database may lack: one verdict for each email, the latest, or that it was sent.

        `unsettled` are verdicts that no commit has confirmed. `awaiting_reply` are claims whose final dot is written
        and has no reply: whatever the database says of those, they are in doubt until the reply comes. An acceptance
        comes before all else: attempts of two servers are counted apart, so that a later number need not be a later
        try.
        """
        lost_at = now if self.lost_at is None else self.lost_at
        keeps = lost_at < self.keep_until
        verdicts = [verdict for at, verdict in self._verdicts if keeps or lost_at - at <= REMEMBERED_S]
        verdicts += [
            RecentVerdict(s.key, "", "", "", None, s.relay, s.attempt, s.outcome)
            for s in unsettled
            if s.outcome.state == DeliveryState.PENDING
        ]
        reason = "Postgres was lost while the relay waited for the reply to the final dot"
        doubt = Outcome(DeliveryState.IN_DOUBT, "in_doubt", reason, doubt_s)
        verdicts += [RecentVerdict.on(tried, tried.attempt, doubt) for tried in awaiting_reply]
        latest: dict[str, RecentVerdict] = {}
        for verdict in verdicts:
            if (
                verdict.key not in latest
                or latest[verdict.key].outcome.state != DeliveryState.SENT
                or verdict.outcome.state == DeliveryState.SENT
            ):
                latest[verdict.key] = verdict
        return list(latest.values())
