"""The main loop of a relay: one route, one session at a time, many SMTP connections.

It drains the outbox until it is told to stop. Postgres and SMTP may go away and come back; the process stays. Here the
story of one turn is told; each of its parts is a module of this package. Claims go to connections, marks and verdicts
go to the next tick, and the guard stands between a mark's commit and the final dot.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from outbox.log import Events
from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.claim_intake import ClaimIntake
from outbox.relay.claim_trigger import ClaimTrigger
from outbox.relay.holds import Holds
from outbox.relay.in_doubt import Inquirer, load_resolver
from outbox.relay.large_messages import SMALL_BYTES
from outbox.relay.maintenance import Maintenance
from outbox.relay.marks import Asked, Marks, explain_lost
from outbox.relay.memory_budget import Budget
from outbox.relay.message_fetch import MessageFetch
from outbox.relay.observer import Observer
from outbox.relay.pool import Pool
from outbox.relay.reassertion import Reassertion
from outbox.relay.route_state import RouteState
from outbox.relay.server_state import ServerState
from outbox.relay.session import Session, SessionEvents
from outbox.relay.session_keeper import LAST_WORD_S, SessionKeeper
from outbox.relay.settlement import Settlement
from outbox.relay.suspects import SuspectRule
from outbox.relay.sweep import judge
from outbox.relay.tick import TickRequest, TickResult
from outbox.relay.tick_runner import TickRunner
from outbox.relay.timers import Outlook, Timers
from outbox.relay.until_empty import UntilEmpty, summary_of
from outbox.relay.verdict_history import VerdictHistory
from outbox.relay.verdicts import Verdicts
from outbox.relay.wake_up import WakeUp
from outbox.settings import Settings
from outbox.smtp.connector import Route
from outbox.smtp.outgoing import OutgoingEmail, Try

log = Events("outbox.relay")


class Relay:
    """One relay of the fleet, which serves one route.

    All state is touched on the event loop's thread only, and the session's connection by one coroutine only, since
    advisory locks are re-entrant within a session and so exclude nobody inside a process.
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
        assert settings.database_url is not None
        assert settings.smtp_url is not None
        self.settings = settings
        self.serves = route
        self.until_empty = until_empty
        self.observers = observers
        self.counts: Counter[str] = Counter()
        """Emails by what became of them."""
        self.left_in_doubt = 0

        self._wake = WakeUp()
        self._timers = Timers(poll_max_s=settings.poll_max_s, lease_s=settings.lease_s)
        self._history = VerdictHistory()
        self._ticks = TickRunner(settings.database_url)
        self._barrier = BarrierWatch(settings, self._history)
        mail_route = Route(settings.smtp_url, settings, named=route)
        self.server = ServerState(mail_route.name, settings, wake=self._wake.set)
        self.verdicts = Verdicts(
            settings,
            self.server,
            self._history,
            counts=self.counts,
            observers=observers,
            on_settlement=self._on_settlement,
        )
        self.marks = Marks(self.verdicts, is_held=self._is_held)
        self.pool = Pool(
            mail_route,
            self.server,
            self.marks,
            self.verdicts,
            settings=settings,
            is_held=self._is_held,
            wake=self._wake.set,
        )
        self.share = (budget or Budget.of(settings.message_bytes_max)).share(self._bytes_in_flight, self._wake.set)
        """Its part of the memory for large messages."""
        self._holds = Holds(self.pool, self.counts)
        self._trigger = ClaimTrigger(
            self._timers,
            self._wake.set,
            is_blocked=lambda: self.server.breaker.is_open or self._holds.holds_any,
        )
        self.sessions = SessionKeeper(
            settings,
            route,
            barrier=self._barrier,
            share=self.share,
            events=SessionEvents(
                self._trigger.on_notification, self._hear_of_relays, self._barrier.note_answer, self._session_lost
            ),
            on_opened=self._session_opened,
        )
        self._reassertion = Reassertion(
            self._history, self.sessions.patience, route=route, instance=self._barrier.instance
        )
        self._intake = ClaimIntake(
            self.pool,
            self._holds,
            self.share,
            self._timers,
            messages=MessageFetch(self.pool, self._holds, self.share, self.sessions.patience),
            suspects=suspects or SuspectRule(),
            in_flight=lambda: self.pool.in_flight().values(),
        )
        self._route_state = RouteState(self.pool, self.server, route, self._timers, self._wake.set)
        self._maintenance = Maintenance(
            settings,
            route,
            pool=self.pool,
            server=self.server,
            barrier=self._barrier,
            timers=self._timers,
            counts=self.counts,
            resolver=self._resolver(settings),
        )
        self.end_of_work = UntilEmpty(route, self.server, self._holds, self.counts)

    def _resolver(self, settings: Settings) -> Inquirer | None:
        if settings.resolver is None:
            return None
        return Inquirer(
            load_resolver(settings.resolver, settings.directory),
            grace_s=settings.doubt_grace_s,
            asks_max=settings.asks_max,
            wake=self._wake.set,
        )

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────────────────

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
        deadlines = asyncio.get_running_loop().create_task(self.pool.connections.watch_deadlines())
        deadlines.add_done_callback(self.pool.note_crash)
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
        if self.stopping:
            return
        drain_until = self._timers.begin_drain(time.monotonic(), self.settings.drain_s)
        self.verdicts.decide()
        self.pool.close_politely()
        self.sessions.stop(drain_until, has_work=self._has_work())
        self._wake.set()

    @property
    def stopping(self) -> bool:
        """Return True once it drains or stops."""
        return self._timers.is_stopping

    def _is_done(self) -> bool:
        return self.stopping and (not self._has_work() or self._timers.is_drained(time.monotonic()))

    def _has_work(self) -> bool:
        verdicts, pool = self.verdicts, self.pool
        return bool(
            verdicts.settlements
            or verdicts.undecided
            or self.marks
            or pool.returns
            or pool.connections.is_busy
            or self.server.undone
        )

    async def _end(self) -> None:
        """Close everything; what is past its dot and unanswered is in doubt from here on."""
        self._timers.stop()
        self.verdicts.decide()
        self.pool.close_politely()
        await self.pool.end()
        self.marks.clear()  # what is not marked yet stays unmarked, and is freed below
        self.left_in_doubt = sum(s.marked and s.outcome.state == "in_doubt" for s in self.verdicts.settlements)
        session = self.sessions.current
        if session is None:
            return
        if session.lost is None:
            with session.lost_on_error(), self.sessions.patience(LAST_WORD_S):
                await self._write_last(session)
            await session.close()
        untold = [s.key for s in self.verdicts.settlements if s.marked]
        if untold:  # the next sweep finds those marks that were committed
            self.left_in_doubt = len(untold)
            log.error(
                "verdicts_unwritten",
                "Postgres is gone: {emails} verdicts stay unwritten: {named}",
                emails=len(untold),
                named=", ".join(untold),
                keys=untold,
            )
        log.info("relay_stopped", "the relay has stopped: {summary}", summary=self.summary(), counts=dict(self.counts))

    async def _write_last(self, session: Session) -> None:
        """Write all that is known in a last tick, and end the relay with what it still holds."""
        await self._tick(session)
        await self._maintenance.put_back(session, self._unsettled())
        await self._maintenance.write_note(session)
        _, doubted = await judge(
            session.connection,
            [session.relay],
            doubt_s=self._maintenance.doubt_s,
            died=False,
            quarantine=session.quarantine,
        )
        self.left_in_doubt += doubted
        await self._barrier.leave(session)

    # ── one turn ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _turn(self, session: Session) -> None:
        """Wait for something to do, write it in one commit, act on what came true."""
        await self._wake.sleep_until(self._next_turn_at(time.monotonic()))
        if self.pool.crash is not None:
            raise self.pool.crash
        now = time.monotonic()
        if self.share.has_enough_now:
            self._timers.poll_now()
        await self._reassert(session)
        with self.sessions.patience():
            if self._barrier.has_gap:
                await self._barrier.raise_after_gap(session, now)
            await self._prepare(session, now)
            await self._tick_if_due(session, now)
        await self._intake.fetch(session)
        with self.sessions.patience():
            if self._timers.is_sweep_due(now) and not self.stopping and not self._barrier.is_up:
                await self._maintain(session)
            if self.until_empty and not self.stopping:
                await self._stop_if_done(session, now)

    def _next_turn_at(self, now: float) -> float:
        breaker = self.server.breaker
        return self._timers.next_turn_at(
            Outlook(
                can_claim=self._room(now) > 0,
                starts_at=self.pool.next_start_at(now),
                resumes_at=breaker.next_at if breaker.is_open and breaker.next_at > now else None,
                barrier_look_at=self._barrier.look_at,
            )
        )

    def _room(self, now: float) -> int:
        """Return how many deliveries to claim."""
        return 0 if self._barrier.is_up else self._intake.room(now)

    async def _reassert(self, session: Session) -> None:
        """After a new session: write what the database may have lost, and end the former session."""
        doubt_s = self._maintenance.doubt_s
        if not self._reassertion.is_complete_on(session):
            await self._reassertion.write(session, self.verdicts, self.pool, doubt_s)
        if self.sessions.former is not None:
            await self._reassertion.end_former(session, self.sessions.former, doubt_s)
            self.sessions.forget_former()

    async def _prepare(self, session: Session, now: float) -> None:
        """Before a tick: write and read whatever is not part of it, which mostly is nothing."""
        if await self._barrier.look(session, now):
            self._timers.poll_now()
            self._timers.sweep_now()
            self._wake.set()
        await self._route_state.exchange(session, now, is_stopping=self.stopping, is_held=self._holds.holds_fleet)
        if self.pool.returns:
            await self._maintenance.give_back(session)
        if self.server.undone:
            await self._maintenance.put_back(session, self._unsettled())
        if self.verdicts.dropped:
            await self.verdicts.judge_dropped(session.connection)
        if await self._maintenance.write_answers(session):
            self._trigger.fire()

    async def _tick_if_due(self, session: Session, now: float) -> None:
        room = self._room(now) if self._timers.is_poll_due(now) else 0
        may_mark = self.marks and not self._barrier.is_up
        if may_mark or self.verdicts.settlements or room or self._timers.is_pulse_due(now):
            await self._gather()
            await self._tick(session, room)
        else:
            self._trigger.begin_look()
            self._trigger.end_look(now, found=False)
            if self.pool.ready and session.lost is None and not self.stopping:
                self.pool.dispatch_ready(now)  # claims that came back from cut connections

    async def _gather(self) -> None:
        """Let more come together for one commit, unless all that is in flight waits for the tick already."""
        while time.monotonic() < self._timers.rest_until and self.pool.connections.busy > len(self.marks):
            await self._wake.sleep_for_next(self._timers.rest_until)

    async def _maintain(self, session: Session) -> None:
        """Sweep, and whatever is due with it."""
        if await self._maintenance.sweep(session):
            self._trigger.fire()
        await self._judge_stranded(session)
        await self._maintenance.write_note(session)

    async def _judge_stranded(self, session: Session, *, soon: bool = False) -> None:
        now = time.monotonic()
        if self._timers.is_stranded_due(now, soon=soon):
            self._timers.note_stranded(now, soon=soon)
            in_flight = {*self.pool.in_flight(), *self._unsettled()}
            if await self._maintenance.judge_stranded(session, in_flight):
                self._trigger.fire()

    async def _stop_if_done(self, session: Session, now: float) -> None:
        """Stop a relay that runs until the outbox is empty, if it is, or if only a person can let the rest go."""
        pool = self.pool
        is_idle = not (pool.ready or self.marks or self.verdicts.settlements or pool.connections.is_busy)
        if await self.end_of_work.is_over(session, now, is_idle=is_idle):
            self.stop()
        elif is_idle:
            await self._judge_stranded(session, soon=True)

    # ── one tick ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tick(self, session: Session, room: int = 0) -> None:
        """Settle, mark and claim in one commit, and act on it."""
        began_at = time.monotonic()
        with self._intake.asking(session, room, began_at) as request:
            await self._tick_with(session, request, began_at)

    async def _tick_with(self, session: Session, request: TickRequest, began_at: float) -> None:
        marks: Asked = {} if self._barrier.is_up else self.marks.take()
        settlements = self.verdicts.take()
        request = replace(
            request,
            route=self.serves,
            server=self.server.name,
            settlements=settlements,
            marks=tuple(marks),
            epoch=self._barrier.epoch,
        )
        self._trigger.begin_look()
        for observer in self.observers:
            observer.ticking()
        started_s = boot_clock_s()  # before the mark is sent: a pause between its commit and its reply counts
        try:
            done = await self._ticks.run(session, request)
        except BaseException as error:
            session.lose(session.lost or str(error) or type(error).__name__)
            self.verdicts.put_back(settlements)  # settling twice changes nothing
            self.marks.withdraw(marks)
            raise
        now = time.monotonic()
        has_new_pause = self._adopt(done, began_at, now)
        if self._intake.note(request, done, now, in_parts=self._ticks.in_parts):
            await self._route_state.probe_without_mail(session)
        self._trigger.end_look(now, found=bool(done.claims or done.unfit))
        held = self._intake.take(session, done)
        lost = self._act_on_marks(session, marks, done, started_s)
        if held is not None:  # after the final dots, which must not wait
            await self._intake.take_held(session, held, has_new_pause=has_new_pause)
        await explain_lost(lost, session.connection, self.counts)
        await self._retry_or_explain(session, settlements, done)
        if await self._barrier.answer(session, done, time.monotonic()):
            self._timers.poll_now()
            self._timers.pulse_now()
            self._wake.set()
        await session.plan_for([claim.email for claim in done.claims])

    def _adopt(self, done: TickResult, began_at: float, now: float) -> bool:
        """Take over what a tick has read of the fleet; return True if a person has paused something meanwhile."""
        self._barrier.note_answer()
        self._timers.note_tick(began_at, now)
        for observer in self.observers:
            observer.ticked(began_at, now)
        self._route_state.adopt_pause(done.pause, now)
        self._route_state.adopt_rate(done.found)
        change = self._holds.adopt(done.held)
        if change.has_ended:  # what was set aside is resumed with the next sweep
            self._timers.poll_now()
            self._timers.expire_now()
            self._wake.set()
        return change.has_begun

    async def _retry_or_explain(self, session: Session, settlements: list[Settlement], done: TickResult) -> None:
        """Settle what is locked with a later tick; say why the rest of what was not settled changed nothing."""
        if len(done.settled) >= len(settlements):
            return
        self.verdicts.put_back([one for one in settlements if one.email in done.locked])
        missed = [one for one in settlements if one.identity not in done.settled and one.email not in done.locked]
        if missed:
            await self.verdicts.explain(missed, session.connection)

    def _act_on_marks(self, session: Session, marks: Asked, done: TickResult, started_s: float) -> list[Try]:
        """Have the final dots written of what is marked; return what is no longer this relay's."""
        self._maintenance.count_expired(len(done.expired))
        if not done.is_open:
            marks, ended = self.marks.keep_refused(marks, done)
            self.pool.release(ended)
        return self.marks.act_on(marks, done, is_too_late=lambda: self._is_too_late(session, started_s))

    def _is_too_late(self, session: Session, started_s: float) -> bool:
        """Return True if the dot after a mark, asked for at `started_s`, must not be written any more."""
        is_late = boot_clock_s() - started_s >= self.settings.guard_s
        return is_late or session.lost is not None or self._barrier.has_gap

    # ── events of the session ────────────────────────────────────────────────────────────────────────────────────────

    def _session_opened(self, session: Session) -> None:
        log.info(
            "session_opened",
            "relay {relay} holds its lock and relays to {route}",
            relay=session.relay,
            route=self.server.name,
        )
        self._timers.restart(session.opened_at)
        self._intake.begin()
        self._maintenance.begin()
        self._reassertion.begin(session)

    def _session_lost(self) -> None:
        """Forget all claims, which are other relays' now; what is past its dot is waited for."""
        self._history.note_lost(time.monotonic())
        for observer in self.observers:
            observer.session_lost()
        self.pool.drop_session()
        self._intake.forget()
        self._wake.set()

    def _hear_of_relays(self, notification: str) -> None:
        if self._barrier.hear(notification):
            self._timers.pulse_now()
            self._trigger.on_notification()

    # ── its state, for others ────────────────────────────────────────────────────────────────────────────────────────

    def not_ready_reasons(self) -> list[str]:
        """Return what keeps it from sending whatever is due, as far as it knows; if nothing does, it is ready."""
        found = ["it is stopping"] if self.stopping else []
        session = self.sessions.current
        if not self.sessions.holds_session:
            lost = session.lost if session is not None else "none is opened yet"
            found.append(f"it holds no session with Postgres: {lost}")
        elif self._barrier.is_up:
            found.append("it waits at the failover barrier until the other relays have written what they sent")
        broken = self.pool.broken() or self.server.deferring()
        return [*found, broken] if broken else found

    def summary(self) -> str:
        """Return what it has done so far, in words."""
        return summary_of(self.counts)

    @property
    def alive(self) -> int:
        """Return how many relays the fleet has, of all routes, as of the last sweep."""
        return self._maintenance.relays

    def _unsettled(self) -> set[int]:
        """Return the emails whose verdicts are not written yet."""
        return {one.email for one in self.verdicts.settlements}

    def _bytes_in_flight(self) -> int:
        """Return how many bytes its large messages have."""
        return sum(one.size for one in self.pool.in_flight().values() if one.size > SMALL_BYTES)

    def _is_held(self, outgoing: OutgoingEmail) -> bool:
        """Return True while the session that claimed the email is held."""
        return self.sessions.is_current(outgoing.relay)

    def _on_settlement(self) -> None:
        """Let a tick write it; the memory of its message is free for the other relays."""
        self.share.wake_others()
        self._wake.set()
