import asyncio
import itertools
from pathlib import Path

import asyncpg
import pytest

from outbox.database import schema
from outbox.database.schema import initialise, installed_version, require_current
from outbox.database.upgrades import UPGRADES
from outbox.errors import SchemaError
from tests.support.fleet import until

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
    """Return all that a schema is: columns, constraints, indexes, functions, rights, triggers, views, versions."""
    return await connection.fetch("""
        SELECT 'column' AS kind, table_name || '.' || column_name AS name, data_type || ' ' || is_nullable AS what
          FROM information_schema.columns WHERE table_schema = 'outbox'
        UNION ALL
        SELECT 'constraint', c.conrelid::regclass || ' ' || c.conname, pg_get_constraintdef(c.oid)
          FROM pg_constraint c WHERE c.connamespace = 'outbox'::regnamespace
        UNION ALL
        SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'outbox'
        UNION ALL
        SELECT 'function', proname, pg_get_functiondef(oid) || proacl::text FROM pg_proc
         WHERE pronamespace = 'outbox'::regnamespace
        UNION ALL
        SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger
         WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'outbox'::regnamespace) AND NOT tgisinternal
        UNION ALL
        SELECT 'view', viewname, definition FROM pg_views WHERE schemaname = 'outbox'
        UNION ALL
        SELECT 'identity', relname, relreplident::text FROM pg_class
         WHERE relnamespace = 'outbox'::regnamespace AND relkind IN ('r', 'p')
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


V1 = Path(__file__).parent / "schema_1.sql"


async def of_version_5(connection):
    await connection.execute(V1.read_text())
    await initialise(connection, version=5)


OUT_OF_BOUNDS = """
WITH made AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message, made_by)
    SELECT k, 'a@example.com', 'b@example.com', '<1@example.com>', m, b
      FROM (VALUES ('large', repeat('x', 21000000)::bytea, ''), ('header', repeat('x', 70000)::bytea, ''),
                   (repeat('k', 1500), 'x', ''), ('who', 'x', repeat('m', 501)), ('bc', 'x', ''), ('far', 'x', ''),
                   ('never', 'x', ''), ('always', 'x', ''), ('paused', 'x', ''), ('settled', 'x', '')) AS v (k, m, b)
    RETURNING id, key
)
INSERT INTO outbox.delivery (email, due_at, send_before, paused, state, settled_at)
SELECT id, CASE key WHEN 'bc' THEN '4000-01-01 BC' WHEN 'far' THEN '20000-01-01' WHEN 'always' THEN '-infinity'
                    WHEN 'settled' THEN '-infinity' WHEN 'paused' THEN 'infinity' ELSE '2026-01-01' END::timestamptz,
       CASE key WHEN 'never' THEN 'infinity' WHEN 'far' THEN '20000-01-01' WHEN 'bc' THEN '-infinity' END::timestamptz,
       CASE key WHEN 'paused' THEN 'sales' END, CASE key WHEN 'settled' THEN 'cancelled' ELSE 'pending' END,
       CASE key WHEN 'settled' THEN now() END
  FROM made
"""


async def test_an_upgrade_keeps_rows_that_break_the_new_bounds_and_refuses_new_ones(stranger):
    await of_version_5(stranger)
    await stranger.execute(OUT_OF_BOUNDS)
    emails = await stranger.fetch("SELECT id, key, octet_length(message), made_by FROM outbox.email ORDER BY id")
    assert await initialise(stranger) == (5, NOW)
    assert (
        await stranger.fetch("SELECT id, key, octet_length(message), made_by FROM outbox.email ORDER BY id") == emails
    )
    assert await schema.read_broken(stranger) == ["email_message_size", "email_sizes"]
    for column, value in (("key", "'y' || repeat('k', 1500)"), ("message", "repeat('x', 21000000)::bytea")):
        with pytest.raises(asyncpg.CheckViolationError):
            await stranger.execute(f"UPDATE outbox.email SET {column} = {value} WHERE key = 'bc'")
    # A relay claims any of them, and each client can read when it is due.
    assert await stranger.execute("UPDATE outbox.delivery SET relay = 1 WHERE state = 'pending'") == "UPDATE 9"
    rows = await stranger.fetch("SELECT e.key, d.* FROM outbox.delivery d JOIN outbox.email e ON e.id = d.email")
    found = {row["key"]: (row["due_at"].year, row["send_before"] and row["send_before"].year) for row in rows}
    assert found["bc"] == (1970, 1970)
    assert found["far"] == (2999, 2999)
    assert found["always"] == found["settled"] == (1970, None)
    assert found["never"] == found["large"] == (2026, None)
    assert await stranger.fetchval("SELECT bool_and(due_at = 'infinity') FROM outbox.delivery WHERE paused = 'sales'")
    with pytest.raises(asyncpg.CheckViolationError):
        await stranger.execute("UPDATE outbox.delivery SET due_at = '4000-01-01 BC'")


async def test_an_upgrade_from_version_7_meets_no_deadlock_with_a_relay_that_settles(stranger, empty):
    """It waits for a reader of `edition`; a relay changes deliveries and writes attempts meanwhile."""
    await stranger.execute(V1.read_text())
    await initialise(stranger, version=7)
    reader, relay, look = [await asyncpg.connect(empty) for _ in range(3)]
    reading = reader.transaction()
    await reading.start()
    await reader.execute("SELECT FROM outbox.edition")
    upgrading = asyncio.create_task(initialise(stranger))
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    await until(lambda: _is(look, waits, 1), "the upgrade waits for the reader")
    settle = (
        "WITH d AS (UPDATE outbox.delivery SET due_at = now() RETURNING email)"
        " INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, 1, 'accepted', '' FROM d"
    )
    settling = asyncio.create_task(relay.execute(settle))
    await until(lambda: _is(look, waits, 2), "the relay waits for the upgrade")
    await reading.rollback()
    assert await upgrading == (7, NOW)
    assert await settling == "INSERT 0 0"
    for one in (reader, relay, look):
        await one.close()


async def test_an_upgrade_meets_no_deadlock_with_a_generate_whatever_its_steps_lock_first(stranger, empty):
    """A step changes `delivery`, and a trigger of `report` is replaced after it; generate writes them the other way."""
    await initialise(stranger)
    cron, look = [await asyncpg.connect(empty) for _ in range(2)]
    step = {schema.VERSION + 1: "ALTER TABLE outbox.delivery ADD COLUMN weight integer"}
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with cron.transaction():
        await cron.execute("LOCK TABLE outbox.report IN ROW EXCLUSIVE MODE")  # as its INSERT does
        upgrading = asyncio.create_task(initialise(stranger, version=schema.VERSION + 1, upgrades=step))
        await until(lambda: _is(look, waits, 1), "the upgrade waits for the cron")
        await cron.execute("LOCK TABLE outbox.email, outbox.delivery IN ROW EXCLUSIVE MODE")
    assert await upgrading == (schema.VERSION, schema.VERSION + 1)
    for one in (cron, look):
        await one.close()


async def _is(connection, query, value):
    return await connection.fetchval(query) == value


async def test_an_upgrade_from_version_7_finds_what_needs_a_person(stranger):
    """All dead letters about which nobody has decided, and what expired lately."""
    await stranger.execute(V1.read_text())
    await initialise(stranger, version=7)
    await stranger.execute("SET session_replication_role = replica")  # functions are of the newest version
    await stranger.execute("""
        INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message) OVERRIDING SYSTEM VALUE
        SELECT n, 'k' || n, CASE WHEN n < 6 THEN n END, 'a@example.com', 'b@example.com', '<1@example.com>', 'x'
          FROM generate_series(1, 7) n;
        INSERT INTO outbox.delivery (email, state, attempt, settled_at)
        VALUES (1, 'dead', 1, now() - interval '1 year'), (2, 'dead', 1, now()), (3, 'expired', 0, now()),
               (4, 'expired', 0, now() - interval '1 year'), (5, 'sent', 1, now()), (6, 'dead', 1, now()),
               (7, 'expired', 0, now());
        INSERT INTO outbox.attempt (email, attempt, verdict, reply)
        VALUES (2, 1, 'resolved', 'ann decided: discard'), (6, 0, 'resolved', 'ann decided: resend')""")
    await stranger.execute("RESET session_replication_role")
    await initialise(stranger)
    assert [row["email"] for row in await stranger.fetch("SELECT email FROM outbox.failure ORDER BY 1")] == [1, 3, 6]


async def test_every_function_has_a_search_path_of_its_own_and_none_is_everybodys(connection, stranger):
    await of_version_5(stranger)
    await initialise(stranger)
    for one in (connection, stranger):
        functions = await one.fetch(
            "SELECT proname, proconfig, has_function_privilege('public', oid, 'EXECUTE') AS is_everybodys FROM pg_proc"
            " WHERE pronamespace = 'outbox'::regnamespace"
        )
        assert len(functions) > 10
        for name, config, is_everybodys in functions:
            assert "search_path=pg_catalog, pg_temp" in (config or []), name
            assert not is_everybodys, name


# What stands before pg_catalog in a path, or fits the argument better than what is in it, is taken (CVE-2018-1058).
SHADOWS = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.trap() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$;
CREATE FUNCTION evil.lower(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT evil.trap()';
CREATE FUNCTION evil.octet_length(text) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT evil.trap()::int';
CREATE FUNCTION evil.octet_length(bytea) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT evil.trap()::int';
CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT evil.trap()::timestamptz';
CREATE FUNCTION evil.nothing(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT evil.trap()::boolean';
CREATE OPERATOR evil.<> (FUNCTION = evil.nothing, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR evil.= (FUNCTION = evil.nothing, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR evil.!~ (FUNCTION = evil.nothing, LEFTARG = text, RIGHTARG = text);
CREATE FUNCTION evil.to_regclass(text) RETURNS regclass LANGUAGE sql AS 'SELECT evil.trap()::regclass';
CREATE FUNCTION evil.to_regnamespace(text) RETURNS regnamespace LANGUAGE sql AS 'SELECT evil.trap()::regnamespace';
CREATE FUNCTION evil.pg_advisory_xact_lock(int, int) RETURNS void LANGUAGE sql AS 'SELECT evil.trap()';
CREATE DOMAIN evil.text AS pg_catalog.text;
CREATE DOMAIN evil.timestamptz AS pg_catalog.timestamptz;
"""
BOUND = """
SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend
 WHERE refobjid IN (SELECT oid FROM pg_proc WHERE pronamespace = 'evil'::regnamespace
                    UNION SELECT oid FROM pg_operator WHERE oprnamespace = 'evil'::regnamespace
                    UNION SELECT oid FROM pg_type WHERE typnamespace = 'evil'::regnamespace)
   AND NOT EXISTS (SELECT FROM pg_operator o WHERE o.oid = objid AND o.oprnamespace = 'evil'::regnamespace)
   AND NOT EXISTS (SELECT FROM pg_type t WHERE t.oid = objid AND t.typnamespace = 'evil'::regnamespace)
"""


@pytest.mark.parametrize("begins", ["with nothing", "at version 1", "by psql"])
async def test_no_part_of_the_schema_is_bound_to_a_function_of_another_schema(stranger, begins):
    if begins == "at version 1":
        await stranger.execute(V1.read_text())
    await stranger.execute(SHADOWS)
    await stranger.execute("SET search_path = evil, pg_catalog, public")
    if begins == "by psql":
        await stranger.execute(schema.schema_sql())
    else:
        await initialise(stranger)
        assert await schema.limit_messages(stranger, 1_000_000) == 20_971_520
    assert await stranger.fetch(BOUND) == []
    said = await stranger.fetchval(
        "SELECT outbox.enqueue(key => 'k', sender => 's@example.com', recipient => 'a@example.com', body_text => 't')"
    )
    assert said is True
    assert await stranger.fetchval("SELECT outbox.suppressed('A@example.com', '')") is None
    assert await stranger.fetchval("SELECT outbox.unsubscribe('x')") is None


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
    assert set(UPGRADES) == set(range(2, schema.VERSION + 1)), "each version can be reached from the first"
