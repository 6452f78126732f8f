"""Advisory locks of ours in the hands of a role that may only connect: they decide nothing and stop nobody."""

import asyncio
import re
from contextlib import suppress

import asyncpg
import pytest

from outbox.database.locks import RELAY_LOCKS, SELFTEST_LOCKS
from outbox.errors import DatabaseUnavailableError
from outbox.operations.route_rules import read_unserved
from outbox.operations.status import read_status
from outbox.relay import lock_proof, registration
from outbox.relay.lock_proof import prove_locks
from outbox.relay.statements import STATEMENTS
from outbox.relay.sweep import Sweep, judge_former, judge_stranded, sweep
from outbox.relay.tick import TickRequest, tick
from outbox.settings.urls import DatabaseUrl
from tests.support import sessions as relay_sessions
from tests.support.fleet import until

LEASE_S = 10.0
SHARED, EXCLUSIVE = "_shared", ""


@pytest.fixture
async def stranger(database, connection):
    """Connects as a role without any grant; gives a function that makes sessions of it."""
    await connection.execute("DROP ROLE IF EXISTS n_squats; CREATE ROLE n_squats LOGIN")
    sessions = []

    async def connect():
        sessions.append(await asyncpg.connect(re.sub("//[^@]*@", "//n_squats@", database)))
        return sessions[-1]

    yield connect
    for one in sessions:
        one.terminate()
    await until(
        lambda: connection.fetchval("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'n_squats'"),
        "it is gone",
    )
    await connection.execute("DROP ROLE n_squats")


@pytest.fixture
async def opened(database):
    sessions = []

    async def open_session(former=None, lease_s=LEASE_S):
        sessions.append(
            await relay_sessions.open_session(database, lease_s=lease_s, former=former, statements=STATEMENTS)
        )
        return sessions[-1]

    yield open_session
    for one in sessions:
        one.connection.terminate()


async def squat(stranger, ids, mode=EXCLUSIVE):
    holder = await stranger()
    await holder.execute(f"SELECT pg_advisory_lock{mode}({RELAY_LOCKS}, id) FROM unnest($1::int[]) AS id".replace(
        "$1", f"'{{{','.join(map(str, ids))}}}'"))  # fmt: skip
    return holder


async def dies(connection, relay):
    """End a relay's session, and its backend with it."""
    pid = relay.connection.get_server_pid()
    relay.connection.terminate()
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1"
    await until(lambda: connection.fetchval(gone, pid), "its backend is gone")


@pytest.mark.parametrize("mode", [SHARED, EXCLUSIVE])
async def test_a_relay_that_died_is_dead_whoever_holds_the_lock_of_its_id(connection, opened, stranger, mode):
    living, dead = await opened(), await opened()
    await dies(connection, dead)
    await squat(stranger, [dead.relay], mode)
    assert [relay.id for relay in (await read_status(connection)).relays] == [living.relay]
    found = await sweep(living.connection, living.relay, doubt_s=None, quarantine=living.quarantine)
    assert found == Sweep([dead.relay])
    assert await connection.fetchval("SELECT ended_at IS NOT NULL FROM outbox.relay WHERE id = $1", dead.relay)


@pytest.mark.parametrize("mode", [SHARED, EXCLUSIVE])
async def test_what_waits_for_a_squatted_relay_of_a_route_is_unserved(connection, opened, stranger, mode):
    dead = await opened()
    await connection.execute("UPDATE outbox.relay SET route = 'bulk'")
    await connection.execute(
        "SELECT outbox.enqueue(key => 'k', sender => 'a@example.com', recipient => 'b@example.com', body_text => 'x',"
        " route => 'bulk')"
    )
    assert await read_unserved(connection) == []
    await dies(connection, dead)
    await squat(stranger, [dead.relay], mode)
    assert [one.route for one in await read_unserved(connection)] == ["bulk"]


async def test_two_sweepers_at_once_judge_a_squatted_relay_once(connection, opened, stranger):
    sweepers, dead = [await opened() for _ in range(4)], await opened()
    await dies(connection, dead)
    await squat(stranger, [dead.relay])
    found = await asyncio.gather(
        *(sweep(one.connection, one.relay, doubt_s=None, quarantine=one.quarantine) for one in sweepers)
    )
    assert sorted(one.dead for one in found) == [[], [], [], [dead.relay]]


@pytest.mark.parametrize("mode", [SHARED, EXCLUSIVE])
@pytest.mark.parametrize("squatted", [True, False])
async def test_what_a_relay_holds_that_never_was_is_let_go_of_whoever_holds_the_lock_of_its_id(
    connection, opened, stranger, squatted, mode
):
    relay, living = await opened(), await opened()
    await connection.execute(
        "INSERT INTO outbox.email (key, sender, recipient, message_id, message)"
        " SELECT k, 'a@example.com', 'b@example.com', '<1@example.com>', 'x' FROM unnest(ARRAY['no', 'living']) k"
    )
    await connection.execute(
        "INSERT INTO outbox.delivery (email, relay)"
        " SELECT id, CASE key WHEN 'no' THEN 99999 ELSE $1 END FROM outbox.email",
        living.relay,
    )
    await connection.execute("DELETE FROM outbox.relay WHERE id = $1", living.relay)
    if squatted:
        await squat(stranger, [99_999], mode)
    assert await judge_stranded(relay.connection, relay.relay, [], doubt_s=None, quarantine=relay.quarantine) == (1, 0)
    held = await connection.fetch("SELECT m.key FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email"
                                  " WHERE d.relay IS NOT NULL")  # fmt: skip
    assert [key for (key,) in held] == ["living"]


async def test_a_relay_that_lives_is_passed_over_though_strangers_wait_for_its_lock(connection, opened, stranger):
    one, other = await opened(), await opened()
    waiting = asyncio.create_task(squat(stranger, [other.relay]))
    await until(lambda: connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"), "the stranger waits")
    found = await sweep(one.connection, one.relay, doubt_s=None, quarantine=one.quarantine)
    assert (found.dead, found.alive, found.beside) == ([], 1, 1)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting


async def test_a_reused_backend_pid_is_no_relay_unless_its_role_could_be_one(connection, opened, stranger):
    """A role that opens sessions for long enough gets any process id."""
    living, dead = await opened(), await opened()
    await dies(connection, dead)
    holder = await squat(stranger, [dead.relay])
    await connection.execute(
        "UPDATE outbox.relay SET backend_pid = $1 WHERE id = $2", holder.get_server_pid(), dead.relay
    )
    assert [relay.id for relay in (await read_status(connection)).relays] == [living.relay]
    assert (await sweep(living.connection, living.relay, doubt_s=None, quarantine=living.quarantine)).dead == [
        dead.relay
    ]


@pytest.mark.parametrize("mode", [SHARED, EXCLUSIVE])
async def test_a_relay_starts_though_thousands_of_ids_to_come_are_held(connection, opened, stranger, mode):
    first = await opened()
    await squat(stranger, range(first.relay + 1, first.relay + 2001), mode)
    second = await opened()
    assert second.relay == first.relay + 2001
    found = await sweep(first.connection, first.relay, doubt_s=None, quarantine=first.quarantine)
    assert (found.dead, found.alive, found.beside) == ([], 1, 1)
    assert await connection.fetchval("SELECT count(*) FROM outbox.relay") == 2


async def test_a_relay_starts_though_ids_to_come_are_held_with_gaps(opened, stranger):
    first = await opened()
    await squat(stranger, [first.relay + n for n in (1, 2, 4, 5, 7)])
    assert (await opened()).relay == first.relay + 3


async def test_a_relay_that_cannot_register_names_who_is_in_its_way(connection, opened, stranger, monkeypatch):
    first = await opened()
    holder = await squat(stranger, range(first.relay + 1, first.relay + 100))
    monkeypatch.setattr(registration, "REGISTER_TRIES", 1)
    with pytest.raises(DatabaseUnavailableError, match=f"pid {holder.get_server_pid()}, role n_squats"):
        await opened()
    assert await connection.fetchval("SELECT count(*) FROM outbox.relay") == 1


@pytest.mark.parametrize("mode", [SHARED, EXCLUSIVE])
async def test_a_successor_does_not_wait_for_a_stranger_who_holds_its_former_lock(connection, opened, stranger, mode):
    former = await opened()
    await connection.execute("INSERT INTO outbox.email (key, sender, recipient, message_id, message)"
                             " VALUES ('k', 'a@example.com', 'b@example.com', '<1@x>', 'x')")  # fmt: skip
    await connection.execute("INSERT INTO outbox.delivery (email) SELECT id FROM outbox.email")
    assert len((await tick(former.connection, former.relay, TickRequest(claims_max=1))).claims) == 1
    await dies(connection, former)
    await squat(stranger, [former.relay], mode)
    async with asyncio.timeout(LEASE_S / 4):
        successor = await opened(former=former)
        judged = await judge_former(
            successor.connection, former.relay, former.timeline, doubt_s=None, quarantine=successor.quarantine
        )
    assert judged == (1, 0)


async def test_no_stranger_can_fail_the_proof_that_locks_work(database, connection, stranger, monkeypatch):
    """It sees the key in pg_locks as soon as it is taken, and stands before us in the queue for it."""
    holder = await stranger()
    prove = lock_proof._prove_exclusion

    async def prove_and_be_overtaken(url, one, other, key):
        backend = await prove(url, one, other, key)
        overtaking.append(asyncio.create_task(holder.execute(f"SELECT pg_advisory_lock({SELFTEST_LOCKS}, {key})")))
        await until(lambda: connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"), "it waits")
        return backend

    overtaking = []
    monkeypatch.setattr(lock_proof, "_prove_exclusion", prove_and_be_overtaken)
    await prove_locks(DatabaseUrl.parse(database), lease_s=LEASE_S)
    await overtaking[0]
