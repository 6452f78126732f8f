"""Barrier after a change of servers: no email is claimed or marked until the relays have reported what they sent.

A server can lack what was committed on another one: a promoted standby lacks the last commits, and an old primary that
is in charge again lacks all that was sent meanwhile. The one row of `outbox.failover` is the barrier. It stands while
`lifted_at` is null, and its `epoch` grows each time that it is raised.

This module reads and writes the row; `failover_rules` decides.
"""

from dataclasses import dataclass, replace
from typing import Final

from outbox.database.connection import Connection
from outbox.database.driver import Record
from outbox.database.failover_rules import (
    LEFT,
    RAISED,
    Here,
    Kind,
    Other,
    Row,
    ServerId,
    Standing,
    awaited_by,
    may_lift,
    raised,
)
from outbox.database.timeline import timeline_of

BARRIER_LOOK_S: Final = 0.2

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


async def read(connection: Connection) -> Row:
    """Return the barrier. If the row is missing it counts as lifted."""
    return _row_of(await connection.fetchrow(READ))


async def holds_generate(connection: Connection) -> bool:
    """Return True if `generate` has to wait.

    Either the barrier stands, or a promoted server knows relays of an earlier timeline that have not come yet.
    """
    row = await read(connection)
    if not row.is_lifted:
        return row.until_s > 0
    return bool(await connection.fetchval(AWAITS_FIRST, await timeline_of(connection)))


def _row_of(found: Record | None) -> Row:
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


async def look_around(
    connection: Connection, server: ServerId, relay: int, standing: Standing, *, last: int | None
) -> Here:
    """Return what the session `relay` finds on this server. `last` is the relay's session before, if any."""
    rows = await connection.fetch(OTHERS_HERE, relay, standing.instance)
    history = await connection.fetchrow(HISTORY, last, standing.instance, server[0], relay)
    others = [Other(row["instance"], row["timeline"]) for row in rows]
    return Here(server, others, has_last=history["has_last"], is_first=server[0] > 0 and history["is_first"])


async def raise_barrier(connection: Connection, kind: Kind, here: Here, standing: Standing, channel: str) -> Row:
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


async def lift(connection: Connection, epoch: int, channel: str) -> None:
    """Lift the barrier of that epoch and wake all relays; do nothing if it is lifted or was raised again."""
    await connection.fetch(LIFT, epoch, channel, RAISED)


async def leave(connection: Connection, relay: int, instance: str, channel: str) -> None:
    """Note that a relay stops in order. Its memory ends with it, so no barrier waits for it, not even one that stands.

    Its row no longer counts as one that has reported.
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

    def adopt(self, row: Row) -> bool:
        """Take over the epoch of the row; return True if the relay has to wait from now on."""
        was_up, self.up, self.epoch = self.up, not row.is_lifted, row.epoch
        return self.up and not was_up

    def look_now(self) -> None:
        """Let the next look be due at once."""
        self.look_at = 0.0

    async def look(self, connection: Connection, relay: int, now: float, channel: str) -> Row:
        """Write that this relay has reported all that it knows, and lift the barrier if no other relay is awaited.

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
