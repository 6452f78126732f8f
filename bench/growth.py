"""What claim, mark and settle cost per message as tables grow, what a million messages leave behind, and a prune.

Through `ledger.tick` on a real relay session, with the statistics of before the mail came. Databases of all sizes stand
beside each other and are measured in turns, so that a noisy minute is noisy for all.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from rich.console import Console
from rich.table import Table

from bench.stock import TABLES, put_due, stock
from bench.world import World, median, save, world
from outbox import ledger
from outbox.address import DatabaseUrl
from outbox.ledger import Settlement
from outbox.relay import STATEMENTS
from outbox.session import Session
from outbox.verdict import Outcome

_T = TypeVar("_T")

BATCH = 100
BASE = 100_000
"""Sent emails behind what is measured by another number."""
FLAT = 1.2
TIMES = "\N{MULTIPLICATION SIGN}"
SENT = Outcome("sent", "accepted", "250 2.0.0 Ok: queued as 4XyZ1234")
KINDS = ("us", "cpu_us", "blocks", "wal")
STEPS = ("claim", "mark", "settle")
PARTS = ("settled", "due", "deferred", "bloat", "prune")
DAY_S = 86_400.0

# Of one backend alone (PostgreSQL 18): what vacuums and checkpoints do is not in it.
COUNTERS = """
SELECT (SELECT coalesce(sum(hits), 0) + coalesce(sum(reads), 0) FROM pg_stat_get_backend_io($1))::float8,
       (SELECT wal_bytes FROM pg_stat_get_backend_wal($1))::float8
"""

console = Console(width=None if sys.stdout.isatty() else 150)


def _each_step(value: Callable[[], _T]) -> dict[str, dict[str, _T]]:
    return {step: {kind: value() for kind in KINDS} for step in STEPS}


@dataclass
class Place:
    """A database that is measured, with a relay's session in it. `costs[step][kind]` has one value per round."""

    label: str
    watcher: Any
    session: Session
    costs: dict[str, dict[str, list[float]]] = field(default_factory=lambda: _each_step(list))

    def cost(self, step: str, kind: str) -> float:
        """The median of all rounds, per message."""
        return median(self.costs[step][kind])

    async def round(self, batches: int) -> None:
        """So many batches claimed, marked and settled; as many emails come anew."""
        spent = _each_step(float)
        for _ in range(batches):
            claims = (await self._timed(spent["claim"], room=BATCH)).claims
            assert len(claims) == BATCH, f"{self.label}: {len(claims)} of {BATCH} claimed"
            marked = (await self._timed(spent["mark"], marks=[c.email for c in claims])).marked
            settlements = [
                Settlement(c.relay, c.email, c.key, marked[c.email], marked=True, outcome=SENT) for c in claims
            ]
            assert len((await self._timed(spent["settle"], settlements=settlements)).settled) == BATCH
        for step, found in spent.items():
            for kind, value in found.items():
                self.costs[step][kind].append(value / batches / BATCH)
        await put_due(self.watcher, batches * BATCH)

    async def _timed(self, spent: dict[str, float], **what: Any) -> ledger.Tick:
        blocks, wal = await self._counters()
        cpu_us, began_at = self._cpu_us(), time.perf_counter()
        done = await ledger.tick(self.session.connection, self.session.relay, **what)
        spent["us"] += 1e6 * (time.perf_counter() - began_at)
        spent["cpu_us"] += self._cpu_us() - cpu_us
        after = await self._counters()
        spent["blocks"] += after[0] - blocks
        spent["wal"] += after[1] - wal
        return done

    async def _counters(self) -> tuple[float, float]:
        await self.session.connection.execute("SELECT pg_stat_force_next_flush()")
        blocks, wal = await self.watcher.fetchrow(COUNTERS, self.session.connection.get_server_pid())
        return blocks, wal

    def _cpu_us(self) -> float:
        """What the session's backend has computed so far: steadier than time where others use the machine (proc(5))."""
        try:
            told = Path(f"/proc/{self.session.connection.get_server_pid()}/schedstat").read_text()
        except OSError:
            return 0.0
        return int(told.split()[0]) / 1e3


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
    """All parts, one after the other: tables, and bench/results/growth.json."""
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
        found["bloat"] = await _bloat(url, through)
    if "prune" in parts:
        found["prune"] = await _prune(url, max(settled), rounds, prune_s)
    console.print(f"[dim]{save('growth', found)}[/dim]")


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
        places = [await stack.enter_async_context(_place(url, n, *size[:2])) for n, size in enumerate(sizes)]
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
                    place.costs = _each_step(list)
            console.print(f"{what}: round {number} of {rounds}", style="dim")
        _print_costs(what, places)
        return [{"label": place.label, **place.costs} for place in places]


@asynccontextmanager
async def _place(url: str, number: int, label: str, settled: int) -> AsyncIterator[Place]:
    began_at = time.monotonic()
    async with stock(url, f"growth_{number}", settled=settled) as (there, connection):
        console.print(
            f"{label}: {settled:,} sent emails put in within {time.monotonic() - began_at:.0f} s", style="dim"
        )
        session = await _session(there)
        try:
            yield Place(label, connection, session)
        finally:
            await session.close()


async def _session(url: str) -> Session:
    nothing = lambda: None  # noqa: E731
    return await Session.open(
        DatabaseUrl.parse(url), lease_s=600, wake=nothing, on_lost=nothing, former=None, statements=STATEMENTS
    )


def _print_costs(what: str, places: Sequence[Place]) -> None:
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
                cells.append(f"{value:,.{0 if kind == 'wal' else 1}f} [{_shade(ratio)}]{TIMES}{ratio:.2f}[/]")
        table.add_row(place.label, *cells)
    console.print(table)


def _shade(ratio: float) -> str:
    return "green" if ratio <= FLAT else "bold red"


# ── what a million messages leave behind ─────────────────────────────────────────────────────────────────────────────

SIZES = """
SELECT c.relname AS name, pg_table_size(c.oid) AS heap, pg_indexes_size(c.oid) AS indexes, s.n_dead_tup AS dead,
       s.n_tup_upd AS updates, s.n_tup_hot_upd AS heap_only, s.autovacuum_count AS vacuums
  FROM pg_class c JOIN pg_stat_user_tables s ON s.relid = c.oid
 WHERE c.oid = ANY ($1::regclass[]) ORDER BY c.oid
"""
INDEXES = """
SELECT relname AS name, pg_relation_size(oid) AS bytes FROM pg_class WHERE relkind = 'i' AND relname LIKE 'delivery%'
 ORDER BY oid
"""


async def _bloat(url: str, through: int) -> dict[str, Any]:
    """Put emails through in ten portions, with autovacuum as the schema has it; sizes before and after."""
    async with stock(url, "growth_bloat", settled=BASE, autovacuum=True) as (there, connection):
        before = await _sizes(connection)
        session = await _session(there)
        portions: list[float] = []
        for _ in range(10):
            await put_due(connection, through // 10)
            began_at = time.perf_counter()
            count = await _drain(session)
            portions.append(1e6 * (time.perf_counter() - began_at) / max(count, 1))
            console.print(f"{count:,} more went through: {portions[-1]:.0f} µs each", style="dim")
        await session.close()
        after = await _sizes(connection)
    _print_bloat(through, before, after)
    slow = portions[-1] / portions[0]
    console.print(f"the last tenth against the first, per message: [{_shade(slow)}]{TIMES}{slow:.2f}[/]")
    return {"through": through, "us_by_tenths": portions, "before": before, "after": after}


async def _drain(session: Session) -> int:
    """As a relay in full swing: each tick settles a batch, marks the next and claims the one after it."""
    settlements: list[Settlement] = []
    claims: list[ledger.Claim] = []
    count = 0
    while True:
        done = await ledger.tick(
            session.connection, session.relay, settlements=settlements, marks=[c.email for c in claims], room=BATCH
        )
        count += len(done.settled)
        settlements = [
            Settlement(c.relay, c.email, c.key, done.marked[c.email], marked=True, outcome=SENT) for c in claims
        ]
        claims = done.claims
        if not claims and not settlements:
            return count


async def _sizes(connection: Any) -> dict[str, dict[str, int]]:
    await asyncio.sleep(1.5)  # sessions tell their statistics once a second
    tables = await connection.fetch(SIZES, [f"outbox.{table}" for table in TABLES])
    indexes = await connection.fetch(INDEXES)
    return {row["name"]: {name: value for name, value in row.items() if name != "name"} for row in (*tables, *indexes)}


def _print_bloat(through: int, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    table = Table(title=f"after {through:,} messages, autovacuum on", box=None, title_justify="left")
    for column in ("", "MB", "before", "indexes MB", "before", "dead rows", "heap-only", "autovacuums"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in after.items():
        was = before[name]
        if "bytes" in row:
            table.add_row(f"  {name}", _mb(row["bytes"]), _mb(was["bytes"]))
            continue
        updates = row["updates"] - was["updates"]
        share = f"{(row['heap_only'] - was['heap_only']) / updates:.0%}" if updates else ""
        table.add_row(
            name, _mb(row["heap"]), _mb(was["heap"]), _mb(row["indexes"]), _mb(was["indexes"]), f"{row['dead']:,}",
            share, str(row["vacuums"] - was["vacuums"]),
        )  # fmt: skip
    console.print(table)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


# ── a prune, and a relay beside it ───────────────────────────────────────────────────────────────────────────────────

MAILS = 20_000


async def _prune(url: str, settled: int, rounds: int, prune_s: float) -> dict[str, Any]:
    """A prune for a while, alone; then a relay's rate without and with one beside it, in turns."""
    async with (
        stock(url, "growth_prune", settled=settled) as (there, connection),
        world(there, connections=16) as place,
    ):
        place.write_settings()
        lsn = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
        async with _pruning(place) as alone:
            await asyncio.sleep(prune_s)
        wal = float(await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1)", lsn))
        rates: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(rounds):
            rates["without"].append(await _relayed(place))
            async with _pruning(place) as beside:
                rates["with"].append(await _relayed(place))
            console.print(f"round {number + 1} of {rounds}: {beside['emails']:,} pruned beside a relay", style="dim")
    _print_prune(settled, alone, wal, rates)
    return {"settled": settled, "alone": alone, "wal": wal, "relay_per_s": rates}


@asynccontextmanager
async def _pruning(place: World) -> AsyncIterator[dict[str, float]]:
    """A prune runs in the block; what it did is there after it."""
    found: dict[str, float] = {}
    began_at = time.perf_counter()
    process = await place.start("outbox", "prune", "--keep", "400d", "--json")
    yield found
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    out, _ = await process.communicate()
    assert process.returncode in (0, 128 + signal.SIGTERM), f"{process.returncode}: {out.decode()}"
    found |= {name: value for name, value in json.loads(out).items() if isinstance(value, int)}
    found["s"] = time.perf_counter() - began_at


async def _relayed(place: World) -> float:
    """Emails per second of one relay, from the first acceptance to the last."""
    await put_due(place.connection, MAILS)
    since = place.mark()
    process = await place.start("outbox", "relay", "--until-empty")
    await process.communicate()
    assert process.returncode == 0, (place.directory / "log").read_text()[-2000:]
    ats = [line.at for line in await place.accepted(MAILS, since, deadline_s=5)]
    assert len(ats) == MAILS, f"{len(ats)} of {MAILS} accepted"
    return MAILS / (max(ats) - min(ats))


def _print_prune(settled: int, alone: dict[str, float], wal: float, rates: dict[str, list[float]]) -> None:
    without, beside = median(rates["without"]), median(rates["with"])
    emails = max(alone["emails"], 1)
    console.print(
        f"prune of {settled:,} emails, alone: {emails / alone['s']:,.0f} emails/s with their attempts, "
        f"{wal / emails:,.0f} B of WAL each ({emails:,} in {alone['s']:.0f} s)\n"
        f"a relay beside a prune: {beside:,.0f}/s, without one {without:,.0f}/s: "
        f"[{_shade(without / beside)}]{TIMES}{beside / without:.2f}[/]"
    )
