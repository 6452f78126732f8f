"""A fleet of relays: how its size changes what is sent per second, and what it costs while there is nothing to send."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from bench.harness.environment import duplicates, open_environment
from bench.harness.figures import Spread, Target, keep, show
from bench.harness.process_usage import cpu_s, family, memory_mb, postmaster
from bench.speed.one_relay import message_of
from outbox.database.connection import CHANNEL

SIZE: Final = 2000
SETTLED_S: Final = 15.0  # until polls and sweeps of a fleet that has just come up are at rest
SENT_S: Final = 300.0
IDLE_MAX: Final = 2.0

# The bytes first, so that all become due in one short transaction while the relays stand and listen.
PUT: Final = """
INSERT INTO outbox.email (key, sender, recipient, message_id, message)
SELECT 'mail' || n, 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@example.com>', $2
  FROM generate_series(1, $1) n
"""
MAKE_DUE: Final = "INSERT INTO outbox.delivery (email) SELECT id FROM outbox.email"
SHARES: Final = "SELECT count(*) FROM outbox.attempt WHERE verdict = 'accepted' GROUP BY relay"
COMMITS: Final = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"


async def measure(
    url: str, *, relays: Sequence[int], emails: int, connections: int, idle: int, idle_s: float, runs: int
) -> None:
    """Alternate the sizes, then let a large fleet idle; tables and bench/results/relays.json."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in relays}
    for number in range(runs):
        for count in relays:
            found[count].append(await _throughput(url, count, emails, connections))
        print(f"run {number + 1} of {runs}")
    _show_throughput(found, emails, connections, runs)
    resting = await _idle(url, idle, idle_s, runs) if idle else []
    if resting:
        _show_idle(resting, idle, idle_s)
    rates = {count: Spread.of([one["per_s"] for one in every]).median for count, every in found.items()}
    targets = [
        Target(f"{count} relays against one", rates[count] / rates[1], 1, "times", at_least=True)
        for count in relays if count > 1 and 1 in rates
    ]  # fmt: skip
    targets += [
        Target(f"{idle} idle relays: CPU of Postgres", Spread.of([one["postgres"] for one in resting]).median, IDLE_MAX,
               "% of a core") for _ in resting[:1]
    ]  # fmt: skip
    result = {"emails": emails, "size": SIZE, "connections": connections, "runs": runs, "found": found}
    keep("relays", {**result, "idle": {"relays": idle, "seconds": idle_s, "found": resting}}, targets)


def _show_throughput(found: dict[int, list[dict[str, float]]], emails: int, connections: int, runs: int) -> None:
    one = Spread.of([run["per_s"] for run in next(iter(found.values()))]).median
    spreads = {count: {what: Spread.of([run[what] for run in every]) for what in every[0]}
               for count, every in found.items()}  # fmt: skip
    show(
        f"{emails} emails of {SIZE} bytes, {connections} connections each: median, least and most of {runs} runs",
        ("relays", "sent/s", "against the first", "relays' CPU µs/msg", "Postgres' CPU µs/msg", "commits/msg",
         "least share"),
        [
            (str(count), of["per_s"].text(",.0f"), f"{of['per_s'].median / one:.2f}", f"{of['relay_us'].median:,.0f}",
             f"{of['postgres_us'].median:,.0f}", f"{of['commits'].median:.3f}", f"{of['least_share'].median:.2f}")
            for count, of in spreads.items()
        ],
    )  # fmt: skip


def _show_idle(resting: Sequence[dict[str, float]], idle: int, idle_s: float) -> None:
    names = {
        "postgres": "CPU of Postgres, % of a core", "relays": "CPU of all relays, % of a core",
        "commits": "transactions/s", "relay_mb": "memory of a relay, MB",
    }  # fmt: skip
    show(
        f"{idle} idle relays: median, least and most of {len(resting)} times {idle_s:g} s",
        ("what", "figure"),
        [(name, Spread.of([one[what] for one in resting]).text(",.2f")) for what, name in names.items()],
    )


async def _throughput(url: str, relays: int, emails: int, connections: int) -> dict[str, float]:
    """Measure from the first acceptance to the last, with a fleet that listens before the mail is there."""
    async with open_environment(url, connections=connections) as environment:
        await environment.reset(0)
        await environment.connection.execute(PUT, emails, message_of(SIZE))
        await environment.connection.execute("ANALYZE outbox.email")
        server = await postmaster(environment.connection)
        async with environment.relaying(relays) as running:
            await asyncio.sleep(1)
            await environment.connection.execute("CHECKPOINT")
            since = environment.mark()
            pids = [one.pid for one in running]
            commits = await environment.connection.fetchval(COMMITS)
            before = cpu_s(pids), cpu_s(family(server))
            async with environment.connection.transaction():
                await environment.connection.execute(MAKE_DUE)
                await environment.connection.execute("ANALYZE outbox.delivery")
                await environment.connection.execute("SELECT pg_notify($1, '')", CHANNEL)
            lines = await environment.accepted(emails, since, SENT_S)
            after = cpu_s(pids), cpu_s(family(server))
        commits = await environment.connection.fetchval(COMMITS) - commits
        shares = [row["count"] for row in await environment.connection.fetch(SHARES)]
    if len(lines) != emails or duplicates(lines):
        raise SystemExit(f"bench: of {emails} emails {len(lines)} were accepted, {duplicates(lines)} of them twice.")
    ats = [line.at for line in lines]
    return {
        "per_s": emails / (max(ats) - min(ats)),
        "relay_us": 1e6 * (after[0] - before[0]) / emails,
        "postgres_us": 1e6 * (after[1] - before[1]) / emails,
        "commits": commits / emails,
        "least_share": min(shares) * relays / emails if len(shares) == relays else 0.0,
    }


async def _idle(url: str, relays: int, seconds: float, windows: int) -> list[dict[str, float]]:
    """Measure the cost of a fleet that has nothing to do, in several stretches of so many seconds."""
    found = []
    async with open_environment(url, connections=16) as environment:
        await environment.reset(0)
        server = await postmaster(environment.connection)
        async with environment.relaying(relays) as running:
            pids = [one.pid for one in running]
            await asyncio.sleep(SETTLED_S)
            await environment.connection.execute("CHECKPOINT")  # of what was written before; it is no cost of idling
            for _ in range(windows):
                began, commits = time.monotonic(), await environment.connection.fetchval(COMMITS)
                before = cpu_s(pids), cpu_s(family(server))
                await asyncio.sleep(seconds)
                after, took_s = (cpu_s(pids), cpu_s(family(server))), time.monotonic() - began
                found.append({
                    "relays": 100 * (after[0] - before[0]) / took_s,
                    "postgres": 100 * (after[1] - before[1]) / took_s,
                    "commits": (await environment.connection.fetchval(COMMITS) - commits) / took_s,
                    "relay_mb": sum(map(memory_mb, pids)) / relays,
                })  # fmt: skip
    return found
