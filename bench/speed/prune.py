"""Speed of a prune, and what it takes from a relay beside it."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from bench.harness.environment import Environment, median, open_environment
from bench.harness.seed_data import put_due, stock
from bench.speed.tick_cost import TIMES, console, shade

MAILS = 20_000


async def measure_prune(url: str, settled: int, rounds: int, prune_s: float) -> dict[str, Any]:
    """Measure a prune for a while, alone; then a relay's rate without and with one beside it, in turns."""
    async with (
        stock(url, "growth_prune", settled=settled, autovacuum=True) as (there, connection),
        open_environment(there, connections=16) as environment,
    ):
        environment.write_settings()
        lsn = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
        async with _pruning(environment) as alone:
            await asyncio.sleep(prune_s)
        wal = float(await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1)", lsn))
        rates: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(rounds):
            rates["without"].append(await _relayed(environment))
            async with _pruning(environment) as beside:
                rates["with"].append(await _relayed(environment))
            console.print(f"round {number + 1} of {rounds}: {beside['emails']:,} pruned beside a relay", style="dim")
    _print_prune(settled, alone, wal, rates)
    return {"settled": settled, "alone": alone, "wal": wal, "relay_per_s": rates}


@asynccontextmanager
async def _pruning(environment: Environment) -> AsyncIterator[dict[str, float]]:
    """Run a prune in the block; its figures are there after it."""
    found: dict[str, float] = {}
    began_at = time.perf_counter()
    process = await environment.start("outbox", "prune", "--keep", "400d", "--json")
    yield found
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    out, _ = await process.communicate()
    assert process.returncode in (0, 128 + signal.SIGTERM), f"{process.returncode}: {out.decode()}"
    found |= {name: value for name, value in json.loads(out).items() if isinstance(value, int)}
    found["s"] = time.perf_counter() - began_at


async def _relayed(environment: Environment) -> float:
    """Return the emails per second of one relay, from the first acceptance to the last."""
    await environment.connection.execute("VACUUM outbox.delivery")  # else each finds more dead rows than the one before
    await put_due(environment.connection, MAILS)
    since = environment.mark()
    process = await environment.start("outbox", "relay", "--until-empty")
    await process.communicate()
    assert process.returncode == 0, environment.log_tail()
    ats = [line.at for line in await environment.accepted(MAILS, since, deadline_s=5)]
    assert len(ats) == MAILS, f"{len(ats)} of {MAILS} accepted"
    return MAILS / (max(ats) - min(ats))


def _print_prune(settled: int, alone: dict[str, float], wal: float, rates: dict[str, list[float]]) -> None:
    without, beside = median(rates["without"]), median(rates["with"])
    emails = max(alone["emails"], 1)
    console.print(
        f"prune of {settled:,} emails, alone: {emails / alone['s']:,.0f} emails/s with their attempts, "
        f"{wal / emails:,.0f} B of WAL each ({emails:,} in {alone['s']:.0f} s)\n"
        f"a relay beside a prune: {beside:,.0f}/s, without one {without:,.0f}/s: "
        f"[{shade(without / beside)}]{TIMES}{beside / without:.2f}[/]"
    )
