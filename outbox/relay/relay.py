"""The main loop of a relay: one route, one session at a time, many SMTP connections.

It drains the outbox until it is told to stop. Postgres and SMTP may go away and come back; the process stays. Here the
story of one turn is told; each of its parts is a module of this package. Claims go to connections, marks and verdicts
go to the next tick, and the guard stands between a mark's commit and the final dot.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from logging import DEBUG
from typing import Final

from outbox.log import Events
from outbox.relay.backoff import full_jitter_s
from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.claim_intake import ClaimIntake
from outbox.relay.claim_trigger import ClaimTrigger
from outbox.relay.explanations import explain_lost_claims, explain_missed_settlements, fields_of
from outbox.relay.giving_back import put_back_dead_letters, release_claims
from outbox.relay.holds import Holds
from outbox.relay.in_doubt import Inquirer, load_resolver
from outbox.relay.large_messages import SMALL_BYTES
from outbox.relay.maintenance import Maintenance
from outbox.relay.memory_budget import Budget
from outbox.relay.message_fetch import MessageFetch
from outbox.relay.observer import Observer
from outbox.relay.pool import Pool
from outbox.relay.reassertion import Reassertion
from outbox.relay.refusals import Ruling
from outbox.relay.route_state import RouteState
from outbox.relay.session import Session, SessionEvents
from outbox.relay.session_keeper import LAST_WORD_S, SessionKeeper
from outbox.relay.settlement import Settlement, count_withdrawn_by_reply
from outbox.relay.suspects import SuspectRule
from outbox.relay.sweep import judge
from outbox.relay.tick import TickRequest, TickResult
from outbox.relay.tick_runner import TickRunner
from outbox.relay.timers import Outlook, Timers
from outbox.relay.until_empty import UntilEmpty, summary_of
from outbox.relay.verdict_history import VerdictHistory
from outbox.relay.wake_up import WakeUp
from outbox.settings import Settings
from outbox.smtp.connection import Conversation, Throttle
from outbox.smtp.connector import Route
from outbox.smtp.outgoing import Claim
from outbox.smtp.reply_class import Refusal
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Outcome, Refused, Verdict, Withdrawn, outcome_of

log = Events("outbox.relay")

UNDECIDED_S: Final = 0.3  # a deferral waits so long for the replies to others that are under way
AGAIN_BASE_S: Final = 1.0  # pause before a withdrawn delivery is due again; doubles with every withdrawal
CUTS_MAX: Final = 2
WITHDRAWALS_MAX: Final = 20  # the server works for others and drops this one so often: quarantined
LOCKED: Final = "another session has locked its row"

Marks = dict[int, tuple[Conversation, Claim]]
"""Claims whose marks are asked for, by email, with the connections that ask."""


class Relay:
    """One relay of the fleet, which serves one route; the desk (`connection.Desk`) of its connections.

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
        self._marks: Marks = {}
        self._settlements: list[Settlement] = []
        self._heard: str | None = None

        self._wake = WakeUp()
        self._timers = Timers(poll_max_s=settings.poll_max_s, lease_s=settings.lease_s)
        self._memory = VerdictHistory()
        self._ticks = TickRunner(settings.database_url)
        self._barrier = BarrierWatch(settings, self._memory)
        self.pool = Pool(Route(settings.smtp_url, settings, named=route), self, settings, wake=self._wake.set)
        self.share = (budget or Budget.of(settings.message_bytes_max)).share(self._bytes_in_flight, self._wake.set)
        """Its part of the memory for large messages."""
        self._holds = Holds(self.pool, self.counts, self._wake.set)
        self._trigger = ClaimTrigger(
            self._timers,
            self._wake.set,
            is_blocked=lambda: self.pool.breaker.is_open or self._holds.holds_any,
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
            self._memory, self.sessions.patience, route=route, instance=self._barrier.instance
        )
        self._intake = ClaimIntake(
            self.pool,
            self._holds,
            self.share,
            self._timers,
            messages=MessageFetch(self.pool, self._holds, self.share, self.sessions.patience),
            suspects=suspects or SuspectRule(),
            in_flight=self._claims,
        )
        self._route_state = RouteState(self.pool, route, self._timers, self._wake.set)
        self._maintenance = Maintenance(
            settings,
            route,
            pool=self.pool,
            barrier=self._barrier,
            timers=self._timers,
            counts=self.counts,
            resolver=self._resolver(settings),
        )
        self.end_of_work = UntilEmpty(route, self.pool, self._holds, self.counts)

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
        deadlines = asyncio.get_running_loop().create_task(self.pool.watch_deadlines())
        deadlines.add_done_callback(self.pool.note_fault)
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
        self._decide()
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
        pool = self.pool
        return bool(
            self._settlements
            or self._marks
            or pool.releases
            or pool.put_off
            or pool.is_busy
            or pool.undecided
            or pool.undone
        )

    async def _end(self) -> None:
        """Close everything; what is past its dot and unanswered is in doubt from here on."""
        self._timers.stop()
        self._decide()
        self.pool.close_politely()
        await self.pool.end()
        self._marks.clear()  # what is not marked yet stays unmarked, and is freed below
        self.left_in_doubt = sum(s.marked and s.outcome.state == "in_doubt" for s in self._settlements)
        session = self.sessions.current
        if session is None:
            return
        if session.lost is None:
            with session.lost_on_error(), self.sessions.patience(LAST_WORD_S):
                await self._write_last(session)
            await session.close()
        untold = [s.key for s in self._settlements if s.marked]
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
        await put_back_dead_letters(session, self.pool, self._unsettled(), self.counts)
        await self._maintenance.write_note(session, self._heard)
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
        if self.pool.fault is not None:
            raise self.pool.fault
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
        breaker = self.pool.breaker
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
            awaiting_reply = self.pool.handed_over()
            here = await self._reassertion.write(session, self._settlements, awaiting_reply, doubt_s)
            self._settlements = here.settlements(self._settlements)
            here.renumber(awaiting_reply)
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
        if self.pool.releases or self.pool.put_off:
            await release_claims(session, self.pool)
        if self.pool.undone:
            await put_back_dead_letters(session, self.pool, self._unsettled(), self.counts)
        if self.pool.dropped:
            await self._judge_dropped(session)
        if await self._maintenance.write_answers(session):
            self._trigger.fire()

    async def _tick_if_due(self, session: Session, now: float) -> None:
        room = self._room(now) if self._timers.is_poll_due(now) else 0
        may_mark = self._marks and not self._barrier.is_up
        if may_mark or self._settlements or room or self._timers.is_pulse_due(now):
            await self._gather()
            await self._tick(session, room)
        else:
            self._trigger.begin_look()
            self._trigger.end_look(now, found=False)
            if self.pool.ready and session.lost is None and not self.stopping:
                self.pool.staff(now)  # claims that came back from cut connections

    async def _gather(self) -> None:
        """Let more come together for one commit, unless all that is in flight waits for the tick already."""
        while time.monotonic() < self._timers.rest_until and self.pool.under_way() > len(self._marks):
            await self._wake.sleep_for_next(self._timers.rest_until)

    async def _maintain(self, session: Session) -> None:
        """Sweep, and whatever is due with it."""
        if await self._maintenance.sweep(session):
            self._trigger.fire()
        await self._judge_stranded(session)
        await self._maintenance.write_note(session, self._heard)

    async def _judge_stranded(self, session: Session, *, soon: bool = False) -> None:
        now = time.monotonic()
        if self._timers.is_stranded_due(now, soon=soon):
            self._timers.note_stranded(now, soon=soon)
            in_flight = {claim.email for claim in self._claims()} | self._unsettled()
            if await self._maintenance.judge_stranded(session, in_flight):
                self._trigger.fire()

    async def _stop_if_done(self, session: Session, now: float) -> None:
        """Stop a relay that runs until the outbox is empty, if it is, or if only a person can let the rest go."""
        is_idle = not (self.pool.ready or self._marks or self._settlements or self.pool.is_busy)
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
        marks, self._marks = ({}, self._marks) if self._barrier.is_up else (self._marks, {})
        settlements, self._settlements = self._settlements, []
        request = replace(
            request,
            route=self.serves,
            server=self.pool.route.name,
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
            self._tick_failed(marks, settlements)
            raise
        now = time.monotonic()
        has_new_pause = self._adopt(done, began_at, now)
        if self._intake.note(request, done, now, in_parts=self._ticks.in_parts):
            await self._route_state.probe_without_mail(session)
        self._trigger.end_look(now, found=bool(done.claims or done.unfit))
        held = self._intake.take(session, done)
        lost = self._act_on_marks(session, marks if done.is_open else self._ask_again(marks, done), done, started_s)
        if held is not None:  # after the final dots, which must not wait
            await self._intake.take_held(session, held, with_ready=has_new_pause)
        await explain_lost_claims(session, lost, self.counts)
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
            for claim in done.claims:
                claim.claimed_at = now
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
        self._settlements[:0] = [one for one in settlements if one.email in done.locked]
        missed = [one for one in settlements if one.identity not in done.settled and one.email not in done.locked]
        await explain_missed_settlements(session, missed, self.counts)

    # ── events of the session ────────────────────────────────────────────────────────────────────────────────────────

    def _session_opened(self, session: Session) -> None:
        log.info(
            "session_opened",
            "relay {relay} holds its lock and relays to {route}",
            relay=session.relay,
            route=self.pool.route.name,
        )
        self._timers.restart(session.opened_at)
        self._intake.begin()
        self._maintenance.begin()
        self._reassertion.begin(session)

    def _session_lost(self) -> None:
        """Forget all claims, which are other relays' now; what is past its dot is waited for."""
        self._memory.note_lost(time.monotonic())
        for observer in self.observers:
            observer.session_lost()
        self._marks.clear()
        self.pool.drop_claims()
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
        broken = self.pool.broken() or self.pool.defers_all()
        return [*found, broken] if broken else found

    def summary(self) -> str:
        """Return what it has done so far, in words."""
        return summary_of(self.counts)

    @property
    def alive(self) -> int:
        """Return how many relays the fleet has, of all routes, as of the last sweep."""
        return self._maintenance.relays

    def _claims(self) -> Iterator[Claim]:
        """Yield all claims that it has in flight, or is about to give back; some twice."""
        yield from self.pool.in_hand()
        yield from self.pool.releases
        yield from self.pool.put_off
        yield from (claim for _, claim in self._marks.values())

    def _unsettled(self) -> set[int]:
        """Return the emails whose verdicts are not written yet."""
        return {one.email for one in self._settlements}

    def _bytes_in_flight(self) -> int:
        """Return how many bytes its large messages have."""
        held = {claim.email: claim.size for claim in self._claims()}
        return sum(size for size in held.values() if size > SMALL_BYTES)

    # ── marks and verdicts ───────────────────────────────────────────────────────────────────────────────────────────

    def take(self) -> Claim | None:
        """The next claim, for a connection that can start on it now."""
        return self.pool.take()

    def ask_mark(self, conversation: Conversation, claim: Claim) -> None:
        """Put the claim into the next tick's marks."""
        if not self.sessions.is_current(claim.relay):
            conversation.abandon("the session that claimed it is gone")
            return
        if claim.email in self._marks:  # cancelled, retried and claimed anew, all while another connection had it
            conversation.abandon("another connection is about to send it")
            return
        self._marks[claim.email] = (conversation, claim)
        self._wake.set()

    def judged(self, claim: Claim, verdict: Verdict, *, dropped: bool = False, ruled: bool = False) -> None:
        """Put the verdict into the next tick, or, if it is a deferral, find out first whether most others get it.

        `dropped`: the server let go of this very message. `ruled`: the verdict came from a refusal that might have been
        about the route.
        """
        if isinstance(verdict, Deferred):
            is_clear = self.pool.note_deferral(claim, verdict.reply, tries=_tries(claim))
            if not is_clear and self.pool.may_wait(claim):
                if not self.pool.undecided:
                    asyncio.get_running_loop().call_later(UNDECIDED_S, self._decide)
                self.pool.undecided.append((claim, verdict, ruled))
                return
        self._conclude(claim, verdict, dropped=dropped, ruled=ruled)

    def _decide(self) -> None:
        """Judge the deferrals that waited for the replies to others."""
        undecided, self.pool.undecided = self.pool.undecided, []
        for claim, verdict, ruled in undecided:
            self._conclude(claim, verdict, ruled=ruled)

    def _conclude(self, claim: Claim, verdict: Verdict, *, dropped: bool = False, ruled: bool = False) -> None:
        """Put the verdict into the next tick; count and say it."""
        attempt, tries = _attempt(claim), _tries(claim)
        if isinstance(verdict, Deferred) and not self.pool.judge_deferral(claim, verdict.reply, tries=tries).is_own:
            verdict = Withdrawn(verdict.reply)
        outcome = self._outcome(claim, verdict, tries, dropped=dropped)
        self._memory.note(claim, attempt, outcome, time.monotonic())
        self._settlements.append(
            Settlement(claim.relay, claim.email, claim.key, attempt, marked=claim.marked, outcome=outcome)
        )
        self.counts[outcome.verdict if outcome.state != "dead" else "dead"] += 1
        if self.observers:
            now = time.monotonic()
            for observer in self.observers:
                observer.judged(claim, attempt, outcome, now)
        self._heard = outcome.reply
        match verdict:
            case Accepted(reply):
                self.pool.note_accepted(claim, time.monotonic())
                if log.says(DEBUG):
                    log.debug("email_accepted", "{key} was accepted: {reply}", **fields_of(claim, attempt), reply=reply)
            case Deferred(reply) | Refused(reply):
                self.pool.breaker.succeed(time.monotonic(), took_mail=False)
                if not ruled:
                    self.pool.judge.judged_otherwise()
                log.info(
                    "email_refused" if outcome.state == "dead" else "email_deferred",
                    "{key}, try {try_number}: {reply} ({state})",
                    **fields_of(claim, attempt),
                    try_number=tries,
                    reply=reply,
                    state=outcome.state,
                )
            case InDoubt(reply):
                log.warning("email_in_doubt", "{key} is in doubt: {reply}", **fields_of(claim, attempt), reply=reply)
            case Withdrawn(reply):
                log.info("email_withdrawn", "{key} was not sent: {reply}", **fields_of(claim, attempt), reply=reply)
        self.share.wake_others()
        self._wake.set()

    def _outcome(self, claim: Claim, verdict: Verdict, tries: int, *, dropped: bool) -> Outcome:
        """What a verdict on the try of that number leads to."""
        if isinstance(verdict, Accepted):
            return outcome_of(verdict, tries=tries, tries_max=tries, backoff_s=0.0, again_s=0.0, doubt_s=None)
        retry, is_open = self.settings.retry, self.pool.breaker.is_open
        return outcome_of(
            verdict,
            tries=tries,
            tries_max=retry.attempts_max,
            backoff_s=full_jitter_s(max(tries, 1), base_s=retry.base_s, max_s=retry.max_s),
            again_s=min(
                full_jitter_s(claim.withdrawn + 1, base_s=AGAIN_BASE_S, max_s=retry.max_s),
                self.pool.breaker.pause_max_s if is_open else retry.max_s,  # then the pause sets the pace
            ),
            doubt_s=self._maintenance.doubt_s,
            withdrawals=claim.withdrawn,
            withdrawals_max=WITHDRAWALS_MAX if dropped and not is_open else None,
        )

    def untouched(self, claim: Claim, reason: str) -> None:
        """Keep the claim for another connection; one that meets only cut connections is put off a while."""
        if not self.sessions.is_current(claim.relay):
            return
        claim.cuts += 1
        if self.pool.breaker.is_open:  # no message is to blame while nobody can be reached; another may find out more
            self.pool.put_off.append(claim)
        elif claim.cuts >= CUTS_MAX and claim.withdrawn + 1 >= WITHDRAWALS_MAX:
            self.pool.dropped.append((claim, reason))
        elif claim.cuts >= CUTS_MAX:
            self._conclude(claim, Withdrawn(reason))
        elif self.stopping or self._holds.holds_any:  # under a pause it is claimed anew, and set aside if it is to be
            self.pool.releases.append(claim)
        else:
            self.pool.ready.appendleft(claim)
        self._wake.set()

    def idle(self, conversation: Conversation) -> None:
        """Remember a connection that waits for mail."""
        self.pool.idle(conversation)

    def paused(self, reason: str) -> None:
        """Pause the route at once."""
        self.pool.paused(reason)

    def throttled(self, conversation: Conversation, kind: Throttle, reason: str) -> None:
        """Send more slowly, or over fewer connections."""
        self.pool.throttled(conversation, kind, reason)
        self._heard = reason
        self._wake.set()

    def is_own_limit(self, claim: Claim) -> bool:
        """Note that the server wants this email later; return True if it keeps on taking others meanwhile."""
        return self.pool.replies.is_own_limit(claim.email)

    def session_full(self, conversation: Conversation, messages: int | None) -> None:
        """Remember how many messages the server takes on one connection."""
        self.pool.session_full(conversation, messages)

    def route_refused(self, claim: Claim, refusal: Refusal) -> None:
        """Judge a refusal that may be about the route; only what is about the email costs it anything."""
        now = time.monotonic()
        ruling = self.pool.judge.rule(refusal, claim.sender, claim.recipient, now)
        match ruling:
            case Ruling.EMAIL:
                if refusal.is_permanent:
                    attempt = claim.attempt if claim.marked else claim.attempt + 1
                    self.pool.judge.note_dead(refusal, claim.email, claim.key, attempt, now)
                self.judged(claim, refusal.verdict, ruled=True)
                return
            case Ruling.SPARE:
                log.warning(
                    "email_not_understood",
                    "{key}: the server did not understand a command and takes other mail, so this email waits: {reply}",
                    **fields_of(claim, claim.attempt),
                    reply=refusal.reply,
                )
            case Ruling.SENDER:
                self.pool.hold(claim.sender, refusal.reply)
            case Ruling.ROUTE:
                self.pool.refused(claim.sender, refusal.reply)
        if ruling is not Ruling.SPARE:
            self.pool.undone += self.pool.judge.dead_of_route(refusal, now)
        self.judged(claim, Withdrawn(refusal.reply))

    def requeue(self, claim: Claim, reason: str) -> None:
        """Keep the claim for another connection, or for any relay if it cannot be sent soon. It is no try of it."""
        if not self.sessions.is_current(claim.relay):
            return
        log.debug("email_requeued", "{key} waits for another connection: {reason}", key=claim.key, reason=reason)
        self._heard = reason
        if self.stopping or self._holds.holds_any:  # under a pause it is claimed anew, and set aside if it is to be
            self.pool.releases.append(claim)
        elif self.pool.may_keep(time.monotonic()):
            self.pool.ready.appendleft(claim)
        else:
            self.pool.put_off.append(claim)
        self._wake.set()

    def closed(self, conversation: Conversation, trouble: str | None) -> None:
        """Forget a connection, and take back the mark that it may have asked for."""
        self.pool.forget(conversation, trouble)
        for email, (asking, claim) in list(self._marks.items()):
            if asking is conversation:  # its mark was only asked for: nothing happened to it
                del self._marks[email]
                self.untouched(claim, trouble or "the connection was lost before the mark")
        self._wake.set()

    def _ask_again(self, marks: Marks, done: TickResult) -> Marks:
        """Keep the marks that the barrier refused for a later tick; return the others."""
        decided = {*done.marked, *done.expired, *done.quarantined}
        for email, (conversation, claim) in marks.items():
            if email not in decided and conversation.ahead is claim and not conversation.is_closed:
                self._marks.setdefault(email, (conversation, claim))
            elif email not in decided:
                self.pool.releases.append(claim)
        return {email: mark for email, mark in marks.items() if email in decided}

    def _tick_failed(self, marks: Marks, settlements: list[Settlement]) -> None:
        """Nothing is known of the commit. Settling twice changes nothing; a mark is taken back by the next session."""
        self._settlements[:0] = settlements
        for conversation, claim in marks.values():
            claim.attempt += 1
            claim.marked = True
            if conversation.ahead is claim:
                conversation.abandon("its mark is not known to be committed")
            self.judged(claim, Withdrawn("its mark was not confirmed, so the dot was not written"))

    def _act_on_marks(
        self,
        session: Session,
        marks: Marks,
        done: TickResult,
        started_s: float,
    ) -> list[Claim]:
        """The guard: only what is marked, fresh and still held goes on to its dot. Gives what is no longer held."""
        lost: list[Claim] = []
        self._maintenance.count_expired(len(done.expired))
        for email, (conversation, claim) in marks.items():
            still_there = not conversation.is_closed and conversation.ahead is claim
            if email in done.expired or email in done.quarantined:
                if still_there:
                    conversation.abandon("it is too late to send it, or its mark cannot be written")
                continue
            if email not in done.marked:
                is_locked = email in done.locked
                if still_there:
                    conversation.abandon(LOCKED if is_locked else "it is no longer this relay's")
                if is_locked:
                    self.judged(claim, Withdrawn(LOCKED))
                else:
                    lost.append(claim)
                continue
            claim.marked = True
            claim.attempt = done.marked[email]
            if not still_there:
                self.judged(claim, Withdrawn("the connection was lost before the dot"))
            elif self._is_too_late(session, started_s):
                conversation.abandon("the guard stopped it")
                self.judged(claim, Withdrawn("the guard stopped it: too late after the mark, or the session was lost"))
            else:
                conversation.hand_over()
        return lost

    def _is_too_late(self, session: Session, started_s: float) -> bool:
        """Return True if the dot after a mark, asked for at `started_s`, must not be written any more."""
        is_late = boot_clock_s() - started_s >= self.settings.guard_s
        return is_late or session.lost is not None or self._barrier.has_gap

    async def _judge_dropped(self, session: Session) -> None:
        """Withdraw emails whose connections were cut; one that the server dropped too often is quarantined.

        What a server refused by its rate, or deferred for all, was withdrawn too, and does not count for that.
        """
        dropped, self.pool.dropped = self.pool.dropped, []
        by_reply = await count_withdrawn_by_reply(session.connection, [claim.email for claim, _ in dropped])
        for claim, reason in dropped:
            is_last = claim.withdrawn - by_reply.get(claim.email, 0) + 1 >= WITHDRAWALS_MAX
            self._conclude(claim, Withdrawn(reason), dropped=is_last)


def _attempt(claim: Claim) -> int:
    """Return the number of the latest try; before its mark it is not counted in the row yet."""
    return claim.attempt if claim.marked else claim.attempt + 1


def _tries(claim: Claim) -> int:
    """Return how many tries count, with the latest."""
    return _attempt(claim) - claim.withdrawn
