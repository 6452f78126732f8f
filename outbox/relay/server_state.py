"""Knowledge of one relay about its mail server: trouble, refusals, and the limits found from its replies.

The rules are pure and have modules of their own (`circuit_breaker`, `rate_limit`, `found_rate`, `recent_replies`,
`connection_limits`, `refusals`, `sender_holds`); here a reply reaches those that it concerns, with the log line for it.
Nothing here opens a connection or knows which emails wait.
"""

import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from outbox.log import Events
from outbox.relay.circuit_breaker import PAUSE_MAX_S, REFUSALS_MAX, REFUSED_PAUSE_MAX_S, Breaker
from outbox.relay.connection_limits import ConnectionLimit, SessionLimit
from outbox.relay.meter import Meter
from outbox.relay.rate_limit import RateLimiter, RefusedTry
from outbox.relay.recent_replies import RECIPIENTS_MIN, Judgement, RecentReplies
from outbox.relay.refusals import DeadLetter, RefusalJudge, Ruling
from outbox.relay.sender_holds import SenderHolds
from outbox.settings import Settings
from outbox.smtp.outgoing import Try
from outbox.smtp.refusal import Refusal
from outbox.smtp.reply_class import is_server_trouble, names_recipient
from outbox.smtp.route_trouble import LoginRefusedError

log = Events("outbox.relay")

BLOCKED_S: Final = 4.0  # a rate limit that stops all sending for so long is reported as trouble
DEFERS_ALL_S: Final = 30.0  # a reply to all recipients is shown for at least so long, if nothing is accepted
OTHERS_SEND_S: Final = 10.0  # after another relay's latest email, as far as sweeps show
REFUSED_FOR_S: Final = 10.0  # nothing was accepted for so long while a sender is refused: `until_empty` gives up
QUOTA: Final = re.compile(r"\bquota\b|\b(dai|hour)ly\b", re.IGNORECASE)


class ServerState:
    """State of the mail server of a route, as one relay sees it. `name` is the route's."""

    def __init__(self, name: str, settings: Settings, *, wake: Callable[[], None]) -> None:
        self.name = name
        self.settings = settings
        self.breaker = Breaker()
        self.limiter = RateLimiter(settings.rate_per_s, settings.daily_max)
        self.connection_limit = ConnectionLimit()
        self.session_limit = SessionLimit()
        self.replies = RecentReplies()
        self.senders = SenderHolds()
        self.judge = RefusalJudge()
        self.undone: list[DeadLetter] = []
        """Dead letters that are to be put back: the refusal was not about them."""
        self.throttles = 0
        """Number of replies that limited the rate or the connections."""
        self.refusals = 0
        """Number of replies that were about the sender or this host."""
        self.last_reply: str | None = None
        self._wake = wake
        self._deferring: tuple[str, float] | None = None  # the reply to all recipients, and until when it is believed
        self._limited_in_a_row = 0  # replies that limited the rate since the server took an email
        self._taken = Meter()
        self._accepted_started_at: float | None = None
        self._sent_by_others: int | None = None
        self._others_sent_at: float | None = None
        self._is_paused_by_limit = False
        self._login_refused: LoginRefusedError | None = None

    @property
    def pause_max_s(self) -> float:
        """Return how long a pause of the route may last, in seconds."""
        return REFUSED_PAUSE_MAX_S if self.breaker.refusals else PAUSE_MAX_S

    def note_reply(self, reply: str) -> None:
        """Keep the latest reply, or the reason of a try that had none, for those who look."""
        self.last_reply = reply

    def on_accepted(self, tried: Try, now: float) -> None:
        """Note that the server took an email."""
        sender = tried.outgoing.sender
        was_refused = self.breaker.refusals
        self.breaker.succeed(now)
        self.judge.accepted(sender, now)
        if (self.senders or was_refused) and self.senders.accept(sender):
            log.info("sender_accepted", "{route} takes mail from {sender} again", route=self.name, sender=sender)
        self._taken.note(now)
        self._deferring = None
        self._limited_in_a_row = 0
        self.replies.note_accepted(tried.outgoing.recipient, now)
        self._accepted_started_at = max(self._accepted_started_at or tried.started_at, tried.started_at)

    def on_judged(self, *, of_the_route: bool) -> None:
        """Note that the server deferred or refused one email; `of_the_route`: its reply might have been about all."""
        self.breaker.succeed(time.monotonic(), took_mail=False)
        if not of_the_route:
            self.judge.judged_otherwise()

    def note_deferral(self, tried: Try, reply: str) -> bool:
        """Note a deferral; return True if it is known already whether it is a try of this email."""
        now, recipient = time.monotonic(), tried.outgoing.recipient
        self.replies.note_deferred(recipient, reply, now, tries=tried.counted)
        return self.replies.is_common(recipient, reply, now)

    def judge_deferral(self, tried: Try, reply: str) -> Judgement:
        """Judge whether a deferral is a try of this email, and slow down if most recipients get the same."""
        now = time.monotonic()
        names = names_recipient(reply)
        judgement = self.replies.judge(
            tried.outgoing.email,
            tried.outgoing.recipient,
            reply,
            now,
            tries=tried.counted,
            known=self.limiter.found.said if self.limiter.found is not None else "",
            names_recipient=names,
        )
        if judgement.is_of_the_rate:
            self._refuse_rate(reply, tried.started_at, is_supposed=True)
            if not self.replies.accepts(now):
                lasts_s = 2 * DEFERS_ALL_S if names else self._believed_s
                self._deferring = (reply, now + lasts_s)
        return judgement

    def on_rate_limit(self, reply: str, started_at: float) -> None:
        """Send more slowly, since the rate was the reason against a try of that time. A used-up quota pauses, too."""
        self._refuse_rate(reply, started_at)
        self._limited_in_a_row += 1
        now = time.monotonic()
        if self._limited_in_a_row >= RECIPIENTS_MIN and not self.replies.accepts(now) and is_server_trouble(reply):
            self._deferring = (reply, now + self._believed_s)
        if QUOTA.search(reply):
            self.pause(reply)

    @property
    def _believed_s(self) -> float:
        """Return for how long a reply to all is believed: for as long as the longest pause of an email."""
        return max(2 * DEFERS_ALL_S, self.settings.retry.max_s)

    def _refuse_rate(self, reply: str, started_at: float, *, is_supposed: bool = False) -> None:
        """Start no email until the fleet has agreed on a lower rate."""
        self.throttles += 1
        now = time.monotonic()
        fleet_rate = self._taken.per_s(now) * self.limiter.alive
        accepts = self.replies.accepts(now)
        self.limiter.refuse(RefusedTry(reply, started_at, self._accepted_started_at, fleet_rate, is_supposed, accepts))
        self._wake()

    def on_session_limit(self, messages: int) -> bool:
        """Note after how many messages the server closed a connection; return True if that shows a new limit."""
        if not messages or not self.session_limit.note(messages, time.monotonic()):
            return False
        log.info(
            "session_limit", "{route} takes {messages} messages on one connection", route=self.name, messages=messages
        )
        return True

    def on_connection_limit(self, reply: str, *, working: int, are_opening: bool) -> bool:
        """Do with fewer connections, or, if the server grants none at all, take it for broken and return False.

        `working` connections are open and stay so; `are_opening`: others than the refused one are being opened.
        """
        now = time.monotonic()
        is_working = working > 0 or self._others_send(now)
        if not (is_working or are_opening):
            self.connection_limit = ConnectionLimit()
            self._is_paused_by_limit = True
            self.pause(reply)
            return False
        if is_working:  # one that is only being opened proves nothing
            self._end_pause_by_limit()
        self.throttles += 1
        if self.connection_limit.found is None:
            log.warning(
                "connections_limited",
                "the mail server takes only so many connections: {reason}",
                reason=reply,
                route=self.name,
            )
        self.connection_limit.refuse(working, reply, now)
        return True

    def note_others(self, sent: int, now: float, *, is_connected: bool) -> None:
        """Note how many emails the other relays of the route have sent, as of a sweep."""
        if self._sent_by_others is not None and sent > self._sent_by_others:
            self._others_sent_at = now
        self._sent_by_others = sent
        if self._others_send(now):
            self._end_pause_by_limit()
        elif not is_connected:
            self.connection_limit.hurry(now)  # those that had the connections are gone

    def _others_send(self, now: float) -> bool:
        """Return True if the server works for other relays, so that it has only no connection left for this one."""
        return self._others_sent_at is not None and now - self._others_sent_at < OTHERS_SEND_S

    def _end_pause_by_limit(self) -> None:
        """Let the fleet go on if this relay paused the route, and the server only has no connection left for it."""
        if self._is_paused_by_limit:
            self._is_paused_by_limit = False
            self.breaker.works_for_others()
            self._wake()

    def pause(self, reason: str) -> None:
        """Pause the route at once; connections that stand find out for themselves."""
        now = time.monotonic()
        if not self.breaker.is_open:
            log.warning("smtp_trouble", "SMTP is in trouble: {reason}", reason=reason, route=self.name)
        if self.breaker.may_connect(now):  # else the breaker counts one trouble twice
            self.breaker.trip(reason, now)

    def on_cut(self, trouble: str) -> None:
        """Note that a connection ended in the middle of a dialogue; several in a row pause the route."""
        was_open = self.breaker.is_open
        self.breaker.cut(trouble, time.monotonic())
        if self.breaker.is_open and not was_open:
            log.warning("smtp_trouble", "SMTP is in trouble: {reason}", reason=trouble, route=self.name)
        log.info("connection_closed", "connection closed: {reason}", reason=trouble, route=self.name)

    def rule(self, tried: Try, refusal: Refusal) -> Ruling:
        """Decide about a refusal that may be about the sender or this host, and act on what it shows of the server."""
        now, outgoing = time.monotonic(), tried.outgoing
        ruling = self.judge.rule(refusal, outgoing.sender, outgoing.recipient, now)
        match ruling:
            case Ruling.EMAIL:
                if refusal.is_permanent:
                    self.judge.note_dead(refusal, outgoing.email, outgoing.key, tried.number, now)
                return ruling
            case Ruling.SPARE:
                log.warning(
                    "email_not_understood",
                    "{key}: the server did not understand a command and takes other mail, so this email waits: {reply}",
                    key=outgoing.key,
                    email=outgoing.email,
                    attempt=tried.attempt,
                    relay=outgoing.relay,
                    reply=refusal.reply,
                )
                return ruling
            case Ruling.SENDER:
                self.hold_sender(outgoing.sender, refusal.reply)
            case Ruling.ROUTE:
                self.refuse_route(outgoing.sender, refusal.reply)
        self.undo(self.judge.dead_of_route(refusal, now))
        return ruling

    def hold_sender(self, sender: str, reason: str) -> None:
        """Let the mail of one sender wait, since the server refuses it and takes that of others."""
        self.refusals += 1
        if self.senders.refuse(sender, reason, time.monotonic()):
            log.error(
                "sender_refused",
                "{route} refuses mail from {sender}, which waits: {reason}",
                route=self.name,
                sender=sender,
                reason=reason,
            )

    def refuse_route(self, sender: str | None, reason: str) -> None:
        """Stop sending, since the server refuses the sender or this host; a probe finds out when that is over.

        Without a sender it refused this host before any mail.
        """
        now = time.monotonic()
        self.refusals += 1
        if sender is not None:
            self.senders.note_route_refusal(sender)
        was_refused = self.breaker.refusals > 0
        if self.breaker.may_connect(now) or not was_refused:  # else the breaker counts one refusal twice
            self.breaker.refuse(reason, now)
        if not was_refused:
            log.error(
                "route_refused",
                "SMTP is in trouble: {route} refuses this sender or host, so nothing is sent and nothing is lost: "
                "{reason}",
                route=self.name,
                reason=reason.removeprefix(f"{self.name}: "),
            )

    def refuse_login(self, trouble: LoginRefusedError) -> None:
        """Stop connecting for as long as the route does not try its login again; connections that stand go on."""
        is_new = trouble is not self._login_refused
        self._login_refused = trouble
        if is_new:
            self.refusals += 1
            log.error(
                "route_refused",
                "SMTP is in trouble: {route} refuses the login, so nothing is sent and nothing is lost: {reason}",
                route=self.name,
                reason=str(trouble).removeprefix(f"{self.name}: "),
            )
        now = time.monotonic()
        self.breaker.refuse_login(str(trouble), now, trouble.until - now, is_new=is_new)

    def undo(self, letters: Sequence[DeadLetter]) -> None:
        """Have dead letters put back, since the refusal was not about them."""
        self.undone += letters

    def take_undone(self, *, without: Collection[int]) -> list[DeadLetter]:
        """Return the dead letters that are to be put back, and forget them; but for those of these emails."""
        letters = [one for one in self.undone if one.email not in without]
        self.undone = [one for one in self.undone if one.email in without]
        return letters

    def refused_for_good(self, now: float, *, has_other_mail: bool) -> str | None:
        """Return the refusal of the sender or this host with which the server goes on: a person must act.

        That of one sender counts only if there is no other mail, and the server has taken none for a while.
        """
        if self.breaker.is_refused:
            return self.breaker.reason
        if has_other_mail or now - self.judge.accepted_at <= REFUSED_FOR_S:
            return None
        return next((reason for _, reason in self.senders.reasons(refusals_min=REFUSALS_MAX)), None)

    def deferring(self) -> str | None:
        """Return why the mail server is in trouble although it answers: different recipients get the same deferral.

        It holds until the server takes an email, or has not deferred one for as long as the longest pause of an email.
        """
        if self._deferring is None or time.monotonic() >= self._deferring[1]:
            return None
        return f"SMTP: the mail server defers every email: {self._deferring[0]}"

    def limits(self, now: float, *, is_connected: bool) -> str | None:
        """Return which limit keeps mail from going out: of senders, of the day, of the rate or of connections."""
        held = next((f"SMTP refuses mail from {sender}: {reason}" for sender, reason in self.senders.reasons()), None)
        if held is not None:
            return held
        if self.limiter.is_used_up(now):
            return f"SMTP: {self.limiter.used_up}"
        if (deferring := self.deferring()) is not None:
            return deferring
        found, limit = self.limiter.found, self.connection_limit
        if found is not None and found.silence_s >= BLOCKED_S and found.sending_s <= 0:
            return f"SMTP: the mail server takes no more for now, by its rate limit: {found.said}"
        if limit.found is not None and not is_connected and limit.retry_at > now:
            return f"SMTP: the mail server takes no more connections: {limit.said}"
        return None
