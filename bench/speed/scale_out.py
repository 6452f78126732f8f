"""Past one Postgres by itself: commits on a synchronous standby, two servers side by side, crons on a pooler."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import asyncpg

from bench.harness.environment import Environment, open_environment, server
from bench.harness.figures import Spread, keep, show
from bench.harness.pgbouncer import PGBOUNCER, pooler
from bench.speed.one_relay import message_of
from bench.speed.relay_scaling import MAKE_DUE, PUT, SIZE
from outbox.database.connection import CHANNEL
from outbox.database.driver import DriverConnection
from outbox.database.opening import lease_settings
from outbox.sandbox.postgres import Server, standby

LEASE_S: Final = 10.0
SENT_S: Final = 300.0
LOOK_S: Final = 0.02
NAME: Final = "standby"
SESSIONS: Final = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

ONE: Final = "one server, one relay"
REPLICATED: Final = "… whose commits wait for a synchronous standby"
SHARED: Final = "one server, two relays"
DIVIDED: Final = "two servers, each with half of the mail and a relay"
DIRECT: Final = "crons on Postgres itself"


async def measure(*, emails: int, crons: int, recipients: int, sessions: int, runs: int) -> None:
    """Alternate all of them; a table and bench/results/scale.json."""
    relayed: dict[str, list[dict[str, float]]] = {}
    made: dict[str, list[dict[str, float]]] = {}
    pooled = f"crons on PgBouncer with {sessions} sessions (session mode)"
    with server() as first, server() as second, standby(first, name=NAME):
        for number in range(runs):
            for who, urls, relays in (
                (ONE, [first.url], 1),
                (REPLICATED, [first.url], 1),
                (SHARED, [first.url], 2),
                (DIVIDED, [first.url, second.url], 1),
            ):
                async with _commits_wait(first, waiting=who == REPLICATED):
                    relayed.setdefault(who, []).append(await _relayed(urls, relays, emails))
            made.setdefault(DIRECT, []).append(await _made(first.url, crons, recipients, None))
            if PGBOUNCER is not None:
                made.setdefault(pooled, []).append(await _made(first.url, crons, recipients, sessions))
            print(f"run {number + 1} of {runs}")
    show(
        f"{emails} emails of {SIZE} bytes, first acceptance to last: median, least and most of {runs} runs",
        ("what", "sent/s"),
        [(who, Spread.of([one["per_s"] for one in every]).text(",.0f")) for who, every in relayed.items()],
    )
    show(
        f"{crons} crons at once, {recipients} recipients: median, least and most of {runs} runs",
        ("what", "s until the last one's end", "sessions with Postgres at most"),
        [
            (who, Spread.of([one["s"] for one in every]).text(",.2f"),
             Spread.of([one["sessions"] for one in every]).text(",.0f"))
            for who, every in made.items()
        ],
    )  # fmt: skip
    keep("scale", {"emails": emails, "crons": crons, "recipients": recipients, "relayed": relayed, "made": made}, [])


@asynccontextmanager
async def _commits_wait(primary: Server, *, waiting: bool) -> AsyncIterator[None]:
    """Make each commit in the block wait for the standby."""
    connection = await asyncpg.connect(primary.url)
    try:
        if waiting:
            await _set(connection, f"ALTER SYSTEM SET synchronous_standby_names = '{NAME}'")
            while await connection.fetchval("SELECT sync_state FROM pg_stat_replication") != "sync":
                await asyncio.sleep(LOOK_S)
        yield
        await _set(connection, "ALTER SYSTEM RESET synchronous_standby_names")
    finally:
        await connection.close()


async def _set(connection: DriverConnection, statement: str) -> None:
    await connection.execute(statement)
    await connection.execute("SELECT pg_reload_conf()")


async def _relayed(urls: Sequence[str], relays: int, emails: int) -> dict[str, float]:
    """Return the emails per second of all servers together; each has its share of the emails and so many relays."""
    async with AsyncExitStack() as stack:
        places = [
            await stack.enter_async_context(open_environment(url, connections=64 // len(urls) // relays))
            for url in urls
        ]
        share = emails // len(places)
        for environment in places:
            await environment.reset(0)
            await environment.connection.execute(PUT, share, message_of(SIZE))
            await environment.connection.execute("ANALYZE outbox.email")
            await stack.enter_async_context(environment.relaying(relays))
        await asyncio.sleep(1)
        since = [environment.mark() for environment in places]
        await asyncio.gather(*map(_make_due, places))
        every = await asyncio.gather(
            *(environment.accepted(share, mark, SENT_S) for environment, mark in zip(places, since, strict=True))
        )
    ats = [line.at for lines in every for line in lines]
    if len(ats) != share * len(places):
        raise SystemExit(f"bench: of {emails} emails {len(ats)} were accepted.")
    return {"per_s": len(ats) / (max(ats) - min(ats))}


async def _make_due(environment: Environment) -> None:
    async with environment.connection.transaction():
        await environment.connection.execute(MAKE_DUE)
        await environment.connection.execute("ANALYZE outbox.delivery")
        await environment.connection.execute("SELECT pg_notify($1, '')", CHANNEL)


async def _made(url: str, crons: int, recipients: int, sessions: int | None) -> dict[str, float]:
    """Return how long so many crons at once take, and the largest number of sessions that Postgres has meanwhile."""
    async with open_environment(url, connections=1) as environment, AsyncExitStack() as stack:
        await environment.reset(recipients)
        settings: dict[str, str] = {}
        lease = lease_settings(LEASE_S, statements_too=False)
        if sessions is not None:  # as docs/scale.md says: what PgBouncer keeps back, the role brings along
            for name, value in lease.items():
                await environment.connection.execute(f"ALTER ROLE postgres SET {name} = '{value}'")
            stack.push_async_callback(environment.connection.execute, "ALTER ROLE postgres RESET ALL")
            settings["OUTBOX_DATABASE_URL"] = await stack.enter_async_context(
                pooler(url, mode="session", sessions=sessions, ignored=[*lease, "application_name"])
            )
        began_at, most = time.perf_counter(), 0
        running = [await environment.start("outbox", "generate", settings=settings) for _ in range(crons)]
        ends = asyncio.gather(*(cron.communicate() for cron in running))
        while not ends.done():
            most = max(most, await environment.connection.fetchval(SESSIONS))
            await asyncio.sleep(LOOK_S)
        took_s = time.perf_counter() - began_at
        made = await environment.connection.fetchval("SELECT count(DISTINCT recipient_key) FROM outbox.report")
    if any(cron.returncode for cron in running) or made != recipients:
        raise SystemExit(f"bench: {made} of {recipients} reports were made: {environment.log_tail()}")
    return {"s": took_s, "sessions": most}
