"""The relay's connections to its SMTP server: how many there are, which are idle, and what waits for one.

It opens no more than the route's breaker allows, and hands ready claims to connections. It knows nothing of Postgres:
what must be given back there lies in `releases` and `put_off` until the relay's next turn.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from outbox.log import Events
from outbox.relay.circuit_breaker import Breaker
from outbox.relay.rate_limit import Pace, RefusedTry
from outbox.relay.refusals import DeadLetter, RefusalJudge
from outbox.relay.throttle import RECIPIENTS_MIN, ConnectionLimit, Judgement, Meter, RecentReplies
from outbox.settings import Settings
from outbox.smtp.connection import Conversation, Desk, Throttle
from outbox.smtp.connector import LoginRefusedError, Route, RouteTroubleError
from outbox.smtp.outgoing import Claim
from outbox.smtp.reply_class import About, Stage, classify, is_server_trouble, names_recipient
from outbox.smtp.route_headers import Letterhead
from outbox.smtp.verdict import Deferred

log = Events("outbox.relay")

ROOM_MIN: Final = 8  # claims that a relay without connections starts with
DEADLINE_CHECK_S: Final = 1.0
AFTER_STOP_S: Final = 0.05
STUCK_S: Final = 3.0
HOLD_S: Final = 5.0  # a claim that can be sent within this time after a refusal is not given back
BLOCKED_S: Final = 4.0  # a server that wants to be left alone for so long is a trouble to be named
DEFERS_ALL_S: Final = 30.0  # a reply to everybody is shown for at least so long, if nothing is accepted
QUOTA: Final = re.compile(r"\bquota\b|\b(dai|hour)ly\b", re.IGNORECASE)
OTHERS_SEND_S: Final = 10.0  # after another relay's latest email, as far as sweeps tell
REFUSED_MIN: Final = 400  # RFC 5321 §4.2.1: 4xx and 5xx are refusals
SILENCE_S: Final = 30.0  # a server that says nothing for so long is a trouble to be named
LIMIT_SEEN_MIN: Final = 3  # so many connections in a row ended after the same number of messages: that is a limit
LIMIT_KEPT_S: Final = 3600.0
PROBES_MAX: Final = 64  # claims of which one is chosen to ask a server that refused the sender
PASSED_OVER_S: Final = 30.0  # so that the next choice sees others
HOLD_FIRST_S: Final = 1.0  # pause of a sender whom the server refuses while it takes others; doubles each time
HOLD_MAX_S: Final = 60.0


@dataclass(slots=True)
class Hold:
    """Sender whose mail waits, since the server refuses it and takes that of others."""

    reason: str
    until: float = 0.0
    refusals: int = 0


class Pool:
    """The connections of one relay. All state is touched on the event loop's thread only."""

    def __init__(self, route: Route, desk: Desk, settings: Settings, *, wake: Callable[[], None]) -> None:
        self.route = route
        self.desk = desk
        self.settings = settings
        self.wake = wake
        self.breaker = Breaker()
        self.pace = Pace(settings.rate_per_s, settings.daily_max)
        self.connection_limit = ConnectionLimit()
        self.replies = RecentReplies()
        self.throttles = 0
        """How many replies limited the rate or the connections."""
        self._defers_all: tuple[str, float] | None = None  # the reply, and until when it is believed
        self._refused_in_a_row = 0  # by a limit, since the server took an email
        self._taken = Meter()
        self._accepted_started_at: float | None = None
        self._sent_by_others: int | None = None
        self._others_sent_at: float | None = None
        self._is_paused_by_limit = False
        self.ready: deque[Claim] = deque()
        self.releases: list[Claim] = []
        self.put_off: list[Claim] = []
        self.dropped: list[tuple[Claim, str]] = []
        """Claims that met only cut connections, with the reason, which may have to be quarantined."""
        self.undecided: list[tuple[Claim, Deferred, bool]] = []
        """Deferrals of which it is not known yet whether most others get the same."""
        self.conversations: set[Conversation] = set()
        self.is_closing = False
        self.fault: BaseException | None = None
        """A fault of ours: the relay ends loudly rather than go on without connections or deadlines."""
        self._signs = route.letterhead if route.letterhead is not None and route.letterhead.is_slow else None
        self._signing: asyncio.Task[None] | None = None
        # Its own: in the loop's, names that nobody resolves and disks that hang take all threads, of all routes.
        self._signing_thread = ThreadPoolExecutor(1, "outbox signing") if self._signs is not None else None
        self.checking_thread = ThreadPoolExecutor(1, "outbox checking")
        """Thread that checks large messages; it starts with the first one."""
        self.session_limit: int | None = None
        """How many messages the server takes on one connection, if that was found out."""
        self.holds: dict[str, Hold] = {}
        self.judge = RefusalJudge()
        self.undone: list[DeadLetter] = []
        """Dead letters that are to be put back: the refusal was not about them."""
        self.refusals = 0
        """How many replies were about the sender or this host."""
        self._refused_senders: set[str] = set()
        self._limits_seen: deque[int] = deque(maxlen=LIMIT_SEEN_MIN)
        self._limit_until = 0.0
        self._idle: list[Conversation] = []
        self._openings: set[asyncio.Task[None]] = set()
        self._login_refused: LoginRefusedError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether any connection has mail in hand."""
        return any(map(_is_busy, self.conversations))

    @property
    def is_deaf(self) -> bool:
        """Whether no connection tells anything of the server: there is none, or each hangs."""
        return not self._openings and all(_is_busy(c) and c.waited_s() >= STUCK_S for c in self.conversations)

    @property
    def is_empty(self) -> bool:
        """Whether there is no connection, none is being opened, and no claim waits for one."""
        return not (self.ready or self._openings or self.conversations)

    def under_way(self) -> int:
        """How many connections have mail in hand."""
        return sum(map(_is_busy, self.conversations))

    def in_hand(self) -> list[Claim]:
        """All claims that wait for a connection or are on one."""
        on_the_way = [claim for c in self.conversations for claim in (c.ahead, c.handed_over) if claim is not None]
        return [*self.ready, *on_the_way, *(one[0] for one in self.undecided), *(one[0] for one in self.dropped)]

    def handed_over(self) -> list[Claim]:
        """The claims whose final dot is written and not answered."""
        return [c.handed_over for c in self.conversations if c.handed_over is not None]

    def trouble(self) -> str | None:
        """What keeps mail from going out: the server, as far as the connections tell, or the day's maximum."""
        used_up = f"SMTP: {self.pace.used_up}" if self.pace.is_used_up(time.monotonic()) else None
        held = next((f"SMTP refuses mail from {sender}: {hold.reason}" for sender, hold in self.holds.items()), None)
        return self.broken() or held or used_up or self._throttled_by()

    def _throttled_by(self) -> str | None:
        """Return why the server takes next to nothing, if it said that it is to be left alone."""
        found, limit = self.pace.found, self.connection_limit
        if (deferring := self.defers_all()) is not None:
            return deferring
        if found is not None and found.silence_s >= BLOCKED_S and found.sending_s <= 0:
            return f"SMTP: the mail server takes no more for now, by its rate limit: {found.said}"
        if limit.found is not None and not self.conversations and limit.retry_at > time.monotonic():
            return f"SMTP: the mail server takes no more connections: {limit.said}"
        return None

    def defers_all(self) -> str | None:
        """Return why the mail server is at fault although it answers: different recipients get the same deferral.

        It holds until the server takes an email, or has not deferred one for as long as the longest pause of an email.
        """
        if self._defers_all is None or time.monotonic() >= self._defers_all[1]:
            return None
        return f"SMTP: the mail server defers every email: {self._defers_all[0]}"

    def counts(self) -> dict[str, int]:
        """How many connections are `busy`, `idle` and `opening`. May be asked from any thread."""
        idle, all_of_them = len(self._idle), len(self.conversations)
        return {"busy": max(all_of_them - idle, 0), "idle": idle, "opening": len(self._openings)}

    def broken(self) -> str | None:
        """What is wrong with the server, as far as the connections tell."""
        if self.breaker.is_open:
            return f"SMTP: {self.breaker.reason}"
        stuck = sum(_is_busy(c) and c.waited_s() >= SILENCE_S for c in self.conversations)
        if stuck:
            return f"the mail server has been silent for more than {SILENCE_S:g} s on {stuck} connections"
        return None

    def room(self, now: float) -> int:
        """How many more claims the connections can take soon; none while the route is paused, one for a probe."""
        live = len(self.conversations)
        if self._is_stuck() or self._is_shut_out(now) or self.pace.is_used_up(now):
            return 0
        if self.breaker.is_open and (live == 0 or self.breaker.refusals):
            is_free = not (self.ready or self._openings or self.is_busy)
            probes = min(PROBES_MAX, self.settings.batch_max) if self.breaker.refusals else 1
            return probes if is_free and self.breaker.may_connect(now) else 0
        wanted = min(max(2 * (live + len(self._openings)), ROOM_MIN), 2 * self.connections_max)
        room = max(0, min(wanted - len(self.ready), self.settings.batch_max))
        return min(room, self.pace.room(len(self.ready))) if self.pace.is_bounded else room

    def take(self) -> Claim | None:
        """The next ready claim, for a connection that can start on it now."""
        now = time.monotonic()
        if self.is_closing or not self._has_next() or self._is_refused(now) or not self.pace.may_start(now):
            return None
        if len(self.ready) <= len(self.conversations):
            self.wake()  # running low: ask for more before a connection goes idle
        claim = self.ready.popleft()
        claim.started_at = now
        return claim

    def add(self, claims: list[Claim]) -> None:
        """Let claims wait for connections: suspects in front, since each moment in hand is held against them, then
        urgent ones.
        """
        if self.holds:
            claims = self._without_held(claims)
        if self.breaker.refusals:
            claims = self._probe_of(claims)
        self.ready.extend(claim for claim in claims if not (claim.suspect or claim.urgent))
        self.ready.extendleft(claim for claim in reversed(claims) if claim.urgent and not claim.suspect)
        self.ready.extendleft(claim for claim in claims if claim.suspect)
        self._sign_ready()
        if claims and self.pace.is_bounded:
            self.wake()  # moments are asked for in the relay's next turn

    def staff(self, now: float) -> None:
        """Give ready claims to idle connections, and open more for the rest."""
        is_refused = self._is_refused(now)
        while self._has_next() and self._idle and not is_refused and self.pace.may_start(now):
            claim = self.ready.popleft()
            claim.started_at = now
            self._idle.pop().start(claim)
        is_shut = self.breaker.is_open and not self.conversations and not self.breaker.may_connect(now)
        if is_shut or is_refused or self._is_stuck() or self._is_shut_out(now):  # others may do better
            self.release_ready()
            return
        if self.pace.is_used_up(now):  # what has its moment is counted for the day, and is still sent
            self.release_ready(keep=self.pace.held)
        while len(self._openings) + len(self._idle) < len(self.ready) and self._may_open(now):
            self._open(self._connect())

    def note_accepted(self, claim: Claim, now: float) -> None:
        """Note that the server took an email."""
        was_refused = self.breaker.refusals
        self.breaker.succeed(now)
        self.judge.accepted(claim.sender, now)
        if self.holds or was_refused:
            self.accept_sender(claim.sender)
        self._taken.note(now)
        self._defers_all = None
        self._refused_in_a_row = 0
        self.replies.note_accepted(claim.recipient, now)
        self._accepted_started_at = max(self._accepted_started_at or claim.started_at, claim.started_at)
        if self.connection_limit.found is not None:
            self.connection_limit.note_working(self._working(), now)

    def note_deferral(self, claim: Claim, reply: str, *, tries: int) -> bool:
        """Note a deferral; return True if it is known already whether it is a try of this email."""
        now = time.monotonic()
        self.replies.note_deferred(claim.recipient, reply, now, tries=tries)
        return self.replies.is_common(claim.recipient, reply, now)

    def may_wait(self, claim: Claim) -> bool:
        """Return True if other tries will soon tell whether the deferral of this one is its own.

        What is marked is settled at once: if this relay died, its sending would be in doubt.
        """
        return not (claim.marked or self.is_closing) and (bool(self.ready) or self.is_busy)

    def judge_deferral(self, claim: Claim, reply: str, *, tries: int) -> Judgement:
        """Judge whether a deferral is a try of this email, and slow down if most recipients get the same."""
        now = time.monotonic()
        known = self.pace.found.said if self.pace.found is not None else ""
        names = names_recipient(reply)
        judgement = self.replies.judge(
            claim.email, claim.recipient, reply, now, tries=tries, known=known, names_recipient=names
        )
        if judgement.is_of_the_rate:
            self.refuse_rate(reply, claim.started_at, is_supposed=True)
            if not self.replies.accepts(now):
                lasts_s = 2 * DEFERS_ALL_S if names else max(2 * DEFERS_ALL_S, self.settings.retry.max_s)
                self._defers_all = (reply, now + lasts_s)
        return judgement

    def throttled(self, conversation: Conversation, kind: Throttle, reason: str) -> None:
        """Slow down, or do with fewer connections: the server said so. A quota that is used up pauses the route too."""
        if kind == "connections":
            conversation.close_politely()
            self._limit_connections(reason)
            return
        self.refuse_rate(reason, conversation.began_at)
        self._refused_in_a_row += 1
        if (
            self._refused_in_a_row >= RECIPIENTS_MIN
            and not self.replies.accepts(time.monotonic())
            and is_server_trouble(reason)
        ):
            self._defers_all = (reason, time.monotonic() + max(2 * DEFERS_ALL_S, self.settings.retry.max_s))
        if QUOTA.search(reason):
            self.paused(reason)

    def refuse_rate(self, said: str, started_at: float, *, is_supposed: bool = False) -> None:
        """Stop starting emails until the fleet has agreed on a lower rate."""
        self.throttles += 1
        now = time.monotonic()
        self.pace.refuse(
            RefusedTry(
                said,
                started_at,
                self._accepted_started_at,
                self._taken.per_s(now) * self.pace.alive,
                is_supposed,
                self.replies.accepts(now),
            )
        )
        self.release_ready(keep=self.pace.share)
        self.wake()

    def note_others(self, sent: int, now: float) -> None:
        """Note how many emails the other relays of the route have sent, as of a sweep."""
        if self._sent_by_others is not None and sent > self._sent_by_others:
            self._others_sent_at = now
        self._sent_by_others = sent
        if self._others_send(now):
            self._end_pause_by_limit()
        if not (self.conversations or self._others_send(now)):
            self.connection_limit.hurry(now)  # those that had the connections are gone

    def _others_send(self, now: float) -> bool:
        """Return True if the server works for other relays, so that it has only no connection left for this one."""
        return self._others_sent_at is not None and now - self._others_sent_at < OTHERS_SEND_S

    def _end_pause_by_limit(self) -> None:
        """Let the fleet go on if this relay paused the route, and the server only has no connection left for it."""
        if self._is_paused_by_limit:
            self._is_paused_by_limit = False
            self.breaker.works_for_others()
            self.wake()

    def may_keep(self, now: float) -> bool:
        """Return True if one more claim can be sent soon, so that it need not be given back."""
        if self.is_closing or self.breaker.is_open or self.pace.refused is not None:
            return False
        return len(self.ready) < self.pace.share and self.pace.next_at(now) - now < HOLD_S

    def _working(self) -> int:
        """Return how many connections are open and stay so."""
        return sum(not conversation.closing for conversation in self.conversations)

    def _limit_connections(self, reason: str, *, opening: int = 0) -> None:
        """Do with fewer connections, or, if the server grants none at all, take it for broken.

        `opening` is 1 if the connection that was refused is one of those that are being opened.
        """
        now = time.monotonic()
        is_working = self._working() > 0 or self._others_send(now)
        if not (is_working or len(self._openings) > opening):
            self.connection_limit = ConnectionLimit()
            self._is_paused_by_limit = True
            self.paused(reason)
            return
        if is_working:  # one that is only being opened proves nothing
            self._end_pause_by_limit()
        limit = self.connection_limit
        self.throttles += 1
        if limit.found is None:
            log.warning(
                "connections_limited",
                "the mail server takes only so many connections: {reason}",
                reason=reason,
                route=self.route.name,
            )
        limit.refuse(self._working(), reason, now)
        asyncio.get_running_loop().call_later(max(limit.retry_at - now, 0.0), self.wake)
        if self._is_shut_out(now):
            self.release_ready()
        self.wake()

    def next_start_at(self, now: float) -> float | None:
        """When the rate lets the next waiting email go; None where the rate is not what it waits for.

        Where no connection waits, those that work take their next email by themselves.
        """
        at = self.pace.next_at(now)
        return at if self._has_next() and self.pace.is_bounded and (at > now or self._idle) else None

    def _has_next(self) -> bool:
        """Whether the next ready claim can be started on: it is there, and signed if it is to be."""
        return bool(self.ready) and (self._signs is None or _is_prepared(self.ready[0]))

    def _sign_ready(self) -> None:
        """Have what is ready signed, off the loop, which has a pulse and marks to look after."""
        if self._signs is not None and self._signing is None and not all(map(_is_prepared, self.ready)):
            self._signing = asyncio.get_running_loop().create_task(self._sign(self._signs))
            self._signing.add_done_callback(self.note_fault)

    async def _sign(self, letterhead: Letterhead) -> None:
        """Until all that is ready is signed. A claim that is let go of meanwhile is signed for nothing."""
        try:
            while (claim := next((one for one in self.ready if not _is_prepared(one)), None)) is not None:
                await asyncio.get_running_loop().run_in_executor(self._signing_thread, letterhead.prepare, claim)
                self.staff(time.monotonic())
        finally:
            self._signing = None

    def probe(self) -> None:
        """Find out whether the server lets anybody in, when there is no mail to find it out with."""
        if not self._openings:
            self._open(self._connect(probing=True))

    def idle(self, conversation: Conversation) -> None:
        """Remember a connection that waits for mail."""
        if self.is_closing:
            conversation.close_politely()
        else:
            self._idle.append(conversation)
            self.wake()

    def paused(self, reason: str) -> None:
        """Pause the route at once; connections that stand find out for themselves."""
        if not self.breaker.is_open:
            log.warning("smtp_trouble", "SMTP is in trouble: {reason}", reason=reason, route=self.route.name)
        if self.breaker.may_connect(time.monotonic()):  # else it is news of the same trouble
            self.breaker.trip(reason, time.monotonic())

    def session_full(self, _conversation: Conversation, messages: int | None) -> None:
        """Remember how many messages the server takes on one connection, once several in a row ended at that number."""
        if not messages:
            return
        self._limits_seen.append(messages)
        if len(self._limits_seen) < LIMIT_SEEN_MIN or len(set(self._limits_seen)) > 1:
            return
        self._limit_until = time.monotonic() + LIMIT_KEPT_S
        if messages == self.session_limit:
            return
        self.session_limit = messages
        log.info(
            "session_limit",
            "{route} takes {messages} messages on one connection",
            route=self.route.name,
            messages=messages,
        )
        for one in list(self.conversations):
            one.limit_to(messages)

    def refused(self, sender: str | None, reason: str) -> None:
        """Stop sending, since the server refuses the sender or this host; a probe finds out when that is over.

        Without a sender it refused this host before any mail.
        """
        now = time.monotonic()
        self.refusals += 1
        if sender is not None:
            self._refused_senders.add(sender)
        was_refused = self.breaker.refusals > 0
        if self.breaker.may_connect(now) or not was_refused:  # else it is news of the same refusal
            self.breaker.refuse(reason, now)
        if not was_refused:
            log.error(
                "route_refused",
                "SMTP is in trouble: {route} refuses this sender or host, so nothing is sent and nothing is lost: "
                "{reason}",
                route=self.route.name,
                reason=reason.removeprefix(f"{self.route.name}: "),
            )
        self.release_ready()
        for conversation in list(self.conversations):
            conversation.close_politely()

    def login_refused(self, trouble: LoginRefusedError) -> None:
        """Stop connecting for as long as the route does not try its login again; connections that stand go on."""
        is_new = trouble is not self._login_refused
        self._login_refused = trouble
        if is_new:
            self.refusals += 1
            log.error(
                "route_refused",
                "SMTP is in trouble: {route} refuses the login, so nothing is sent and nothing is lost: {reason}",
                route=self.route.name,
                reason=str(trouble).removeprefix(f"{self.route.name}: "),
            )
        now = time.monotonic()
        self.breaker.refuse_login(str(trouble), now, trouble.until - now, is_new=is_new)

    def hold(self, sender: str, reason: str) -> None:
        """Let the mail of one sender wait, since the server refuses it and takes that of others."""
        now = time.monotonic()
        self.refusals += 1
        hold = self.holds.get(sender)
        if hold is None:
            hold = self.holds[sender] = Hold(reason)
            log.error(
                "sender_refused",
                "{route} refuses mail from {sender}, which waits: {reason}",
                route=self.route.name,
                sender=sender,
                reason=reason,
            )
        if now >= hold.until:  # else it is news of the same refusal
            hold.reason = reason
            hold.refusals += 1
            hold.until = now + min(HOLD_FIRST_S * 2 ** (hold.refusals - 1), HOLD_MAX_S)
        waiting = [*self.ready]
        self.ready.clear()
        self.ready.extend(self._without_held(waiting))

    def accept_sender(self, sender: str) -> None:
        """Let the mail of a sender go again, since the server takes it."""
        self._refused_senders.clear()
        if self.holds.pop(sender, None) is not None:
            log.info("sender_accepted", "{route} takes mail from {sender} again", route=self.route.name, sender=sender)

    def _without_held(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims whose senders are not held back; the others are given back until then."""
        now = time.monotonic()
        free: list[Claim] = []
        for claim in claims:
            hold = self.holds.get(claim.sender)
            if hold is None or now >= hold.until:
                free.append(claim)
            else:
                claim.rest_s = hold.until - now
                self.put_off.append(claim)
                self.wake()
        return free

    def _probe_of(self, claims: list[Claim]) -> list[Claim]:
        """Return one claim to ask a server with that refused all; of a sender whom it did not refuse, if possible.

        If all of a full choice are of refused senders they are given back for a while, so that a backlog of one bad
        sender does not hide the mail of others.
        """
        unheard = [claim for claim in claims if claim.sender not in self._refused_senders]
        chosen = (unheard or claims)[:1] if not (self.ready or self.is_busy) else []
        for claim in claims:
            if claim not in chosen:
                claim.rest_s = PASSED_OVER_S if not unheard and len(claims) >= PROBES_MAX else 0.0
                (self.put_off if claim.rest_s else self.releases).append(claim)
                self.wake()
        return chosen

    def _is_refused(self, now: float) -> bool:
        """Return True while nothing may be begun on any connection, since the server refuses all of it."""
        return self.breaker.refusals > 0 and not self.breaker.may_connect(now)

    def forget(self, conversation: Conversation, trouble: str | None) -> None:
        """Let go of a connection that is over; several cut ones in a row pause the route."""
        self.conversations.discard(conversation)
        if conversation in self._idle:
            self._idle.remove(conversation)
        if trouble is not None:
            was_open = self.breaker.is_open
            self.breaker.cut(trouble, time.monotonic())
            if self.breaker.is_open and not was_open:
                log.warning("smtp_trouble", "SMTP is in trouble: {reason}", reason=trouble, route=self.route.name)
            log.info("connection_closed", "connection closed: {reason}", reason=trouble, route=self.route.name)

    def release_ready(self, *, keep: int = 0) -> None:
        """Give back what waits for a connection, but for the first few."""
        while len(self.ready) > keep:
            self.releases.append(self.ready.pop())
            self.wake()

    def drop_claims(self) -> None:
        """Forget the claims of a session that is gone; what is past its dot is waited for."""
        self.ready.clear()
        self.pace.forget()
        self.releases.clear()
        self.put_off.clear()
        self.undecided.clear()
        self.dropped.clear()
        for conversation in list(self.conversations):
            if conversation.ahead is not None:
                conversation.abandon("the session that claimed it is gone")

    def close_politely(self) -> None:
        """Take no more; connections finish what they have in hand."""
        self.is_closing = True
        self.release_ready()
        for conversation in list(self.conversations):
            conversation.close_politely()

    async def end(self) -> None:
        """Close everything now; what is past its dot and unanswered is in doubt from here on."""
        ending = [*self._openings, *([self._signing] if self._signing is not None else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self.checking_thread.shutdown(wait=False, cancel_futures=True)
        if self._signing_thread is not None:
            self._signing_thread.shutdown(wait=False, cancel_futures=True)
        for conversation in list(self.conversations):
            conversation.give_up("the relay was stopped while it waited for the reply to the final dot")

    async def watch_deadlines(self) -> None:
        """For ever: end what is silent for too long, and what has been idle for so long that the server soon will."""
        while True:
            slept_at = time.monotonic()
            await asyncio.sleep(DEADLINE_CHECK_S)
            if time.monotonic() - slept_at > 2 * DEADLINE_CHECK_S:  # this process was stopped: first read what came
                await asyncio.sleep(AFTER_STOP_S)
            now = time.monotonic()
            for conversation in list(self.conversations):
                conversation.check_deadline()
                if conversation.idle_since is not None and now - conversation.idle_since > self.settings.idle_s:
                    conversation.close_politely()
                    if conversation in self._idle:
                        self._idle.remove(conversation)

    def note_fault(self, task: asyncio.Task[None]) -> None:
        """Keep what a task of ours died of, for the relay."""
        if not task.cancelled() and task.exception() is not None:
            self.fault = task.exception()
            self.wake()

    def _is_stuck(self) -> bool:
        """Whether each connection that there may be hangs."""
        return len(self.conversations) >= self.connections_max and self.is_deaf

    @property
    def connections_max(self) -> int:
        """How many connections there may be: what the settings allow, or what the server does if that is less."""
        return min(self.settings.connections_max, self.connection_limit.found or self.settings.connections_max)

    def _is_shut_out(self, now: float) -> bool:
        """Return True if there is no connection and the server grants none at this moment."""
        return not (self.conversations or self._openings) and not self.connection_limit.may_open(0, now)

    def _may_open(self, now: float) -> bool:
        open_now = len(self.conversations) + len(self._openings)
        if open_now >= self.settings.connections_max or not self.connection_limit.may_open(open_now, now):
            return False
        return not self.breaker.is_open or (self.breaker.may_connect(now) and not self._openings)

    def _open(self, connecting: Coroutine[None, None, None]) -> None:
        opening = asyncio.get_running_loop().create_task(connecting)
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        opening.add_done_callback(self.note_fault)

    async def _connect(self, *, probing: bool = False) -> None:
        try:
            conversation, transport = await self.route.connect(self.desk)
        except RouteTroubleError as trouble:
            if isinstance(trouble, LoginRefusedError):
                self.login_refused(trouble)
            elif _is_limit(trouble):
                self._limit_connections(str(trouble), opening=1)
            elif _is_refusal(trouble) and not self.conversations:
                self.refused(None, str(trouble))
            else:
                self.paused(str(trouble))
            if not self.conversations:
                self.release_ready()
            self.wake()
            return
        if probing:
            self.breaker.succeed(time.monotonic())
        self.conversations.add(conversation)
        if self.session_limit is not None and time.monotonic() < self._limit_until:
            conversation.limit_to(self.session_limit)
        conversation.attach(transport)


def _is_refusal(trouble: RouteTroubleError) -> bool:
    """Return True if the server refuses this host, in its greeting or its reply to EHLO: a person must act."""
    return trouble.stage in (Stage.CONNECT, Stage.EHLO) and _about(trouble) is About.ROUTE


def _is_limit(trouble: RouteTroubleError) -> bool:
    """Return True if a connection was refused since there are too many, or were too many in a short time."""
    return trouble.code >= REFUSED_MIN and _about(trouble) in (About.CONNECTIONS, About.RATE)


def _about(trouble: RouteTroubleError) -> About:
    return classify(trouble.stage, trouble.code, trouble.text)


def _is_prepared(claim: Claim) -> bool:
    return claim.head is not None or claim.fault is not None


def _is_busy(conversation: Conversation) -> bool:
    return conversation.ahead is not None or conversation.handed_over is not None
