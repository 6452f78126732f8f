"""`outbox doctor` on other roles: on the search path, with CONNECT, and in outbox's locks."""

import re

import asyncpg
import pytest

from outbox.database.locks import BUCKET_LOCKS, INIT_LOCK, PRUNE_LOCK, RELAY_LOCKS, SELFTEST_LOCKS
from outbox.database.opening import connect
from outbox.database.roles import ROLES, grant_roles
from outbox.doctor.access import look_at_connect, look_at_locks, look_at_path, names_of
from outbox.doctor.finding import Grade
from outbox.settings.urls import DatabaseUrl
from tests.support.sessions import open_session

LOGINS = ("d_victim", "d_other", "d_enqueues")


@pytest.fixture
async def roles(database, connection):
    """Logins without rights; gives a function that connects as one, as a command of ours does."""

    async def drop(*names):
        for name in names:
            if await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", name):
                await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")

    await drop(*LOGINS, *ROLES)
    for name in LOGINS:
        await connection.execute(f"CREATE ROLE {name} LOGIN")
    sessions = []

    async def connected(name, plain=False):
        url = re.sub("//[^@]*@", f"//{name}@", database)
        if plain:
            sessions.append(await asyncpg.connect(url))
        else:
            sessions.append(await connect(DatabaseUrl.parse(url), application="outbox test"))
        return sessions[-1]

    yield connected
    for session in sessions:
        await session.close()
    await drop(*LOGINS, *ROLES)


@pytest.mark.parametrize("path, names", [
    ('"$user", public', ["me", "public"]), ("pg_catalog, pg_temp", []), ('"Odd, ""name", SHOP', ['Odd, "name', "shop"]),
    ('""', []), ("", []),
])  # fmt: skip
def test_a_path_is_read_as_postgres_reads_it(path, names):
    assert names_of(path, "me") == names


async def test_a_schema_of_the_path_in_which_everybody_may_create_is_a_note_with_the_revoke(connection, roles):
    victim = await roles("d_victim")
    assert (await look_at_path(victim)).grade is Grade.OK
    await connection.execute("GRANT CREATE ON SCHEMA public TO PUBLIC, d_other, d_victim")
    found = await look_at_path(victim)
    assert found.grade is Grade.NOTE
    assert "PUBLIC, d_other may create in schema public" in found.found
    assert found.fix == "REVOKE CREATE ON SCHEMA public FROM PUBLIC, d_other"
    for statement in found.fix.split("; "):
        await connection.execute(statement)
    assert (await look_at_path(victim)).grade is Grade.OK, "what the role itself may do is no danger to it"


async def test_the_path_of_the_role_in_this_database_counts(connection, roles):
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(
        f'CREATE SCHEMA "Shop floor"; GRANT CREATE ON SCHEMA "Shop floor" TO d_other;'
        f' ALTER ROLE d_victim IN DATABASE {name} SET search_path = "Shop floor", public'
    )
    assert (await look_at_path(await roles("d_other"))).grade is Grade.OK, "it has another path"
    found = await look_at_path(await roles("d_victim"))
    assert 'd_other may create in schema "Shop floor"' in found.found
    assert found.fix == 'REVOKE CREATE ON SCHEMA "Shop floor" FROM d_other'


async def test_who_may_create_a_schema_that_the_path_names_is_told(connection, roles):
    """`"$user"` is on everybody's path, and mostly not there."""
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"GRANT CREATE ON DATABASE {name} TO d_other")
    victim = await roles("d_victim")
    found = await look_at_path(victim)
    assert f"d_other may create in database {name}" in found.found
    await connection.execute("CREATE SCHEMA d_victim AUTHORIZATION d_victim")
    assert (await look_at_path(victim)).grade is Grade.OK


async def test_that_everybody_may_connect_is_a_note_once_roles_are_in_use(connection, roles):
    assert (await look_at_connect(connection)).grade is Grade.OK
    await grant_roles(connection)
    found = await look_at_connect(connection)
    name = await connection.fetchval("SELECT current_database()")
    assert found.grade is Grade.NOTE
    assert f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC" in found.fix
    await connection.execute(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
    assert (await look_at_connect(connection)).grade is Grade.OK


@pytest.mark.parametrize("kind, number", [
    ("relay", RELAY_LOCKS), ("generate", BUCKET_LOCKS), ("prune", PRUNE_LOCK), ("init", INIT_LOCK),
    ("self-test", SELFTEST_LOCKS),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["", "_shared"])
async def test_locks_of_ours_in_a_strangers_hands_are_a_fault_with_pid_and_role(connection, roles, kind, number, mode):
    other = await roles("d_other", plain=True)
    await other.execute(f"SELECT pg_advisory_lock{mode}({number}, n) FROM generate_series(0, 2) AS n")
    found = await look_at_locks(connection)
    assert found.grade is Grade.PROBLEM
    assert f"pid {other.get_server_pid()} (role d_other) holds 3 of {kind}" in found.found
    await other.execute("SELECT pg_advisory_unlock_all(); SELECT pg_advisory_lock(7, 7)")
    assert (await look_at_locks(connection)).grade is Grade.OK, "another number is another's business"


async def test_a_role_that_may_only_enqueue_holds_no_lock_of_relays(connection, roles):
    await grant_roles(connection)
    await connection.execute("GRANT outbox_enqueue TO d_enqueues")
    other = await roles("d_enqueues", plain=True)
    await other.execute(f"SELECT pg_advisory_lock({RELAY_LOCKS}, 1)")
    assert "role d_enqueues) holds 1 of relay" in (await look_at_locks(connection)).found


async def test_locks_of_relays_that_live_are_theirs(database, connection, roles):
    await grant_roles(connection)
    await connection.execute("GRANT outbox_relay TO d_victim")
    relay = await open_session(re.sub("//[^@]*@", "//d_victim@", database), lease_s=10)
    assert (await look_at_locks(connection)).grade is Grade.OK
    relay.connection.terminate()
