"""Claims that must not be sent now: suppressed addresses, and reports or a fleet that a person has paused."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from outbox.database.pause_list import FLEET, label
from outbox.log import Events
from outbox.relay import pauses, suppression
from outbox.relay.pool import Pool
from outbox.relay.session import Session
from outbox.relay.tick import TickResult
from outbox.smtp.outgoing import OutgoingEmail

log = Events("outbox.relay")


@dataclass(frozen=True, slots=True)
class PauseChange:
    """Change of the pauses since the last tick."""

    has_begun: bool
    has_ended: bool


class Holds:
    """Pauses that are in force, as of the last tick of the session."""

    def __init__(self, pool: Pool, counts: Counter[str]) -> None:
        self._pool = pool
        self._counts = counts
        self._held: frozenset[str] = frozenset()

    def forget(self) -> None:
        """Begin with a new session, whose first tick says what is paused."""
        self._held = frozenset()
        self._pool.note_pauses(is_any=False)

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
        self._pool.note_pauses(is_any=bool(held))
        for report in begun:
            log.warning("sending_paused", "{what} is paused", what=label(report), report=report)
        for report in over:
            log.info("sending_resumed", "{what} is no longer paused", what=label(report), report=report)
        return PauseChange(bool(begun), bool(over))

    async def sendable(self, session: Session, done: TickResult, *, is_stopping: bool) -> Sequence[OutgoingEmail]:
        """Return the claims of a tick that may be sent. Suppressed ones are cancelled, paused ones set aside."""
        claims = await self._unsuppressed(session, done) if done.listed else done.claims
        if not done.held:
            return claims
        aside = await self._set_aside(session, claims, is_stopping=is_stopping)
        return [claim for claim in claims if claim.email not in aside]

    async def spare_waiting(self, session: Session, *, is_stopping: bool) -> None:
        """Set aside what waits for a connection and a new pause holds back. What a connection has begun is sent."""
        waiting = self._pool.ready.take_all()  # so that no connection takes it meanwhile
        aside = await self._set_aside(session, [tried.outgoing for tried in waiting], is_stopping=is_stopping)
        if session.lost is not None:
            return
        spared = [tried for tried in waiting if tried.outgoing.email not in aside]
        if self._pool.is_closing:  # the relay was stopped meanwhile
            self._pool.release([tried.outgoing for tried in spared])
        else:
            self._pool.add(spared)  # their sender may have been refused meanwhile

    async def _set_aside(
        self, session: Session, claims: Sequence[OutgoingEmail], *, is_stopping: bool
    ) -> Collection[int]:
        """Return which of these claims a pause holds back: they are given back, or set aside in the database."""
        emails = [claim.email for claim in claims]
        if self.holds_fleet or is_stopping:
            self._pool.release(claims)
            return emails
        return await pauses.set_aside(session.connection, session.relay, emails, session.quarantine)

    async def _unsuppressed(self, session: Session, done: TickResult) -> list[OutgoingEmail]:
        ended = await suppression.cancel_listed(
            session.connection, session.relay, list(done.listed), session.quarantine
        )
        if ended:
            self._counts["suppressed"] += len(ended)
            log.info(
                "emails_suppressed",
                "{emails} emails are not sent: their addresses are on the suppression list",
                emails=len(ended),
            )
        return [claim for claim in done.claims if claim.email not in ended]
