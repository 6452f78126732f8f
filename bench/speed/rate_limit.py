"""Precision of the fleet's rate while relays come, go and are killed: emails accepted within any ten seconds."""

import asyncio
import signal
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from bench.harness.environment import Environment, open_environment
from bench.harness.figures import Spread, Target, keep, show
from bench.speed.one_relay import message_of

SIZE: Final = 2000
WINDOW_S: Final = 10.0
UP_S: Final = 1.0  # from the first acceptance until the rate is counted
STAY_S: Final = 5.0
WRONG_MAX: Final = 5.0  # per cent
STANDING: Final = 3  # relays that are there from the first to the last
SHARES: Final = "SELECT count(*) FROM outbox.attempt WHERE verdict = 'accepted' AND relay = ANY ($1) GROUP BY relay"


async def measure(url: str, *, rates: Sequence[float], seconds: float, runs: int) -> None:
    """Measure each rate with a fleet that changes all the time; a table and bench/results/rate.json."""
    found: dict[float, list[dict[str, float]]] = {rate: [] for rate in rates}
    for number in range(runs):
        for rate in rates:
            found[rate].append(await _once(url, rate, seconds))
        print(f"run {number + 1} of {runs}")
    names = {"least": "least", "most": "most", "gap_ms": "ten in, ms", "least_share": "least share"}
    show(
        f"Emails accepted within any {WINDOW_S:g} s, of what `rate` allows: {STANDING} relays stay, two others "
        f"come and go every {STAY_S:g} s, each third of them by SIGKILL; median, least and most of {runs} times "
        f"{seconds:g} s",
        ("rate", *names.values()),
        [
            (f"{rate:g}/s", *(Spread.of([one[name] for one in every]).text(",.3f") for name in names))
            for rate, every in found.items()
        ],
    )
    targets = [
        Target(f"{rate:g}/s: the furthest from it within any {WINDOW_S:g} s", max(map(_wrong, every)), WRONG_MAX, "%")
        for rate, every in found.items()
    ]
    keep("rate", {"seconds": seconds, "window_s": WINDOW_S, "runs": runs, "found": found}, targets)


def _wrong(one: dict[str, float]) -> float:
    return 100 * max(1 - one["least"], one["most"] - 1)


async def _once(url: str, rate: float, seconds: float) -> dict[str, float]:
    """Return the rate in the emptiest and fullest window, and how evenly the lasting relays shared it."""
    async with open_environment(url, connections=16, further=f'rate = "{rate:g}/s"') as environment:
        await environment.reset(0)
        await environment.put_emails(int(rate * (seconds + 3 * WINDOW_S)), message_of(SIZE))
        async with environment.relaying(STANDING):
            staying = [r["id"] for r in await environment.connection.fetch("SELECT id FROM outbox.relay")]
            since = environment.mark()
            await environment.accepted(1, since, WINDOW_S)
            await asyncio.sleep(UP_S)
            async with _unrest(environment):
                await asyncio.sleep(seconds)
            ats = sorted(line.at for line in environment.lines(since))
            shares = [row["count"] for row in await environment.connection.fetch(SHARES, staying)]
    counted = [at for at in ats if at >= ats[0] + UP_S]
    counts = within(counted, WINDOW_S)
    gaps = [later - earlier for earlier, later in zip(counted, counted[9:], strict=False)]
    return {
        "least": min(counts) / rate / WINDOW_S,
        "most": max(counts) / rate / WINDOW_S,
        "gap_ms": 1000 * min(gaps),
        "least_share": min(shares) / max(shares) if len(shares) == STANDING else 0.0,
    }


@asynccontextmanager
async def _unrest(environment: Environment) -> AsyncIterator[None]:
    """Run two others for a few seconds, again and again; kill every third of them while it works."""

    async def come_and_go() -> None:
        number = 0
        while True:
            number += 1
            relay = await environment.start("outbox", "relay")
            try:
                await asyncio.sleep(STAY_S)
            finally:
                relay.send_signal(signal.SIGTERM if number % 3 else signal.SIGKILL)
                await relay.communicate()

    unrest = [asyncio.create_task(come_and_go()) for _ in range(2)]
    try:
        yield
    finally:
        for one in unrest:
            one.cancel()
        await asyncio.gather(*unrest, return_exceptions=True)


def within(ats: Sequence[float], window_s: float) -> list[int]:
    """Count how many of these ordered moments lie in each window that begins at one of them and ends by the last."""
    return [bisect_left(ats, at + window_s) - n for n, at in enumerate(ats) if at + window_s <= ats[-1]]
