"""The corridor of sending: one route, one session at a time, many SMTP connections.

It drains the outbox until it is told to stop. Postgres and SMTP may go away and come back; the process stays.
`ledger` says what each write is, `conversation` what each connection does; here they meet: claims go to
connections, marks and verdicts go to the next tick, and the guard stands between a mark's commit and the dot.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from logging import DEBUG
from typing import Any, Final

import asyncpg

from outbox.database import failover_barrier, failover_rules
from outbox.database.connection import CHANNEL, LOST_SESSION
from outbox.database.failover_barrier import Barrier
from outbox.database.failover_rules import Answer, Kind, Presence, Row, ServerId, Standing, answer_of
from outbox.database.lock_wait import BlockerWatch
from outbox.database.locks import is_lock_timeout
from outbox.database.refusal import DatabaseRefusedError
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.log import Events
from outbox.relay import failover, in_doubt, ledger, suppression
from outbox.relay import pauses as pause
from outbox.relay.backoff import full_jitter_s
from outbox.relay.circuit_breaker import (
    PAUSE_MAX_S,
    PROBE_LEASE_S,
    REFUSALS_MAX,
    REFUSED_PAUSE_MAX_S,
    pause_login,
    pause_route,
    probe_route,
    resume_route,
)
from outbox.relay.circuit_breaker import STATEMENTS as ROUTE_STATEMENTS
from outbox.relay.failover import Memory, tell_again
from outbox.relay.in_doubt import Inquirer, load_resolver, resend_doubtful
from outbox.relay.isolate import tick_in_parts
from outbox.relay.ledger import EXPIRED_AT_ONCE, Frontier, Note, RoutePause, Settlement, Tick, Turns, contradicts
from outbox.relay.memory_budget import Budget
from outbox.relay.notifications import Notifications
from outbox.relay.observer import Observer
from outbox.relay.pauses import FLEET, Pause
from outbox.relay.pool import Pool
from outbox.relay.quarantine import UNDECODABLE, Quarantine, is_of_a_row
from outbox.relay.rate_limit import STATEMENTS as PACE_STATEMENTS
from outbox.relay.rate_limit import report_refusal, reserve
from outbox.relay.refusals import STATEMENTS as REFUSAL_STATEMENTS
from outbox.relay.refusals import Ruling, put_back
from outbox.relay.reopening import Reopening
from outbox.relay.session import Session, boot_clock_s
from outbox.relay.throttle import Found
from outbox.settings import Settings, WhenInDoubt
from outbox.smtp import route_headers
from outbox.smtp.connection import Conversation, Throttle
from outbox.smtp.connector import Route
from outbox.smtp.login import login_pause_s
from outbox.smtp.outgoing import Claim
from outbox.smtp.reply_class import Refusal
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Outcome, Refused, Verdict, Withdrawn, outcome_of

log = Events("outbox.relay")

UNDECIDED_S: Final = 0.3  # a deferral waits so long for the replies to others that are under way
POLL_FIRST_S: Final = 0.1
GATHER_SHARE: Final = 2.0  # of the last tick's time is rested after it
GATHER_MAX_S: Final = 0.02
SWEEP_MIN_S: Final = 0.4
SWEEP_MAX_S: Final = 4.0
SWEEP_SHARE_S: Final = 0.2  # the fleet together sweeps about five times a second
EXPIRE_MIN_S: Final = 1.0  # the fleet together looks for what is too late once a second
EXPIRE_MAX_S: Final = 10.0
TAKE_UP_REST: Final = 5.0  # times what taking up took is rested before the next
REOPEN_FIRST_S: Final = 0.02
REOPEN_MAX_S: Final = 2.0
AGAIN_BASE_S: Final = 1.0  # pause before a withdrawn delivery is due again; doubles with every withdrawal
CUTS_MAX: Final = 2
OPEN_LEASES_MAX: Final = 3  # a server that falls silent while a session is opened is given up after so many leases
WITHDRAWALS_MAX: Final = 20  # the server works for others and drops this one so often: quarantined
PROVEN_S: Final = 2.0  # a relay that has lived for so long dies of what it holds rather than of something else
STRANDED_FIRST_S: Final = 30.0  # it has to read all open rows, so it is rare
STRANDED_EVERY_S: Final = 600.0
STRANDED_SOON_S: Final = 1.0  # where an end waits for it
BLOCKER_LOOK_S: Final = 0.5
LOCKED: Final = "another session has locked its row"
REFUSED_FOR_S: Final = 10.0  # nothing was accepted for so long while a sender is refused: `until_empty` gives up
PUT_BACK_WHY: Final = "the server said the same of other recipients: it refuses the sender or this host"
FETCHED_AT_ONCE: Final = 1024 * 1024
ENVELOPE_BYTES_MAX: Final = 4096  # of the key, addresses, Message-ID and trace context: see `email_sizes` in schema.sql
LAST_WORD_S: Final = 1.0  # a Postgres that is silent for so long holds nobody up who was told to stop
STATEMENTS: Final = (
    *(ledger.STATEMENTS + ROUTE_STATEMENTS + PACE_STATEMENTS + REFUSAL_STATEMENTS),
    *(
        failover.STATEMENTS
        + failover_barrier.STATEMENTS
        + in_doubt.STATEMENTS
        + pause.STATEMENTS
        + suppression.STATEMENTS
    ),
)


class _RowError(Exception):
    """A tick failed, and its error is one that comes from what a row holds."""


class Relay:
    """One relay of the fleet, which serves one route; the desk (`conversation.Desk`) of its connections.

    All state is touched on the event loop's thread only, and the session's connection by one coroutine only, since
    advisory locks are re-entrant within a session and so exclude nobody inside a process.
    """

    def __init__(
        self, settings: Settings, route: str = "", *, until_empty: bool = False, observers: Sequence[Observer] = ()
    ) -> None:
        settings.require("database_url", "smtp_url")
        settings = settings.on_route(route)
        assert settings.database_url is not None
        assert settings.smtp_url is not None
        self.database_url = settings.database_url
        self.settings = settings
        self.serves = route
        self.until_empty = until_empty
        self.observers = observers
        self._wake = asyncio.Event()
        self.pool = Pool(Route(settings.smtp_url, settings, named=route), self, settings, wake=self._wake.set)
        self.inquirer: Inquirer | None = None
        if settings.resolver is not None:
            self.inquirer = Inquirer(
                load_resolver(settings.resolver, settings.directory),
                grace_s=settings.doubt_grace_s,
                asks_max=settings.asks_max,
                wake=self._wake.set,
            )
        self.counts: Counter[str] = Counter()
        self.stopping = False
        self.alive = 1
        """How many relays the fleet has, of all routes, as of the last sweep."""
        self.left_in_doubt = 0
        self.left_held: list[Pause] = []
        """The pauses under which mail was left, if that is why an `until_empty` ended before it was so."""
        self.turned_at = time.monotonic()
        """When the corridor last took a turn, or a try to get a session ended: see `health`."""

        self._session: Session | None = None
        self._former: Session | None = None
        self._marks: dict[int, tuple[Conversation, Claim]] = {}
        self._settlements: list[Settlement] = []
        self._poll_at, self._poll_s = 0.0, POLL_FIRST_S
        self._frontier, self._urgent_frontier, self._turns = Frontier(), Frontier(), Turns()
        self._sweep_at = self._expire_at = self._pulse_at = 0.0
        self._ticked_at = self._tick_s = 0.0
        self._drain_until: float | None = None
        self._reopen_pause_s = REOPEN_FIRST_S
        self._opened_at = 0.0
        self._opening: asyncio.Timeout | None = None
        self._asked_at: float | None = None
        self._memory = Memory()
        self._told: ServerId | None = None  # the server that knows our verdicts
        self._presence, self._barrier = Presence.new(settings.guard_s, settings.lease_s), Barrier()
        self._noted = Note()
        self._sent_before = 0
        self._heard: str | None = None
        self._held: frozenset[str] = frozenset()
        self.beside: Sequence[Relay] = (self,)
        """The relays of this process, including this one: they die together, and share the memory budget."""
        self._asks_suspect, self._dead = False, list[int]()
        # A row made a tick fail, or wait: the next ones are done in parts, until one of them finds nothing wrong.
        self._quarantine, self._in_parts = Quarantine(), False
        self._notifications, self._stranded_at = Notifications(), 0.0
        self._rest: Tick | None = None  # what the last tick claimed, and is still to be fetched or quarantined
        # Its part of the memory for large messages: `Relays` has one budget for all relays of a process.
        self.share = Budget.of(settings.message_bytes_max).share(self._bytes_in_hand, self._wake.set)

    def stop(self) -> None:
        """Begin to drain: claim nothing more, finish what is in hand within `drain_s`, then `run` returns."""
        if self.stopping:
            return
        self.stopping = True
        self._decide()
        self._drain_until = time.monotonic() + self.settings.drain_s
        self.pool.close_politely()
        loop = asyncio.get_running_loop()
        loop.call_later(self.settings.drain_s + LAST_WORD_S, self._wait_no_more)
        if self._opening is not None and not self._opening.expired():
            until = loop.time() + (self.settings.drain_s if self._has_in_hand() else 0.0)
            self._opening.reschedule(min(self._opening.when() or until, until))
        self._wake.set()

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
            self._session = await self._open_first()
            self._told = self._session.server if self._session is not None else None
            while self._session is not None and not self._is_done():
                try:
                    self.turned_at = time.monotonic()
                    await self._work(self._session)
                except (*LOST_SESSION, asyncpg.PostgresError) as error:
                    self._session.lose(str(error) or type(error).__name__)
                if self._session.lost is not None and not self._is_done():
                    await self._reopen()
        finally:
            deadlines.cancel()
            await self._end()

    async def _open(self) -> Session:
        within_s = OPEN_LEASES_MAX * self.settings.lease_s
        if self._drain_until is not None:
            within_s = max(min(within_s, self._drain_until - time.monotonic()), 0.0)
        try:
            async with asyncio.timeout(within_s) as self._opening:
                session = await Session.open(
                    self.database_url,
                    lease_s=self.settings.lease_s,
                    wake=self._hear_notification,
                    on_lost=self._session_lost,
                    former=self._former,
                    route=self.serves,
                    statements=STATEMENTS,
                    standing=self._standing(self._former),
                    hear=self._hear_of_relays,
                    on_answer=self._note_answer,
                )
                await self._adopt_limit(session)
        except LOST_SESSION as error:
            raise DatabaseUnavailableError(
                f"Postgres at {self.database_url.redacted} went away while a session was opened "
                f"({str(error) or type(error).__name__})."
            ) from error
        except asyncpg.InsufficientPrivilegeError as error:
            if "permission denied for schema" in str(error):  # it has no rights at all, which is no matter of time
                raise
            raise DatabaseUnavailableError(  # until the rights on what an upgrade brought are granted
                f"Postgres at {self.database_url.redacted} refuses: {error}; "
                "let the owner of the schema run `outbox init --roles`."
            ) from error
        finally:
            self._opening = None
        log.info(
            "session_opened",
            "relay {relay} holds its lock and relays to {route}",
            relay=session.relay,
            route=self.pool.route.name,
        )
        self._poll_at = self._sweep_at = 0.0
        self._frontier, self._urgent_frontier, self._turns = Frontier(), Frontier(), Turns()
        self._meet_server(session)
        self._noted = Note()
        self._sent_before = self.counts["accepted"]
        self._held = frozenset()
        self._opened_at = time.monotonic()
        self._quarantine = Quarantine((session.relay,))
        self._stranded_at = self._opened_at + STRANDED_FIRST_S
        return session

    async def _adopt_limit(self, session: Session) -> None:
        """Take what the database lets in: another server's `outbox init` may have set more than these settings have."""
        try:
            limit = int(await session.connection.fetchval(ledger.MESSAGE_LIMIT))
        except asyncpg.InsufficientPrivilegeError:  # a role with rights by hand, from before there was a limit
            limit = 0
        except BaseException as error:
            session.lose(str(error) or type(error).__name__)
            raise
        bytes_max = max(self.settings.message_bytes_max, limit) + ENVELOPE_BYTES_MAX
        self.share.bytes_max = bytes_max
        self.share.budget.bytes_max = max(self.share.budget.bytes_max, bytes_max)

    def _meet_server(self, session: Session) -> None:
        """Start with the barrier that the session found, and note a change of servers."""
        is_move = self._former is not None and self._former.server != session.server
        if is_move:
            self._memory.note_move(0.0, time.monotonic())
        self._presence.arrive(session.server, boot_clock_s(), session.met)
        self._barrier = Barrier(grace_s=self.settings.failover_grace_s)
        self._meet_barrier(session.barrier)

    def _meet_barrier(self, row: Row) -> None:
        """Take over the barrier's epoch, and wait behind it if it stands."""
        if row.moved_s is not None:
            self._memory.note_move(row.moved_s, time.monotonic())
        was_up, self._barrier.up, self._barrier.epoch = self._barrier.up, not row.is_lifted, row.epoch
        if self._barrier.up and not was_up:
            say = log.warning if row.kind is Kind.MOVE else log.info
            say(
                "barrier_stands",
                "no email is claimed until {relays} relays have written what they sent, or for {grace_s:g} s at most",
                relays=len(row.awaited),
                grace_s=self.settings.failover_grace_s,
                epoch=row.epoch,
                kind=row.kind.name.lower(),
            )

    async def _open_first(self) -> Session | None:
        """The first session. A server that does not answer is waited for as long as a lease: it may be restarting.

        None if the relay is told to stop before.
        """
        patience_until = time.monotonic() + self.settings.lease_s
        while True:
            self.turned_at = time.monotonic()
            try:
                return await self._open()
            except DatabaseRefusedError:
                raise
            except DatabaseUnavailableError as error:
                if self.stopping:
                    return None
                if time.monotonic() > patience_until:
                    raise
                log.warning("database_unavailable", "{reason} Trying again.", reason=error)
                await asyncio.sleep(0.5)
            if self.stopping:
                return None

    async def _reopen(self) -> None:
        """The next identity, however long it takes; what is past its dot goes on meanwhile."""
        assert self._session is not None
        log.warning(
            "session_lost",
            "relay {relay} lost its session: {reason}",
            relay=self._session.relay,
            reason=self._session.lost,
        )
        self._former = self._session
        if time.monotonic() - self._opened_at > self.settings.lease_s:
            self._reopen_pause_s = REOPEN_FIRST_S
        reopening = Reopening(self.database_url)
        while not self._is_done():
            self.turned_at = time.monotonic()
            await asyncio.sleep(self._reopen_pause_s * (0.5 + random.random()))  # noqa: S311 - jitter, not a secret
            self._reopen_pause_s = min(2 * self._reopen_pause_s, REOPEN_MAX_S)
            try:
                self._session = await self._open()
            except (OutboxError, *LOST_SESSION, asyncpg.PostgresError) as error:
                await reopening.refused(error, self._is_waited_for)
            else:
                return

    def _is_waited_for(self) -> bool:
        """Return True if a pause must end; the relay is not stuck while it asks."""
        self.turned_at = time.monotonic()
        return self.stopping

    def _is_done(self) -> bool:
        if not self.stopping:
            return False
        assert self._drain_until is not None
        return not self._has_in_hand() or time.monotonic() > self._drain_until

    def _has_in_hand(self) -> bool:
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

    def _wait_no_more(self) -> None:
        """The time to stop is over: a Postgres that does not answer is not waited for."""
        if self._asked_at is None or self._session is None:
            return
        left_s = self._asked_at + LAST_WORD_S - time.monotonic()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, self._wait_no_more)
        else:
            self._session.lose("Postgres was silent when the relay had to stop")

    async def _end(self) -> None:
        """Close everything; what is past its dot and unanswered is in doubt from here on."""
        self.stopping = True
        self._decide()
        self.pool.close_politely()
        await self.pool.end()
        self._marks.clear()  # what is not marked yet stays unmarked, and is freed below
        self.left_in_doubt = sum(s.marked and s.outcome.state == "in_doubt" for s in self._settlements)
        session = self._session
        if session is None:
            return
        if session.lost is None:
            try:
                with self._patience(session, LAST_WORD_S):
                    await self._tick(session)
                    await self._put_back(session)
                    await self._note(session)
                    _, doubted = await ledger.judge(
                        session.connection,
                        [session.relay],
                        doubt_s=self._doubt_s(),
                        died=False,
                        quarantine=self._quarantine,
                    )
                    self.left_in_doubt += doubted
                    await failover_barrier.leave(session.connection, session.relay, self._presence.instance, CHANNEL)
            except (*LOST_SESSION, asyncpg.PostgresError) as error:
                session.lose(str(error))
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

    @property
    def holds_session(self) -> bool:
        """Whether it holds its session, as far as it knows."""
        return self._session is not None and self._session.lost is None

    def hindrances(self) -> list[str]:
        """What keeps it from sending whatever is due, as far as it knows; nothing is that it is ready."""
        found = ["it is stopping"] if self.stopping else []
        if not self.holds_session:
            lost = self._session.lost if self._session is not None else "none is opened yet"
            found.append(f"it holds no session with Postgres: {lost}")
        elif self._barrier.up:
            found.append("it waits at the failover barrier until the other relays have written what they sent")
        broken = self.pool.broken() or self.pool.defers_all()
        return [*found, broken] if broken else found

    def summary(self) -> str:
        """What it has done so far, in words."""
        return ", ".join(f"{n} {verdict}" for verdict, n in sorted(self.counts.items())) or "nothing was sent"

    def take(self) -> Claim | None:
        """The next claim, for a connection that can start on it now."""
        return self.pool.take()

    def ask_mark(self, conversation: Conversation, claim: Claim) -> None:
        """Put the claim into the next tick's marks."""
        if not self._is_current(claim):
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
                    log.debug("email_accepted", "{key} was accepted: {reply}", **_of(claim, attempt), reply=reply)
            case Deferred(reply) | Refused(reply):
                self.pool.breaker.succeed(time.monotonic(), took_mail=False)
                if not ruled:
                    self.pool.judge.judged_otherwise()
                log.info(
                    "email_refused" if outcome.state == "dead" else "email_deferred",
                    "{key}, try {try_number}: {reply} ({state})",
                    **_of(claim, attempt),
                    try_number=tries,
                    reply=reply,
                    state=outcome.state,
                )
            case InDoubt(reply):
                log.warning("email_in_doubt", "{key} is in doubt: {reply}", **_of(claim, attempt), reply=reply)
            case Withdrawn(reply):
                log.info("email_withdrawn", "{key} was not sent: {reply}", **_of(claim, attempt), reply=reply)
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
                self._pause_max_s if is_open else retry.max_s,  # then the pause sets the pace
            ),
            doubt_s=self._doubt_s(),
            withdrawals=claim.withdrawn,
            withdrawals_max=WITHDRAWALS_MAX if dropped and not is_open else None,
        )

    def untouched(self, claim: Claim, reason: str) -> None:
        """Keep the claim for another connection; one that meets only cut connections is put off a while."""
        if not self._is_current(claim):
            return
        claim.cuts += 1
        if self.pool.breaker.is_open:  # no message is to blame while nobody can be reached; another may find out more
            self.pool.put_off.append(claim)
        elif claim.cuts >= CUTS_MAX and claim.withdrawn + 1 >= WITHDRAWALS_MAX:
            self.pool.dropped.append((claim, reason))
        elif claim.cuts >= CUTS_MAX:
            self._conclude(claim, Withdrawn(reason))
        elif self.stopping or self._held:  # under a pause it is claimed anew, and set aside if it is to be
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
                    **_of(claim, claim.attempt),
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
        if not self._is_current(claim):
            return
        log.debug("email_requeued", "{key} waits for another connection: {reason}", key=claim.key, reason=reason)
        self._heard = reason
        if self.stopping or self._held:  # under a pause it is claimed anew, and set aside if it is to be
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

    def _is_current(self, claim: Claim) -> bool:
        session = self._session
        return session is not None and session.lost is None and claim.relay == session.relay

    def _hear_notification(self) -> None:
        self._look_again_in(self._notifications.hear(time.monotonic()))

    def _look_again_in(self, wait_s: float | None) -> None:
        if wait_s == 0:
            self._look_again()
        elif wait_s is not None:
            asyncio.get_running_loop().call_later(wait_s, self._look_again)

    def _hear_of_relays(self, said: str) -> None:
        """Note which relays come and go; look at the barrier when it is raised or lifted."""
        self._presence.hear(said, boot_clock_s())
        if said == failover_rules.RAISED:
            self._pulse_at = self._barrier.look_at = 0.0
            self._hear_notification()

    def _look_again(self) -> None:
        self._poll_at = 0.0
        if self.pool.breaker.is_open or self._held:
            self._pulse_at = 0.0  # the news may be that the route works again, or that a pause is over
        self._wake.set()

    def _session_lost(self) -> None:
        """Nothing that was claimed is ours any more; what is past its dot is waited for."""
        self._memory.lost_at = self._memory.lost_at or time.monotonic()
        for observer in self.observers:
            observer.session_lost()
        self._marks.clear()
        self.pool.drop_claims()
        self._rest, self.share.asked = None, 0
        self.share.note_wanted(0, 0.0)
        self.share.wake_others()
        self._wake.set()

    async def _work(self, session: Session) -> None:
        """One turn: wait for something to do, write it in one commit, act on what came true."""
        await self._wait()
        if self.pool.fault is not None:
            raise self.pool.fault
        now = time.monotonic()
        if self.share.has_enough_now:
            self._poll_at = 0.0
        if self._told != session.server or self._former is not None:
            await self._tell_again(session)
        with self._patience(session):
            if self._presence.has_gap:
                await self._raise_barrier(session)
            await self._speak(session, now)
            room = self._room(now) if now >= self._poll_at else 0
            may_mark = self._marks and not self._barrier.up
            if may_mark or self._settlements or room or now >= self._pulse_at:
                await self._gather(now)
                await self._tick(session, room)
            else:
                self._notifications.begin_look()
                self._notifications.end_look(now, found=False)
                if self.pool.ready and session.lost is None and not self.stopping:
                    self.pool.staff(now)  # claims that came back from cut connections
        if self._rest is not None:
            rest, self._rest = self._rest, None
            await self._take_rest(session, rest)
        with self._patience(session):
            if now >= self._sweep_at and not self.stopping and not self._barrier.up:
                await self._sweep(session)
            if self.until_empty:
                await self._stop_if_done(session, now)

    async def _stop_if_done(self, session: Session, now: float) -> None:
        """Stop a relay that runs until the outbox is empty, if it is, or if the server refuses all that is left."""
        self._stop_if_refused(now)
        if self._has_nothing():
            await self._stop_if_empty(session)

    def _stop_if_refused(self, now: float) -> None:
        """Stop when the server goes on refusing the sender or this host: a person must act, and no mail is lost."""
        pool = self.pool
        refused = [pool.breaker.reason] if pool.breaker.is_refused else []
        if not refused and self._has_nothing() and now - self.pool.judge.accepted_at > REFUSED_FOR_S:
            refused = [hold.reason for hold in pool.holds.values() if hold.refusals >= REFUSALS_MAX]
        if refused and not self.stopping:
            pool.given_up = refused[0]
            self.stop()

    async def _stop_if_empty(self, session: Session) -> None:
        """Stop when nothing is left, or only what people hold back: that may be so for days."""
        now = time.monotonic()
        left_out = self._quarantine.left_out
        if await ledger.is_empty(session.connection, route=self.serves, left_out=left_out):
            for email, why in (await ledger.never_taken(session.connection, route=self.serves)).items():
                log.warning(
                    "email_never_taken", "email {email} is never sent: {why}; set its row right", email=email, why=why
                )
            log.info("outbox_empty", "the outbox is empty: {summary}", summary=self.summary(), counts=dict(self.counts))
            self.stop()
        elif self._held and await pause.is_held(session.connection, route=self.serves):
            self.left_held = [one for one in await pause.read_pauses(session.connection) if one.waiting]
            log.info(
                "outbox_held",
                "nothing is left but what is paused: {summary}",
                summary=self.summary(),
                counts=dict(self.counts),
            )
            self.stop()
        elif now >= min(self._stranded_at, self._opened_at + STRANDED_SOON_S):
            self._stranded_at = now + STRANDED_SOON_S
            await self._judge_stranded(session)

    @contextmanager
    def _patience(self, session: Session, at_most_s: float | None = None) -> Iterator[None]:
        """Lose the session when Postgres is silent for a lease: a cut network says nothing by itself."""
        silent_s = min(self.settings.lease_s, at_most_s or self.settings.lease_s)
        reason = f"Postgres did not answer within {silent_s:g} s"
        silence = asyncio.get_running_loop().call_later(silent_s, session.lose, reason)
        self._asked_at = self.turned_at = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = None
            silence.cancel()

    def _note_answer(self) -> None:
        self._presence.note_answer(boot_clock_s())

    def _standing(self, former: Session | None) -> Standing:
        server = former.server if former is not None else None
        return self._presence.standing(server, grace_s=self.settings.failover_grace_s)

    async def _raise_barrier(self, session: Session) -> None:
        """Raise the barrier after a time without an answer: meanwhile others may have sent on another server."""
        standing = self._standing(session)
        async with session.connection.transaction():
            here = await failover_barrier.look_around(
                session.connection, session.server, session.relay, standing, last=None
            )
            row = await failover_barrier.raise_barrier(session.connection, Kind.GAP, here, standing, CHANNEL)
        self._presence.arrive(session.server, boot_clock_s())
        self._meet_barrier(row)

    async def _meet_epoch(self, session: Session, done: Tick) -> None:
        """Act on a barrier that another relay raised while this one was at work, if the tick met one."""
        if done.is_open or self._barrier.up:  # behind the barrier it looks at it regularly
            return
        row = await failover_barrier.read(session.connection)
        if answer_of(row, self._barrier.epoch, has_gap=self._presence.has_gap) is Answer.VOUCH:
            await failover_barrier.lift(session.connection, row.epoch, CHANNEL)
            row = replace(row, is_lifted=True)
        self._meet_barrier(row)
        self._poll_at = self._pulse_at = 0.0
        self._wake.set()

    def _has_nothing(self) -> bool:
        pool = self.pool
        return not (self.stopping or pool.ready or self._marks or self._settlements or pool.is_busy)

    async def _wait(self) -> None:
        """Until woken, or the next poll, sweep, pulse or probe is due; the loop has its turn in any case."""
        now = time.monotonic()
        if self._wake.is_set() or self._next_turn_at(now) <= now:
            await asyncio.sleep(0)
        else:
            timer = asyncio.get_running_loop().call_later(self._next_turn_at(now) - now, self._wake.set)
            await self._wake.wait()
            timer.cancel()
        self._wake.clear()

    async def _gather(self, now: float) -> None:
        """Let more come together for one commit, where Postgres is slow to answer, since many relays keep it busy.

        Each tick costs it the same whatever it moves. So after one that took long a relay rests a while, unless all
        that is under way waits for the tick already; a fleet at its limit then moves more with each.
        """
        rest_until = self._ticked_at + min(GATHER_SHARE * self._tick_s, GATHER_MAX_S)
        while now < rest_until and self.pool.under_way() > len(self._marks):
            timer = asyncio.get_running_loop().call_later(rest_until - now, self._wake.set)
            self._wake.clear()
            await self._wake.wait()
            timer.cancel()
            now = time.monotonic()
            self._wake.set()  # what it was said for is looked at after the tick

    def _next_turn_at(self, now: float) -> float:
        if self._barrier.up:
            return min(self._pulse_at, self._barrier.look_at)
        if self._drain_until is not None:
            return min(self._pulse_at, self._drain_until)
        at = min(self._sweep_at, self._pulse_at)
        if self._room(now) > 0:
            at = min(at, self._poll_at)
        if (start_at := self.pool.next_start_at(now)) is not None:
            at = min(at, start_at)
        paused = self.pool.breaker
        return min(at, paused.next_at) if paused.is_open and paused.next_at > now else at

    def _room(self, now: float) -> int:
        """How many deliveries to claim."""
        return 0 if self.stopping or self._barrier.up or FLEET in self._held else self.pool.room(now)

    async def _tick(self, session: Session, room: int = 0) -> None:
        suspects = self._asks_suspect = room > 0 and self._may_take_suspect()
        try:
            await self._tick_with(session, room, suspects=int(suspects))
        finally:
            self._asks_suspect = False

    async def _tick_with(self, session: Session, room: int, *, suspects: int) -> None:
        marks, self._marks = ({}, self._marks) if self._barrier.up else (self._marks, {})
        settlements, self._settlements = self._settlements, []
        began_at = time.monotonic()
        self._notifications.begin_look()
        for observer in self.observers:
            observer.ticking()
        since, urgent_since = self._frontier.since(began_at), self._urgent_frontier.since(began_at)
        urgent_max = self._turns.urgent_of(room)
        work = {"settlements": settlements, "marks": marks, "room": room, "suspects": suspects}
        order = {"since": since, "urgent_since": urgent_since, "urgent_max": urgent_max}
        started_s = boot_clock_s()  # before the mark is sent: a pause between its commit and its reply counts
        try:
            done = await self._tick_or_parts(session, work, order)
        except BaseException as error:
            self.share.asked = 0
            session.lose(session.lost or str(error) or type(error).__name__)
            self._tick_failed(marks, settlements)
            raise
        self._note_answer()
        now = self._ticked_at = time.monotonic()
        self._tick_s = now - began_at
        self._pulse_at = now + self.settings.lease_s / 3
        for observer in self.observers:
            observer.ticked(began_at, now)
            for claim in done.claims:
                claim.claimed_at = now
        self._adopt(done.pause, now)
        self._adopt_found(done.found)
        news = self._adopt_holds(done.held)
        self.share.asked = sum(claim.size for claim in done.claims if not claim.fetched)
        if done.is_open and room:
            await self._note_claims(session, done, room, order, now)
        self._look_again_in(self._notifications.end_look(now, found=bool(done.claims or done.unfit)))
        small, large = _by_size(done)
        is_free = not (small.held or small.listed)
        if is_free:
            self._take_claims(session, small.claims, now)
        lost = self._act_on_marks(session, marks if done.is_open else self._ask_again(marks, done), done, started_s)
        if not is_free:  # after the final dots, which must not wait
            self._take_claims(session, await self._wanted(session, small, look_at_all=news), now)
        self._rest = large if large.claims or large.unfit else None
        await self._explain_lost(lost, session)
        if len(done.settled) < len(settlements):
            self._settlements[:0] = [s for s in settlements if s.email in done.locked]
            missed = [s for s in settlements if s.identity not in done.settled and s.email not in done.locked]
            if missed:
                await self._explain(missed, session)
        await self._meet_epoch(session, done)
        await session.plan_for([claim.email for claim in done.claims])

    def _ask_again(self, marks: dict[int, tuple[Conversation, Claim]], done: Tick) -> dict[int, Any]:
        """Keep the marks that the barrier refused for a later tick; return the others."""
        decided = {*done.marked, *done.expired, *done.quarantined}
        for email, (conversation, claim) in marks.items():
            if email not in decided and conversation.ahead is claim and not conversation.is_closed:
                self._marks.setdefault(email, (conversation, claim))
            elif email not in decided:
                self.pool.releases.append(claim)
        return {email: mark for email, mark in marks.items() if email in decided}

    async def _note_claims(self, session: Session, done: Tick, room: int, order: dict[str, Any], now: float) -> None:
        """Record how far a tick with free capacity has come, and plan the next claim."""
        since, urgent_since, urgent_max = order["since"], order["urgent_since"], order["urgent_max"]
        self.share.note_wanted(done.bytes_wanted, now)
        self._frontier.note(done.reached, since, now)
        self._urgent_frontier.note(done.urgent_reached, urgent_since, now)
        in_part = self._turns.note(done.claims, room, urgent_max) or since is not None
        in_part = in_part or (self._in_parts and not done.locked)  # a lock may last: it is not looked at all the time
        in_part = in_part or bool(done.unfit) or (done.bytes_wanted > 0 and bool(done.claims))
        all_urgent_at = now if urgent_since is None else self._urgent_frontier.all_at
        await self._plan_next_claim(session, done.claims, room, now, in_part=in_part, all_urgent_at=all_urgent_at)

    async def _tick_or_parts(self, session: Session, work: dict[str, Any], order: dict[str, Any]) -> Tick:
        """Tick. If a row makes that fail, tick in parts, now and until no such row is found any more."""
        work |= {
            "route": self.serves,
            "server": self.pool.route.name,
            "budget": self.share.ask() if work["room"] else 0,
            "bytes_max": self.share.bytes_max,
            "epoch": self._barrier.epoch,
        }
        try:
            if not self._in_parts:
                return await self._whole_tick(session, work, order)
        except _RowError as error:
            log.warning("tick_failed", "a row makes the tick fail, and is looked for: {reason}", reason=error)
        quarantine = self._quarantine
        found = quarantine.count
        try:
            done = await tick_in_parts(session.connection, session.relay, quarantine, **work)
        except UNDECODABLE as error:
            raise ConnectionError(f"an answer of Postgres cannot be read ({error})") from error
        self._in_parts = quarantine.count > found or bool(done.locked) or not work["room"]
        return done

    async def _whole_tick(self, session: Session, work: dict[str, Any], order: dict[str, Any]) -> Tick:
        pid = session.connection.get_server_pid()
        watch = BlockerWatch(self.database_url, pid, first_s=BLOCKER_LOOK_S, every_s=BLOCKER_LOOK_S)
        try:
            async with watch:
                return await ledger.tick(
                    session.connection, session.relay, **work, **order, left_out=self._quarantine.left_out
                )
        except asyncpg.PostgresError as error:  # nothing was committed
            is_locked = is_lock_timeout(error)
            if not (is_locked or is_of_a_row(error)) or session.lost is not None:
                raise
            self._in_parts = True
            raise _RowError(f"{watch.holder} has locked it" if is_locked else error) from error
        except UNDECODABLE as error:  # it was committed: the next session finds out what has become of it
            self._in_parts = True
            raise ConnectionError(f"an answer of Postgres cannot be read ({error})") from error

    def _bytes_in_hand(self) -> int:
        """Return how many bytes its large messages have."""
        pool = self.pool
        marking = (claim for _, claim in self._marks.values())
        held = {claim.email: claim.size for claim in (*pool.in_hand(), *pool.releases, *pool.put_off, *marking)}
        return sum(size for size in held.values() if size > ledger.SMALL_BYTES)

    async def _take_rest(self, session: Session, done: Tick) -> None:
        """Quarantine what cannot be sent; fetch and check large messages, then let them wait for connections."""
        try:
            with self._patience(session):
                for email, why in done.unfit.items():
                    await self._quarantine.put(session.connection, email, why)
                claims = list(await self._wanted(session, done, look_at_all=False))
            while claims and session.lost is None and not self.stopping:
                some = [claims.pop(0)]
                while claims and sum(claim.size for claim in some) + claims[0].size <= FETCHED_AT_ONCE:
                    some.append(claims.pop(0))
                with self._patience(session):  # each has a lease of its own
                    await self._fetch(session, some)
                some = [claim for claim in some if claim.fetched]
                await asyncio.get_running_loop().run_in_executor(self.pool.checking_thread, _check_all, some)
                self._take_claims(session, some, time.monotonic())
                self.share.asked = sum(claim.size for claim in claims)
            self._take_claims(session, claims, time.monotonic())  # the relay stops: they are given back
        finally:
            self.share.asked = 0

    async def _fetch(self, session: Session, claims: list[Claim]) -> None:
        try:
            await ledger.fetch_messages(session.connection, claims)
        except asyncpg.PostgresError as error:
            if not is_of_a_row(error):
                raise
            for claim in claims:
                if len(claims) > 1:
                    await self._fetch(session, [claim])
                else:
                    await self._quarantine.put(session.connection, claim.email, error)

    def _tick_failed(self, marks: dict[int, tuple[Conversation, Claim]], settlements: list[Settlement]) -> None:
        """Nothing is known of the commit. Settling twice changes nothing; a mark is taken back by the next session."""
        self._settlements[:0] = settlements
        for conversation, claim in marks.values():
            claim.attempt += 1
            claim.marked = True
            if conversation.ahead is claim:
                conversation.abandon("its mark is not known to be committed")
            self.judged(claim, Withdrawn("its mark was not confirmed, so the dot was not written"))

    async def _plan_next_claim(
        self, session: Session, claims: list[Claim], room: int, now: float, *, in_part: bool, all_urgent_at: float
    ) -> None:
        if self.pool.breaker.probing and not claims and not in_part and self.pool.is_empty:
            await self._probe_without_mail(session)
        if len(claims) >= room or in_part:
            self._poll_s = POLL_FIRST_S
            self._wake.set()
        else:
            if claims:
                self._poll_s = POLL_FIRST_S
            longest_s = min(self.settings.poll_max_s, self.settings.lease_s / 3)
            self._poll_at = now + self._poll_s * (0.8 + 0.2 * random.random())  # noqa: S311 - jitter
            self._poll_s = min(2 * self._poll_s, longest_s)
            if all_urgent_at > now:  # an urgent email that a long transaction committed lies behind the frontier
                self._poll_at = min(self._poll_at, all_urgent_at)

    def _take_claims(self, session: Session, claims: list[Claim], now: float) -> None:
        if session.lost is None:
            if self.stopping:
                self.pool.releases.extend(claims)
            else:
                self.pool.add(claims)
            self.pool.staff(now)

    def _adopt_holds(self, held: frozenset[str]) -> bool:
        """Take over what people hold back; gives whether that is more than it was."""
        begun, over = held - self._held, self._held - held
        self._held = held
        for report in begun:
            log.warning("sending_paused", "{what} is paused", what=pause.spoken(report), report=report)
        for report in over:
            log.info("sending_resumed", "{what} is no longer paused", what=pause.spoken(report), report=report)
        if over:
            self._poll_at = self._expire_at = self._sweep_at = 0.0  # what was set aside is taken up in the upkeep
            self._wake.set()
        return bool(begun)

    async def _wanted(self, session: Session, done: Tick, *, look_at_all: bool) -> list[Claim]:
        """Of a tick's claims those that neither a suppression forbids, which cancels them, nor a pause holds back."""
        claims = await self._unsuppressed(session, done) if done.listed else done.claims
        return await self._spared(session, claims, look_at_all=look_at_all) if done.held else claims

    async def _unsuppressed(self, session: Session, done: Tick) -> list[Claim]:
        ended = await suppression.cancel_listed(session.connection, session.relay, list(done.listed), self._quarantine)
        if ended:
            self.counts["suppressed"] += len(ended)
            log.info(
                "emails_suppressed",
                "{emails} emails are not sent: their addresses are on the suppression list",
                emails=len(ended),
            )
        return [claim for claim in done.claims if claim.email not in ended]

    async def _spared(self, session: Session, claims: list[Claim], *, look_at_all: bool) -> list[Claim]:
        """Of these claims those that no pause holds back; after news also of what waits for a connection.

        What waits is not there to be taken meanwhile. What a connection has begun is sent.
        """
        if look_at_all:
            claims = [*self.pool.ready, *claims]
            self.pool.ready.clear()
        if FLEET in self._held or self.stopping:
            self.pool.releases.extend(claims)
            self._wake.set()
            return []
        aside = await pause.set_aside(
            session.connection, session.relay, [claim.email for claim in claims], self._quarantine
        )
        return [claim for claim in claims if claim.email not in aside]

    async def _probe_without_mail(self, session: Session) -> None:
        """It is this relay's turn to try the server. With mail that is only put off, the turn is left to later."""
        if await ledger.is_empty(session.connection, route=self.serves, within_s=2 * self._pause_max_s):
            self.pool.probe()
        else:
            self.pool.breaker.probing = False

    @property
    def _pause_max_s(self) -> float:
        return REFUSED_PAUSE_MAX_S if self.pool.breaker.refusals else PAUSE_MAX_S

    def _act_on_marks(
        self,
        session: Session,
        marks: dict[int, tuple[Conversation, Claim]],
        done: Tick,
        started_s: float,
    ) -> list[Claim]:
        """The guard: only what is marked, fresh and still held goes on to its dot. Gives what is no longer held."""
        lost: list[Claim] = []
        if done.expired:
            self._expired(len(done.expired))
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
        return is_late or session.lost is not None or self._presence.has_gap

    async def _explain_lost(self, lost: list[Claim], session: Session) -> None:
        """Say why what was about to be sent was not: a person cancelled it, or else something is wrong."""
        if not lost:
            return
        standing = await ledger.standing(session.connection, [claim.email for claim in lost])
        for claim in lost:
            of = _of(claim, claim.attempt)
            state, _ = standing.get(claim.email, (None, None))
            if state == "cancelled":
                log.info("claim_cancelled", "{key} was cancelled at the last moment; it was not sent", **of)
                self.counts["cancelled"] += 1
            elif state in ("sent", "in_doubt"):
                log.info(
                    "claim_told", "{key} is not sent: a relay on another Postgres server has sent it, or may have", **of
                )
            else:
                log.error("claim_lost", "{key} is no longer this relay's; it was not sent", **of)
                self.counts["lost claims"] += 1

    async def _explain(self, missed: list[Settlement], session: Session) -> None:
        """A settlement that changed nothing is never passed over in silence, unless it was already true."""
        standing = await ledger.standing(session.connection, [s.email for s in missed])
        for settlement in missed:
            state, attempt = standing.get(settlement.email, (None, None))
            if contradicts(settlement, state, attempt):
                self.counts["stale settlements"] += 1
                log.error(
                    "verdict_stale",
                    "{key}, attempt {attempt}: the verdict {verdict!r} came too late, "
                    "the delivery is {state} at attempt {at_attempt}",
                    key=settlement.key,
                    email=settlement.email,
                    attempt=settlement.attempt,
                    relay=settlement.relay,
                    verdict=settlement.outcome.verdict,
                    state=state,
                    at_attempt=attempt,
                )

    async def _give_back(self, session: Session) -> None:
        pool = self.pool
        releases, pool.releases = [claim.email for claim in pool.releases], []
        put_off, pool.put_off = pool.put_off, []
        quarantine = self._quarantine
        await ledger.release(session.connection, session.relay, releases, quarantine=quarantine)
        rested = {PAUSE_MAX_S: [claim.email for claim in put_off if not claim.rest_s]}
        held = [claim for claim in put_off if claim.rest_s]
        rested[max((claim.rest_s for claim in held), default=0.0)] = [claim.email for claim in held]
        for after_s, emails in rested.items():
            if emails:
                await ledger.release(session.connection, session.relay, emails, after_s=after_s, quarantine=quarantine)

    async def _put_back(self, session: Session) -> None:
        """Make dead letters pending again that turned out to be the route's, once their verdicts are written."""
        waiting = {settlement.email for settlement in self._settlements}
        letters = [one for one in self.pool.undone if one.email not in waiting]
        if not letters:
            return
        self.pool.undone = [one for one in self.pool.undone if one.email in waiting]
        undone = await put_back(session.connection, letters, PUT_BACK_WHY)
        if undone:
            self.counts["put back"] += len(undone)
            log.warning(
                "dead_letters_put_back",
                "{emails} dead letters are pending again, since the refusal was not about them: {named}",
                emails=len(undone),
                named=", ".join(one.key for one in letters if one.email in undone),
            )

    async def _sweep(self, session: Session) -> None:
        found = await ledger.sweep(
            session.connection,
            session.relay,
            doubt_s=self._doubt_s(),
            route=self.serves,
            quarantine=self._quarantine,
        )
        pause_s = min(max(SWEEP_SHARE_S * (found.alive + 1), SWEEP_MIN_S), SWEEP_MAX_S)
        self.pool.pace.alive = found.beside + 1
        self.pool.note_others(found.sent, time.monotonic())
        self.alive = found.alive + 1
        self._presence.see(found.instances, boot_clock_s())
        self._sweep_at = time.monotonic() + pause_s * (0.8 + 0.4 * random.random())  # noqa: S311 - jitter
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
        if found.freed:
            self._look_again()
        if time.monotonic() >= self._expire_at:
            await self._expire(session, found.alive + 1)
        if self.settings.in_doubt is WhenInDoubt.RESEND:
            resent = await resend_doubtful(session.connection, self._quarantine)
            if resent:
                log.warning(
                    "emails_resent",
                    '{emails} emails in doubt are sent again, as in_doubt = "resend" says',
                    emails=resent,
                )
                self._look_again()
        elif self.settings.in_doubt is WhenInDoubt.ASK and self.inquirer is not None:
            await self.inquirer.ask(session.connection, time.monotonic(), self._quarantine)
        if time.monotonic() >= self._stranded_at:
            self._stranded_at = time.monotonic() + STRANDED_EVERY_S * (0.8 + 0.4 * random.random())  # noqa: S311 - jitter
            await self._judge_stranded(session)
        await self._note(session)

    async def _judge_stranded(self, session: Session) -> None:
        pool = self.pool
        marking = (claim for _, claim in self._marks.values())
        in_hand = {claim.email for claim in (*pool.in_hand(), *pool.releases, *pool.put_off, *marking)}
        freed, doubted = await ledger.judge_stranded(
            session.connection,
            session.relay,
            in_hand | {one.email for one in self._settlements},
            doubt_s=self._doubt_s(),
            route=self.serves,
            quarantine=self._quarantine,
        )
        if freed or doubted:
            log.warning(
                "emails_stranded",
                "emails were held by relays that do not exist: {freed} released, {in_doubt} in doubt",
                freed=freed,
                in_doubt=doubted,
            )
            self._look_again()

    async def _expire(self, session: Session, relays: int) -> None:
        """End what is too late to send, and take up what was set aside under a pause that is over."""
        pause_s = min(EXPIRE_MIN_S * relays, EXPIRE_MAX_S) * (0.8 + 0.4 * random.random())  # noqa: S311 - jitter
        self._expire_at = time.monotonic() + pause_s
        expired = await ledger.expire(session.connection, session.relay, self._quarantine)
        if expired:
            self._expired(expired)
        began_at = time.monotonic()
        taken_up = await pause.take_up(session.connection, self._quarantine)
        took_s = time.monotonic() - began_at
        if taken_up:
            log.info("emails_taken_up", "{emails} emails that were set aside are due again", emails=taken_up)
            self._look_again()
        if expired == EXPIRED_AT_ONCE:  # there are more; until they are gone every claim has to pass them by
            self._expire_at = self._sweep_at = 0.0
            self._wake.set()
        elif taken_up == pause.TAKEN_UP_AT_ONCE:  # more, too; dear where a snapshot is held that keeps what is done
            self._expire_at = self._sweep_at = time.monotonic() + TAKE_UP_REST * took_s
            self._wake.set()

    def _expired(self, emails: int) -> None:
        self.counts["expired"] += emails
        log.warning("emails_expired", "{emails} emails were not sent: their send_before is over", emails=emails)

    def _doubt_s(self) -> float | None:
        return None if self.settings.in_doubt is WhenInDoubt.HOLD else self.settings.doubt_grace_s

    async def _note(self, session: Session) -> None:
        """Keep in the relay's row how it goes and what hinders it, for those who look; written when it changes."""
        trouble = self.pool.trouble() or (self.inquirer.trouble if self.inquirer is not None else None)
        sent = self.counts["accepted"] - self._sent_before
        note = Note(trouble, self.counts["stale settlements"], sent, self._heard)
        if note != self._noted:
            if trouble is not None and self._noted.trouble is None:
                log.warning("no_progress", "no progress: {reason}", reason=trouble)
            await ledger.write_note(session.connection, session.relay, note)
            self._noted = note

    def _may_take_suspect(self) -> bool:
        """Whether none is in hand, and this relay has lived for a while: one that dies at once, whatever it holds, must
        not make an innocent email guilty.
        """
        if time.monotonic() - self._opened_at < PROVEN_S:
            return False
        return not any(relay.has_suspect for relay in self.beside)

    @property
    def has_suspect(self) -> bool:
        """Whether it holds one, or asks for one at this moment."""
        marking = (claim for _, claim in self._marks.values())
        given_back = (*self.pool.releases, *self.pool.put_off)
        return self._asks_suspect or any(one.suspect for one in (*self.pool.in_hand(), *given_back, *marking))

    async def _speak(self, session: Session, now: float) -> None:
        """Before a tick: whatever there is to say or to ask besides it, which mostly is nothing."""
        if self._barrier.up:
            await self._barrier.look(session.connection, session.relay, now, CHANNEL)
            if not self._barrier.up:
                log.info(
                    "barrier_lifted",
                    "emails are claimed again: the other relays have written what they sent, or time is up",
                )
                self._poll_at = self._sweep_at = 0.0
                self._wake.set()
        if self.pool.breaker.news is not None or self.pool.breaker.wants_probe(now):
            await self._speak_for_route(session, now)
        if self.pool.releases or self.pool.put_off:
            await self._give_back(session)
        if self.pool.undone:
            await self._put_back(session)
        if self.pool.dropped:
            await self._judge_dropped(session)
        if self.pool.pace.refused is not None:
            await self._report_refusal(session)
        if not self.stopping:
            await self._reserve(session, now)
        inquirer = self.inquirer
        if inquirer is not None and inquirer.answers and await inquirer.write(session.connection, self._quarantine):
            self._look_again()

    async def _judge_dropped(self, session: Session) -> None:
        """Withdraw emails whose connections were cut; one that the server dropped too often is quarantined.

        What a server refused by its rate, or deferred for all, was withdrawn too, and does not count for that.
        """
        dropped, self.pool.dropped = self.pool.dropped, []
        by_reply = await ledger.count_put_off(session.connection, [claim.email for claim, _ in dropped])
        for claim, reason in dropped:
            is_last = claim.withdrawn - by_reply.get(claim.email, 0) + 1 >= WITHDRAWALS_MAX
            self._conclude(claim, Withdrawn(reason), dropped=is_last)

    async def _report_refusal(self, session: Session) -> None:
        """Tell the fleet that the server refused by rate, and take over the rate that it agrees on."""
        pace = self.pool.pace
        refused = pace.refused
        assert refused is not None
        is_told, found = await report_refusal(session.connection, self.pool.route.name, refused.as_of(time.monotonic()))
        if not is_told:
            self._wake.set()
        elif pace.refused is refused:  # else there was another one meanwhile
            pace.refused = None
            self._adopt_found(found)

    def _adopt_found(self, found: Found | None) -> None:
        """Take over what the fleet knows of the rate that the server takes."""
        pace, before = self.pool.pace, self.pool.pace.found
        if found is None and before is None and pace.found_per_s is None:
            return  # as mostly
        is_news = pace.adopt(found)
        if is_news:
            self.pool.release_ready(keep=pace.share)
            log.warning(
                "rate_found",
                "{route} takes about {rate:.3g} emails a second, and the fleet sends at that rate: {reply}",
                rate=pace.found_per_s,
                reply=pace.found.said if pace.found is not None else "",
                route=self.pool.route.name,
            )
        elif before is not None and pace.found is None and pace.refused is None:
            log.info("rate_forgotten", "{route} has no rate limit any more", route=self.pool.route.name)
            self._wake.set()

    async def _reserve(self, session: Session, now: float) -> None:
        """Ask for moments in the fleet's rate, for what waits here."""
        pace = self.pool.pace
        wanted = pace.wants(len(self.pool.ready), now)
        if wanted:
            asked_at = time.monotonic()
            grant = await reserve(
                session.connection,
                self.pool.route.name,
                wanted,
                rate_per_s=pace.rate_per_s,
                daily_max=pace.daily_max,
                unused=pace.unused,
            )
            if grant.used_up and pace.used_up is None:
                log.warning("day_used_up", "nothing more is sent for now: daily_max is reached")
            pace.grant(grant, asked_at, time.monotonic())
            self._adopt_found(grant.found)

    async def _tell_again(self, session: Session) -> None:
        """After a new session: what this process knows and the database may have lost, and the end of its last one."""
        doubt_s = self._doubt_s()
        if self._told != session.server:
            unsettled = list(self._settlements)
            handed_over = self.pool.handed_over()
            news = self._memory.recall(unsettled, handed_over, doubt_s=doubt_s)
            told = {(n.key, n.attempt) for n in news}
            emails, changed = await tell_again(
                session.connection,
                news,
                lambda: self._patience(session),
                route=self.serves,
                instance=self._presence.instance,
            )
            # What was judged meanwhile still has the old ids; on another server they may be another email's.
            self._settlements = [
                replace(s, email=emails[s.key].email) if s.key in emails else s
                for s in self._settlements
                if s not in unsettled or (s.key, s.attempt) not in told
            ]
            for claim in handed_over:
                if claim.key in emails:
                    there = emails[claim.key]
                    claim.email = there.email
                    claim.attempt = there.attempt or claim.attempt  # the row there may have counted further
            self._told = session.server
            self._memory.lost_at = None
            log.warning(
                "verdicts_told_again",
                "another Postgres, or a new start of it: {told} verdicts were told, {new} new to it",
                told=len(news),
                new=changed,
            )
        if self._former is not None:
            with self._patience(session):
                await ledger.judge_former(
                    session.connection,
                    self._former.relay,
                    self._former.timeline,
                    doubt_s=doubt_s,
                    quarantine=self._quarantine,
                    instance=self._presence.instance,
                    present=session.relay,
                )
            self._former = None
            self._memory.lost_at = None

    async def _speak_for_route(self, session: Session, now: float) -> None:
        """Tell the fleet that the server is in trouble, or works; or ask for the turn to find out."""
        breaker, route = self.pool.breaker, self.pool.route.name
        news, breaker.news = breaker.news, None
        if news == "pause":
            await pause_route(session.connection, session.relay, route, breaker.reason)
            self._pulse_at = 0.0  # the next tick tells how long
        elif news == "login":
            await pause_login(session.connection, session.relay, route, breaker.reason)
            self._pulse_at = 0.0
        elif news == "resume":
            await resume_route(session.connection, session.relay, route)
        elif not self.stopping and self.pool.is_deaf and FLEET not in self._held:
            insists, breaker.insists = breaker.insists, False
            breaker.probing = await probe_route(session.connection, session.relay, route, insists=insists)
            breaker.fleet_retry_at = now + PROBE_LEASE_S
            self._poll_at = 0.0 if breaker.probing else self._poll_at

    def _has_another_login(self, pause: RoutePause | None) -> bool:
        """Return True if the login may be another one than the one that was refused, so that it is worth a try."""
        route = self.pool.route
        if (
            pause is not None
            and pause.logins
            and route.is_newer_than_refusal(login_pause_s(pause.logins) - pause.wait_s)
        ):
            return True
        return route.has_new_login()

    def _adopt(self, pause: RoutePause | None, now: float) -> None:
        """Take over what the fleet knows of the route."""
        breaker, route = self.pool.breaker, self.pool.route.name
        was_open = breaker.is_open
        breaker.adopt(*((pause.reason, pause.wait_s, now, pause.logins) if pause else (None, 0.0, now)))
        if breaker.login_refused and self._has_another_login(pause):
            breaker.insist(now)
        if pause is not None and not was_open:
            log.warning(
                "route_paused", "the fleet's route to {route} is paused: {reason}", route=route, reason=pause.reason
            )
            self.pool.undone += self.pool.judge.dead_of_pause(pause.reason, now)
        elif was_open and not breaker.is_open:
            log.info("route_resumed", "the fleet's route to {route} works again", route=route)
            self._poll_at = 0.0
            self._wake.set()


def _by_size(done: Tick) -> tuple[Tick, Tick]:
    """Return a tick's claims in two parts: small messages, then those still to be fetched or quarantined."""
    if all(claim.fetched for claim in done.claims):
        return done, replace(done, claims=[], listed=frozenset())
    small, large = ([claim for claim in done.claims if claim.fetched is fetched] for fetched in (True, False))
    listed = done.listed & {claim.email for claim in large}
    return replace(done, claims=small, listed=done.listed - listed), replace(done, claims=large, listed=listed)


def _attempt(claim: Claim) -> int:
    """Return the number of the latest try; before its mark it is not counted in the row yet."""
    return claim.attempt if claim.marked else claim.attempt + 1


def _tries(claim: Claim) -> int:
    """Return how many tries count, with the latest."""
    return _attempt(claim) - claim.withdrawn


def _check_all(claims: Sequence[Claim]) -> None:
    for claim in claims:
        route_headers.check(claim)


def _of(claim: Claim, attempt: int) -> dict[str, Any]:
    """Which try of which email a fact is about."""
    return {"key": claim.key, "email": claim.email, "attempt": attempt, "relay": claim.relay}
