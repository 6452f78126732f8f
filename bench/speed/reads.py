"""Cost of what people and monitoring read, beside few and many old emails, with the statistics of before this week.

Each database has a history of sent emails, and an edition of this week that was put in after the last ANALYZE: most of
its emails are sent, some are in doubt, dead, without a report, or wait.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from rich.table import Table

from bench.harness.environment import median
from bench.harness.seed_data import stock
from bench.speed.tick_cost import TIMES, console, shade
from outbox.database.connection import Connection
from outbox.database.opening import connect
from outbox.operations.deferrals import read_deferrals
from outbox.operations.email_counts import read_waiting
from outbox.operations.snapshot import read_outcomes, read_snapshot
from outbox.settings.urls import DatabaseUrl

EDITION: Final = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected, looked_at)
VALUES ('progress', '2025-W02', '2025-01-06', '2025-01-13', $1, now()) RETURNING id
"""
# Of a hundred: 1 has no report, 1 is in doubt, 1 dead, 5 wait, the others are sent.
THIS_WEEK: Final = (
    """
INSERT INTO outbox.unreached (edition, recipient_key, reason)
SELECT $2, n, 'its address cannot be used' FROM generate_series(1, $1::bigint) n WHERE n % 100 = 0
""",
    """
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT $2, n, md5('week' || n), 'Progress', rpad('<p>', 100, 'x')
  FROM generate_series(1, $1::bigint) n WHERE n % 100 > 0
""",
    """
INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
SELECT 'progress/2025-W02/' || recipient_key, id, 'reports@example.com', 'p' || recipient_key || '@example.com',
       '<week' || id || '@example.com>', convert_to(rpad('Subject: x', 100, 'x'), 'UTF8')
  FROM outbox.report WHERE edition = $2 AND $1::bigint > 0 ORDER BY id
""",
    """
INSERT INTO outbox.delivery (email, due_at, state, attempt, relay, marked_at, settled_at, doubted_at)
SELECT m.id, now(), s.state, CASE WHEN s.state = 'pending' THEN 0 ELSE 1 END,
       CASE WHEN s.state <> 'pending' THEN 1 END, CASE WHEN s.state <> 'pending' THEN now() END,
       CASE WHEN s.state IN ('sent', 'dead') THEN now() END, CASE WHEN s.state = 'in_doubt' THEN now() END
  FROM outbox.report r JOIN outbox.email m ON m.report = r.id,
       LATERAL (SELECT CASE r.recipient_key::int % 100 WHEN 1 THEN 'in_doubt' WHEN 2 THEN 'dead' WHEN 3 THEN 'pending'
                WHEN 4 THEN 'pending' WHEN 5 THEN 'pending' WHEN 6 THEN 'pending' WHEN 7 THEN 'pending'
                ELSE 'sent' END) AS s (state)
 WHERE r.edition = $2 AND $1::bigint > 0 ORDER BY m.id
""",
)
BLOCKS: Final = "SELECT coalesce(sum(hits), 0) + coalesce(sum(reads), 0) FROM pg_stat_get_backend_io(pg_backend_pid())"

Read = Callable[[Connection, int], Awaitable[Any]]
READS: Final[dict[str, Read]] = {
    "snapshot, as status shows it": lambda there, _: read_snapshot(there, editions_max=20, in_doubt_max=10),
    "outcome of this week's edition": lambda there, edition: read_outcomes(there, [edition]),
    "emails that wait, by the reason": lambda there, _: read_waiting(there),
    "emails that wait after a try": lambda there, _: read_deferrals(there),
}
KINDS: Final = ("ms", "blocks")


async def measure_reads(url: str, settled: Sequence[int], recipients: int, rounds: int) -> list[dict[str, Any]]:
    """Measure each read in databases of these sizes, in turns: milliseconds and buffers, one value per round."""
    async with AsyncExitStack() as stack:
        places: list[tuple[Connection, int, dict[str, Any]]] = []
        for number, size in enumerate(settled):
            there, seeding = await stack.enter_async_context(stock(url, f"reads_{number}", settled=size))
            edition = await seeding.fetchval(EDITION, recipients)
            for statement in THIS_WEEK:
                await seeding.execute(statement, recipients, edition)
            connection = await connect(DatabaseUrl.parse(there), application="outbox bench")
            stack.push_async_callback(connection.close)
            costs: dict[str, dict[str, list[float]]] = {read: {kind: [] for kind in KINDS} for read in READS}
            places.append((connection, edition, {"label": f"{size:,}", "costs": costs}))
            console.print(f"{size:,} sent emails, and an edition of {recipients:,}", style="dim")
        for number in range(rounds + 1):
            for connection, edition, found in places:
                for name, read in READS.items():
                    cost = await _cost(connection, edition, read)
                    if number > 0:  # what is read for the first time is no cost of its size
                        for kind, value in zip(KINDS, cost, strict=True):
                            found["costs"][name][kind].append(value)
        measured = [place[2] for place in places]
        _print(measured, recipients)
        return measured


async def _cost(connection: Connection, edition: int, read: Read) -> tuple[float, float]:
    """Return the milliseconds and the buffers of one read."""
    before = await _blocks(connection)
    began_at = time.perf_counter()
    await read(connection, edition)
    passed_ms = 1e3 * (time.perf_counter() - began_at)
    return passed_ms, await _blocks(connection) - before


async def _blocks(connection: Connection) -> float:
    await connection.execute("SELECT pg_stat_force_next_flush()")
    return float(await connection.fetchval(BLOCKS))


def _print(places: Sequence[dict[str, Any]], recipients: int) -> None:
    table = Table(
        title=f"reads beside so many sent emails ({TIMES} the first); this week's edition has {recipients:,}",
        box=None, title_justify="left",
    )  # fmt: skip
    table.add_column("")
    for place in places:
        for kind in ("ms", "buffers"):
            table.add_column(f"{place['label']}\n{kind}", justify="right")
    for name in READS:
        cells = []
        for place in places:
            for kind in KINDS:
                value, first = (median(one["costs"][name][kind]) for one in (place, places[0]))
                ratio = value / first if first else 1.0
                cells.append(f"{value:,.{1 if kind == 'ms' else 0}f} [{shade(ratio)}]{TIMES}{ratio:.2f}[/]")
        table.add_row(name, *cells)
    console.print(table)
