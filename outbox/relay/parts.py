"""Parts of a relay, and their connections with each other.

`Relay` takes its turns with them. Each of the others gets only what it uses.
"""

import time
from collections import Counter
from collections.abc import Sequence

from outbox.log import Events
from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.claim_intake import ClaimIntake
from outbox.relay.claim_trigger import ClaimTrigger
from outbox.relay.holds import Holds
from outbox.relay.maintenance import Maintenance
from outbox.relay.marks import Marks
from outbox.relay.memory_budget import Budget
from outbox.relay.message_fetch import MessageFetch
from outbox.relay.observer import Observer
from outbox.relay.pool import Pool
from outbox.relay.reassertion import Reassertion
from outbox.relay.resolver import ResolverRunner, load_resolver
from outbox.relay.route_state import RouteState
from outbox.relay.server_state import ServerState
from outbox.relay.session import Session, SessionEvents
from outbox.relay.session_keeper import SessionKeeper
from outbox.relay.suspects import SuspectRule
from outbox.relay.tick_runner import TickRunner
from outbox.relay.ticker import Ticker
from outbox.relay.timers import Timers
from outbox.relay.verdict_history import VerdictHistory
from outbox.relay.verdicts import Verdicts
from outbox.relay.wake_up import WakeUp
from outbox.settings import Settings
from outbox.smtp.connector import Connector
from outbox.smtp.outgoing import OutgoingEmail

log = Events("outbox.relay")


class RelayParts:
    """Parts of the relay of one route. `budget` and `suspects` are shared by the relays of a process."""

    def __init__(
        self,
        settings: Settings,
        route: str,
        observers: Sequence[Observer],
        *,
        budget: Budget | None = None,
        suspects: SuspectRule | None = None,
    ) -> None:
        self.settings = settings
        self.route = route
        self.observers = observers
        self.counts: Counter[str] = Counter()
        self.wake = WakeUp()
        self.timers = Timers(poll_max_s=settings.poll_max_s, lease_s=settings.lease_s)
        self.history = VerdictHistory()
        self.barrier = BarrierWatch(settings, self.history)
        self._connect_server()
        budget = budget or Budget.of(settings.message_bytes_max)
        self.share = budget.share(self.pool.in_flight.large_bytes, self.wake.set)
        self.holds = Holds(self.pool, self.counts)
        self.trigger = ClaimTrigger(
            self.timers, self.wake.set, is_blocked=lambda: self.server.breaker.is_open or self.holds.holds_any
        )
        self._connect_sessions()
        self._connect_claims(suspects or SuspectRule())
        self.route_state = RouteState(self.pool, self.holds, route, self.timers, self.wake.set)
        self.maintenance = Maintenance(
            settings,
            route,
            pool=self.pool,
            barrier=self.barrier,
            timers=self.timers,
            counts=self.counts,
            resolver=self._resolver(),
        )
        self._connect_ticker()

    def _connect_server(self) -> None:
        """Connect what sends emails: connections, marks, verdicts, and the state of the mail server."""
        settings = self.settings
        assert settings.smtp_url is not None
        connector = Connector.of(settings.smtp_url, settings, named=self.route)
        self.server = ServerState(connector.name, settings, wake=self.wake.set)
        self.verdicts = Verdicts(
            settings,
            self.server,
            self.history,
            counts=self.counts,
            observers=self.observers,
            on_settlement=self._on_settlement,
        )
        self.marks = Marks(self.verdicts, is_held=self._is_held)
        self.pool = Pool(
            connector,
            self.server,
            self.marks,
            self.verdicts,
            settings=settings,
            is_held=self._is_held,
            wake=self.wake.set,
        )

    def _connect_sessions(self) -> None:
        """Connect the Postgres session with those that begin and end with it."""
        events = SessionEvents(
            self.trigger.on_notification, self._on_relays, self.barrier.note_answer, self._on_lost_session
        )
        self.sessions = SessionKeeper(
            self.settings,
            self.route,
            barrier=self.barrier,
            share=self.share,
            events=events,
            on_opened=self._on_session,
        )
        self.reassertion = Reassertion(
            self.history, self.sessions.patience, route=self.route, instance=self.barrier.instance
        )

    def _connect_claims(self, suspects: SuspectRule) -> None:
        """Connect what decides about claims."""
        messages = MessageFetch(self.pool, self.holds, self.share, self.sessions.patience)
        self.intake = ClaimIntake(
            self.pool,
            self.holds,
            self.share,
            self.timers,
            self.barrier,
            messages=messages,
            suspects=suspects,
        )

    def _connect_ticker(self) -> None:
        """Connect what a tick takes along, and what follows from it."""
        assert self.settings.database_url is not None
        self.ticker = Ticker(
            TickRunner(self.settings.database_url, route=self.route, server=self.server.name),
            self.intake,
            self.pool,
            self.route_state,
            barrier=self.barrier,
            timers=self.timers,
            trigger=self.trigger,
            wake=self.wake,
            observers=self.observers,
            counts=self.counts,
            guard_s=self.settings.guard_s,
        )

    def _resolver(self) -> ResolverRunner | None:
        settings = self.settings
        if settings.resolver is None:
            return None
        return ResolverRunner(
            load_resolver(settings.resolver, settings.directory),
            grace_s=settings.doubt_grace_s,
            asks_max=settings.asks_max,
            wake=self.wake.set,
        )

    def _is_held(self, outgoing: OutgoingEmail) -> bool:
        """Return True while the session that claimed the email is held."""
        return self.sessions.is_current(outgoing.relay)

    def _on_settlement(self) -> None:
        """Let a tick write it; the memory of its message is free for the other relays."""
        self.share.wake_others()
        self.wake.set()

    def _on_session(self, session: Session) -> None:
        """Begin with a new session."""
        log.info(
            "session_opened",
            "relay {relay} holds its lock and relays to {route}",
            relay=session.relay,
            route=self.server.name,
        )
        self.timers.restart(session.opened_at)
        self.intake.begin()
        self.maintenance.begin()
        self.reassertion.begin(session)

    def _on_lost_session(self) -> None:
        """Forget all claims, which are other relays' now; what is past its dot is waited for."""
        self.history.note_lost(time.monotonic())
        for observer in self.observers:
            observer.session_lost()
        self.pool.drop_session()
        self.intake.forget()
        self.wake.set()

    def _on_relays(self, notification: str) -> None:
        """Look at the barrier if a relay has raised or lifted it."""
        if self.barrier.hear(notification):
            self.timers.pulse_now()
            self.trigger.on_notification()
