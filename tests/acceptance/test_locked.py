"""Commands that meet a lock which another session keeps: they end in time, and name its pid and role."""

import asyncio
import re
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from outbox.database.lock_wait import BlockerWatch
from outbox.database.locks import INIT_LOCK, PRUNE_LOCK
from outbox.database.opening import connect
from outbox.settings.urls import DatabaseUrl
from tests.support.fleet import until


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


@pytest.mark.parametrize("mode", ["", "_shared"])
async def test_prune_does_not_stop_at_its_lock_in_the_hands_of_a_stranger(fleet, stranger, mode):
    await stranger.execute(f"SELECT pg_advisory_lock{mode}({PRUNE_LOCK}, 0)")
    ended = await fleet.run("prune", "--keep", "30d", deadline_s=30)
    assert (ended.code, ended.err) == (0, "")


async def test_prune_says_at_once_that_another_prune_holds_its_lock(fleet, connection):
    await connection.execute(f"SELECT pg_advisory_lock({PRUNE_LOCK}, 0)")
    ended = await fleet.run("prune", "--keep", "30d", deadline_s=30)
    assert ended.code == 1
    assert "Another `outbox prune`" in ended.sentences[0]


DECIDES = (
    ("cancel", "mail1", "--why", "x"),
    ("resolve", "mail2", "--discard", "--why", "x"),
    ("retry", "mail2", "--why", "x"),
    ("suppress", "a@example.com", "--why", "x"),
    ("resume", "--why", "x"),
)


@pytest.mark.parametrize("words", DECIDES, ids=lambda words: words[0])
async def test_a_command_whose_row_another_session_holds_names_it_and_changes_nothing(fleet, connection, words):
    await fleet.put_emails(2)
    await connection.execute(
        "UPDATE outbox.delivery SET state = 'dead', attempt = 1, settled_at = now() WHERE email = 2;"
        " INSERT INTO outbox.pause (report, who, why) VALUES ('', 'me', 'x')"
    )
    before = await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email")
    async with connection.transaction():
        await connection.execute(
            "SELECT FROM outbox.delivery FOR UPDATE; SELECT FROM outbox.pause FOR UPDATE;"
            " INSERT INTO outbox.suppression (address, reason, who, why) VALUES ('a@example.com', 'decided', '', '')"
        )
        ended = await fleet.run(*words, deadline_s=40)
        assert ended.code == 1
        assert f"pid {connection.get_server_pid()} (role postgres" in ended.sentences[-1], ended
        await connection.execute("DELETE FROM outbox.suppression")
    assert await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email") == before
    assert not await connection.fetchval("SELECT count(*) FROM outbox.operation WHERE emails > 0")


async def test_generate_names_who_holds_a_key_and_exits_with_1(fleet, connection):
    await fleet.hire(3)
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO outbox.email (key, sender, recipient, message_id, message)"
            " VALUES ('progress/2026-W47/2', 'a@example.com', 'p2@example.com', '<1@x>', 'x')"
        )
        ended = await fleet.run("generate", "--period", "2026-W47", deadline_s=40)
    assert ended.code == 1
    assert ended.out == "progress 2026-W47: 2 made here, 0 elsewhere, 1 failed, of 3 recipients.\n"
    (sentence,) = ended.sentences
    assert sentence.startswith("progress 2026-W47, recipient 2: its email's key progress/2026-W47/2 is blocked: ")
    assert f"pid {connection.get_server_pid()} (role postgres" in sentence


async def test_a_schedule_whose_row_another_session_holds_says_who_and_is_started_when_it_is_free(fleet, connection):
    at = datetime.now(UTC) - timedelta(minutes=10)
    fleet.timezone = "UTC"
    fleet.report = f'cadence = "daily"\nschedule = "{at.minute} {at.hour} * * *"\n'
    await fleet.hire(1)
    await connection.execute(
        "INSERT INTO outbox.schedule (report, tick_at, done_at) SELECT 'progress', at, at"
        " FROM (SELECT now() - interval '3 days') AS long_ago (at)"
    )
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox.schedule FOR UPDATE")
        relay = await fleet.relay()
        await relay.says(f"pid {connection.get_server_pid()} (role postgres", 40)
    await until(lambda: fleet.sink.messages == 1, "its email is sent", 40)


async def test_blockers_are_described_by_pid_and_role(database, connection):
    url = DatabaseUrl.parse(database)
    waiting = await connect(url, application="outbox test")
    async with BlockerWatch(url, waiting.get_server_pid(), first_s=0, every_s=0.05) as watch:
        await asyncio.sleep(0.3)
        assert (watch.seen, watch.holder) == ("", "another session")
        await connection.execute("SELECT pg_advisory_lock(1, 2)")
        task = asyncio.create_task(waiting.execute("SELECT pg_advisory_lock(1, 2)"))
        await until(lambda: watch.seen, "it waits")
        assert watch.seen == watch.holder == f"pid {connection.get_server_pid()} (role postgres)"
        await connection.execute("SELECT pg_advisory_unlock(1, 2)")
        await task
    await waiting.close()


async def test_a_database_that_is_away_has_no_blockers():
    url = DatabaseUrl.parse("postgresql://postgres@/x?host=/tmp/nowhere")
    async with BlockerWatch(url, 1, first_s=0, every_s=0.01) as watch:
        await asyncio.sleep(0.1)
    assert watch.seen == ""
