"""Ticks of a relay: what each settles, marks and claims in one commit, and what follows from it."""

import time
from collections import Counter
from collections.abc import Sequence

from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.claim_intake import ClaimIntake
from outbox.relay.claim_trigger import ClaimTrigger
from outbox.relay.expiry import count_expired
from outbox.relay.marks import Asked, explain_lost
from outbox.relay.observer import Observer
from outbox.relay.pool import Pool
from outbox.relay.route_state import RouteState
from outbox.relay.session import Session
from outbox.relay.settlement import Settlement
from outbox.relay.tick import TickRequest, TickResult
from outbox.relay.tick_runner import TickRunner
from outbox.relay.timers import Timers
from outbox.relay.wake_up import WakeUp
from outbox.smtp.outgoing import Try


class Ticker:
    """Ticker of one relay. The guard between a mark's commit and the final dot is here and in `marks`."""

    def __init__(
        self,
        runner: TickRunner,
        intake: ClaimIntake,
        pool: Pool,
        route_state: RouteState,
        *,
        barrier: BarrierWatch,
        timers: Timers,
        trigger: ClaimTrigger,
        wake: WakeUp,
        observers: Sequence[Observer],
        counts: Counter[str],
        guard_s: float,
    ) -> None:
        self._runner = runner
        self._intake = intake
        self._pool = pool
        self._marks, self._verdicts = pool.marks, pool.verdicts
        self._route_state = route_state
        self._barrier = barrier
        self._timers = timers
        self._trigger = trigger
        self._wake = wake
        self._observers = observers
        self._counts = counts
        self._guard_s = guard_s

    async def tick_if_due(self, session: Session, now: float) -> None:
        """Tick if there is something to write, to mark or to claim, or if it is time to show a sign of life."""
        claims_max = self._intake.claims_max(now) if self._timers.is_poll_due(now) else 0
        may_mark = self._marks and not self._barrier.is_up
        if may_mark or self._verdicts.settlements or claims_max or self._timers.is_pulse_due(now):
            await self._gather()
            await self.tick(session, claims_max)
        else:
            self._trigger.begin_look()
            self._trigger.end_look(now, found=False)
            if self._pool.ready and session.lost is None and not self._timers.is_stopping:
                self._pool.dispatch_ready(now)  # claims that came back from cut connections

    async def _gather(self) -> None:
        """Let more come together for one commit, unless all that is in flight waits for the tick already."""
        while time.monotonic() < self._timers.rest_until and not self._pool.in_flight.is_waiting_for_marks:
            await self._wake.sleep_for_next(self._timers.rest_until)

    async def tick(self, session: Session, claims_max: int = 0) -> None:
        """Settle, mark and claim in one commit, and act on it."""
        began_at = time.monotonic()
        with self._intake.asking(session, claims_max, began_at) as request:
            await self._tick_with(session, request, began_at)

    async def _tick_with(self, session: Session, request: TickRequest, began_at: float) -> None:
        marks: Asked = {} if self._barrier.is_up else self._marks.take()
        settlements = self._verdicts.take()
        request = request._replace(
            settlements=settlements,
            marks=tuple(marks),
            epoch=self._barrier.epoch,
        )
        self._trigger.begin_look()
        for observer in self._observers:
            observer.ticking()
        started_s = boot_clock_s()  # before the mark is sent: a pause between its commit and its reply counts
        try:
            done = await self._runner.run(session, request)
        except BaseException as error:
            session.lose(session.lost or str(error) or type(error).__name__)
            self._verdicts.put_back(settlements)  # settling twice changes nothing
            self._marks.withdraw(marks)
            raise
        now = time.monotonic()
        has_new_pause = self._adopt(done, began_at, now)
        if self._intake.note(request, done, now, in_parts=self._runner.in_parts):
            await self._route_state.probe_without_mail(session)
        self._trigger.end_look(now, found=bool(done.claims or done.unfit))
        held = self._intake.take(session, done)
        lost = self._act_on_marks(session, marks, done, started_s)
        if held is not None:  # after the final dots, which must not wait
            await self._intake.take_held(session, held, has_new_pause=has_new_pause)
        await explain_lost(lost, session.connection, self._counts)
        await self._retry_or_explain(session, settlements, done)
        if await self._barrier.answer(session, done, time.monotonic()):
            self._timers.pulse_now()
            self._trigger.fire()
        await session.plan_for([claim.email for claim in done.claims])

    def _adopt(self, done: TickResult, began_at: float, now: float) -> bool:
        """Take over what a tick has read of the fleet; return True if a person has paused something meanwhile."""
        self._barrier.note_answer()
        self._timers.note_tick(began_at, now)
        for observer in self._observers:
            observer.ticked(began_at, now)
        return self._route_state.adopt(done, now)

    async def _retry_or_explain(self, session: Session, settlements: list[Settlement], done: TickResult) -> None:
        """Settle what is locked with a later tick; say why the rest of what was not settled changed nothing."""
        if len(done.settled) >= len(settlements):
            return
        self._verdicts.put_back([one for one in settlements if one.email in done.locked])
        missed = [one for one in settlements if one.identity not in done.settled and one.email not in done.locked]
        if missed:
            await self._verdicts.explain(missed, session.connection)

    def _act_on_marks(self, session: Session, marks: Asked, done: TickResult, started_s: float) -> list[Try]:
        """Have the final dots written of what is marked; return what is no longer this relay's."""
        count_expired(self._counts, len(done.expired))
        if not done.is_open:
            marks, ended = self._marks.keep_refused(marks, done)
            self._pool.release(ended)
        return self._marks.act_on(marks, done, is_too_late=lambda: self._is_too_late(session, started_s))

    def _is_too_late(self, session: Session, started_s: float) -> bool:
        """Return True if the dot after a mark, asked for at `started_s`, must not be written any more."""
        is_late = boot_clock_s() - started_s >= self._guard_s
        return is_late or session.lost is not None or self._barrier.has_gap
