"""The main loop of a relay: one route, one session at a time, many SMTP connections.

It drains the outbox until it is stopped. Postgres and SMTP may go away and come back; the process stays. Here is one
turn of it, in `ticker` one tick; the objects that do the work are connected in `parts`.
"""

import time
from collections.abc import Sequence

from outbox.log import Events
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.memory_budget import Budget
from outbox.relay.observer import Observer
from outbox.relay.parts import RelayParts
from outbox.relay.session import Session
from outbox.relay.session_keeper import LAST_WORD_S
from outbox.relay.suspects import SuspectRule
from outbox.relay.sweep import judge
from outbox.relay.timers import Outlook
from outbox.relay.until_empty import UntilEmpty, summary_of
from outbox.settings import Settings

log = Events("outbox.relay")


class Relay:
    """One relay of the fleet, which serves one route.

    All state is touched on the event loop's thread only, and the session's connection by one coroutine only, since
    advisory locks are re-entrant within a session, so two coroutines would not exclude each other.
    """

    def __init__(
        self,
        settings: Settings,
        route: str = "",
        *,
        until_empty: bool = False,
        observers: Sequence[Observer] = (),
        budget: Budget | None = None,
        suspects: SuspectRule | None = None,
    ) -> None:
        """`budget` and `suspects` are shared by the relays of a process, which die together."""
        settings.require("database_url", "smtp_url")
        settings = settings.on_route(route)
        self.until_empty = until_empty
        self.serves = route
        self.left_in_doubt = 0
        """How many verdicts are unknown or unwritten at the end."""
        parts = self._parts = RelayParts(settings, route, observers, budget=budget, suspects=suspects)
        self.settings, self.counts = settings, parts.counts
        self.sessions, self.server = parts.sessions, parts.server
        self.pool, self.verdicts = parts.pool, parts.verdicts
        self._ticker = parts.ticker
        self.end_of_work = UntilEmpty(route, parts.server, parts.holds, parts.counts)

    async def run(self) -> None:
        """Relay until stopped, or until the outbox is empty if so asked.

        Raises:
            OutboxError: the database cannot be used at the start; later trouble is outlived.

        """
        if self.settings.redirect_to:
            log.warning(
                "redirecting",
                "redirect_to is set: every email goes to {redirect_to}, none to its recipient",
                redirect_to=self.settings.redirect_to,
            )
        deadlines = self.pool.watch_deadlines()
        try:
            await self.sessions.open_first()
            while (session := self.sessions.current) is not None and not self._is_done():
                with session.lost_on_error():
                    self.sessions.note_turn()
                    await self._turn(session)
                if session.lost is not None and not self._is_done():
                    await self.sessions.reopen(self._is_done)
        finally:
            deadlines.cancel()
            await self._end()

    def stop(self) -> None:
        """Begin to drain: claim nothing more, finish what is in flight within `drain_s`, then `run` returns."""
        parts = self._parts
        if self.stopping:
            return
        drain_until = parts.timers.begin_drain(time.monotonic(), self.settings.drain_s)
        self.verdicts.decide()
        self.pool.close_politely()
        self.sessions.stop(drain_until, has_work=self._has_work())
        parts.wake.set()

    @property
    def stopping(self) -> bool:
        """Return True once it drains or stops."""
        return self._parts.timers.is_stopping

    def _is_done(self) -> bool:
        return self.stopping and (not self._has_work() or self._parts.timers.is_drained(time.monotonic()))

    def _has_work(self) -> bool:
        return self.pool.in_flight.has_work or bool(self.server.undone)

    async def _end(self) -> None:
        """Close everything; what is past its dot and unanswered is in doubt from here on."""
        self._parts.timers.stop()
        self.verdicts.decide()
        self.pool.close_politely()
        await self.pool.end()
        self._parts.marks.clear()  # what is not marked yet stays unmarked, and is freed below
        self.left_in_doubt = sum(
            s.marked and s.outcome.state == DeliveryState.IN_DOUBT for s in self.verdicts.settlements
        )
        session = self.sessions.current
        if session is None:
            return
        if session.lost is None:
            with session.lost_on_error(), self.sessions.patience(LAST_WORD_S):
                await self._write_last(session)
            await session.close()
        unwritten = [s.key for s in self.verdicts.settlements if s.marked]
        if unwritten:  # the next sweep finds those marks that were committed
            self.left_in_doubt = len(unwritten)
            log.error(
                "verdicts_unwritten",
                "Postgres is gone: {emails} verdicts stay unwritten: {named}",
                emails=len(unwritten),
                named=", ".join(unwritten),
                keys=unwritten,
            )
        log.info("relay_stopped", "the relay has stopped: {summary}", summary=self.summary(), counts=dict(self.counts))

    async def _write_last(self, session: Session) -> None:
        """Write all that is known in a last tick, and end the relay with what it still holds."""
        parts = self._parts
        await self._ticker.tick(session)
        await parts.maintenance.put_back(session, self.verdicts.unsettled())
        await parts.maintenance.write_note(session)
        _, doubted = await judge(
            session.connection,
            [session.relay],
            doubt_s=parts.maintenance.doubt_s,
            died=False,
            quarantine=session.quarantine,
        )
        self.left_in_doubt += doubted
        await parts.barrier.leave(session)

    async def _turn(self, session: Session) -> None:
        """Wait for something to do, write it in one commit, act on what came true."""
        parts = self._parts
        await parts.wake.sleep_until(self._next_turn_at(time.monotonic()))
        if self.pool.crash is not None:
            raise self.pool.crash
        now = time.monotonic()
        if parts.share.has_enough_now:
            parts.timers.poll_now()
        await self._reassert(session)
        with self.sessions.patience():
            if parts.barrier.has_gap:
                await parts.barrier.raise_after_gap(session, now)
            await self._prepare(session, now)
            await self._ticker.tick_if_due(session, now)
        await parts.intake.fetch(session)
        with self.sessions.patience():
            if parts.timers.is_sweep_due(now) and not self.stopping and not parts.barrier.is_up:
                await self._maintain(session)
            if self.until_empty and not self.stopping:
                await self._stop_if_done(session, now)

    def _next_turn_at(self, now: float) -> float:
        parts = self._parts
        breaker = self.server.breaker
        return parts.timers.next_turn_at(
            Outlook(
                can_claim=parts.intake.claims_max(now) > 0,
                starts_at=self.pool.facts.next_start_at(now),
                resumes_at=breaker.next_at if breaker.is_open and breaker.next_at > now else None,
                barrier_look_at=parts.barrier.look_at,
            )
        )

    async def _reassert(self, session: Session) -> None:
        """After a new session: write what the database may have lost, and end the former session."""
        parts = self._parts
        doubt_s = parts.maintenance.doubt_s
        if not parts.reassertion.is_complete_on(session):
            await parts.reassertion.write(session, self.verdicts, self.pool.in_flight, doubt_s)
        if self.sessions.former is not None:
            await parts.reassertion.end_former(session, self.sessions.former, doubt_s)
            self.sessions.forget_former()

    async def _prepare(self, session: Session, now: float) -> None:
        """Before a tick: write and read whatever is not part of it, which mostly is nothing."""
        parts = self._parts
        if await parts.barrier.look(session, now):
            parts.timers.poll_now()
            parts.timers.sweep_now()
            parts.wake.set()
        await parts.route_state.exchange(session, now)
        if self.pool.returns:
            await parts.maintenance.give_back(session)
        if self.server.undone:
            await parts.maintenance.put_back(session, self.verdicts.unsettled())
        if self.verdicts.dropped:
            await self.verdicts.judge_dropped(session.connection)
        if await parts.maintenance.write_answers(session):
            parts.trigger.fire()

    async def _maintain(self, session: Session) -> None:
        """Sweep, and whatever is due with it."""
        parts = self._parts
        if await parts.maintenance.sweep(session):
            parts.trigger.fire()
        await self._judge_stranded(session)
        await parts.maintenance.write_note(session)

    async def _judge_stranded(self, session: Session, *, soon: bool = False) -> None:
        parts = self._parts
        now = time.monotonic()
        if parts.timers.is_stranded_due(now, soon=soon):
            parts.timers.note_stranded(now, soon=soon)
            in_flight = {*self.pool.in_flight.emails(), *self.verdicts.unsettled()}
            if await parts.maintenance.judge_stranded(session, in_flight):
                parts.trigger.fire()

    async def _stop_if_done(self, session: Session, now: float) -> None:
        """Stop a relay that runs until the outbox is empty, if it is, or if only a person can let the rest go."""
        is_idle = self.pool.in_flight.is_empty
        if await self.end_of_work.is_over(session, now, is_idle=is_idle):
            self.stop()
        elif is_idle:
            await self._judge_stranded(session, soon=True)

    def not_ready_reasons(self) -> list[str]:
        """Return what keeps it from sending whatever is due, as far as it knows; if nothing does, it is ready."""
        found = ["it is stopping"] if self.stopping else []
        session = self.sessions.current
        if not self.sessions.holds_session:
            lost = session.lost if session is not None else "none is opened yet"
            found.append(f"it holds no session with Postgres: {lost}")
        elif self._parts.barrier.is_up:
            found.append("it waits at the failover barrier until the other relays have written what they sent")
        broken = self.pool.facts.broken()
        return [*found, broken] if broken else found

    def summary(self) -> str:
        """Return what it has done so far, in words."""
        return summary_of(self.counts)

    @property
    def alive(self) -> int:
        """Return how many relays the fleet has, of all routes, as of the last sweep."""
        return self._parts.maintenance.relays
