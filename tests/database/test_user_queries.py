"""The user's queries in generate's session: with their role's search path, and without effect on our statements.

A role that may create in a schema on that path puts objects there that fit better than Postgres' own (CVE-2018-1058).
"""

import re

import asyncpg
import pytest
from sqlalchemy import text

from outbox.database.connection import TRUSTED_PATH
from outbox.database.roles import ROLES, grant_roles
from outbox.generate.query_errors import RowError
from outbox.generate.run import generate
from outbox.generate.session import GenerateSession
from outbox.operations.audit import audit
from outbox.operations.preview import preview
from outbox.settings import load

WEEK = "2026-W47"
SETTINGS = """
database_url = "{database}"
sender = "Progress reports <reports@example.com>"
[digest]
link = "https://reports.example.com/d/{{token}}"
[reports.progress]
recipients = '''{recipients}'''
data = '''{data}'''
link = "https://reports.example.com/r/{{token}}"
[reports.collected]
deliver = "digest"
recipients = "select id::text as key, email, name from people"
data = "select 1 as done where :key <> ''"
link = "https://reports.example.com/r/{{token}}"
"""
RECIPIENTS = "select id::text as key, email, name, mood from people"
DATA = (
    "select p.id::text as key, p.mood, array[p.mood] as moods, p as whole from people p where p.id::text = any(:keys)"
)

# An aggregate and operators of asyncpg's own query about types, and functions and operators of our statements.
SHADOWS = """
CREATE FUNCTION public.evil() RETURNS integer LANGUAGE plpgsql AS
    $$ BEGIN PERFORM nextval('public.hits'); RAISE WARNING 'evil as %', current_user; RETURN 1; END $$;
CREATE FUNCTION public.unnest(integer[]) RETURNS SETOF integer LANGUAGE sql AS 'SELECT public.evil()';
CREATE FUNCTION public.unnest(bigint[]) RETURNS SETOF bigint LANGUAGE sql AS 'SELECT public.evil()::bigint';
CREATE FUNCTION public.unnest(text[]) RETURNS SETOF text LANGUAGE sql AS 'SELECT public.evil()::text';
CREATE FUNCTION public.hashtext(varchar) RETURNS integer LANGUAGE sql AS 'SELECT public.evil()';
CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT public.evil(); SELECT pg_catalog.now()';
CREATE FUNCTION public.pg_try_advisory_lock(bigint, integer) RETURNS boolean LANGUAGE sql AS
    'SELECT public.evil(); SELECT true';
CREATE FUNCTION public.set_config(text, varchar, boolean) RETURNS text LANGUAGE sql AS
    'SELECT public.evil()::text';
CREATE FUNCTION public.collected(oid, oid) RETURNS oid LANGUAGE sql AS 'SELECT public.evil(); SELECT 1::oid';
CREATE AGGREGATE public.array_agg(oid) (SFUNC = public.collected, STYPE = oid, INITCOND = '0');
CREATE FUNCTION public.differs(oid, integer) RETURNS boolean LANGUAGE sql AS
    'SELECT public.evil() = 0';
CREATE OPERATOR public.<> (FUNCTION = public.differs, LEFTARG = oid, RIGHTARG = integer);
CREATE FUNCTION public.same(text, varchar) RETURNS boolean LANGUAGE sql AS 'SELECT public.evil() = 0';
CREATE OPERATOR public.= (FUNCTION = public.same, LEFTARG = text, RIGHTARG = varchar);
CREATE FUNCTION public.joined(bigint, text) RETURNS text LANGUAGE sql AS 'SELECT public.evil()::text';
CREATE OPERATOR public.|| (FUNCTION = public.joined, LEFTARG = bigint, RIGHTARG = text);
"""


@pytest.fixture
async def roles(connection):
    """Those of outbox, with `app_queries` in it for generate and audit, and `n_shadows`, which may create in public."""
    mine = ("app_queries", "n_shadows")  # the groups of outbox stay: other databases of this server have them, too

    async def drop():
        for (name,) in await connection.fetch("SELECT rolname FROM pg_roles WHERE rolname = ANY ($1::text[])", mine):
            await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")

    await drop()
    await grant_roles(connection)
    await connection.execute(
        "CREATE ROLE n_shadows LOGIN; CREATE ROLE app_queries LOGIN; GRANT outbox_generate, outbox_read TO app_queries;"
        " CREATE TYPE mood AS ENUM ('well', 'unwell'); ALTER TABLE people ADD COLUMN mood mood NOT NULL DEFAULT 'well';"
        " GRANT SELECT ON people TO app_queries; GRANT CREATE ON SCHEMA public TO PUBLIC;"
        " CREATE SEQUENCE public.hits; GRANT ALL ON SEQUENCE public.hits TO PUBLIC;"
        " INSERT INTO people SELECT n, 'p' || n || '@example.com', 'Person ' || n FROM generate_series(1, 3) n"
    )
    yield (*ROLES, *mine)
    await drop()


def of(role, database):
    return re.sub("//[^@]*@", f"//{role}@", database)


@pytest.fixture
def settings_of(database, tmp_path):
    def write(role="postgres", recipients=RECIPIENTS, data=DATA):
        path = tmp_path / "outbox.toml"
        path.write_text(SETTINGS.format(database=of(role, database), recipients=recipients, data=data))
        return load(path, {})

    return write


async def test_no_object_that_another_role_put_on_the_path_runs_in_a_statement_of_ours(
    connection, database, roles, settings_of
):
    attacker = await asyncpg.connect(of("n_shadows", database))
    await attacker.execute(SHADOWS)
    await attacker.close()
    settings = settings_of("app_queries")
    made = await generate(settings, "progress", period_key=WEEK)
    assert (made.made, made.failed) == (3, {})
    assert (await generate(settings, "collected", period_key=WEEK)).made == 3
    assert (await generate(settings, "digest", period_key=WEEK)).made == 3
    assert (await audit(settings, "progress", WEEK)).expected == 3
    assert (await preview(settings, "progress", period_key=WEEK)).recipient.columns["mood"] == "well"
    assert not await connection.fetchval("SELECT is_called FROM public.hits"), "a shadow ran"

    victim = await asyncpg.connect(of("app_queries", database))
    await victim.fetchval("SELECT unnest(ARRAY[1])")
    await victim.close()
    assert await connection.fetchval("SELECT is_called FROM public.hits"), "else this test shows nothing"


async def test_a_users_query_has_the_path_of_its_role_and_no_statement_of_ours_has_it(connection, roles, settings_of):
    await connection.execute(
        "CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO PUBLIC; CREATE VIEW app.folk AS SELECT * FROM people;"
        ' GRANT SELECT ON app.folk TO app_queries; ALTER ROLE app_queries SET search_path = app, "$user"'
    )
    settings = settings_of("app_queries", "select id::text as key, email from folk", "select :key as k from folk")
    assert (await generate(settings, "progress", period_key=WEEK)).made == 3
    async with GenerateSession.open(settings) as session:
        for _ in range(2):
            (row,) = await session.queries.rows("select current_setting('search_path') as path", {})
            assert row["path"] == 'app, "$user"'
            assert (await session.fetch(text("SELECT current_setting('search_path')")))[0][0] == TRUSTED_PATH
        async with session.snapshot():
            (row,) = await session.queries.rows("select current_setting('search_path') as path", {})
            assert row["path"] == 'app, "$user"'
            assert (await session.fetch(text("SELECT current_setting('search_path')")))[0][0] == TRUSTED_PATH


@pytest.mark.parametrize("path", ["''", '"we""ird", public', "'sch,ema', public"])
async def test_any_path_that_a_role_may_have_is_given_to_its_queries(connection, roles, settings_of, path):
    await connection.execute(f"ALTER ROLE app_queries SET search_path = {path}")
    settings = settings_of("app_queries")
    async with GenerateSession.open(settings) as session:
        (row,) = await session.queries.rows(
            "select current_setting('search_path') as path, 'well'::public.mood as m", {}
        )
        await connection.execute(f"SET search_path = {path}")
        assert row["path"] == await connection.fetchval("SHOW search_path")


# What a query may leave behind: by itself, or in a function of the application.
LEAVES = {
    "a path": "select set_config('search_path', 'evil', false)",
    "a path in a function": "select public.leaves()",
    "a role": "select set_config('role', 'app_queries', false)",
    "a time zone and a limit": "select set_config('TimeZone', 'Asia/Tokyo', false),"
    " set_config('statement_timeout', '7777', false), set_config('lock_timeout', '0', false)",
    "a plan": "select set_config('enable_indexscan', 'off', false)",
}
NOW = """
SELECT current_setting('search_path'), current_user::text, current_setting('TimeZone'),
       current_setting('statement_timeout'), current_setting('lock_timeout'), current_setting('enable_indexscan'),
       current_setting('default_toast_compression')
"""


@pytest.mark.parametrize("how", ["alone", "in a snapshot", "in a stream"])
@pytest.mark.parametrize("leaves", LEAVES)
async def test_what_a_users_query_sets_for_the_session_is_undone_before_our_next_statement(
    connection, roles, settings_of, leaves, how
):
    await connection.execute(
        "CREATE FUNCTION public.leaves() RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM set_config('search_path', 'evil', false); SET search_path = evil; RETURN ''; END $$"
    )
    async with GenerateSession.open(settings_of()) as session:
        await session.use_timezone("America/New_York")
        ours = [tuple(row) for row in await session.fetch(text(NOW))]
        if how == "alone":
            await session.queries.rows(LEAVES[leaves], {})
        elif how == "in a stream":
            assert [len(rows) async for rows in session.queries.stream(LEAVES[leaves], {}, 10)] == [1]
        else:
            async with session.snapshot():
                await session.queries.rows(LEAVES[leaves], {})
                assert [tuple(row) for row in await session.fetch(text(NOW))] == ours
        assert [tuple(row) for row in await session.fetch(text(NOW))] == ours
        (theirs,) = await session.queries.rows("select current_setting('search_path') as path, current_user as me", {})
        assert (theirs["path"], theirs["me"]) == ('"$user", public', "postgres")


async def test_temporary_objects_of_a_users_query_stand_for_nothing_of_ours(connection, roles, settings_of):
    await connection.execute(
        "CREATE FUNCTION public.shadow() RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " CREATE TEMP TABLE report (id int, edition int, recipient_key text);"
        " CREATE TEMP TABLE email (id int, key text); CREATE TEMP TABLE pg_settings (name text, setting text);"
        " CREATE TEMP TABLE edition (id int); CREATE DOMAIN pg_temp.float8 AS int; CREATE DOMAIN pg_temp.bytea AS int;"
        " RETURN ''; EXCEPTION WHEN duplicate_table OR duplicate_object THEN RETURN ''; END $$"
    )
    settings = settings_of("app_queries", f"{RECIPIENTS}, (select public.shadow()) s")
    result = await generate(settings, "progress", period_key=WEEK)
    assert (result.made, result.failed) == (3, {})
    assert await connection.fetchval("SELECT count(*) FROM outbox.email") == 3


async def test_a_doctors_session_stays_read_only_whatever_a_query_sets(roles, settings_of):
    async with GenerateSession.open(settings_of()) as session:
        await session.keep("default_transaction_read_only", "on")
        await session.queries.rows("select set_config('default_transaction_read_only', 'off', false)", {})
        await session.fetch(text("SELECT 1"))
        with pytest.raises(RowError, match="read-only transaction"):
            await session.queries.rows("insert into people (id) values (9) returning id", {})
