import asyncio
import itertools
from pathlib import Path

import asyncpg
import pytest

from outbox import schema
from outbox.errors import SchemaError
from outbox.schema import initialise, installed_version, require_current

NOW, NEXT = schema.VERSION, schema.VERSION + 1
ADD_NOTE = {NEXT: "ALTER TABLE outbox.email ADD COLUMN note text"}

_numbers = itertools.count(1)


@pytest.fixture
async def empty(postgres_server):
    """The URL of a database in which nobody ever said `outbox init`."""
    name = f"schema_{next(_numbers)}"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE DATABASE {name}")
    yield postgres_server.database_url(name)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def stranger(empty):
    """A connection to that database."""
    connected = await asyncpg.connect(empty)
    yield connected
    await connected.close()


async def shape(connection):
    """All that a schema is: columns, constraints, indexes, and which versions it went through."""
    return await connection.fetch("""
        SELECT 'column' AS kind, table_name || '.' || column_name AS name, data_type || ' ' || is_nullable AS what
          FROM information_schema.columns WHERE table_schema = 'outbox'
        UNION ALL
        SELECT 'constraint', c.conrelid::regclass || ' ' || c.conname, pg_get_constraintdef(c.oid)
          FROM pg_constraint c WHERE c.connamespace = 'outbox'::regnamespace
        UNION ALL
        SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'outbox'
        UNION ALL
        SELECT 'version', version::text, applied_at::text FROM outbox.schema_version
        ORDER BY 1, 2, 3
    """)


async def put_email(connection):
    await connection.execute("""
        WITH made AS (INSERT INTO outbox.email (key, sender, recipient, message_id, message)
                      VALUES ('mail1', 'a@example.com', 'b@example.com', '<1@example.com>', 'x') RETURNING id)
        INSERT INTO outbox.delivery (email) SELECT id FROM made""")


async def test_an_empty_database_gets_the_schema(stranger):
    assert await installed_version(stranger) is None
    assert await initialise(stranger) == (None, schema.VERSION)
    assert await installed_version(stranger) == schema.VERSION
    await require_current(stranger)
    await put_email(stranger)


async def test_a_second_init_changes_nothing(stranger):
    await initialise(stranger)
    await put_email(stranger)
    before = await shape(stranger)
    assert await initialise(stranger) == (schema.VERSION, schema.VERSION)
    assert await shape(stranger) == before
    assert await stranger.fetchval("SELECT count(*) FROM outbox.delivery") == 1


async def test_a_database_of_the_first_version_becomes_what_a_new_one_is(stranger, connection):
    """`connection` has the newest schema, made at once."""
    await stranger.execute((Path(__file__).parent / "schema_1.sql").read_text())
    await put_email(stranger)
    assert await initialise(stranger) == (1, NOW)

    async def parts(of):
        return {tuple(row) for row in await shape(of) if row["kind"] != "version"}

    assert await parts(stranger) == await parts(connection)
    assert await stranger.fetchval("SELECT count(*) FROM outbox.delivery") == 1


async def init_eight_times_at_once(url, **arguments):
    connections = await asyncio.gather(*(asyncpg.connect(url) for _ in range(8)))
    try:
        return await asyncio.gather(*(initialise(connection, **arguments) for connection in connections))
    finally:
        await asyncio.gather(*(connection.close() for connection in connections))


async def test_eight_servers_may_init_at_once_and_one_of_them_creates(empty, stranger):
    answers = await init_eight_times_at_once(empty)
    assert sorted(answers, key=str) == sorted([(None, NOW), *[(NOW, NOW)] * 7], key=str)
    await require_current(stranger)
    assert await stranger.fetchval("SELECT count(*) FROM outbox.schema_version") == 1


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_they_may_also_where_the_database_is_stricter_by_default(empty, stranger, isolation):
    name = await stranger.fetchval("SELECT current_database()")
    await stranger.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    answers = await init_eight_times_at_once(empty)
    assert answers.count((None, NOW)) == 1


async def test_eight_servers_may_upgrade_at_once_and_one_of_them_does(empty, stranger):
    await initialise(stranger)
    answers = await init_eight_times_at_once(empty, version=NEXT, upgrades=ADD_NOTE)
    assert sorted(answers) == [(NOW, NEXT), *[(NEXT, NEXT)] * 7]


async def test_an_upgrade_keeps_every_row_and_is_recorded(connection):
    await put_email(connection)
    emails = await connection.fetch("SELECT * FROM outbox.email")
    assert await initialise(connection, version=NEXT, upgrades=ADD_NOTE) == (NOW, NEXT)
    assert await installed_version(connection) == NEXT
    kept = await connection.fetch("SELECT * FROM outbox.email")
    assert [{**email, "note": None} for email in emails] == [dict(email) for email in kept]
    versions = await connection.fetch("SELECT version FROM outbox.schema_version ORDER BY version")
    assert [row["version"] for row in versions] == [NOW, NEXT]


async def test_an_upgrade_walks_through_all_versions_in_between(connection):
    steps = {
        n: f"ALTER TABLE outbox.email ADD COLUMN note{n} text DEFAULT 'v{n - 1}'" for n in (NEXT, NEXT + 1, NEXT + 2)
    }
    assert await initialise(connection, version=NEXT + 1, upgrades=steps) == (NOW, NEXT + 1)
    assert await initialise(connection, version=NEXT + 2, upgrades=steps) == (NEXT + 1, NEXT + 2)
    versions = await connection.fetch("SELECT version FROM outbox.schema_version ORDER BY version")
    assert [row["version"] for row in versions] == [NOW, NEXT, NEXT + 1, NEXT + 2]


@pytest.mark.parametrize("fault", ["SELECT 1 / 0", "ALTER TABLE outbox.email ADD COLUMN note text"])
async def test_an_upgrade_that_fails_leaves_everything_as_it_was(connection, fault):
    await put_email(connection)
    before = await shape(connection)
    with pytest.raises(asyncpg.PostgresError):
        await initialise(connection, version=NEXT + 1, upgrades={**ADD_NOTE, NEXT + 1: fault})
    assert await shape(connection) == before
    assert await connection.fetchval("SELECT count(*) FROM outbox.delivery") == 1
    assert await initialise(connection, version=NEXT, upgrades=ADD_NOTE) == (NOW, NEXT), "and the next try may succeed"


async def test_a_missing_schema_is_told_with_its_mend(stranger):
    with pytest.raises(SchemaError, match=r"no outbox schema yet.*outbox init"):
        await require_current(stranger)


async def test_an_older_schema_is_told_with_its_mend(connection, monkeypatch):
    monkeypatch.setattr(schema, "VERSION", NEXT)
    with pytest.raises(SchemaError, match=rf"older \(version {NOW}\).*\(version {NEXT}\).*outbox init"):
        await require_current(connection)


async def test_a_newer_schema_is_told_with_its_mend_and_left_alone(connection):
    await initialise(connection, version=NEXT, compatible=NEXT, upgrades=ADD_NOTE)
    before = await shape(connection)
    with pytest.raises(SchemaError, match=rf"newer \(version {NEXT}\).*upgrade"):
        await require_current(connection)
    with pytest.raises(SchemaError, match=rf"newer \(version {NEXT}\).*upgrade"):
        await initialise(connection)
    assert await shape(connection) == before


async def test_a_newer_schema_that_this_program_may_still_work_on_is_used(connection):
    await initialise(connection, version=NEXT, compatible=NOW, upgrades=ADD_NOTE)
    await require_current(connection)
    assert await initialise(connection) == (NEXT, NEXT)


async def test_a_schema_of_somebody_else_is_told_and_left_alone(stranger):
    await stranger.execute("CREATE SCHEMA outbox CREATE TABLE email (theirs int)")
    for ask in (require_current, initialise, installed_version):
        with pytest.raises(SchemaError, match="not this program's"):
            await ask(stranger)
    assert await stranger.fetchval("SELECT count(*) FROM information_schema.tables WHERE table_schema = 'outbox'") == 1


async def test_the_schema_file_may_be_applied_by_psql_alone(stranger):
    async with stranger.transaction():
        await stranger.execute(schema.schema_sql())
    await require_current(stranger)
    assert await initialise(stranger) == (NOW, NOW)


async def test_the_schema_file_says_the_version_that_the_code_is_for(stranger):
    await stranger.execute(schema.schema_sql())
    assert await installed_version(stranger) == schema.VERSION
    assert set(schema.UPGRADES) == set(range(2, schema.VERSION + 1)), "each version can be reached from the first"
