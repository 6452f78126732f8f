"""The levers of these tests: SMTP does one thing at one stage, a row is locked, and what the database says afterwards.

Nothing in the relay helps: it is a process like any other, met over its two sockets and its signals.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg

from outbox.sandbox.smtp_sink import Action, Hold, Reply, Stage, Visit
from tests.support.fleet import Fleet, Process, until

GARBAGE = Reply("what?")
CLOSING = Reply("421 4.3.2 closing", then_cut=True)
SLOW = "lease_s = 2\nguard_s = 1"  # the shortest lease


class At:
    """A script: `action` at `stage`, on the first `times` occasions that fit, for as long as it is `on`."""

    def __init__(
        self,
        stage: Stage,
        action: Action,
        *,
        times: int | None = None,
        when: Callable[[Visit], bool] = lambda _: True,
    ) -> None:
        self.stage, self.action, self.times, self.when = stage, action, times, when
        self.on = True
        self.count = 0

    def __call__(self, stage: Stage, visit: Visit) -> Action | None:
        if stage is not self.stage or not self.on or self.count == self.times or not self.when(visit):
            return None
        self.count += 1
        return self.action

    async def reached(self, count: int = 1) -> None:
        await until(lambda: self.count >= count, f"{self.stage} was reached {count} times")


async def post(fleet: Fleet, count: int, *, first: int = 1) -> None:
    """Emails put in and announced, as `generate` does it."""
    async with fleet.connection.transaction():
        await fleet.put_emails(count, first=first)
        await fleet.connection.execute("NOTIFY outbox")


async def delivery(fleet: Fleet, key: str = "mail1") -> Any:
    """The row: state, attempt, withdrawn, relay, and `tries`, the attempts that count."""
    return await fleet.connection.fetchrow(
        "SELECT d.*, d.attempt - d.withdrawn AS tries FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email"
        " WHERE m.key = $1",
        key,
    )


async def trail(fleet: Fleet, key: str = "mail1") -> list[str]:
    """The verdicts of an email, oldest first."""
    rows = await fleet.connection.fetch(
        "SELECT a.verdict FROM outbox.attempt a JOIN outbox.email m ON m.id = a.email WHERE m.key = $1"
        " ORDER BY a.settled_at, a.attempt",
        key,
    )
    return [row["verdict"] for row in rows]


async def in_state(fleet: Fleet, state: str, key: str = "mail1", deadline_s: float = 20) -> None:
    async def is_so() -> bool:
        return (await delivery(fleet, key))["state"] == state

    await until(is_so, f"{key} is {state}", deadline_s)


async def all_sent(fleet: Fleet, count: int, deadline_s: float = 20) -> None:
    async def are_so() -> bool:
        return await fleet.states() == {"sent": count}

    try:
        await until(are_so, f"all {count} are sent", deadline_s)
    except AssertionError as late:
        raise AssertionError(f"{late}, but {await fleet.states()}") from late


async def recipients(fleet: Fleet, state: str) -> set[str]:
    rows = await fleet.connection.fetch(
        "SELECT m.recipient FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email WHERE d.state = $1", state
    )
    return {row["recipient"] for row in rows}


async def balance(fleet: Fleet, count: int) -> set[str]:
    """Nothing twice, nothing lost, and no state that lies; gives whom nobody knows to have been reached."""
    accepted = set(fleet.sink.addresses)
    sent, in_doubt = await recipients(fleet, "sent"), await recipients(fleet, "in_doubt")
    assert fleet.twice == {}
    assert sent - accepted == set(), "sent, says the database, and no server has it"
    assert accepted - sent - in_doubt == set(), "accepted, and the database does not know that it may be"
    assert len(accepted) + len(in_doubt - accepted) == count == len(sent) + len(in_doubt)
    return in_doubt


async def terminate_session(fleet: Fleet) -> None:
    """End the sessions of all relays of this database that are alive."""
    await fleet.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'outbox relay' AND datname = current_database()"
    )


async def no_session(fleet: Fleet) -> None:
    """Wait until no relay has a session."""

    async def none_there() -> bool:
        return not await fleet.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'outbox relay' AND datname = current_database()"
        )

    await until(none_there, "no relay has a session")


async def no_barrier(fleet: Fleet) -> None:
    """Wait until a relay that has just started is at work beside the others."""

    async def lifted() -> bool:
        return not await fleet.connection.fetchval("SELECT count(*) FROM outbox.failover WHERE lifted_at IS NULL")

    await until(lifted, "no barrier stands")


async def status(fleet: Fleet) -> Any:
    """What `outbox status --json` shows."""
    ended = await fleet.run("status", "--json")
    assert ended.code == 0, ended
    return json.loads(ended.out)


@asynccontextmanager
async def locked(fleet: Fleet, key: str = "mail1") -> AsyncIterator[Any]:
    """The delivery's row is locked by another session; gives that, to be closed or to commit early."""
    holder = await asyncpg.connect(fleet.database)
    try:
        await holder.execute("BEGIN")
        await holder.fetch(
            "SELECT FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email WHERE m.key = $1 FOR UPDATE OF d", key
        )
        yield holder
    finally:
        await holder.close()


@asynccontextmanager
async def mark_held(fleet: Fleet, *, environment: dict[str, str] | None = None) -> AsyncIterator[tuple[Process, Any]]:
    """A relay stands at mail1's mark: the content is written, and the mark waits for our lock on the row.

    Gives the relay and the session that holds the lock: when that is closed the mark goes on. Half a lease is the most
    that it waits.
    """
    go_ahead = asyncio.Event()
    script = At(Stage.DATA, Hold(go_ahead), times=1)
    fleet.sink.script = script
    await fleet.put_emails(1)
    relay = await fleet.relay(environment=environment)
    await script.reached()
    async with locked(fleet) as holder:
        go_ahead.set()
        await mark_waits(fleet)
        assert not any(stage is Stage.DOT for _, _, stage in fleet.sink.events)
        yield relay, holder


async def mark_waits(fleet: Fleet) -> None:
    async def waits() -> bool:
        return bool(
            await fleet.connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox relay'"
                " AND datname = current_database() AND wait_event IN ('transactionid', 'tuple')"
            )
        )

    await until(waits, "the mark waits for the row")


def socket_of(database: str) -> Path:
    """The Unix socket behind a URL of the tests' Postgres: a target for a proxy."""
    where = parse_qs(urlsplit(database).query)
    return Path(where["host"][0], f".s.PGSQL.{where['port'][0]}")


def by_port(database: str, port: int, host: str = "127.0.0.1") -> str:
    """The same database, through a proxy that listens there."""
    return f"postgresql://postgres@{host}:{port}{urlsplit(database).path}"
