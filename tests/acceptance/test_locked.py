"""Commands that meet a lock which another session keeps: they end in time, and name its pid and role."""

import asyncio
import re

import asyncpg
import pytest

from outbox.address import DatabaseUrl
from outbox.database import INIT_LOCK, PRUNE_LOCK, connect, describe_blockers
from tests.fleet import until


@pytest.fixture
async def stranger(database, connection):
    """A session of a role that may only connect."""
    await connection.execute("DROP ROLE IF EXISTS n_locks; CREATE ROLE n_locks LOGIN")
    session = await asyncpg.connect(re.sub("//[^@]*@", "//n_locks@", database))
    yield session
    await session.close()
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'n_locks'"
    await until(lambda: connection.fetchval(gone), "it is gone")
    await connection.execute("DROP ROLE n_locks")


@pytest.mark.parametrize("words", [("init",), ("init", "--roles")])
@pytest.mark.parametrize("mode", ["", "_shared"])
async def test_init_does_not_wait_for_ever_for_a_stranger_who_holds_its_lock(fleet, stranger, words, mode):
    await stranger.execute(f"SELECT pg_advisory_lock{mode}({INIT_LOCK}, 0)")
    ended = await fleet.run(*words, deadline_s=30)
    assert (ended.code, ended.out) == (1, "")
    assert f"pid {stranger.get_server_pid()} (role n_locks" in ended.sentences[0]
    assert len(ended.sentences) == 1
    await stranger.execute("SELECT pg_advisory_unlock_all()")
    assert (await fleet.run("init")).code == 0


async def test_init_waits_longer_for_one_who_may_change_the_schema(fleet):
    """As another server that upgrades a large database: it takes more than one lock_timeout."""
    holder = await asyncpg.connect(fleet.database)
    await holder.execute("SELECT pg_advisory_lock($1, 0)", INIT_LOCK)
    name = await holder.fetchval("SELECT current_database()")
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND classid = $1"
    tries = (
        "SELECT xact_start, query_start FROM pg_stat_activity WHERE application_name = 'outbox init' AND datname = $1"
    )
    command = await fleet.start("init")
    await until(lambda: holder.fetchval(waits, INIT_LOCK), "init waits")
    first = await holder.fetchrow(tries, name)

    async def again():
        now = await holder.fetchrow(tries, name)
        return now["xact_start"] == first["xact_start"] and now["query_start"] > first["query_start"]

    await until(again, "its wait is over, and it waits again", 20)
    await until(lambda: holder.fetchval(waits, INIT_LOCK), "init waits again")
    await holder.close()
    assert (await command.ended(20)).code == 0


@pytest.mark.parametrize(
    "words", [("status",), ("list",), ("init", "--redefine", "progress"), ("pause", "progress", "--why", "x")]
)
async def test_a_command_that_meets_a_locked_table_names_who_locked_it(fleet, connection, words):
    await connection.execute("SET application_name = 'psql'")
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox.delivery, outbox.definition, outbox.pause")
        ended = await fleet.run(*words, deadline_s=30)
    assert ended.code == 1
    assert f"pid {connection.get_server_pid()} (role postgres, application psql)" in ended.sentences[-1], ended
    assert "Traceback" not in ended.err


async def test_prune_says_at_once_that_its_lock_is_held(fleet, stranger):
    await stranger.execute(f"SELECT pg_advisory_lock({PRUNE_LOCK}, 0)")
    ended = await fleet.run("prune", "--keep", "30d", deadline_s=30)
    assert ended.code == 1
    assert "Another `outbox prune`" in ended.sentences[0]


async def test_blockers_are_described_by_pid_and_role(database, connection):
    url = DatabaseUrl.parse(database)
    waiting = await connect(url, application="outbox test")
    assert await describe_blockers(url, waiting.get_server_pid()) == ""
    await connection.execute("SELECT pg_advisory_lock(1, 2)")
    task = asyncio.create_task(waiting.execute("SELECT pg_advisory_lock(1, 2)"))
    pid = connection.get_server_pid()
    await until(lambda: describe_blockers(url, waiting.get_server_pid()), "it waits")
    assert await describe_blockers(url, waiting.get_server_pid()) == f"pid {pid} (role postgres)"
    await connection.execute("SELECT pg_advisory_unlock(1, 2)")
    await task
    await waiting.close()


async def test_a_database_that_is_away_has_no_blockers():
    assert await describe_blockers(DatabaseUrl.parse("postgresql://postgres@/x?host=/tmp/nowhere"), 1) == ""
