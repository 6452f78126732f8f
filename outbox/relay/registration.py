"""A relay's entry into the fleet: its earlier sessions are ended, its row is written, its lock is taken.

The relay commits the row while it holds the lock, and looks at the failover barrier in the same transaction. So other
relays never see a relay that is not alive, or one that has not looked at the barrier.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from outbox import __version__
from outbox.database import failover_barrier as barrier
from outbox.database import failover_rules
from outbox.database.connection import CHANNEL, Connection
from outbox.database.failover_rules import Row, ServerId, Standing
from outbox.database.locks import HOLDS_ITS_LOCK, RELAY_LOCKS
from outbox.errors import DatabaseUnavailableError
from outbox.relay.boot_clock import boot_clock_s

REGISTER_TRIES: Final = 8

# Only the identity column gives out ids. To skip some, rows are inserted with them and rolled back.
REGISTER: Final = """
INSERT INTO outbox.relay (host, pid, backend_pid, version, timeline, route, instance)
SELECT $1, $2, pg_backend_pid(), $3, $4, $5, $6 FROM generate_series(1, $7::integer) RETURNING id
"""
TAKE_LOCK: Final = "SELECT pg_try_advisory_lock($1, $2)"
HELD: Final = """
SELECT objid::bigint AS id, l.pid, (SELECT a.usesysid::regrole::text FROM pg_stat_get_activity(l.pid) AS a) AS role
  FROM pg_locks l
 WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objsubid = 2
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def register(
    connection: Connection,
    timeline: int,
    route: str = "",
    *,
    instance: str | None = None,
    meet: Callable[[int], Awaitable[None]] | None = None,
) -> int:
    """Register a relay; return its id. Others see its row only with its lock held, since the lock precedes the commit.

    `meet` gets the id and runs in the same transaction.

    Any role may hold the lock of a future id. Such ids are skipped, however many there are.

    Raises:
        DatabaseUnavailableError: the locks of all ids that were tried are held; the error names a holder.

    """
    row = (socket.gethostname(), os.getpid(), __version__, timeline, route, instance)
    held: dict[int, Any] = {}
    relay = 0
    for _ in range(REGISTER_TRIES):
        transaction = connection.transaction()
        await transaction.start()
        relay = int(await connection.fetchval(REGISTER, *row, 1))
        if await connection.fetchval(TAKE_LOCK, RELAY_LOCKS, relay):
            if meet is not None:
                await meet(relay)
            await transaction.commit()
            return relay
        await transaction.rollback()
        held = {one["id"]: one for one in await connection.fetch(HELD, RELAY_LOCKS)}
        after = relay + 1
        while after in held:
            after += 1
        if passed := after - relay - 1:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(REGISTER, *row, passed)
            await transaction.rollback()
    holder = f"pid {held[relay]['pid']}, role {held[relay]['role']}" if relay in held else "a session that has ended"
    raise DatabaseUnavailableError(
        f"The advisory locks of the next relay ids are held ({len(held)} of them; {relay} by {holder}); "
        "end those sessions with pg_terminate_backend, and REVOKE CONNECT on the database from other roles."
    )


@dataclass(frozen=True, slots=True)
class Registered:
    """A relay that is registered, and the barrier as it was at that moment."""

    relay: int
    barrier: Row = field(default_factory=Row)
    met: frozenset[str] = frozenset()
    """The other relays that had registered on this server before, and not ended."""


async def register_at_barrier(
    connection: Connection, server: ServerId, route: str, *, last: int | None, standing: Standing
) -> Registered:
    """Register a relay, and raise the barrier in the same transaction if it has a reason to.

    `last` is the id of the relay's last session.
    """
    registered = Registered(0)

    async def meet(relay: int) -> None:
        nonlocal registered
        here = await barrier.look_around(connection, server, relay, standing, last=last)
        kind = failover_rules.reason_to_raise(here, standing, boot_clock_s())
        await connection.fetch(barrier.NOTIFY, CHANNEL, failover_rules.JOINED + standing.instance)
        if kind is None:
            row = await barrier.read(connection)
        else:
            row = await barrier.raise_barrier(connection, kind, here, standing, CHANNEL)
        registered = Registered(relay, row, failover_rules.met_here(here))

    await register(connection, server[0], route, instance=standing.instance, meet=meet)
    return registered


# $1 the last session, $2 its timeline: on another one its id may be another relay's. $3 the instance.
FORMERS: Final = """
SELECT id FROM outbox.relay WHERE id = $1 AND timeline = $2
UNION
SELECT id FROM outbox.relay WHERE ended_at IS NULL AND instance = $3
"""
EVICT: Final = f"""
SELECT pg_terminate_backend(a.pid) FROM outbox.relay r JOIN pg_stat_activity a ON a.pid = r.backend_pid
 WHERE r.id = ANY ($2::integer[]) AND a.application_name = 'outbox relay' AND a.backend_start <= r.started_at
   AND a.pid <> pg_backend_pid() AND a.usename = current_user AND EXISTS ({HOLDS_ITS_LOCK})
"""
HOLDS_STILL: Final = f"SELECT r.id FROM outbox.relay r WHERE r.id = ANY ($2::integer[]) AND EXISTS ({HOLDS_ITS_LOCK})"
ENDED_LOOK_S: Final = 0.02


async def end_formers(
    connection: Connection, last: int | None, timeline: int, *, instance: str, within_s: float
) -> None:
    """End this relay's earlier sessions in the server too, so that their last commits are decided.

    `last` is the id of its last session, if that was on this `timeline`. A session that the network lost may still run
    its statement, and so may a session of a server that was frozen: it is evicted, and waited for until its backend no
    longer holds its lock. To wait for the lock itself would be to wait for any session that holds it.

    Raises:
        DatabaseUnavailableError: one has not ended within `within_s`.

    """
    formers = [row["id"] for row in await connection.fetch(FORMERS, last, timeline, instance)]
    await connection.fetch(EVICT, RELAY_LOCKS, formers)
    holding: list[Any] = []
    try:
        async with asyncio.timeout(within_s):
            while holding := await connection.fetch(HOLDS_STILL, RELAY_LOCKS, formers):
                await asyncio.sleep(ENDED_LOOK_S)
    except TimeoutError as error:
        relays = ", ".join(str(row["id"]) for row in holding)
        raise DatabaseUnavailableError(
            f"The last session of this relay, {relays or last}, has not ended within {within_s:g} s; it is tried again."
        ) from error
