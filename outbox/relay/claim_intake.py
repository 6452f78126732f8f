"""Intake of claims: how many a tick asks for, which of them may be sent, and when to ask again."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.claiming import ClaimPlan
from outbox.relay.holds import Holds
from outbox.relay.memory_budget import Share
from outbox.relay.message_fetch import MessageFetch
from outbox.relay.pool import Pool
from outbox.relay.session import Session
from outbox.relay.suspects import SuspectRule
from outbox.relay.tick import TickRequest, TickResult
from outbox.relay.timers import Timers
from outbox.smtp.outgoing import OutgoingEmail, Try


class ClaimIntake:
    """Intake of one relay's claims into its pool."""

    def __init__(
        self,
        pool: Pool,
        holds: Holds,
        share: Share,
        timers: Timers,
        barrier: BarrierWatch,
        *,
        messages: MessageFetch,
        suspects: SuspectRule,
    ) -> None:
        self._pool = pool
        self._holds = holds
        self._share = share
        self._timers = timers
        self._barrier = barrier
        self._messages = messages
        self._suspects = suspects
        self._plan = ClaimPlan()
        self._asks_suspect = False
        suspects.join(self.holds_suspect)

    def begin(self) -> None:
        """Begin with a new session."""
        self._plan = ClaimPlan()
        self._holds.forget()

    def forget(self) -> None:
        """Forget the claims of a session that is lost."""
        self._messages.forget()
        self._share.forget()

    def holds_suspect(self) -> bool:
        """Return True if the relay holds a suspect, or asks for one at this moment."""
        return self._asks_suspect or self._pool.in_flight.has_suspect

    def claims_max(self, now: float) -> int:
        """Return how many deliveries to claim: as many as the connections can take soon, unless nothing may be sent."""
        if self._timers.is_stopping or self._barrier.is_up or self._holds.holds_fleet:
            return 0
        return self._pool.facts.capacity(now)

    @contextmanager
    def asking(self, session: Session, claims_max: int, now: float) -> Iterator[TickRequest]:
        """Yield what a tick is to claim. Meanwhile the suspect and the memory that it asks for count as held."""
        self._asks_suspect = claims_max > 0 and self._suspects.may_take(session.opened_at, now)
        try:
            yield self._plan.request(claims_max, now)._replace(
                suspects_max=int(self._asks_suspect),
                budget=self._share.ask() if claims_max else 0,
                bytes_max=self._share.bytes_max,
                left_out=session.quarantine.left_out,
            )
        except BaseException:
            self._share.note_asked(0)
            raise
        finally:
            self._asks_suspect = False

    def note(self, request: TickRequest, done: TickResult, now: float, *, in_parts: bool) -> bool:
        """Record how far a tick has come, and plan the next claim; return True if nothing was due."""
        self._share.note_asked(sum(claim.size for claim in done.claims if not claim.is_fetched))
        if not done.is_open or not request.claims_max:
            return False
        self._share.note_wanted(done.bytes_wanted, now)
        progress = self._plan.note(request, done, now, in_parts=in_parts)
        self._timers.note_claims(now, found=progress.found, has_more=progress.has_more, urgent_at=progress.urgent_at)
        return not (progress.found or progress.has_more)

    def take(self, session: Session, done: TickResult) -> TickResult | None:
        """Let the claims of a tick wait for connections.

        Return those that may be suppressed or paused, which is asked with `take_held`. Large messages are kept for
        `fetch`.
        """
        ready = self._messages.keep(done)
        if ready.held or ready.listed:
            return ready
        self._deliver(session, _tries(ready.claims))
        return None

    async def take_held(self, session: Session, held: TickResult, *, has_new_pause: bool) -> None:
        """Let those claims wait for connections that are neither suppressed nor paused (see `Holds`).

        A pause that has just begun also holds back what waits already.
        """
        is_stopping = self._timers.is_stopping
        if has_new_pause:
            await self._holds.spare_waiting(session, is_stopping=is_stopping)
        claims = await self._holds.sendable(session, held, is_stopping=is_stopping)
        self._deliver(session, _tries(claims))

    async def fetch(self, session: Session) -> None:
        """Fetch large messages, and let their claims wait for connections."""
        await self._messages.run(session, partial(self._deliver, session), is_stopping=lambda: self._timers.is_stopping)

    def _deliver(self, session: Session, tries: list[Try]) -> None:
        """Let tries wait for connections, or give them back if the relay stops."""
        if session.lost is None:
            if self._timers.is_stopping:
                self._pool.release([tried.outgoing for tried in tries])
            else:
                self._pool.add(tries)
            self._pool.dispatch_ready(time.monotonic())


def _tries(claims: Iterable[OutgoingEmail]) -> list[Try]:
    return [Try(claim) for claim in claims]
