"""Faults of Postgres: sessions ended, statements cancelled, crashes, outages, a full disk, no connection left."""

import asyncio
import os
import signal
import time
from contextlib import suppress
from typing import Any, Final

import asyncpg

from bench.faults.environment import Environment
from bench.faults.registry import NOBODY, Struck, fault

FOLLOW_S: Final = 10.0
SESSIONS: Final = "FROM pg_stat_activity WHERE application_name LIKE 'outbox %'"


@fault("terminate", "postgres")
async def _terminate(environment: Environment, _: Struck) -> str:
    """pg_terminate_backend of all relays and generates."""
    await environment.sql(f"SELECT pg_terminate_backend(pid) {SESSIONS}")
    return ""


@fault("cancel", "postgres", 0.2, 0.5)
async def _cancel(environment: Environment, struck: Struck) -> str:
    """pg_cancel_backend of whatever runs a statement, again and again, so that it hits marks."""
    end, hits = time.monotonic() + struck.strike.length_s, 0
    while time.monotonic() < end:
        hits += len(await environment.sql(f"SELECT pg_cancel_backend(pid) {SESSIONS} AND state = 'active'"))
        await asyncio.sleep(0.003)
    return f"{hits} statements"


@fault("crash", "postgres")
async def _crash(environment: Environment, struck: Struck) -> str:
    """SIGKILL of one backend: Postgres ends all sessions and recovers."""
    end = time.monotonic() + environment.patience_s
    while not (rows := await environment.sql(f"SELECT pid {SESSIONS} ORDER BY pid")):
        if time.monotonic() > end:
            return NOBODY
        await asyncio.sleep(0.02)
    struck.now()
    with suppress(ProcessLookupError):
        os.kill(rows[int(struck.strike.coin * len(rows))]["pid"], signal.SIGKILL)
    return ""


@fault("restart-immediate", "postgres")
async def _restart_immediate(environment: Environment, _: Struck) -> str:
    """Immediate shutdown and start of Postgres."""
    await environment.stop_postgres("immediate")
    await environment.start_postgres()
    return ""


@fault("restart-fast", "postgres")
async def _restart_fast(environment: Environment, _: Struck) -> str:
    """Fast shutdown and start of Postgres."""
    await environment.stop_postgres("fast")
    await environment.start_postgres()
    return ""


@fault("down", "postgres", 0.5, 2.0)
async def _down(environment: Environment, struck: Struck) -> str:
    """Postgres stopped for a while."""
    await environment.stop_postgres("fast" if struck.strike.coin < 0.5 else "immediate")
    await asyncio.sleep(struck.strike.length_s)
    await environment.start_postgres()
    return ""


RAISE: Final = """
CREATE OR REPLACE FUNCTION public.disk_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
END $$"""
FULL: Final = (
    "CREATE OR REPLACE TRIGGER disk_full BEFORE INSERT OR UPDATE ON outbox.delivery"
    " FOR EACH STATEMENT EXECUTE FUNCTION public.disk_full()"
)
NOT_FULL: Final = "DROP TRIGGER IF EXISTS disk_full ON outbox.delivery"


@fault("raise", "postgres", 0.2, 1.0)
async def _raise(environment: Environment, struck: Struck) -> str:
    """Every write to outbox.delivery fails like a full disk."""
    await environment.sql(RAISE)
    await environment.sql(FULL)
    try:
        await asyncio.sleep(struck.strike.length_s)
    finally:
        await environment.sql(NOT_FULL)
    return ""


@fault("connections", "postgres", 0.5, 1.5)
async def _connections(environment: Environment, struck: Struck) -> str:
    """max_connections is reached, and every session that ends is replaced by a foreign one."""
    held: list[Any] = []
    end = time.monotonic() + struck.strike.length_s
    asked = False
    try:
        while time.monotonic() < end:
            try:
                held.append(await asyncpg.connect(environment.postgres.url, timeout=1))
            except asyncpg.TooManyConnectionsError:
                if not asked:
                    asked = True
                    await environment.sql(f"SELECT pg_terminate_backend(pid) {SESSIONS}")
                await asyncio.sleep(0.005)
    finally:
        for connection in held:
            connection.terminate()
    return f"{len(held)} held" if asked else "never reached"


LOCK: Final = "SELECT email FROM outbox.delivery WHERE settled_at IS NULL FOR UPDATE SKIP LOCKED"


@fault("lock", "postgres", 0.1, 0.8)
async def _lock(environment: Environment, struck: Struck) -> str:
    """Somebody's transaction locks every open delivery: marks, settles and sweeps wait for it."""
    holder = await asyncpg.connect(environment.postgres.url, timeout=2)
    try:
        await holder.execute("BEGIN")
        rows = await holder.fetch(LOCK)
        struck.now()
        await asyncio.sleep(struck.strike.length_s)
    finally:
        holder.terminate()
    return f"{len(rows)} rows"


@fault("slow-commits", "postgres", 0.5, 2.0)
async def _slow_commits(environment: Environment, struck: Struck) -> str:
    """Every commit takes 100 ms longer (commit_delay)."""
    for setting in ("commit_delay = 100000", "commit_siblings = 0"):
        await environment.sql(f"ALTER SYSTEM SET {setting}")
    await environment.sql("SELECT pg_reload_conf()")
    try:
        await asyncio.sleep(struck.strike.length_s)
    finally:
        await environment.sql("ALTER SYSTEM RESET ALL")
        await environment.sql("SELECT pg_reload_conf()")
    return ""


FOLLOWS: Final = "SELECT FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming'"


async def _followed(environment: Environment, name: str, more: str = "") -> None:
    end = time.monotonic() + FOLLOW_S
    while not await environment.sql(FOLLOWS + more, name) and time.monotonic() < end:
        await asyncio.sleep(0.05)


@fault("failover", "postgres")
async def _failover(environment: Environment, struck: Struck) -> str:
    """The primary is lost; its synchronous standby has every commit and takes over."""
    name = f"standby{struck.strike.number}"
    standby = await environment.add_standby(name)
    await environment.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await environment.sql("SELECT pg_reload_conf()")
    try:
        await _followed(environment, name, " AND sync_state = 'sync'")
        struck.now()
        await environment.fail_over(standby)
    except BaseException:  # commits must not wait for one that never comes
        await environment.sql("ALTER SYSTEM RESET synchronous_standby_names")
        await environment.sql("SELECT pg_reload_conf()")
        raise
    return ""


@fault("failover-async", "postgres", 0.1, 0.4, alone=True)
async def _failover_async(environment: Environment, struck: Struck) -> str:
    """The primary is lost with its last commits, which its asynchronous standby does not have."""
    name = f"standby{struck.strike.number}"
    standby = await environment.add_standby(name)
    await _followed(environment, name)
    follower = await asyncpg.connect(standby.url, timeout=2)
    try:
        await follower.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await follower.execute("SELECT pg_reload_conf()")
    finally:
        follower.terminate()
    struck.now()
    await asyncio.sleep(struck.strike.length_s)
    await environment.fail_over(standby)
    return ""


@fault("failback", "postgres", 1.0, 2.5, alone=True)
async def _failback(environment: Environment, struck: Struck) -> str:
    """The primary freezes, its standby takes over for a while, is lost, and the old primary is in charge again."""
    name = f"standby{struck.strike.number}"
    standby = await environment.add_standby(name)
    await _followed(environment, name)
    struck.now()
    former = await environment.freeze_over(standby)
    await asyncio.sleep(struck.strike.length_s)
    await environment.thaw_back(former)
    return ""
