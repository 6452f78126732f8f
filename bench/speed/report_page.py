"""Latency of a report page while requests come at a fixed rate, among so many stored reports.

An open loop: request n is due at n/rate whatever became of those before it, and its time counts from when it was due,
so that a server which stalls is not asked less often for it. The client keeps its connections, as a proxy would.
"""

import asyncio
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from bench.harness.environment import Environment, open_environment, percentile
from bench.harness.figures import Spread, Target, keep, show

TARGET_P95_MS: Final = 50.0
SHOWN: Final = {"p50_ms": "p50", "p95_ms": "p95", "p99_ms": "p99", "max_ms": "max"}

# Copies of one page as generate made it; of each kept so many, every one with a token and a recipient of its own.
FILL: Final = """
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT edition, 'r' || n, lpad(n::text, 22, '0'), title, html
  FROM (SELECT * FROM outbox.report ORDER BY id LIMIT 1) made, generate_series($1::int, $2::int) n
"""
FILLED_AT_ONCE: Final = 100_000


@dataclass(slots=True)
class Client:
    """Client with connections to one server, used again when they are free."""

    port: int
    cookie: bytes = b""
    """The line of a request that says who is signed in."""
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    opened: int = 0

    async def get(self, path: str) -> int:
        """Return the status of the answer, which is read to its end. A kept connection may have been closed as idle."""
        while self.free:
            reader, writer = self.free.pop()
            if not reader.at_eof():
                try:
                    return await self._get(path, reader, writer)
                except (ConnectionError, asyncio.IncompleteReadError) as error:
                    if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                        raise
            writer.close()
        self.opened += 1
        return await self._get(path, *await asyncio.open_connection("127.0.0.1", self.port))

    async def _get(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode() + self.cookie + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        if given := re.search(rb"(?i)^set-cookie: ([^;\r]+)", head, re.MULTILINE):
            self.cookie = b"Cookie: " + given[1] + b"\r\n"
        length = re.search(rb"content-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)
        self.free.append((reader, writer))
        return int(head[9:12])


async def measure(url: str, *, reports: Sequence[int], rate: int, seconds: float, runs: int) -> None:
    """Measure each number of reports in turn, so many runs each; a table and web.json."""
    found: dict[int, list[dict[str, float]]] = {}
    async with open_environment(url, connections=4) as environment:
        await environment.reset(1)
        await _generate(environment)
        there = 0
        for count in sorted(reports):
            for first in range(there + 1, count + 1, FILLED_AT_ONCE):
                await environment.connection.execute(FILL, first, min(first + FILLED_AT_ONCE - 1, count), timeout=3600)
            there = count
            await environment.connection.execute("VACUUM ANALYZE outbox.report", timeout=3600)
            await environment.connection.execute("CHECKPOINT", timeout=3600)
            async with serving(environment, "--pages-only") as client:
                found[count] = [await once(client, _some_report(count, n), rate, seconds) for n in range(runs)]
    show(
        f"The report page at {rate} requests/s for {seconds:g} s, ms: median, least and most of {runs} runs",
        ("reports", *SHOWN.values(), "connections"),
        [(f"{count:,}", *_cells(every), f"{every[-1]['opened']:.0f}") for count, every in found.items()],
    )
    targets = [
        Target(f"the report page among {count:,}, p95", Spread.of([one["p95_ms"] for one in every]).median,
               TARGET_P95_MS, "ms") for count, every in found.items()
    ]  # fmt: skip
    keep("web", {"rate": rate, "seconds": seconds, "runs": runs, "found": found}, targets)


def _cells(every: Sequence[dict[str, float]]) -> list[str]:
    return [Spread.of([one[what] for one in every]).text(",.1f") for what in SHOWN]


async def _generate(environment: Environment) -> None:
    made = await environment.start("outbox", "generate")
    await made.communicate()
    if made.returncode:
        raise SystemExit(f"bench: generate failed: {environment.log_tail()}")


@asynccontextmanager
async def serving(environment: Environment, *arguments: str) -> AsyncIterator[Client]:
    """Run `outbox web` in a process of its own; yield a client that is signed in to the board, if there is one."""
    log = environment.directory / "log"
    said_before = log.stat().st_size
    process = await environment.start("outbox", "web", "--http", "127.0.0.1:0", *arguments)
    try:
        found: Any = None
        while found is None:
            if process.returncode is not None:
                raise SystemExit(f"bench: outbox web ended: {environment.log_tail()}")
            await asyncio.sleep(0.05)
            found = re.search(rb"http://127\.0\.0\.1:(\d+)(/(?:\?token=[\w-]+)?)", log.read_bytes()[said_before:])
        client = Client(int(found[1]))
        if b"token" in found[2]:
            await client.get(found[2].decode())
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()


def _some_report(reports: int, seed: int) -> Callable[[], str]:
    chance = random.Random(seed)
    return lambda: f"/r/{chance.randint(1, reports):022}"


async def once(client: Client, path: Callable[[], str], rate: float, seconds: float) -> dict[str, float]:
    """Return the latencies for so many requests a second, each for the next path."""
    waits: list[float] = []
    refused: list[int] = []

    async def ask(due_at: float) -> None:
        status = await client.get(path())
        waits.append(1000 * (time.monotonic() - due_at))
        if status != 200:
            refused.append(status)

    begins_at = time.monotonic() + 0.2
    asked = []
    for number in range(int(rate * seconds)):
        due_at = begins_at + number / rate
        await asyncio.sleep(max(due_at - time.monotonic(), 0))
        asked.append(asyncio.create_task(ask(due_at)))
    await asyncio.gather(*asked)
    if refused:
        raise SystemExit(f"bench: {len(refused)} of {len(waits)} answers were no page, the first {refused[0]}.")
    return {
        "p50_ms": percentile(waits, 0.5),
        "p95_ms": percentile(waits, 0.95),
        "p99_ms": percentile(waits, 0.99),
        "max_ms": max(waits),
        "opened": client.opened,
    }
