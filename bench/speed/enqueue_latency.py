"""Latency of a single email with an idle fleet: from the COMMIT that enqueued it to the sink's acceptance."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.harness.environment import Environment, open_environment, percentile
from bench.harness.figures import Spread, Target, keep, show
from bench.speed.one_relay import message_of
from outbox.database.connection import CHANNEL

POLL_MAX_S: Final = 1.0
DIALOGUE_S: Final = 0.1  # from a claim to the acceptance, at most, when polls are what is waited for
LOST_S: Final = 60.0
SHOWN: Final = {"p50_ms": "p50", "p99_ms": "p99", "max_ms": "max", "standing_p99_ms": "p99 if connected"}

ENQUEUE: Final = """
WITH made AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    VALUES ($1, 'reports@example.com', $1 || '@example.com', '<' || $1 || '@example.com>', $2) RETURNING id
)
INSERT INTO outbox.delivery (email) SELECT id FROM made
"""


@dataclass(frozen=True, slots=True)
class Way:
    """Way in which emails come: whether their commit notifies, and the pause before each."""

    name: str
    notified: bool
    pause_s: tuple[float, float]
    share: float = 1.0
    """Of the singles: where each takes long, there are fewer."""


NOTIFIED: Final = Way("NOTIFY", notified=True, pause_s=(0.1, 0.3))
POLLED: Final = Way("no NOTIFY", notified=False, pause_s=(0.1, 0.3))
POLLED_AT_REST: Final = Way("no NOTIFY, polls at rest", notified=False, pause_s=(2.5, 3.5), share=0.05)


async def measure(url: str, *, relays: Sequence[int], singles: int, runs: int) -> None:
    """Measure all ways with each fleet (polls with the smallest only: they are rarest); a table and latency.json."""
    found: dict[tuple[int, Way], list[dict[str, float]]] = {}
    for number in range(runs):
        for count in relays:
            for way in (NOTIFIED, POLLED, POLLED_AT_REST) if count == min(relays) else (NOTIFIED,):
                figures = await _once(url, count, way, max(round(singles * way.share), 1), random.Random(number))
                found.setdefault((count, way), []).append(figures)
        print(f"run {number + 1} of {runs}")
    show(
        f"From COMMIT to acceptance, ms, {singles} single emails a run: median, least and most of {runs} runs",
        ("relays", "way", *SHOWN.values()),
        [(str(count), way.name, *_cells(every)) for (count, way), every in found.items()],
        words=2,
    )
    polled = [one["max_ms"] / 1000 for (_, way), every in found.items() if not way.notified for one in every]
    notified = found[min(relays), NOTIFIED]
    targets = [
        Target(f"NOTIFY, {min(relays)} relays: {SHOWN[what]}", Spread.of([one[what] for one in notified]).median, limit,
               "ms") for what, limit in {"p50_ms": 10.0, "p99_ms": 50.0}.items()
    ]  # fmt: skip
    targets.append(Target("the longest wait without NOTIFY, poll_max_s = 1", max(polled), POLL_MAX_S + DIALOGUE_S, "s"))
    rows = [{"relays": count, **asdict(way), "runs": every} for (count, way), every in found.items()]
    keep("latency", {"singles": singles, "runs": runs, "poll_max_s": POLL_MAX_S, "found": rows}, targets)


def _cells(every: Sequence[dict[str, float]]) -> list[str]:
    return [Spread.of([one[what] for one in every]).text(",.1f") for what in SHOWN]


async def _once(url: str, relays: int, way: Way, singles: int, chance: random.Random) -> dict[str, float]:
    """Return the waits of all singles, and of those that came on a connection which was already open."""
    further = "" if way.notified else f"poll_max_s = {POLL_MAX_S}"
    async with open_environment(url, connections=4, further=further) as environment:
        await environment.reset(0)
        async with environment.relaying(relays):
            await asyncio.sleep(2 * way.pause_s[1])
            since = environment.mark()
            committed = {}
            for number in range(singles):
                await asyncio.sleep(chance.uniform(*way.pause_s))
                committed[f"single{number}@example.com"] = await _commit(environment, f"single{number}", way)
            lines = await environment.accepted(singles, since, LOST_S)
    if sorted(committed) != sorted(line.address for line in lines):
        raise SystemExit(f"bench: {len(committed)} were enqueued and {len(lines)} accepted.")
    first = {line.port: line.address for line in reversed(lines)}
    waits = {line.address: 1000 * (line.at - committed[line.address]) for line in lines}
    standing = [wait for address, wait in waits.items() if address not in first.values()]
    return {
        "p50_ms": percentile(list(waits.values()), 0.5),
        "p99_ms": percentile(list(waits.values()), 0.99),
        "max_ms": max(waits.values()),
        "standing_p99_ms": percentile(standing, 0.99),
        "opened": len(first),
    }


async def _commit(environment: Environment, key: str, way: Way) -> float:
    """Enqueue one; return the time right after its COMMIT, by the clock of the sink's journal."""
    connection: Any = environment.connection
    async with connection.transaction():
        await connection.execute(ENQUEUE, key, message_of(2000))
        if way.notified:
            await connection.execute("SELECT pg_notify($1, '')", CHANNEL)
    return time.time()
