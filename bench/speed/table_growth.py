"""Cost of a message as tables grow.

With the statistics of before the mail came. Databases of all sizes stand beside each other and are measured in turns,
so that a noisy minute is noisy for all.
"""

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import asyncpg

from bench.harness.environment import RESULTS, median
from bench.harness.figures import Target, keep
from bench.harness.seed_data import put_due
from bench.speed.dead_tuples import measure_bloat, measure_held
from bench.speed.prune import measure_prune
from bench.speed.reads import measure_reads
from bench.speed.tick_cost import BASE, BATCH, FLAT, STEPS, console, each_step, place_with, print_costs

PARTS = ("settled", "due", "deferred", "bloat", "held", "prune", "reads")
COMPARED = {"settled": "that were sent", "due": "that are due", "deferred": "that are deferred"}
DAY_S = 86_400.0
READ_RECIPIENTS = 10_000


async def measure(
    url: str,
    *,
    settled: Sequence[int],
    due: Sequence[int],
    deferred: int,
    through: int,
    rounds: int,
    batches: int,
    prune_s: float,
    parts: Sequence[str],
) -> None:
    """Measure all parts, one after the other: tables, and bench/results/growth.json."""
    await _checkpoint_seldom(url)
    found: dict[str, Any] = {"rounds": rounds, "batches": batches, "batch": BATCH}
    few = batches * BATCH
    if "settled" in parts:
        sizes = [(f"{n:,}", n, few, 0) for n in settled]
        found["settled"] = await _compare(url, "sent emails of long ago", sizes, rounds, batches)
    if "due" in parts:
        sizes = [(f"{n:,}", BASE, n, 0) for n in due]
        found["due"] = await _compare(url, "emails that are due", sizes, rounds, batches)
    if "deferred" in parts:
        sizes = [(f"{n:,}", BASE, few, n) for n in (0, deferred)]
        found["deferred"] = await _compare(url, "emails that are due tomorrow", sizes, rounds, batches)
    if "bloat" in parts:
        found["bloat"] = await measure_bloat(url, through)
    if "held" in parts:
        found["held"] = await measure_held(url, through // 20, batches)
    if "prune" in parts:
        found["prune"] = await measure_prune(url, max(settled), rounds, prune_s)
    if "reads" in parts:
        found["reads"] = await measure_reads(url, settled, READ_RECIPIENTS, rounds)
    targets = [
        Target(f"{what} a message costs among {places[-1]['label']} {those}, against {places[0]['label']}",
               _total(places[-1], kind) / _total(places[0], kind), FLAT, "times")
        for part, those in COMPARED.items() if (places := found.get(part))
        for kind, what in (("cpu_us", "CPU that"), ("blocks", "buffers that"))
    ]  # fmt: skip
    keep("growth", {**_kept_before(), **found}, targets)


def _kept_before() -> dict[str, Any]:
    """Return what was measured before, for those parts that are not measured now."""
    path = RESULTS / "growth.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _total(place: dict[str, Any], kind: str) -> float:
    """Return the sum of claim, mark and settle."""
    return sum(median(place[step][kind]) for step in STEPS)


async def _checkpoint_seldom(url: str) -> None:
    admin = await asyncpg.connect(url)
    await admin.execute("ALTER SYSTEM SET checkpoint_timeout = '1h'")
    await admin.execute("SELECT pg_reload_conf()")
    await admin.close()


async def _compare(
    url: str, what: str, sizes: Sequence[tuple[str, int, int, int]], rounds: int, batches: int
) -> list[dict[str, Any]]:
    """Measure databases of these sizes (label, settled, due, deferred) in turns."""
    async with AsyncExitStack() as stack:
        places = [await stack.enter_async_context(place_with(url, n, *size[:2])) for n, size in enumerate(sizes)]
        # One for all, and none before the end (but for its time), since a page costs most when it is first touched
        # after a checkpoint.
        await places[0].watcher.execute("CHECKPOINT")
        for place, (_, _, due, deferred) in zip(places, sizes, strict=True):
            await put_due(place.watcher, deferred, in_s=DAY_S, cancelled_percent=10)
            await put_due(place.watcher, max(due, batches * BATCH))
        for number in range(rounds + 1):
            for place in places:
                await place.round(batches)
                if number == 0:  # what is read for the first time is no cost of its size
                    place.costs = each_step(list)
            console.print(f"{what}: round {number} of {rounds}", style="dim")
        print_costs(what, places)
        return [{"label": place.label, **place.costs} for place in places]
