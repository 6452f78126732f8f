"""Faults of processes: relays and generates that are killed, paused or told to stop."""

import asyncio
import signal
import time
from typing import Final

import asyncpg

from bench.faults.environment import Environment
from bench.faults.registry import NOBODY, Struck, fault
from bench.faults.server import ServerProcess


async def _relay(environment: Environment, struck: Struck) -> ServerProcess | None:
    struck.victim = await environment.busy_relay(struck.strike.host)
    struck.now()
    return struck.victim


async def _either(environment: Environment, struck: Struck) -> ServerProcess | None:
    """Return the server's generate for every third coin, if it runs; else its relay."""
    cron = environment.hosts[struck.strike.host].cron
    if struck.strike.coin < 1 / 3 and cron is not None and cron.is_alive:
        struck.victim = cron
        return cron
    return await _relay(environment, struck)


@fault("kill", "relay")
async def _kill(environment: Environment, struck: Struck) -> str:
    """SIGKILL of a relay."""
    async with environment.hosts[struck.strike.host].turn:
        relay = await _relay(environment, struck)
        if relay is None:
            return NOBODY
        relay.end("kill", signal.SIGKILL)
        return ""


@fault("kill-generate", "cron")
async def _kill_generate(environment: Environment, struck: Struck) -> str:
    """SIGKILL of a generate; the next cron fires soon."""
    host = environment.hosts[struck.strike.host]
    if host.cron is None or not host.cron.is_alive:
        await environment.fire_cron(host)
        await asyncio.sleep(0.2 + struck.strike.coin)
        struck.now()
    struck.victim = host.cron
    if host.cron is None or not host.cron.is_alive:
        return NOBODY
    host.cron.end("kill-generate", signal.SIGKILL)
    return ""


async def _pause(environment: Environment, struck: Struck) -> str:
    process = await _either(environment, struck)
    if process is None:
        return NOBODY
    process.send(signal.SIGSTOP)
    await asyncio.sleep(struck.strike.length_s)
    process.send(signal.SIGCONT)
    return ""


@fault("pause-short", "relay", 0.2, 0.8)
async def _pause_short(environment: Environment, struck: Struck) -> str:
    """SIGSTOP, and SIGCONT within the lease, of a relay or a generate."""
    return await _pause(environment, struck)


@fault("pause-long", "relay", 1.3, 2.5)
async def _pause_long(environment: Environment, struck: Struck) -> str:
    """SIGSTOP, and SIGCONT after the lease, of a relay or a generate."""
    return await _pause(environment, struck)


# Of what is not marked yet, so that what waits for it is a mark.
LOCK: Final = "SELECT email FROM outbox.delivery WHERE settled_at IS NULL AND state = 'pending' FOR UPDATE SKIP LOCKED"
WAITS: Final = """
SELECT FROM outbox.relay r JOIN pg_stat_activity a ON a.pid = r.backend_pid
 WHERE r.pid = $1 AND r.ended_at IS NULL AND a.wait_event_type = 'Lock'
"""


@fault("pause-at-mark", "relay", 1.3, 4.0)
async def _pause_at_mark(environment: Environment, struck: Struck) -> str:
    """SIGSTOP of a relay while its marks wait for a row, which then comes free; SIGCONT after the lease."""
    relay = await _relay(environment, struck)
    if relay is None:
        return NOBODY
    holder = await asyncpg.connect(environment.postgres.url, timeout=2)
    try:
        await holder.execute("BEGIN")
        await holder.fetch(LOCK)
        end = time.monotonic() + environment.lease_s / 3  # a relay gives up a statement that waits longer for a lock
        while not (waits := await holder.fetch(WAITS, relay.child.pid)) and time.monotonic() < end:
            await asyncio.sleep(0.005)
        struck.now()
        relay.send(signal.SIGSTOP)
    finally:
        holder.terminate()
    await asyncio.sleep(struck.strike.length_s)
    relay.send(signal.SIGCONT)
    return "" if waits else "it asked for no mark"


@fault("term", "relay")
async def _term(environment: Environment, struck: Struck) -> str:
    """SIGTERM of a relay or a generate."""
    process = await _either(environment, struck)
    if process is None:
        return NOBODY
    process.end("term", signal.SIGTERM)
    return ""


@fault("double-term", "relay")
async def _double_term(environment: Environment, struck: Struck) -> str:
    """SIGTERM twice within half a second."""
    process = await _either(environment, struck)
    if process is None:
        return NOBODY
    process.end("double-term", signal.SIGTERM)
    await asyncio.sleep(struck.strike.coin / 2)
    process.send(signal.SIGTERM)
    return ""
