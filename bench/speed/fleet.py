"""Fleet: N servers fire their cron at the same instant while M relays run; the cost of the main job, and its result."""

import asyncio
import re
import signal
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.environment import Environment, duplicates, median, open_environment, percentile
from bench.harness.figures import Target, keep


async def measure(url: str, *, servers: int, relays: int, recipients: int, connections: int, runs: int) -> None:
    """Measure several runs; a table and bench/results/fleet.json."""
    console = Console()
    found = []
    async with open_environment(url, connections=connections) as environment:
        for number in range(runs):
            found.append(await _once(environment, servers, relays, recipients))
            console.print(f"run {number + 1} of {runs}: {found[-1]['all_accepted_s']:.2f} s", style="dim")
    table = Table(title=f"{servers} crons at once, {relays} relays, {recipients} recipients ({runs} runs)", box=None)
    for column in ("what", "median", "least", "most"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, unit in _ROWS.items():
        values = [run[what] for run in found]
        table.add_row(f"{what} {unit}".strip(), *(f"{v:,.3g}" for v in (median(values), min(values), max(values))))
    console.print(table)
    wrong = sum(run[what] for run in found for what in ("duplicates", "lost", "not_made_once", "bad_exits"))
    targets = [Target("crons at once: duplicates, losses, reports made twice, bad exits", wrong, 0, "")]
    keep("fleet", {"servers": servers, "relays": relays, "recipients": recipients, "runs": found}, targets)


_ROWS = {
    "generate_s": "crons' start to the last one's exit",
    "first_accepted_s": "crons' start to the first email",
    "all_accepted_s": "crons' start to the last email",
    "sent_per_s": "first to last email",
    "latency_p50_ms": "commit to acceptance",
    "latency_p99_ms": "commit to acceptance",
    "duplicates": "addresses with more than one email",
    "lost": "addresses without",
    "not_made_once": "recipients without exactly one report",
    "bad_exits": "commands that did not exit 0",
}


async def _once(environment: Environment, servers: int, relays: int, recipients: int) -> dict[str, float]:
    await environment.reset(recipients)
    running = [await environment.start("outbox", "relay") for _ in range(relays)]
    while await environment.connection.fetchval("SELECT count(*) FROM outbox.relay") < relays:
        await asyncio.sleep(0.02)
    await asyncio.sleep(1.0)  # quiet: the relays have looked once and listen
    since = environment.mark()

    began_at = time.time()
    crons = await asyncio.gather(*(environment.start("outbox", "generate") for _ in range(servers)))
    said = [(await cron.communicate())[0].decode() for cron in crons]
    generated_at = time.time()
    await environment.accepted(recipients, since, deadline_s=60 + recipients / 200)
    await _until_settled(environment)
    for relay in running:
        relay.send_signal(signal.SIGTERM)
    for relay in running:
        await relay.communicate()

    lines = environment.lines(since)
    latencies = await _latencies(environment, {line.message_id.strip("<>"): line.at for line in lines})
    ats = [line.at for line in lines]
    addresses = {line.address for line in lines}
    reports = await environment.connection.fetchval("SELECT count(*) FROM outbox.report")
    made = sum(int(match[1]) for text in said if (match := re.search(r"(\d+) made here", text)))
    return {
        "generate_s": generated_at - began_at,
        "first_accepted_s": min(ats, default=began_at) - began_at,
        "all_accepted_s": max(ats, default=began_at) - began_at,
        "sent_per_s": len(ats) / max(max(ats, default=0) - min(ats, default=0), 1e-3),
        "latency_p50_ms": 1000 * percentile(latencies, 0.5),
        "latency_p99_ms": 1000 * percentile(latencies, 0.99),
        "duplicates": duplicates(lines),
        "lost": recipients - len(addresses),
        "not_made_once": abs(recipients - reports) + abs(recipients - made),
        "bad_exits": sum(process.returncode != 0 for process in [*crons, *running]),
    }


async def _until_settled(environment: Environment) -> None:
    waiting = "SELECT count(*) FROM outbox.delivery WHERE settled_at IS NULL"
    end = time.monotonic() + 30
    while await environment.connection.fetchval(waiting) and time.monotonic() < end:
        await asyncio.sleep(0.05)


async def _latencies(environment: Environment, accepted: dict[str, float]) -> list[float]:
    """Return the seconds from the transaction that made each email to its acceptance."""
    rows: list[Any] = await environment.connection.fetch("SELECT message_id, created_at FROM outbox.email")
    at = {row["message_id"].strip("<>"): row["created_at"].timestamp() for row in rows}
    return [accepted_at - at[message_id] for message_id, accepted_at in accepted.items() if message_id in at]
