"""Postgres in trouble of its own: a backend crashes, the disk is full, no connection is free, commits take long."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from outbox.sandbox.postgres import Server
from outbox.sandbox.smtp_sink import Stage, Trickle
from tests.faults.test_postgres_trouble import company, own_server, start_again
from tests.support.fault_levers import SLOW, At, all_sent, balance, delivery, mark_held, post, terminate_session, trail
from tests.support.fleet import Fleet, until

__all__ = ["company", "own_server"]  # fixtures


def times(process, words: str) -> int:
    return sum(words in line for line in process.log)


# ── a backend crashes ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_backend_that_crashes_takes_all_sessions_along_and_no_mail(company):
    company.sink.script = At(Stage.DOT, Trickle(chunk=12, delay_s=0.1))
    await company.put_emails(300)
    relays = [await company.relay() for _ in range(2)]
    await until(lambda: company.sink.messages >= 50, "50 are accepted")
    backend = await company.connection.fetchval(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'outbox relay' AND datname = current_database()"
    )
    os.kill(backend, signal.SIGKILL)
    company.connection = await connected_again(company)
    await all_sent(company, 300, deadline_s=60)
    assert await balance(company, 300) == set()
    for relay in relays:
        assert times(relay, "lost its session") >= 1
        assert relay.process.returncode is None


async def connected_again(company: Fleet) -> asyncpg.Connection:
    async def works() -> asyncpg.Connection | None:
        try:
            return await asyncpg.connect(company.database)
        except (OSError, asyncpg.PostgresError):
            return None

    await until(company.connection.is_closed, "Postgres has ended all sessions")
    return await until(works, "Postgres is back")


# ── the disk is full ─────────────────────────────────────────────────────────────────────────────────────────────────

FULL = """
CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER full_disk BEFORE UPDATE ON outbox.delivery FOR EACH ROW WHEN ({}) EXECUTE FUNCTION full_disk()
"""
WRITES = {
    "claim": "old.relay IS NULL AND new.relay IS NOT NULL",
    "mark": "old.state = 'pending' AND new.state = 'sending'",
    "settle": "old.state = 'sending' AND new.state <> 'sending'",
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_full_disk_holds_mail_up_until_there_is_room_and_costs_none(fleet, write):
    await fleet.connection.execute(FULL.format(WRITES[write]))
    relay = await fleet.relay()
    await post(fleet, 10)
    await until(lambda: times(relay, "No space left on device") >= 3, "it has met the full disk a few times", 60)
    accepted = fleet.sink.messages
    assert (accepted > 0) == (write == "settle")
    await fleet.connection.execute("DROP TRIGGER full_disk ON outbox.delivery")
    await all_sent(fleet, 10, deadline_s=60)
    assert await balance(fleet, 10) == set()
    assert relay.process.returncode is None
    rows = await fleet.connection.fetch("SELECT attempt - withdrawn AS tries FROM outbox.delivery")
    assert {row["tries"] for row in rows} == {1}, "what the disk did counts for nothing"


async def test_a_generate_that_meets_a_full_disk_says_so_and_the_next_one_makes_all(fleet):
    await fleet.hire(5)
    await fleet.connection.execute(
        FULL.format("true").replace("UPDATE ON outbox.delivery", "INSERT ON outbox.delivery")
    )
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert "No space left on device" in sentence
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 0
    await fleet.connection.execute("DROP TRIGGER full_disk ON outbox.delivery")
    assert (await fleet.run("generate")).code == 0
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery") == 5


# ── no connection is free ────────────────────────────────────────────────────────────────────────────────────────────

NO_ROOM = "takes no connection now"


@asynccontextmanager
async def changed(company: Fleet, server: Server, **settings: str) -> AsyncIterator[None]:
    """Postgres runs with these settings for a while."""
    before = dict(server.settings)
    server.settings = {**before, **settings}
    server.stop()
    await start_again(company, server)
    try:
        yield
    finally:
        await company.stop_all()
        server.settings = before
        server.stop()
        await start_again(company, server)


@asynccontextmanager
async def crowd(company: Fleet) -> AsyncIterator[None]:
    """Others hold every connection that there is."""
    others: list[asyncpg.Connection] = []

    async def is_full() -> bool:
        try:
            others.append(await asyncpg.connect(company.database))
        except asyncpg.TooManyConnectionsError:
            return True
        return False

    try:
        await until(is_full, "no connection is free")
        yield
    finally:
        for other in others:
            await other.close()


async def test_who_starts_while_no_connection_is_free_waits_for_one(company, own_server):
    async with changed(company, own_server, max_connections="12"):
        await company.hire(5)
        await company.put_emails(3, first=11)
        async with crowd(company):
            relay = await company.start("relay")
            cron = await company.start("generate")
            await relay.says(NO_ROOM)
            await cron.says(NO_ROOM)
        ended = await cron.ended(60)
        assert ended.code == 0, ended
        await all_sent(company, 8)
        await balance(company, 8)


async def test_a_relay_that_finds_no_connection_for_its_next_session_waits_for_one(company, own_server):
    async with changed(company, own_server, max_connections="12"):
        relay = await company.relay()
        async with crowd(company):
            await terminate_session(company)
            async with crowd(company):
                await post(company, 5)
                await relay.says(NO_ROOM)
                assert company.sink.messages == 0
        await all_sent(company, 5)
        assert await balance(company, 5) == set()
        assert relay.process.returncode is None


# ── commits take their time ──────────────────────────────────────────────────────────────────────────────────────────


async def test_slow_commits_make_mail_late_and_nothing_else(company, own_server):
    async with changed(company, own_server, fsync="on", commit_delay="100000", commit_siblings="0"):
        relays = [await company.relay() for _ in range(2)]
        await post(company, 60)
        await all_sent(company, 60, deadline_s=60)
        assert await balance(company, 60) == set()
        for relay in relays:
            assert times(relay, "lost its session") == 0


async def test_nothing_is_sent_on_a_commit_that_waits_for_a_standby_which_is_not_there(company):
    """The wait is over after a lease, for a claim as for a mark or a registration: it is on this server only."""
    company.top = SLOW
    relay = await company.relay()
    await company.connection.execute("SET synchronous_commit = local")
    await standbys(company, "nobody")
    try:
        await post(company, 5)
        await relay.says("lost its session")
        await until(lambda: times(relay, "no session yet") >= 2, "and gets no other", 60)
        assert company.sink.messages == 0
        assert (await company.states()).get("sent", 0) == 0
    finally:
        await standbys(company, "")
    await all_sent(company, 5, deadline_s=60)
    assert await balance(company, 5) == set()
    assert relay.process.returncode is None


async def test_a_generate_whose_commits_wait_for_a_standby_ends_with_a_sentence(company):
    company.top = SLOW
    await company.hire(5)
    await standbys(company, "nobody")
    try:
        ended = await company.run("generate")
        assert ended.code == 1
        assert "was lost (Postgres did not answer within 6 s); run the command again" in ended.sentences[-1]
    finally:
        await standbys(company, "")
    ended = await company.run("generate")
    assert (ended.code, ended.err) == (0, "")
    assert await company.connection.fetchval("SELECT count(*) FROM outbox.delivery") == 5


async def standbys(company: Fleet, names: str) -> None:
    await company.connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    await company.connection.execute("SELECT pg_reload_conf()")

    async def in_force() -> bool:
        probe = await asyncpg.connect(company.database)
        try:
            return await probe.fetchval("SHOW synchronous_standby_names") == names
        finally:
            await probe.close()

    await until(in_force, f"synchronous_standby_names = {names!r}")


# ── a statement is cancelled ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_mark_that_somebody_cancels_is_not_sent_but_taken_back(fleet):
    async with mark_held(fleet) as (relay, holder):
        cancelled = await fleet.connection.fetchval(
            "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE application_name = 'outbox relay'"
            " AND datname = current_database()"
        )
        assert cancelled == 1
        await relay.says("canceling statement due to user request")
        assert fleet.sink.messages == 0
        await holder.close()
    await all_sent(fleet, 1)
    assert (await delivery(fleet))["tries"] == 1
    assert (await trail(fleet))[-1] == "accepted"
    assert await balance(fleet, 1) == set()
    assert relay.process.returncode is None
