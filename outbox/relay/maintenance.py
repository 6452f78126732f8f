"""Maintenance of the outbox by a relay, besides sending: what dead relays left, what is too late, what is in doubt.

A method that returns a bool returns True if emails may have become due: then it is worth while to claim again.
"""

import time
from collections import Counter
from collections.abc import Collection
from typing import Final

from outbox.log import Events
from outbox.relay import pauses, sweep
from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.claims import release
from outbox.relay.expiry import EXPIRED_AT_ONCE, count_expired, expire
from outbox.relay.in_doubt import resend_doubtful
from outbox.relay.pool import Pool
from outbox.relay.progress_note import Note, write_note
from outbox.relay.refusals import put_back
from outbox.relay.resolver import ResolverRunner
from outbox.relay.session import Session
from outbox.relay.timers import Timers
from outbox.settings import Settings, WhenInDoubt

log = Events("outbox.relay")

PUT_BACK_WHY: Final = "the server said the same of other recipients: it refuses the sender or this host"


class Maintenance:
    """Maintenance by one relay, across its sessions."""

    def __init__(
        self,
        settings: Settings,
        route: str,
        *,
        pool: Pool,
        barrier: BarrierWatch,
        timers: Timers,
        counts: Counter[str],
        resolver: ResolverRunner | None,
    ) -> None:
        self._settings = settings
        self._route = route
        self._pool = pool
        self._server = pool.server
        self._barrier = barrier
        self._timers = timers
        self._counts = counts
        self._resolver = resolver
        self.relays = 1
        """How many relays the fleet has, of all routes, as of the last sweep."""
        self._dead: list[int] = []
        self._note = Note()
        self._sent_before = 0

    def begin(self) -> None:
        """Begin with a new session, whose row says nothing yet."""
        self._note = Note()
        self._sent_before = self._counts["accepted"]

    @property
    def doubt_s(self) -> float | None:
        """Return after how many seconds the policy acts on an email in doubt; None if a person decides."""
        return None if self._settings.in_doubt is WhenInDoubt.HOLD else self._settings.doubt_grace_s

    async def sweep(self, session: Session) -> bool:
        """Judge what dead relays left. Then expire, resume, resend and ask, as far as that is due."""
        found = await sweep.sweep(
            session.connection,
            session.relay,
            doubt_s=self.doubt_s,
            route=self._route,
            quarantine=session.quarantine,
        )
        self.relays = found.alive + 1
        self._server.limiter.share_with(found.beside + 1)
        self._server.note_others(found.sent, time.monotonic(), is_connected=self._pool.facts.is_connected)
        self._barrier.see(found.instances)
        self._timers.note_sweep(time.monotonic(), self.relays)
        is_news = bool(found.freed or found.doubted or found.dead != self._dead)  # it stays dead while a row is locked
        self._dead = found.dead
        if found.dead and is_news:
            log.warning(
                "relay_dead",
                "relay {named} is dead: {freed} claims let go of, {in_doubt} in doubt",
                named=", ".join(map(str, found.dead)),
                relays=found.dead,
                freed=found.freed,
                in_doubt=found.doubted,
            )
        is_expired = self._timers.is_expire_due(time.monotonic()) and await self._expire(session)
        is_resent = await self._act_on_doubt(session)
        return bool(found.freed) or is_expired or is_resent

    async def judge_stranded(self, session: Session, in_flight: Collection[int]) -> bool:
        """Release what relays hold that do not exist, or this one without having it `in_flight`."""
        freed, doubted = await sweep.judge_stranded(
            session.connection,
            session.relay,
            in_flight,
            doubt_s=self.doubt_s,
            route=self._route,
            quarantine=session.quarantine,
        )
        if freed or doubted:
            log.warning(
                "emails_stranded",
                "emails were held by relays that do not exist: {freed} released, {in_doubt} in doubt",
                freed=freed,
                in_doubt=doubted,
            )
        return bool(freed or doubted)

    async def give_back(self, session: Session) -> None:
        """Release the claims that the pool does not send now: at once, or for later if they are to rest."""
        for after_s, emails in self._pool.returns.take():
            await release(session.connection, session.relay, emails, after_s=after_s, quarantine=session.quarantine)

    async def put_back(self, session: Session, unsettled: Collection[int]) -> None:
        """Make dead letters pending again that turned out to be the route's, once their verdicts are written.

        `unsettled` are the emails whose verdicts are not.
        """
        letters = self._server.take_undone(without=unsettled)
        if not letters:
            return
        undone = await put_back(session.connection, letters, PUT_BACK_WHY)
        if undone:
            self._counts["put back"] += len(undone)
            log.warning(
                "dead_letters_put_back",
                "{emails} dead letters are pending again, since the refusal was not about them: {named}",
                emails=len(undone),
                named=", ".join(one.key for one in letters if one.email in undone),
            )

    async def write_answers(self, session: Session) -> bool:
        """Write what the resolver has answered about emails in doubt."""
        resolver = self._resolver
        return bool(resolver and resolver.answers and await resolver.write(session.connection, session.quarantine))

    async def write_note(self, session: Session) -> None:
        """Write the relay's progress and trouble into its row, if they have changed."""
        trouble = self._pool.facts.trouble() or (self._resolver.trouble if self._resolver is not None else None)
        sent = self._counts["accepted"] - self._sent_before
        note = Note(trouble, self._counts["stale settlements"], sent, self._server.last_reply)
        if note == self._note:
            return
        if trouble is not None and self._note.trouble is None:
            log.warning("no_progress", "no progress: {reason}", reason=trouble)
        await write_note(session.connection, session.relay, note)
        self._note = note

    async def _expire(self, session: Session) -> bool:
        """End what is too late to send, and resume what was set aside under a pause that is over."""
        self._timers.note_expire(time.monotonic(), self.relays)
        expired = await expire(session.connection, session.relay, session.quarantine)
        count_expired(self._counts, expired)
        began_at = time.monotonic()
        resumed = await pauses.take_up(session.connection, session.quarantine)
        now = time.monotonic()
        if resumed:
            log.info("emails_taken_up", "{emails} emails that were set aside are due again", emails=resumed)
        if expired == EXPIRED_AT_ONCE:  # there are more; until they are gone every claim has to pass them by
            self._timers.expire_now()
        elif resumed == pauses.TAKEN_UP_AT_ONCE:  # more, too; dear where a snapshot is held that keeps what is done
            self._timers.repeat_expire(now, now - began_at)
        return bool(resumed)

    async def _act_on_doubt(self, session: Session) -> bool:
        """Do what the policy says about emails in doubt."""
        if self._settings.in_doubt is WhenInDoubt.ASK and self._resolver is not None:
            await self._resolver.ask(session.connection, time.monotonic(), session.quarantine)
        if self._settings.in_doubt is not WhenInDoubt.RESEND:
            return False
        resent = await resend_doubtful(session.connection, session.quarantine)
        if resent:
            log.warning(
                "emails_resent", '{emails} emails in doubt are sent again, as in_doubt = "resend" says', emails=resent
            )
        return bool(resent)
