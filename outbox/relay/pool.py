"""Claims of one relay on their way through its connections.

The pool owns the connections (`connection_owner.ConnectionOwner`): it gives them ready tries, and decides about those
that come back. It knows nothing of Postgres: what it does not send waits in `returns` for the relay's next turn, marks
are asked of `marks`, and verdicts go to `verdicts`.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from outbox.log import Events
from outbox.relay.connections import Connections
from outbox.relay.in_flight import InFlight
from outbox.relay.marks import Marks
from outbox.relay.pool_facts import PoolFacts
from outbox.relay.ready_queue import ReadyQueue
from outbox.relay.refusals import Ruling
from outbox.relay.returns import Returns
from outbox.relay.server_state import ServerState
from outbox.relay.verdicts import Verdicts
from outbox.settings import Settings
from outbox.smtp.connection import SmtpConnection
from outbox.smtp.connector import Connector
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.refusal import About, Refusal
from outbox.smtp.route_trouble import LoginRefusedError, RouteTroubleError
from outbox.smtp.verdict import Accepted, Deferred, Verdict, Withdrawn

log = Events("outbox.relay")

HOLD_S: Final = 5.0  # a claim that can be sent within this time after a refusal is not given back
CUTS_MAX: Final = 2  # a try that so many connections cut is withdrawn


class Pool:
    """Connections of one relay, and the tries that wait for them. All state is touched on the event loop's thread only.

    `is_held` returns True while the session that claimed an email is held; `wake` brings the relay's next turn.
    """

    def __init__(
        self,
        connector: Connector,
        server: ServerState,
        marks: Marks,
        verdicts: Verdicts,
        *,
        settings: Settings,
        is_held: Callable[[OutgoingEmail], bool],
        wake: Callable[[], None],
    ) -> None:
        self.connector = connector
        self.server = server
        self.marks = marks
        self.verdicts = verdicts
        self.settings = settings
        self._connections = Connections(
            connector, self, server, settings, on_trouble=self._on_trouble, on_done=self._note_crash
        )
        self.ready = ReadyQueue(
            connector.headers, on_signed=lambda: self.dispatch_ready(time.monotonic()), on_done=self._note_crash
        )
        self.returns = Returns()
        self.facts = PoolFacts(self._connections, self.ready, server, batch_max=settings.batch_max)
        self.in_flight = InFlight(self._connections, self.ready, self.returns, marks, verdicts)
        self.is_closing = False
        self.crash: BaseException | None = None
        """Error of a task of ours: the relay ends loudly rather than go on without connections or deadlines."""
        self._is_paused_by_person = False
        self._is_held = is_held
        self._wake = wake

    def note_pauses(self, *, is_any: bool) -> None:
        """Note if a person pauses anything.

        Then an email that comes back unsent is released: its next claim sets it aside if the pause is for it.
        """
        self._is_paused_by_person = is_any

    def probe(self) -> None:
        """Find out if the server lets a client in, when there is no mail to find it out with."""
        self._connections.probe()

    def add(self, tries: Sequence[Try]) -> None:
        """Let tries wait for connections, but for those of senders that are held back.

        While the server refuses all, one of them is kept to ask it with.
        """
        self.ready.add(self._without_held(tries))
        if tries and self.server.limiter.is_bounded:
            self._wake()  # moments are asked for in the relay's next turn

    def dispatch_ready(self, now: float) -> None:
        """Give ready tries to idle connections, and open more for the rest."""
        breaker, limiter, connections = self.server.breaker, self.server.limiter, self._connections
        is_refused = breaker.refuses_all(now)
        while self.ready.has_next and connections.idle and not is_refused and limiter.may_start(now):
            connections.start(self.ready.pop(now))
        is_shut = breaker.is_open and not connections and not breaker.may_connect(now)
        if is_shut or is_refused or connections.is_stuck or connections.is_shut_out(now):  # others may do better
            self.release_ready()
            return
        if limiter.is_used_up(now):  # what has its moment is counted for the day, and is still sent
            self.release_ready(keep=limiter.held)
        connections.open(len(self.ready), now)

    def release(self, emails: Collection[OutgoingEmail]) -> None:
        """Give emails back, for any relay."""
        for outgoing in emails:
            self.returns.release(outgoing)
        if emails:
            self._wake()

    def release_ready(self, *, keep: int = 0) -> None:
        """Give back what waits for a connection, but for the first few."""
        while len(self.ready) > keep:
            self.returns.release(self.ready.pop_last().outgoing)
            self._wake()

    def drop_session(self) -> None:
        """Forget the tries of a session that is gone; those past their dot are waited for."""
        self.marks.clear()
        self.ready.take_all()
        self.server.limiter.forget()
        self.returns.clear()
        self.verdicts.forget_undecided()
        self._connections.abandon_unsent("the session that claimed it is gone")

    def _without_held(self, tries: Sequence[Try]) -> Sequence[Try]:
        """Return the tries that may be sent; give the others back, until then or for any relay."""
        server = self.server
        if not (server.senders or server.breaker.refusals):
            return tries
        sorted_out = server.senders.sort_out(tries, time.monotonic())
        if server.breaker.refusals:
            is_free = not (self.ready or self._connections.is_busy)
            sorted_out = server.senders.choose_probe(sorted_out, is_free=is_free)
        for tried, rest_s in sorted_out.held:
            self.returns.hold(tried.outgoing, rest_s)
        for tried in sorted_out.released:
            self.returns.release(tried.outgoing)
        if sorted_out.held or sorted_out.released:
            self._wake()
        return sorted_out.free

    def take(self) -> Try | None:
        """Return the next try for a connection that can start it now."""
        now, ready, server = time.monotonic(), self.ready, self.server
        if (
            self.is_closing
            or not ready.has_next
            or server.breaker.refuses_all(now)
            or not server.limiter.may_start(now)
        ):
            return None
        if len(ready) <= len(self._connections):
            self._wake()  # running low: ask for more before a connection goes idle
        return ready.pop(now)

    def ask_mark(self, connection: SmtpConnection, tried: Try) -> None:
        """Put the try into the next tick's marks."""
        self.marks.ask(connection, tried)
        self._wake()

    def on_verdict(self, tried: Try, verdict: Verdict, *, of_the_route: bool = False) -> None:
        """Settle the try."""
        if isinstance(verdict, Accepted):
            self.verdicts.on_verdict(tried, verdict)
            if self.server.connection_limit.found is not None:
                self.server.connection_limit.note_working(self._connections.working, time.monotonic())
        else:
            may_wait = isinstance(verdict, Deferred) and self._may_wait(tried)
            self.verdicts.on_verdict(tried, verdict, may_wait=may_wait, of_the_route=of_the_route)

    def on_refusal(self, connection: SmtpConnection, tried: Try, refusal: Refusal, about: About) -> None:
        """Act on what a refusal shows of the server; only what is about the email costs it anything."""
        is_limit = about in (About.RATE, About.CONNECTIONS, About.SESSION)
        if is_limit and refusal.follows_recipient and self.server.replies.is_own_limit(tried.outgoing.email):
            self.on_verdict(tried, refusal.verdict)
            return
        match about:
            case About.UNCLEAR | About.RELAYING | About.ROUTE:
                self._rule(tried, refusal)
                return
            case About.RATE:
                self.server.on_rate_limit(refusal.reply, connection.began_at)
                self.release_ready(keep=self.server.limiter.share)
            case About.CONNECTIONS:
                connection.close_politely()
                self._limit_connections(refusal.reply)
            case About.SESSION:
                connection.close_politely()
                self._connections.limit_session(connection.history.limit_shown_by(refusal))
            case _:  # the server closes, which is no news of the email
                pass
        if tried.marked:
            self.on_verdict(tried, Withdrawn(refusal.reply))
        else:
            self._requeue(tried, refusal.reply)

    def return_unsent(self, tried: Try, reason: str) -> None:
        """Keep the try for another connection; one that meets only cut connections is withdrawn."""
        if not self._is_held(tried.outgoing):
            return
        tried.note_cut()
        if self.server.breaker.is_open:  # no message is to blame while the server is away; another may find out more
            self.returns.rest(tried.outgoing)
        elif tried.cuts >= CUTS_MAX:
            self.verdicts.on_cut(tried, reason)
        elif self.is_closing or self._is_paused_by_person:
            self.returns.release(tried.outgoing)
        else:
            self.ready.put_first(tried)
        self._wake()

    def idle(self, connection: SmtpConnection) -> None:
        """Remember a connection that waits for mail."""
        if self.is_closing:
            connection.close_politely()
        else:
            self._connections.note_idle(connection)
            self._wake()

    def paused(self, reason: str) -> None:
        """Pause the route at once."""
        self.server.pause(reason)

    def closed(self, connection: SmtpConnection, trouble: str | None) -> None:
        """Forget a connection, and take back the mark that it may have asked for."""
        self._connections.forget(connection)
        if trouble is not None:
            self.server.on_cut(trouble)
        for tried in self.marks.retract(connection):
            self.return_unsent(tried, trouble or "the connection was lost before the mark")
        self._wake()

    def _may_wait(self, tried: Try) -> bool:
        """Return True if other tries will soon show whether the deferral of this one is its own.

        What is marked is settled at once: if this relay died, its sending would be in doubt.
        """
        return not (tried.marked or self.is_closing) and (bool(self.ready) or self._connections.is_busy)

    def _requeue(self, tried: Try, reason: str) -> None:
        """Keep the try for another connection, or for any relay if it cannot be sent soon. It does not count."""
        if not self._is_held(tried.outgoing):
            return
        log.debug(
            "email_requeued", "{key} waits for another connection: {reason}", key=tried.outgoing.key, reason=reason
        )
        self.server.note_reply(reason)
        if self.is_closing or self._is_paused_by_person:
            self.returns.release(tried.outgoing)
        elif self._may_keep(time.monotonic()):
            self.ready.put_first(tried)
        else:
            self.returns.rest(tried.outgoing)
        self._wake()

    def _may_keep(self, now: float) -> bool:
        """Return True if one more try can be sent soon, so that it need not be given back."""
        limiter = self.server.limiter
        if self.is_closing or self.server.breaker.is_open or limiter.refused is not None:
            return False
        return len(self.ready) < limiter.share and limiter.next_at(now) - now < HOLD_S

    def _rule(self, tried: Try, refusal: Refusal) -> None:
        """Settle a try by a refusal that may be about the route, and hold back what waits if it is."""
        ruling = self.server.rule(tried, refusal)
        if ruling is Ruling.EMAIL:
            self.on_verdict(tried, refusal.verdict, of_the_route=True)
            return
        if ruling is Ruling.SENDER:
            self.ready.add(self._without_held(self.ready.take_all()))
        elif ruling is Ruling.ROUTE:
            self._stop_sending()
        self.on_verdict(tried, Withdrawn(refusal.reply))

    def _stop_sending(self) -> None:
        """Give back what waits, and send nothing on the connections that stand: the server refuses all of it."""
        self.release_ready()
        self._connections.close_politely()

    def _limit_connections(self, reason: str, *, opening: int = 0) -> None:
        """Accept that the server refused a connection. `opening` is 1 if it was being opened, else 0."""
        retry_s = self._connections.limit(reason, opening=opening)
        if retry_s is None:
            return
        asyncio.get_running_loop().call_later(retry_s, self._wake)
        if self._connections.is_shut_out(time.monotonic()):
            self.release_ready()
        self._wake()

    def close_politely(self) -> None:
        """Take no more; connections finish what they have in flight."""
        self.is_closing = True
        self._stop_sending()

    async def end(self) -> None:
        """Close everything now; what is past its dot and unanswered is in doubt from here on."""
        await self.ready.end()
        await self._connections.end()

    def watch_deadlines(self) -> asyncio.Task[None]:
        """Start to end connections that are silent or idle for too long; return the task, for the end to cancel."""
        watch = asyncio.get_running_loop().create_task(self._connections.watch_deadlines())
        watch.add_done_callback(self._note_crash)
        return watch

    def _note_crash(self, task: asyncio.Task[None]) -> None:
        """Keep the error that a task of ours ended with, for the relay."""
        if not task.cancelled() and task.exception() is not None:
            self.crash = task.exception()
            self._wake()

    def _on_trouble(self, trouble: RouteTroubleError) -> None:
        """Act on a connection that could not be opened."""
        if isinstance(trouble, LoginRefusedError):
            self.server.refuse_login(trouble)
        elif trouble.is_limit:
            self._limit_connections(str(trouble), opening=1)
        elif trouble.is_refusal and not self._connections:
            self.server.refuse_route(None, str(trouble))
            self._stop_sending()
        else:
            self.server.pause(str(trouble))
        if not self._connections:
            self.release_ready()
        self._wake()
