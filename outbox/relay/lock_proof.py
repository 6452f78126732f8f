"""Self-test before a session is opened: advisory locks here exclude sessions and end with them, as PostgreSQL's do."""

import asyncio
import os
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.database.locks import SELFTEST_LOCKS
from outbox.database.pooler import say_pooler
from outbox.errors import UnsafeDatabaseError
from outbox.relay.lease_connection import CLOSE_TIMEOUT_S, close_quietly, connect_leased
from outbox.settings.urls import DatabaseUrl


async def prove_locks(url: DatabaseUrl, *, lease_s: float) -> None:
    """Raise unless advisory locks here exclude other sessions and end with their own, as those of PostgreSQL do.

    Poolers in transaction mode share a session among clients, CockroachDB grants every lock to every session, a standby
    grants its own, and RDS Proxy keeps settings out: each would let two relays send the same mail.

    Raises:
        UnsafeDatabaseError: one sentence with the reason and the fix.

    """
    key = int.from_bytes(os.urandom(4), "big") & 0x7FFFFFFF  # random: no session can hold its lock beforehand
    one = await connect_leased(url, lease_s)
    try:
        other = await connect_leased(url, lease_s)
        try:
            backend = await _prove_exclusion(url, one, other, key)
            await one.close(timeout=CLOSE_TIMEOUT_S)
            await _prove_release(url, other, key, backend)
        finally:
            await close_quietly(other)
    finally:
        await close_quietly(one)


async def _prove_exclusion(url: DatabaseUrl, one: Connection, other: Connection, key: int) -> int:
    """Raise unless one session excludes the other from a lock; return the backend that has it."""
    try_lock = "SELECT pg_try_advisory_lock($1, $2), pg_backend_pid()"
    if await one.fetchval("SELECT pg_is_in_recovery()"):
        raise UnsafeDatabaseError(
            f"Postgres at {url.redacted} is a standby (it is in recovery); give database_url the primary's address."
        )
    mine, pid = await one.fetchrow(try_lock, SELFTEST_LOCKS, key)
    theirs, other_pid = await other.fetchrow(try_lock, SELFTEST_LOCKS, key)
    pids = {await one.fetchval("SELECT pg_backend_pid()") for _ in range(3)} | {pid}
    if len(pids) > 1 or pid == other_pid:
        if await _is_pgpool(one):
            raise UnsafeDatabaseError(
                f"pgpool-II at {url.redacted} spreads the statements of one session over several servers; set "
                "load_balance_mode = off there, or give database_url the address of Postgres itself."
            )
        raise UnsafeDatabaseError(say_pooler(url, "the server process behind a connection changes"))
    if not mine or theirs:
        raise UnsafeDatabaseError(
            f"The database at {url.redacted} gives one advisory lock to two sessions at once (as CockroachDB does); "
            "outbox needs PostgreSQL itself."
        )
    return int(pid)


async def _is_pgpool(connection: Connection) -> bool:
    try:
        await connection.execute("SHOW pool_version")  # pgpool answers this itself
    except asyncpg.PostgresError:
        return False
    return True


# True if all holders are other roles. Any role can see the key in pg_locks once it is taken, and request its lock.
SELFTEST_TAKEN: Final = """
SELECT coalesce(bool_and(pid <> $3), false) FROM pg_locks
 WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objid::bigint = $2 AND objsubid = 2
"""


async def _prove_release(url: DatabaseUrl, other: Connection, key: int, backend: int) -> None:
    """Raise unless `other` gets the lock, or another role got it first: that, too, shows that `backend` lost it."""
    async with asyncio.timeout(CLOSE_TIMEOUT_S + 1):
        for _ in range(20):
            if await other.fetchval("SELECT pg_try_advisory_lock($1, $2)", SELFTEST_LOCKS, key):
                return
            await asyncio.sleep(0.05)
        if await other.fetchval(SELFTEST_TAKEN, SELFTEST_LOCKS, key, backend):
            return
    raise UnsafeDatabaseError(say_pooler(url, "a lock outlived the connection that took it"))
