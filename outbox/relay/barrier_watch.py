"""Failover barrier as one relay sees it, across all its sessions: the relay raises it, answers it, waits behind it.

`failover_rules` decides, and `failover_barrier` reads and writes the row. Here both are applied to one relay.
"""

from dataclasses import replace

from outbox.database import failover_barrier, failover_rules
from outbox.database.connection import CHANNEL
from outbox.database.failover_barrier import Barrier
from outbox.database.failover_rules import Answer, Kind, Presence, Row, ServerId, Standing, answer_of
from outbox.log import Events
from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.session import Session
from outbox.relay.tick import TickResult
from outbox.relay.verdict_history import VerdictHistory
from outbox.settings import Settings

log = Events("outbox.relay")


class BarrierWatch:
    """The relay at the barrier. While it `is_up`, nothing is claimed or marked."""

    def __init__(self, settings: Settings, history: VerdictHistory) -> None:
        self._grace_s = settings.failover_grace_s
        self._history = history
        self._presence = Presence.new(settings.guard_s, settings.lease_s)
        self._barrier = Barrier()

    @property
    def is_up(self) -> bool:
        """Return True while the relay waits behind the barrier."""
        return self._barrier.up

    @property
    def epoch(self) -> int:
        """Return the latest epoch that this session knows."""
        return self._barrier.epoch

    @property
    def look_at(self) -> float | None:
        """Return when to look at the barrier again; None if it is lifted."""
        return self._barrier.look_at if self._barrier.up else None

    @property
    def instance(self) -> str:
        """Return the identity of this relay across its sessions."""
        return self._presence.instance

    @property
    def has_gap(self) -> bool:
        """Return True after a longer time without an answer of Postgres, until the barrier is raised for it."""
        return self._presence.has_gap

    def standing(self, server: ServerId | None) -> Standing:
        """Return what the relay knows as it opens a session; `server` is the one of its last session."""
        return self._presence.standing(server, grace_s=self._grace_s)

    def note_answer(self) -> None:
        """Note that Postgres has answered."""
        self._presence.note_answer(boot_clock_s())

    def see(self, instances: frozenset[str]) -> None:
        """Note which other relays are alive."""
        self._presence.see(instances, boot_clock_s())

    def hear(self, notification: str) -> bool:
        """Note that a relay has come or gone; return True if the barrier was raised or lifted instead."""
        self._presence.hear(notification, boot_clock_s())
        if notification != failover_rules.RAISED:
            return False
        self._barrier.look_now()
        return True

    def begin(self, session: Session, former: ServerId | None, now: float) -> None:
        """Begin a session, with the barrier that it has found, and note a change of servers since the `former` one."""
        if former is not None and former != session.server:
            self._history.note_move(0.0, now)
        self._presence.arrive(session.server, boot_clock_s(), session.met)
        self._barrier = Barrier(grace_s=self._grace_s)
        self._adopt(session.barrier, now)

    async def raise_after_gap(self, session: Session, now: float) -> None:
        """Raise the barrier after a time without an answer: meanwhile others may have sent on another server."""
        standing = self.standing(session.server)
        async with session.connection.transaction():
            here = await failover_barrier.look_around(
                session.connection, session.server, session.relay, standing, last=None
            )
            row = await failover_barrier.raise_barrier(session.connection, Kind.GAP, here, standing, CHANNEL)
        self._presence.arrive(session.server, boot_clock_s())
        self._adopt(row, now)

    async def answer(self, session: Session, tick: TickResult, now: float) -> bool:
        """Answer a barrier that another relay raised while this one was at work; return True if the tick met one."""
        if tick.is_open or self._barrier.up:  # behind the barrier it looks at it regularly
            return False
        row = await failover_barrier.read(session.connection)
        if answer_of(row, self._barrier.epoch, has_gap=self._presence.has_gap) is Answer.VOUCH:
            await failover_barrier.lift(session.connection, row.epoch, CHANNEL)
            row = replace(row, is_lifted=True)
        self._adopt(row, now)
        return True

    async def look(self, session: Session, now: float) -> bool:
        """Wait behind the barrier; return True once it is lifted. The relay has reported all that it knows."""
        if not self._barrier.up:
            return False
        await self._barrier.look(session.connection, session.relay, now, CHANNEL)
        if self._barrier.up:
            return False
        log.info(
            "barrier_lifted", "emails are claimed again: the other relays have written what they sent, or time is up"
        )
        return True

    async def leave(self, session: Session) -> None:
        """Note that the relay stops in order, so that no barrier waits for it."""
        await failover_barrier.leave(session.connection, session.relay, self._presence.instance, CHANNEL)

    def _adopt(self, row: Row, now: float) -> None:
        """Take over the barrier's epoch, and wait behind it if it stands."""
        if row.moved_s is not None:
            self._history.note_move(row.moved_s, now)
        if self._barrier.adopt(row):
            say = log.warning if row.kind is Kind.MOVE else log.info
            say(
                "barrier_stands",
                "no email is claimed until {relays} relays have written what they sent, or for {grace_s:g} s at most",
                relays=len(row.awaited),
                grace_s=self._grace_s,
                epoch=row.epoch,
                kind=row.kind.name.lower(),
            )
