"""Ticks of a relay: what each settles, marks and claims in one commit, and what follows from it."""

import time
from dataclasses import replace

from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.marks import Asked, explain_lost
from outbox.relay.parts import RelayParts
from outbox.relay.session import Session
from outbox.relay.settlement import Settlement
from outbox.relay.tick import TickRequest, TickResult
from outbox.relay.tick_runner import TickRunner
from outbox.smtp.outgoing import Try


class Ticker:
    """Ticker of one relay. The guard between a mark's commit and the final dot is here and in `marks`."""

    def __init__(self, parts: RelayParts) -> None:
        assert parts.settings.database_url is not None
        self._parts = parts
        self._runner = TickRunner(parts.settings.database_url)

    async def tick_if_due(self, session: Session, now: float) -> None:
        """Tick if there is something to write, to mark or to claim, or if it is time to show a sign of life."""
        parts = self._parts
        claims_max = parts.intake.claims_max(now) if parts.timers.is_poll_due(now) else 0
        may_mark = parts.marks and not parts.barrier.is_up
        if may_mark or parts.verdicts.settlements or claims_max or parts.timers.is_pulse_due(now):
            await self._gather()
            await self.tick(session, claims_max)
        else:
            parts.trigger.begin_look()
            parts.trigger.end_look(now, found=False)
            if parts.pool.ready and session.lost is None and not parts.timers.is_stopping:
                parts.pool.dispatch_ready(now)  # claims that came back from cut connections

    async def _gather(self) -> None:
        """Let more come together for one commit, unless all that is in flight waits for the tick already."""
        parts = self._parts
        while time.monotonic() < parts.timers.rest_until and parts.pool.connections.busy > len(parts.marks):
            await parts.wake.sleep_for_next(parts.timers.rest_until)

    async def tick(self, session: Session, claims_max: int = 0) -> None:
        """Settle, mark and claim in one commit, and act on it."""
        began_at = time.monotonic()
        with self._parts.intake.asking(session, claims_max, began_at) as request:
            await self._tick_with(session, request, began_at)

    async def _tick_with(self, session: Session, request: TickRequest, began_at: float) -> None:
        parts = self._parts
        marks: Asked = {} if parts.barrier.is_up else parts.marks.take()
        settlements = parts.verdicts.take()
        request = replace(
            request,
            route=parts.route,
            server=parts.server.name,
            settlements=settlements,
            marks=tuple(marks),
            epoch=parts.barrier.epoch,
        )
        parts.trigger.begin_look()
        for observer in parts.observers:
            observer.ticking()
        started_s = boot_clock_s()  # before the mark is sent: a pause between its commit and its reply counts
        try:
            done = await self._runner.run(session, request)
        except BaseException as error:
            session.lose(session.lost or str(error) or type(error).__name__)
            parts.verdicts.put_back(settlements)  # settling twice changes nothing
            parts.marks.withdraw(marks)
            raise
        now = time.monotonic()
        has_new_pause = self._adopt(done, began_at, now)
        if parts.intake.note(request, done, now, in_parts=self._runner.in_parts):
            await parts.route_state.probe_without_mail(session)
        parts.trigger.end_look(now, found=bool(done.claims or done.unfit))
        held = parts.intake.take(session, done)
        lost = self._act_on_marks(session, marks, done, started_s)
        if held is not None:  # after the final dots, which must not wait
            await parts.intake.take_held(session, held, has_new_pause=has_new_pause)
        await explain_lost(lost, session.connection, parts.counts)
        await self._retry_or_explain(session, settlements, done)
        if await parts.barrier.answer(session, done, time.monotonic()):
            parts.timers.poll_now()
            parts.timers.pulse_now()
            parts.wake.set()
        await session.plan_for([claim.email for claim in done.claims])

    def _adopt(self, done: TickResult, began_at: float, now: float) -> bool:
        """Take over what a tick has read of the fleet; return True if a person has paused something meanwhile."""
        parts = self._parts
        parts.barrier.note_answer()
        parts.timers.note_tick(began_at, now)
        for observer in parts.observers:
            observer.ticked(began_at, now)
        parts.route_state.adopt_pause(done.pause, now)
        parts.route_state.adopt_rate(done.found)
        change = parts.holds.adopt(done.held)
        if change.has_ended:  # what was set aside is resumed with the next sweep
            parts.timers.poll_now()
            parts.timers.expire_now()
            parts.wake.set()
        return change.has_begun

    async def _retry_or_explain(self, session: Session, settlements: list[Settlement], done: TickResult) -> None:
        """Settle what is locked with a later tick; say why the rest of what was not settled changed nothing."""
        if len(done.settled) >= len(settlements):
            return
        self._parts.verdicts.put_back([one for one in settlements if one.email in done.locked])
        missed = [one for one in settlements if one.identity not in done.settled and one.email not in done.locked]
        if missed:
            await self._parts.verdicts.explain(missed, session.connection)

    def _act_on_marks(self, session: Session, marks: Asked, done: TickResult, started_s: float) -> list[Try]:
        """Have the final dots written of what is marked; return what is no longer this relay's."""
        parts = self._parts
        parts.maintenance.count_expired(len(done.expired))
        if not done.is_open:
            marks, ended = parts.marks.keep_refused(marks, done)
            parts.pool.release(ended)
        return parts.marks.act_on(marks, done, is_too_late=lambda: self._is_too_late(session, started_s))

    def _is_too_late(self, session: Session, started_s: float) -> bool:
        """Return True if the dot after a mark, asked for at `started_s`, must not be written any more."""
        is_late = boot_clock_s() - started_s >= self._parts.settings.guard_s
        return is_late or session.lost is not None or self._parts.barrier.has_gap
