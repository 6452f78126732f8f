"""State of a route that the fleet shares: its circuit breaker, the rate that its server takes, and people's pauses.

A relay reads both with its ticks, reports what it has found out itself, and reserves its part of the rate.
"""

import time
from collections.abc import Callable

from outbox.log import Events
from outbox.relay.circuit_breaker import pause_login, pause_route, probe_route, resume_route
from outbox.relay.found_rate import Found
from outbox.relay.holds import Holds
from outbox.relay.pool import Pool
from outbox.relay.rate_limit import report_refusal, reserve
from outbox.relay.remaining import is_empty
from outbox.relay.session import Session
from outbox.relay.tick import RoutePause, TickResult
from outbox.relay.timers import Timers
from outbox.smtp.login import login_pause_s

log = Events("outbox.relay")


class RouteState:
    """Exchange with the fleet about the route of one relay."""

    def __init__(self, pool: Pool, holds: Holds, route: str, timers: Timers, wake: Callable[[], None]) -> None:
        self._pool = pool
        self._holds = holds
        self._server = pool.server
        self._route = route
        self._timers = timers
        self._wake = wake

    async def exchange(self, session: Session, now: float) -> None:
        """Report what the fleet has to know, and ask for the turn to probe and for a part of the rate.

        A relay that stops asks for neither. While a person pauses the fleet, no probe is wanted.
        """
        breaker, is_stopping = self._server.breaker, self._timers.is_stopping
        if breaker.news is not None or breaker.wants_probe(now):
            await self._exchange_breaker(session, now, may_probe=not (is_stopping or self._holds.holds_fleet))
        if self._server.limiter.refused is not None:
            await self._report_refusal(session)
        if not is_stopping:
            await self._reserve(session, now)

    def adopt(self, done: TickResult, now: float) -> bool:
        """Take over what a tick has read of the fleet; return True if a person has paused something since the last."""
        self._adopt_pause(done.pause, now)
        self._adopt_rate(done.found)
        change = self._holds.adopt(done.held)
        if change.has_ended:  # what was set aside is resumed with the next sweep
            self._timers.poll_now()
            self._timers.expire_now()
            self._wake()
        return change.has_begun

    def _adopt_pause(self, pause: RoutePause | None, now: float) -> None:
        """Take over what the fleet knows of the route's breaker."""
        breaker, name = self._server.breaker, self._server.name
        was_open = breaker.is_open
        breaker.adopt(*((pause.reason, pause.wait_s, now, pause.logins) if pause else (None, 0.0, now)))
        if breaker.login_refused and self._has_another_login(pause):
            breaker.insist(now)
        if pause is not None and not was_open:
            log.warning(
                "route_paused", "the fleet's route to {route} is paused: {reason}", route=name, reason=pause.reason
            )
            self._server.undo(self._server.judge.dead_of_pause(pause.reason, now))
        elif was_open and not breaker.is_open:
            log.info("route_resumed", "the fleet's route to {route} works again", route=name)
            self._timers.poll_now()
            self._wake()

    def _adopt_rate(self, found: Found | None) -> None:
        """Take over what the fleet knows of the rate that the server takes."""
        limiter, before = self._server.limiter, self._server.limiter.found
        if found is None and before is None and limiter.found_per_s is None:
            return  # as mostly
        is_news = limiter.adopt(found)
        if is_news:
            self._pool.release_ready(keep=limiter.share)
            log.warning(
                "rate_found",
                "{route} takes about {rate:.3g} emails a second, and the fleet sends at that rate: {reply}",
                rate=limiter.found_per_s,
                reply=limiter.found.said if limiter.found is not None else "",
                route=self._server.name,
            )
        elif before is not None and limiter.found is None and limiter.refused is None:
            log.info("rate_forgotten", "{route} has no rate limit any more", route=self._server.name)
            self._wake()

    async def probe_without_mail(self, session: Session) -> None:
        """Probe the server if it is this relay's turn and there is no mail, not even postponed mail, to do it with."""
        breaker = self._server.breaker
        if not (breaker.probing and self._pool.facts.is_empty):
            return
        if await is_empty(session.connection, route=self._route, within_s=2 * self._server.pause_max_s):
            self._pool.probe()
        else:
            breaker.leave_probe()

    async def _exchange_breaker(self, session: Session, now: float, *, may_probe: bool) -> None:
        """Tell the fleet that the server is in trouble, or works; or ask for the turn to find out."""
        breaker, name = self._server.breaker, self._server.name
        news = breaker.take_news()
        if news == "pause":
            await pause_route(session.connection, session.relay, name, breaker.reason)
            self._timers.pulse_now()  # the next tick reads how long
        elif news == "login":
            await pause_login(session.connection, session.relay, name, breaker.reason)
            self._timers.pulse_now()
        elif news == "resume":
            await resume_route(session.connection, session.relay, name)
        elif may_probe and self._pool.facts.is_unresponsive:
            insists = breaker.take_insistence()
            is_granted = await probe_route(session.connection, session.relay, name, insists=insists)
            breaker.begin_probe(now, is_granted=is_granted)
            if is_granted:
                self._timers.poll_now()

    def _has_another_login(self, pause: RoutePause | None) -> bool:
        """Return True if the login may be another one than the one that was refused, so that it is worth a try."""
        login = self._pool.connector.login
        if pause is not None and pause.logins:
            refused_s = login_pause_s(pause.logins) - pause.wait_s
            if login.is_newer_than_refusal(refused_s):
                return True
        return login.has_new_login()

    async def _report_refusal(self, session: Session) -> None:
        """Report to the fleet that the server refused by rate, and take over the rate that it agrees on."""
        limiter = self._server.limiter
        refused = limiter.refused
        assert refused is not None
        self._pool.release_ready(keep=limiter.share)
        is_written, found = await report_refusal(session.connection, self._server.name, refused.as_of(time.monotonic()))
        if not is_written:
            self._wake()
        elif limiter.note_reported(refused):  # else there was another one meanwhile
            self._adopt_rate(found)

    async def _reserve(self, session: Session, now: float) -> None:
        """Reserve moments in the fleet's rate for what waits here."""
        limiter = self._server.limiter
        wanted = limiter.wants(len(self._pool.ready), now)
        if not wanted:
            return
        asked_at = time.monotonic()
        grant = await reserve(
            session.connection,
            self._server.name,
            wanted,
            rate_per_s=limiter.rate_per_s,
            daily_max=limiter.daily_max,
            unused=limiter.unused,
        )
        if grant.used_up and limiter.used_up is None:
            log.warning("day_used_up", "nothing more is sent for now: daily_max is reached")
        limiter.grant(grant, asked_at, time.monotonic())
        self._adopt_rate(grant.found)
