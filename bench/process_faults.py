"""Faults of processes: relays and generates that are killed, paused or told to stop."""

import asyncio
import signal

from bench.arena import Arena
from bench.fault import NOBODY, Struck, fault
from bench.host import Life


async def _relay(arena: Arena, struck: Struck) -> Life | None:
    struck.victim = await arena.busy_relay(struck.strike.host)
    struck.now()
    return struck.victim


async def _either(arena: Arena, struck: Struck) -> Life | None:
    """The server's generate for every third coin, if it runs; else its relay."""
    cron = arena.hosts[struck.strike.host].cron
    if struck.strike.coin < 1 / 3 and cron is not None and cron.is_alive:
        struck.victim = cron
        return cron
    return await _relay(arena, struck)


@fault("kill", "relay")
async def _kill(arena: Arena, struck: Struck) -> str:
    """SIGKILL of a relay."""
    async with arena.hosts[struck.strike.host].turn:
        relay = await _relay(arena, struck)
        if relay is None:
            return NOBODY
        relay.end("kill", signal.SIGKILL)
        return ""


@fault("kill-generate", "cron")
async def _kill_generate(arena: Arena, struck: Struck) -> str:
    """SIGKILL of a generate; the next cron fires soon."""
    host = arena.hosts[struck.strike.host]
    if host.cron is None or not host.cron.is_alive:
        await arena.fire_cron(host)
        await asyncio.sleep(0.2 + struck.strike.coin)
        struck.now()
    struck.victim = host.cron
    if host.cron is None or not host.cron.is_alive:
        return NOBODY
    host.cron.end("kill-generate", signal.SIGKILL)
    return ""


async def _pause(arena: Arena, struck: Struck) -> str:
    life = await _either(arena, struck)
    if life is None:
        return NOBODY
    life.send(signal.SIGSTOP)
    await asyncio.sleep(struck.strike.length_s)
    life.send(signal.SIGCONT)
    return ""


@fault("pause-short", "relay", 0.2, 0.8)
async def _pause_short(arena: Arena, struck: Struck) -> str:
    """SIGSTOP, and SIGCONT within the lease, of a relay or a generate."""
    return await _pause(arena, struck)


@fault("pause-long", "relay", 1.3, 2.5)
async def _pause_long(arena: Arena, struck: Struck) -> str:
    """SIGSTOP, and SIGCONT after the lease, of a relay or a generate."""
    return await _pause(arena, struck)


@fault("term", "relay")
async def _term(arena: Arena, struck: Struck) -> str:
    """SIGTERM of a relay or a generate."""
    life = await _either(arena, struck)
    if life is None:
        return NOBODY
    life.end("term", signal.SIGTERM)
    return ""


@fault("double-term", "relay")
async def _double_term(arena: Arena, struck: Struck) -> str:
    """SIGTERM twice within half a second."""
    life = await _either(arena, struck)
    if life is None:
        return NOBODY
    life.end("double-term", signal.SIGTERM)
    await asyncio.sleep(struck.strike.coin / 2)
    life.send(signal.SIGTERM)
    return ""
