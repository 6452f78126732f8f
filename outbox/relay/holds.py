"""Claims that must not be sent now: suppressed addresses, and reports or a fleet that a person has paused."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from outbox.log import Events
from outbox.relay import pauses, suppression
from outbox.relay.pauses import FLEET
from outbox.relay.pool import Pool
from outbox.relay.session import Session
from outbox.relay.tick import TickResult
from outbox.smtp.outgoing import Claim

log = Events("outbox.relay")


@dataclass(frozen=True, slots=True)
class PauseChange:
    """Change of the pauses since the last tick."""

    has_begun: bool
    has_ended: bool


class Holds:
    """Pauses that are in force, as of the last tick of the session."""

    def __init__(self, pool: Pool, counts: Counter[str], wake: Callable[[], None]) -> None:
        self._pool = pool
        self._counts = counts
        self._wake = wake
        self._held: frozenset[str] = frozenset()

    def forget(self) -> None:
        """Begin with a new session, whose first tick says what is paused."""
        self._held = frozenset()

    @property
    def holds_any(self) -> bool:
        """Return True if a report or the fleet is paused."""
        return bool(self._held)

    @property
    def holds_fleet(self) -> bool:
        """Return True if the fleet is paused."""
        return FLEET in self._held

    def adopt(self, held: frozenset[str]) -> PauseChange:
        """Take over the pauses that a tick has read."""
        begun, over = held - self._held, self._held - held
        self._held = held
        for report in begun:
            log.warning("sending_paused", "{what} is paused", what=pauses.spoken(report), report=report)
        for report in over:
            log.info("sending_resumed", "{what} is no longer paused", what=pauses.spoken(report), report=report)
        return PauseChange(bool(begun), bool(over))

    async def sendable(self, session: Session, tick: TickResult, *, with_ready: bool, is_stopping: bool) -> list[Claim]:
        """Return the claims of a tick that may be sent. Suppressed ones are cancelled, paused ones set aside.

        `with_ready`: also judge what waits for a connection, since a pause has just begun. It cannot be taken
        meanwhile. What a connection has begun is sent.
        """
        claims = await self._unsuppressed(session, tick) if tick.listed else tick.claims
        if not tick.held:
            return claims
        if with_ready:
            claims = [*self._pool.ready, *claims]
            self._pool.ready.clear()
        if self.holds_fleet or is_stopping:
            self._pool.releases.extend(claims)
            self._wake()
            return []
        aside = await pauses.set_aside(
            session.connection, session.relay, [claim.email for claim in claims], session.quarantine
        )
        return [claim for claim in claims if claim.email not in aside]

    async def _unsuppressed(self, session: Session, tick: TickResult) -> list[Claim]:
        ended = await suppression.cancel_listed(
            session.connection, session.relay, list(tick.listed), session.quarantine
        )
        if ended:
            self._counts["suppressed"] += len(ended)
            log.info(
                "emails_suppressed",
                "{emails} emails are not sent: their addresses are on the suppression list",
                emails=len(ended),
            )
        return [claim for claim in tick.claims if claim.email not in ended]
