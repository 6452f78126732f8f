"""Rules of the barrier after a change of servers (`failover_barrier`), and a relay's place in the fleet. Pure.

- A relay raises it as it registers, if its last session was on another server (`MOVE`), or if it is new and not the
  only one (`START`). A relay that had no answer for so long that the fleet may have been on another server meanwhile
  raises it too (`GAP`), as it registers or in its session.
- Claims and marks are part of a statement that reads the row: they happen only if the barrier is lifted and its epoch
  is the one that this relay knows.
- A relay that waits behind it first reports all that it remembers, and then writes the epoch into its own row. The
  barrier is lifted when all awaited relays have done so, or after `failover_grace_s`.
- A relay that was at work on this server all the time knows that no other one was in charge: it lifts a barrier of kind
  GAP or START at once. At a MOVE it waits too: the relay that came knows more. Its claims stay: a mark fails if the
  row was reported as sent meanwhile.
"""

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import IntEnum
from typing import Final, Self

ServerId = tuple[int, datetime | None]
"""WAL timeline and start of the postmaster: together they are one run of one server."""

LIFT_MIN_S: Final = 1.0  # after a MOVE, for a relay that none of those that wait has heard of
UNHEARD_S: Final = 3.0  # after a GAP or START, when those that wait do not know what happened elsewhere
PULSE_SLACK_S: Final = 1.0
SEEN_S: Final = 5.0  # a relay that was seen alive so shortly before the old server was lost is waited for on a new one
SEEN_MAX: Final = 1000
MET_S: Final = 3600.0  # back on an old server, all are waited for that were met on the other one so recently

# Payloads of notifications on the channel of relays. Without a payload, one says that there may be work.
RAISED: Final = "barrier"  # or lifted
JOINED: Final = "joined "  # and the instance
LEFT: Final = "left "


class Kind(IntEnum):
    """Reason why a barrier stands. Of two the greater one counts."""

    START = 0
    GAP = 1
    MOVE = 2


@dataclass(frozen=True, slots=True)
class Standing:
    """Knowledge of a relay as it opens a session. All times are of its boot clock, in seconds."""

    instance: str
    blind_s: float
    grace_s: float
    has_gap: bool = False
    """True if a time without an answer was noticed and the barrier is not raised for it yet."""
    server: ServerId | None = None
    """The server of its last session; None: it has had none."""
    answered_s: float = 0.0
    """Time of the last answer of that server."""
    seen: Mapping[str, float] = field(default_factory=dict)
    """The other relays that it has seen alive on that server, and when."""
    visited: Collection[ServerId] = ()
    """All servers that it has had sessions with."""


@dataclass(frozen=True, slots=True)
class Other:
    """Another relay that has not ended as far as the server knows."""

    instance: str
    timeline: int


@dataclass(frozen=True, slots=True)
class Here:
    """State of the server on which a relay registers."""

    server: ServerId
    others: Collection[Other] = ()
    has_last: bool = False
    """True if the relay's last session is in the table, so that this server has the history of the last one."""
    is_first: bool = False
    """True if the last relay that registered before was on another timeline."""


@dataclass(frozen=True, slots=True)
class Row:
    """Barrier as one statement read it. Times are seconds from then on, by the server's clock."""

    epoch: int = 0
    kind: Kind = Kind.START
    awaited: frozenset[str] = frozenset()
    until_s: float = 0.0
    lift_in_s: float = 0.0
    is_lifted: bool = True
    moved_epoch: int = 0
    """The latest epoch that a relay of another server has raised."""
    moved_s: float | None = None
    """Seconds since then."""


def blind_s(guard_s: float, lease_s: float) -> float:
    """Return for how long a relay can be without an answer and not notice that its server was not in charge.

    An idle relay asks every third of a lease.
    """
    return max(guard_s, lease_s / 3 + PULSE_SLACK_S)


def reason_to_raise(here: Here, standing: Standing, now_s: float) -> Kind | None:
    """Return why a relay that registers here has to raise the barrier; None if it need not."""
    last = standing.server
    if last is None:
        if here.is_first or any(other.timeline != here.server[0] for other in here.others):
            return Kind.MOVE  # a standby was promoted, and the relays of the old primary are not back yet
        return Kind.START if here.others else None
    # A restart gives a start that is new. Two standbys that were promoted apart can have one timeline and the same ids.
    is_restarted = here.server[0] == last[0] > 0 and here.has_last and here.server not in standing.visited
    is_same = here.server == last or is_restarted
    if not is_same:
        return Kind.MOVE
    return Kind.GAP if standing.has_gap or now_s - standing.answered_s > standing.blind_s else None


def met_here(here: Here) -> frozenset[str]:
    """Return the relays that have been on this server itself, not only on the one that it comes from."""
    return frozenset(other.instance for other in here.others if other.timeline == here.server[0])


def awaited_by(kind: Kind, here: Here, standing: Standing) -> frozenset[str]:
    """Return the relays to wait for: the raiser itself, all that may live here, and those that it saw elsewhere.

    Back on an old server all that were met on the other are waited for, even if they have been lost there since: this
    server has nothing of what they sent there. After a gap it is those that lived when it began: a sweep that was under
    way when the server froze may have ended them here since.
    """
    found = {standing.instance, *(other.instance for other in here.others)}
    if standing.server is not None:
        is_return = kind is Kind.MOVE and (here.server in standing.visited or here.server[0] < standing.server[0])
        since_s = standing.answered_s - (MET_S if is_return else SEEN_S)
        found |= {instance for instance, at_s in standing.seen.items() if at_s >= since_s}
    return frozenset(found)


def raised(row: Row, kind: Kind, awaited: frozenset[str], grace_s: float) -> Row:
    """Return the barrier after it is raised, over one that may stand already.

    One that stands keeps its end, so that relays which come one after the other do not prolong it.
    """
    stands = not row.is_lifted and row.until_s > 0
    until_s = min(grace_s, UNHEARD_S) if kind is Kind.START else grace_s
    lift_in_s = min(grace_s, {Kind.START: 0.0, Kind.GAP: UNHEARD_S, Kind.MOVE: LIFT_MIN_S}[kind])
    if stands:
        if row.kind >= kind:
            until_s, lift_in_s = row.until_s, row.lift_in_s
        if row.kind is Kind.START and kind is Kind.START:
            until_s = max(row.until_s, until_s)
        awaited |= row.awaited
        kind = max(row.kind, kind)
    epoch = row.epoch + 1
    moved = kind is Kind.MOVE
    return replace(
        row,
        epoch=epoch,
        kind=kind,
        awaited=awaited,
        until_s=until_s,
        lift_in_s=lift_in_s,
        is_lifted=False,
        moved_epoch=epoch if moved else row.moved_epoch,
        moved_s=0.0 if moved else row.moved_s,
    )


def may_lift(row: Row, told: Collection[str], *, waited_s: float, grace_s: float) -> bool:
    """Return True if a relay that has waited for so long, by its own clock, may lift the barrier.

    `told` are the relays that have reported what they know since it was raised.
    """
    if row.until_s <= 0 or waited_s >= grace_s:
        return True
    return row.lift_in_s <= 0 and row.awaited <= frozenset(told)


class Answer(IntEnum):
    """Answer of a relay at work to an epoch that is new to it."""

    GO_ON = 0
    VOUCH = 1  # lift it: this server was in charge all the time
    WAIT = 2


def answer_of(row: Row, known: int, *, has_gap: bool) -> Answer:
    """Return the answer of a relay whose session knows the epoch `known`.

    A barrier that stands with a known epoch was changed by hand: only its end lifts it.
    """
    if row.is_lifted:
        return Answer.GO_ON
    return Answer.WAIT if has_gap or row.moved_epoch > known or row.epoch <= known else Answer.VOUCH


@dataclass(slots=True)
class Presence:
    """Place of a relay in the fleet, across all its sessions. `now_s` is always its boot clock."""

    instance: str
    blind_s: float
    answered_s: float = 0.0
    """When Postgres last answered."""
    silent_since_s: float | None = None
    """When the answer before a longer time without one came; None again once the barrier is raised for it."""
    visited: set[ServerId] = field(default_factory=set)
    _seen: dict[str, float] = field(default_factory=dict)

    @classmethod
    def new(cls, guard_s: float, lease_s: float) -> Self:
        """Return the presence of a relay that has had no session yet."""
        return cls(uuid.uuid4().hex, blind_s(guard_s, lease_s))

    def note_answer(self, now_s: float) -> None:
        """Note an answer of Postgres, and whether it was without one for too long before."""
        if self.silent_since_s is None and now_s - self.answered_s > self.blind_s:
            self.silent_since_s = self.answered_s
        self.answered_s = now_s

    @property
    def has_gap(self) -> bool:
        """Return True after a longer time without an answer, until the barrier is raised for it."""
        return self.silent_since_s is not None

    def standing(self, last: ServerId | None, *, grace_s: float) -> Standing:
        """Return its knowledge as it opens a session; `last` is the server of the session before."""
        return Standing(
            instance=self.instance,
            blind_s=self.blind_s,
            grace_s=grace_s,
            has_gap=self.has_gap,
            server=last,
            answered_s=self.answered_s if self.silent_since_s is None else self.silent_since_s,
            seen=dict(self._seen),
            visited=frozenset(self.visited),
        )

    def arrive(self, server: ServerId, now_s: float, met: Collection[str] = ()) -> None:
        """Note that it has a session with this server, and which relays have registered there before it.

        Those that it saw on another server are not forgotten: they may come here, and send before it sees them here.
        """
        self.see(met, now_s)
        self.visited.add(server)
        self.answered_s = now_s
        self.silent_since_s = None

    def see(self, instances: Collection[str], now_s: float) -> None:
        """Note which other relays live. Those that it met before are remembered for `MET_S`."""
        self._seen = {instance: at_s for instance, at_s in self._seen.items() if at_s >= now_s - MET_S}
        self._seen |= dict.fromkeys(instances, now_s)

    def hear(self, payload: str, now_s: float) -> None:
        """Note that a relay has come or gone. Any role may send such a notification, so what is kept is bounded."""
        if payload.startswith(JOINED) and len(self._seen) < SEEN_MAX:
            instance = payload.removeprefix(JOINED)
            if instance != self.instance and len(instance) == len(self.instance):
                self._seen[instance] = now_s
        elif payload.startswith(LEFT):
            self._seen.pop(payload.removeprefix(LEFT), None)
