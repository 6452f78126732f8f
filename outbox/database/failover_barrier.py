"""Barrier after a change of servers: no email is claimed or marked until the relays have said what they sent.

A server can lack what was committed on another one: a promoted standby lacks the last commits, and an old primary that
is in charge again lacks all that was sent meanwhile. The one row of `outbox.failover` is the barrier. It stands while
`lifted_at` is null, and its `epoch` grows each time that it is raised.

- A relay raises it as it registers, if its last session was on another server (`MOVE`), or if it is new and not the
  only one (`START`). A relay that had no answer for so long that the fleet may have been on another server meanwhile
  raises it too (`GAP`), as it registers or in its session.
- Claims and marks are part of a statement that reads the row: they happen only if the barrier is lifted and its epoch
  is the one that this relay knows.
- A relay that waits behind it has told the server all that it remembers, and then writes the epoch into its own row.
  The barrier is lifted when all awaited relays have done so, or after `failover_grace_s`.
- A relay that was at work on this server all the time knows that no other one was in charge: it lifts a barrier of kind
  GAP or START at once. At a MOVE it waits too: the one that came knows better. Its claims stay: a mark fails if the
  row was told to be sent meanwhile.

The first half of this module decides and knows no database; the second half reads and writes the row.
"""

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import IntEnum
from typing import Any, Final, Self

from outbox.database.timeline import timeline_of

ServerId = tuple[int, datetime | None]
"""WAL timeline and start of the postmaster: together they are one run of one server."""

LIFT_MIN_S: Final = 1.0  # after a MOVE, for a relay that none of those that wait has heard of
UNHEARD_S: Final = 3.0  # after a GAP or START, when those that wait know nothing of what happened elsewhere
PULSE_SLACK_S: Final = 1.0
SEEN_S: Final = 5.0  # a relay that was seen alive so shortly before the old server was lost is waited for on a new one
SEEN_MAX: Final = 1000
MET_S: Final = 3600.0  # back on an old server, all are waited for that were met on the other one so recently
BARRIER_LOOK_S: Final = 0.2

# What a notification on the channel of relays says, besides nothing.
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
    """When that answered for the last time."""
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
    """How long ago that was."""


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

    `told` are the relays that have said what they know since it was raised.
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

    def hear(self, said: str, now_s: float) -> None:
        """Note that a relay has come or gone. Any role may say so: what is remembered of it is bounded."""
        if said.startswith(JOINED) and len(self._seen) < SEEN_MAX:
            instance = said.removeprefix(JOINED)
            if instance != self.instance and len(instance) == len(self.instance):
                self._seen[instance] = now_s
        elif said.startswith(LEFT):
            self._seen.pop(said.removeprefix(LEFT), None)


# ── the row ──────────────────────────────────────────────────────────────────────────────────────────────────────────

READ: Final = """
SELECT epoch, kind, awaited, moved_epoch, lifted_at IS NOT NULL AS is_lifted,
       extract(epoch FROM until - now())::float8 AS until_s,
       extract(epoch FROM lift_after - now())::float8 AS lift_in_s,
       extract(epoch FROM now() - moved_at)::float8 AS moved_s
  FROM outbox.failover WHERE one
"""
READ_LOCKED: Final = f"{READ.rstrip()} FOR UPDATE"
MAKE: Final = "INSERT INTO outbox.failover (one) VALUES (true) ON CONFLICT (one) DO NOTHING"
LAST_TOLD: Final = "SELECT coalesce(max(told_epoch), 0) FROM outbox.relay WHERE told_epoch IS NOT NULL"
RAISE: Final = """
UPDATE outbox.failover
   SET epoch = $1, kind = $2, awaited = $3, raised_at = now(), until = now() + $4::float8 * interval '1 second',
       lift_after = now() + $5::float8 * interval '1 second', lifted_at = NULL, moved_epoch = $6,
       moved_at = CASE WHEN $7 THEN now() ELSE moved_at END
 WHERE one
"""
LIFT: Final = """
WITH lifted AS (
    UPDATE outbox.failover SET lifted_at = now() WHERE one AND epoch = $1 AND lifted_at IS NULL RETURNING one
)
SELECT pg_notify($2, $3) FROM lifted
"""
TELL: Final = "UPDATE outbox.relay SET told_epoch = $2 WHERE id = $1"
TOLD: Final = "SELECT DISTINCT instance FROM outbox.relay WHERE told_epoch = $1 AND instance IS NOT NULL"
FORGET: Final = "UPDATE outbox.relay SET instance = NULL WHERE id = $1"
AWAIT_NO_MORE: Final = """
UPDATE outbox.failover SET awaited = array_remove(awaited, $1)
 WHERE one AND lifted_at IS NULL AND awaited @> ARRAY[$1::text]
"""
NOTIFY: Final = "SELECT pg_notify($1, $2)"
# Relays of programs that know no barrier have no instance, and are not waited for. Whether another one holds its lock
# says nothing: a session that was frozen with its server still does.
OTHERS_HERE: Final = (
    "SELECT instance, timeline FROM outbox.relay WHERE ended_at IS NULL AND id <> $1 AND instance <> $2"
)
# $1 this relay's last session, $2 its instance, $3 the timeline here, $4 this session.
HISTORY: Final = """
SELECT EXISTS (SELECT FROM outbox.relay WHERE id = $1 AND instance = $2 AND timeline = $3) AS has_last,
       coalesce((SELECT timeline > 0 AND timeline <> $3 FROM outbox.relay WHERE id <> $4 ORDER BY id DESC LIMIT 1),
                false) AS is_first
"""
# $1 is the timeline. A relay that stopped in order has no instance any more.
AWAITS_FIRST: Final = """
SELECT EXISTS (SELECT FROM outbox.relay
                WHERE ended_at IS NULL AND instance IS NOT NULL AND timeline BETWEEN 1 AND $1 - 1)
   AND NOT EXISTS (SELECT FROM outbox.relay WHERE timeline = $1)
"""
STATEMENTS: Final = (
    *(READ, READ_LOCKED, MAKE, LAST_TOLD, RAISE, LIFT, TELL, TOLD, FORGET, AWAIT_NO_MORE, NOTIFY),
    *(OTHERS_HERE, HISTORY),
)


async def read(connection: Any) -> Row:
    """Return the barrier. If the row is missing it counts as lifted."""
    return _row_of(await connection.fetchrow(READ))


async def holds_generate(connection: Any) -> bool:
    """Return True if `generate` has to wait.

    Either the barrier stands, or a promoted server knows relays of an earlier timeline that have not come yet.
    """
    row = await read(connection)
    if not row.is_lifted:
        return row.until_s > 0
    return bool(await connection.fetchval(AWAITS_FIRST, await timeline_of(connection)))


def _row_of(found: Any) -> Row:
    if found is None:
        return Row()
    return Row(
        epoch=found["epoch"],
        kind=Kind[found["kind"].upper()],
        awaited=frozenset(found["awaited"]),
        until_s=found["until_s"],
        lift_in_s=found["lift_in_s"],
        is_lifted=found["is_lifted"],
        moved_epoch=found["moved_epoch"],
        moved_s=found["moved_s"],
    )


async def look_around(connection: Any, server: ServerId, relay: int, standing: Standing, *, last: int | None) -> Here:
    """Return what the session `relay` finds on this server. `last` is the relay's session before, if any."""
    rows = await connection.fetch(OTHERS_HERE, relay, standing.instance)
    history = await connection.fetchrow(HISTORY, last, standing.instance, server[0], relay)
    others = [Other(row["instance"], row["timeline"]) for row in rows]
    return Here(server, others, has_last=history["has_last"], is_first=server[0] > 0 and history["is_first"])


async def raise_barrier(connection: Any, kind: Kind, here: Here, standing: Standing, channel: str) -> Row:
    """Raise the barrier in the caller's transaction, whose commit wakes all relays."""
    found = await connection.fetchrow(READ_LOCKED)
    if found is None:
        await connection.execute(MAKE)
        found = await connection.fetchrow(READ_LOCKED)
    before = _row_of(found)
    if (last_told := await connection.fetchval(LAST_TOLD)) > before.epoch:  # the row was changed by hand
        before = replace(before, epoch=last_told)
    row = raised(before, kind, awaited_by(kind, here, standing), standing.grace_s)
    await connection.execute(
        RAISE,
        row.epoch,
        row.kind.name.lower(),
        sorted(row.awaited),
        row.until_s,
        row.lift_in_s,
        row.moved_epoch,
        row.moved_epoch == row.epoch,
    )
    await connection.fetch(NOTIFY, channel, RAISED)
    return row


async def lift(connection: Any, epoch: int, channel: str) -> None:
    """Lift the barrier of that epoch and wake all relays; do nothing if it is lifted or was raised again."""
    await connection.fetch(LIFT, epoch, channel, RAISED)


async def leave(connection: Any, relay: int, instance: str, channel: str) -> None:
    """Note that a relay stops in order. Its memory ends with it, so no barrier waits for it, not even one that stands.

    Its row does not say any more that it has told what it knew.
    """
    await connection.execute(FORGET, relay)
    await connection.execute(AWAIT_NO_MORE, instance)
    await connection.fetch(NOTIFY, channel, LEFT + instance)


@dataclass(slots=True)
class Barrier:
    """Barrier as one session sees it: the epoch that it knows, and whether it waits (`up`).

    It never waits longer than `grace_s` by this host's steady clock, whatever the server's clock does.
    """

    epoch: int = 0
    grace_s: float = 0.0
    up: bool = False
    look_at: float = 0.0
    _since: float | None = None
    _told: int | None = None

    async def look(self, connection: Any, relay: int, now: float, channel: str) -> Row:
        """Write that this relay has told all that it knows, and lift the barrier if no other relay is awaited.

        If it still stands, look again at `look_at`. `now` is this host's steady clock.
        """
        row = await read(connection)
        self._since = now if self._since is None else self._since
        self.epoch, self.up = row.epoch, not row.is_lifted
        if self.up:
            if self._told != row.epoch:
                await connection.execute(TELL, relay, row.epoch)
                self._told = row.epoch
            told = {found["instance"] for found in await connection.fetch(TOLD, row.epoch)}
            if may_lift(row, told, waited_s=now - self._since, grace_s=self.grace_s):
                await lift(connection, row.epoch, channel)
                row = await read(connection)  # unless it was raised once more
                self.up = not row.is_lifted or row.epoch != self.epoch
        self._since = self._since if self.up else None
        self.look_at = now + min(max(row.lift_in_s, 0.02), BARRIER_LOOK_S)
        return row
