"""Remains of a million messages, and the cost of a message while nothing dead may be removed."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
from rich.table import Table

from bench.harness.seed_data import TABLES, put_due, stock
from bench.speed.tick_cost import (
    BASE,
    BATCH,
    TIMES,
    Place,
    console,
    cpu_of,
    each_step,
    place_with,
    print_costs,
    session_in,
    settlements_of,
    shade,
)
from outbox.database.driver import DriverConnection
from outbox.relay.claiming import ClaimCursor
from outbox.relay.session import Session
from outbox.relay.settlement import Settlement
from outbox.relay.tick import TickRequest, tick
from outbox.smtp.outgoing import OutgoingEmail

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


async def measure_bloat(url: str, through: int) -> dict[str, Any]:
    """Put emails through in ten portions, with autovacuum as the schema has it; sizes before and after."""
    async with stock(url, "growth_bloat", settled=BASE, autovacuum=True) as (there, connection):
        before = await _sizes(connection)
        session = await session_in(there)
        portions: list[dict[str, float]] = []
        for _ in range(10):
            await put_due(connection, through // 10)
            cpu_us, began_at = cpu_of(session), time.perf_counter()
            count = await _drain(session)
            took = {"us": 1e6 * (time.perf_counter() - began_at), "cpu_us": cpu_of(session) - cpu_us}
            portions.append({kind: value / count for kind, value in took.items()})
            shown = " and ".join(f"{value:.0f} {kind}" for kind, value in portions[-1].items())
            console.print(f"{count:,} more went through: {shown} each", style="dim")
        await session.close()
        after = await _sizes(connection)
    _print_bloat(through, before, after)
    slow = max(one["cpu_us"] for one in portions) / max(min(one["cpu_us"] for one in portions), 1e-9)
    console.print(f"the dearest tenth against the cheapest, in CPU: [{shade(slow)}]{TIMES}{slow:.2f}[/]")
    return {"through": through, "tenths": portions, "before": before, "after": after}


async def _drain(session: Session) -> int:
    """Act as a relay in full swing: each tick settles a batch, marks the next and claims the one after it."""
    settlements: list[Settlement] = []
    claims: list[OutgoingEmail] = []
    frontier = ClaimCursor()
    count = 0
    while True:
        since = frontier.since(time.monotonic())
        marks = [claim.email for claim in claims]
        done = await tick(
            session.connection,
            session.relay,
            TickRequest(settlements=settlements, marks=marks, claims_max=BATCH, since=since),
        )
        frontier.note(done.reached, since, time.monotonic())
        count += len(done.settled)
        settlements = settlements_of(claims, done.marked)
        claims = done.claims
        if not (claims or settlements or since):
            return count


async def _sizes(connection: DriverConnection) -> dict[str, dict[str, int]]:
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


async def measure_held(url: str, through: int, batches: int) -> dict[str, Any]:
    """Measure the cost of a message while a transaction stays open, so that nothing dead may be removed."""
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(place_with(url, 0, "an old snapshot", BASE))
        holder = await stack.enter_async_context(_connected(place.url))
        await put_due(place.watcher, batches * BATCH)
        await place.round(batches)
        place.costs = each_step(list)
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT FROM outbox.edition")
        for _ in range(max(through // batches // BATCH, 6)):
            await place.round(batches)
    ends = {"at first": slice(3), f"{through:,} later": slice(-3, None)}
    print_costs(
        "emails that went through beside an old snapshot", [_part(place, label, part) for label, part in ends.items()]
    )
    return {"through": through, **place.costs}


def _part(place: Place, label: str, rounds: slice) -> Place:
    costs = {step: {kind: values[rounds] for kind, values in kinds.items()} for step, kinds in place.costs.items()}
    return replace(place, label=label, costs=costs)


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()
