"""What claim, mark and settle cost per message: through `tick` on a real relay session.

Measured is one backend alone (PostgreSQL 18), so what vacuums and checkpoints do meanwhile is not in it.
"""

import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bench.harness.environment import median
from bench.harness.seed_data import put_due, stock
from outbox.database.failover_rules import Presence
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.claiming import ClaimCursor
from outbox.relay.session import Session, SessionEvents
from outbox.relay.settlement import Settlement
from outbox.relay.statements import STATEMENTS
from outbox.relay.tick import TickRequest, TickResult, tick
from outbox.settings.urls import DatabaseUrl
from outbox.smtp.outgoing import OutgoingEmail
from outbox.smtp.verdict import Outcome

_T = TypeVar("_T")

BATCH = 100
GUARD_S = 5.0
BASE = 100_000
"""Sent emails behind what is measured by another number."""
FLAT = 1.2
TIMES = "\N{MULTIPLICATION SIGN}"
SENT = Outcome(DeliveryState.SENT, "accepted", "250 2.0.0 Ok: queued as 4XyZ1234")
KINDS = ("us", "cpu_us", "blocks", "wal")
STEPS = ("claim", "mark", "settle")

COUNTERS = """
SELECT (SELECT coalesce(sum(hits), 0) + coalesce(sum(reads), 0) FROM pg_stat_get_backend_io($1))::float8,
       (SELECT wal_bytes FROM pg_stat_get_backend_wal($1))::float8
"""

console = Console(width=None if sys.stdout.isatty() else 150)


def each_step(value: Callable[[], _T]) -> dict[str, dict[str, _T]]:
    return {step: {kind: value() for kind in KINDS} for step in STEPS}


@dataclass
class Place:
    """Measured database with a relay's session in it. `costs[step][kind]` has one value per round."""

    label: str
    url: str
    watcher: Any
    session: Session
    frontier: ClaimCursor = field(default_factory=ClaimCursor)
    costs: dict[str, dict[str, list[float]]] = field(default_factory=lambda: each_step(list))

    def cost(self, step: str, kind: str) -> float:
        """Return the median of all rounds, per message."""
        return median(self.costs[step][kind])

    async def round(self, batches: int) -> None:
        """Claim, mark and settle so many batches; put as many emails in anew."""
        spent = each_step(float)
        for _ in range(batches):
            since = self.frontier.since(time.monotonic())
            claimed = await self._timed(spent["claim"], room=BATCH, since=since)
            self.frontier.note(claimed.reached, since, time.monotonic())
            claims = claimed.claims
            assert len(claims) == BATCH, f"{self.label}: {len(claims)} of {BATCH} claimed"
            marked = (await self._timed(spent["mark"], marks=[c.email for c in claims])).marked
            settlements = settlements_of(claims, marked)
            assert len((await self._timed(spent["settle"], settlements=settlements)).settled) == BATCH
        for step, found in spent.items():
            for kind, value in found.items():
                self.costs[step][kind].append(value / batches / BATCH)
        await put_due(self.watcher, batches * BATCH)

    async def _timed(self, spent: dict[str, float], **what: Any) -> TickResult:
        blocks, wal = await self._counters()
        cpu_us, began_at = cpu_of(self.session), time.perf_counter()
        done = await tick(self.session.connection, self.session.relay, TickRequest(**what))
        spent["us"] += 1e6 * (time.perf_counter() - began_at)
        spent["cpu_us"] += cpu_of(self.session) - cpu_us
        after = await self._counters()
        spent["blocks"] += after[0] - blocks
        spent["wal"] += after[1] - wal
        return done

    async def _counters(self) -> tuple[float, float]:
        await self.session.connection.execute("SELECT pg_stat_force_next_flush()")
        blocks, wal = await self.watcher.fetchrow(COUNTERS, self.session.connection.get_server_pid())
        return blocks, wal


def settlements_of(claims: Sequence[OutgoingEmail], attempts: dict[int, int]) -> list[Settlement]:
    """Return settlements that say that all were sent."""
    return [Settlement(c.relay, c.email, c.key, attempts[c.email], marked=True, outcome=SENT) for c in claims]


def cpu_of(session: Session) -> float:
    """Return the CPU time of the session's backend: steadier than time where others use the machine (proc(5))."""
    try:
        told = Path(f"/proc/{session.connection.get_server_pid()}/schedstat").read_text()
    except OSError:
        return 0.0
    return int(told.split()[0]) / 1e3


async def session_in(url: str) -> Session:
    lease_s = 600.0
    return await Session.open(
        DatabaseUrl.parse(url),
        lease_s=lease_s,
        events=SessionEvents(),
        statements=STATEMENTS,
        standing=Presence.new(GUARD_S, lease_s).standing(None, grace_s=0.0),
    )


@asynccontextmanager
async def place_with(url: str, number: int, label: str, settled: int) -> AsyncIterator[Place]:
    began_at = time.monotonic()
    async with stock(url, f"growth_{number}", settled=settled) as (there, connection):
        console.print(
            f"{label}: {settled:,} sent emails put in within {time.monotonic() - began_at:.0f} s", style="dim"
        )
        session = await session_in(there)
        try:
            yield Place(label, there, connection, session)
        finally:
            await session.close()


def print_costs(what: str, places: Sequence[Place]) -> None:
    table = Table(title=f"per message, by the number of {what} ({TIMES} the first)", box=None, title_justify="left")
    table.add_column("", justify="right")
    for kind in ("µs", "µs of CPU", "buffers", "B of WAL"):
        for step in STEPS:
            table.add_column(f"{step}\n{kind}", justify="right")
    for place in places:
        cells = []
        for kind in KINDS:
            for step in STEPS:
                value, first = place.cost(step, kind), places[0].cost(step, kind)
                ratio = value / first if first else 1.0
                cells.append(f"{value:,.{0 if kind == 'wal' else 1}f} [{shade(ratio)}]{TIMES}{ratio:.2f}[/]")
        table.add_row(place.label, *cells)
    console.print(table)


def shade(ratio: float) -> str:
    return "green" if ratio <= FLAT else "bold red"
