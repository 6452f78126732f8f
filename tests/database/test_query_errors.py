"""Errors of the user's queries: told once, with the fix; and what is no error of theirs, such as a migration."""

import json

import pytest

from outbox.errors import SourceError
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
[reports.progress]
timezone = "America/New_York"
recipients = {recipients}
data = {data}
link = "https://reports.example.com/r/{{token}}"
"""
PEOPLE = "select id::text as key, email, name from people"


@pytest.fixture
async def settings_of(database, connection, tmp_path):
    await connection.execute(
        "CREATE TABLE task (id serial primary key, person_id int, slug text, done_at timestamp, due date,"
        " at timestamptz, uid uuid, tags text[]);"
        "INSERT INTO people SELECT n, 'p' || n || '@example.com', 'Person ' || n FROM generate_series(1, 9) n;"
        # Sunday the 15th, 23:30 in New York, in UTC: it is in the week before 2026-W47.
        "INSERT INTO task (person_id, slug, done_at, due, at, tags) SELECT n, 'before', '2026-11-16 04:30',"
        " '2026-11-15', '2026-11-16 04:30+00', '{a,b,c}' FROM generate_series(1, 9) n;"
        "INSERT INTO task (person_id, slug, done_at, due, at, tags) SELECT n, 'within', '2026-11-16 05:30',"
        " '2026-11-16', '2026-11-16 05:30+00', '{a,b,c}' FROM generate_series(1, 9) n;"
    )

    def write(data="select 1 as done where :key <> ''", recipients=PEOPLE):
        path = tmp_path / "outbox.toml"
        path.write_text(SETTINGS.format(database=database, recipients=json.dumps(recipients), data=json.dumps(data)))
        return load(path, {})

    return write


# Ways in which people of Postgres write it; each finds one row for each person.
WRITTEN = [
    "select slug from task where person_id = :key::int and at >= :starts_at and at < :ends_at",
    "select slug from task where person_id=:key::integer and due >= :starts_at::date and due < :ends_at::date",
    "select slug from task where person_id = cast(:key as int) and due >= :starts_at and due < :ends_at",
    "select slug from task where person_id = :key::bigint and done_at at time zone 'UTC' >= :starts_at",
    "select slug from task where person_id = :key::int and done_at >= :starts_at::timestamptz at time zone 'UTC'",
    "select slug from task where person_id = :key::int and done_at >= :starts_at at time zone 'UTC'",
    "select person_id as key, slug from task where person_id = any(:keys::int[]) and at >= :starts_at",
    "select person_id as key, slug from task where person_id::text = any(:keys) and at >= :starts_at",
    "select person_id as key, slug from task where person_id in (select unnest(:keys)::int) and at >= :starts_at",
    "select person_id as key, slug from task where person_id = any (:keys :: int[]) and at >= :starts_at;  -- :nobody",
    "select tags[1:2] as slug from task where person_id = :key::int and at >= :starts_at and ':key' <> $$:keys$$",
    "select slug, ':nobody' from task where person_id = :key::int and at between :starts_at and :ends_at /* :nobody */",
    "with mine as (select * from task where person_id = :key::int) select slug from mine where at >= :starts_at",
]


async def test_casts_behind_parameters_and_colons_of_postgres_are_read_as_postgres_reads_them(connection, settings_of):
    for data in WRITTEN:
        result = await generate(settings_of(data), "progress", period_key=WEEK)
        assert (result.made, result.failed) == (9, {}), data
        pages = [row["html"] for row in await connection.fetch("SELECT html FROM outbox.report")]
        assert all("within" in page or "a, b" in page for page in pages), data
        assert not any("before" in page for page in pages), data
        await connection.execute("TRUNCATE outbox.edition CASCADE")


TIMESTAMP = "it compares :starts_at with a timestamp without time zone"
UTC = "(col at time zone 'UTC') >= :starts_at"
WRONG = {
    "a timestamp without time zone": (
        "select slug from task where person_id = :key::int and done_at >= :starts_at",
        (TIMESTAMP, UTC, "col >= :starts_at::timestamptz at time zone 'UTC'"),
    ),
    "a cast to it": ("select slug from task where :key <> '' and done_at >= :starts_at::timestamp", (TIMESTAMP, UTC)),
    "in a batch": ("select :keys as key, slug from task where done_at >= :starts_at", (TIMESTAMP, UTC)),
    "a literal": ("select 1 as a where timestamp '2026-11-24' >= :starts_at and :key <> ''", (TIMESTAMP, UTC)),
    "a bound as a number": ("select slug from task where id > :starts_at and :key <> ''", (":starts_at as int4",)),
    "a key that is a number": (
        "select slug from task where person_id = :key",
        ("integer = text", "compare with cast(:key as int)"),
    ),
    "a key that is a uuid": ("select slug from task where uid = :key", ("compare with cast(:key as uuid)",)),
    "in keys": (
        "select id as key, slug from task where person_id in (:keys)",
        ("any(cast(:keys as int[])) in place of in (:keys)",),
    ),
    "in keys of text": (
        "select id as key, slug from task where slug in (:keys)",
        ("any(:keys) in place of in (:keys)",),
    ),
    "any of keys": (
        "select id as key, slug from task where person_id = any(:keys)",
        ("compare with any(cast(:keys as int[]))",),
    ),
    "a wrong column": ("select slugg from task where :key <> ''", ('column "slugg" does not exist',)),
    "a wrong literal": ("select 'x'::int as a where :key <> ''", ('invalid input syntax for type integer: "x"',)),
    "two statements": ("select :key; select 1", ("multiple commands",)),
    "a type without a parameter's": ("select slug from task where tags @> :period and :key <> ''", ("text[] @> text",)),
    "another parameter": ("select :key as a, :who as b", ("it uses :who, but there are only :period", r"\\:who")),
    "a position": ("select :key as a, $2 as b", ("it uses $2, but parameters have names: :period",)),
}


async def test_an_error_of_the_query_is_told_once_with_the_fix(settings_of):
    for data, words in WRONG.values():
        settings = settings_of(data)
        with pytest.raises(SourceError, match=r"^reports\.progress\.data: Postgres refuses the query") as refused:
            await generate(settings, "progress", period_key=WEEK)
        assert all(word in str(refused.value) for word in words), str(refused.value)
        with pytest.raises(SourceError) as previewed:
            await preview(settings, "progress", period_key=WEEK)
        assert str(previewed.value) == str(refused.value)


async def test_a_timestamp_without_time_zone_in_the_recipients_query_is_told_with_the_fix(settings_of):
    settings = settings_of(recipients=f"{PEOPLE} where exists (select from task where done_at >= :starts_at)")
    for run in (
        lambda: generate(settings, "progress", period_key=WEEK),
        lambda: preview(settings, "progress", period_key=WEEK),
        lambda: audit(settings, "progress", WEEK),
    ):
        with pytest.raises(SourceError, match=r"^reports\.progress\.recipients: .*timestamp without time zone"):
            await run()


# Queries that run, and the bounds whose comparison depends on the session's time zone.
DEPEND = [
    ("done_at >= cast(:starts_at as timestamptz) and at < :ends_at", ["starts_at"]),
    ("done_at >= :starts_at::timestamptz and done_at < :ends_at :: timestamp with time zone", ["starts_at", "ends_at"]),
    ("at >= :starts_at and done_at < :starts_at", ["starts_at"]),
    ("due >= :starts_at and done_at >= :starts_at", ["starts_at"]),
    ("at >= :starts_at::timestamptz and due < :ends_at::date", []),
    ("done_at >= :starts_at::timestamptz at time zone 'UTC'", []),
    ("done_at at time zone 'UTC' >= cast(:starts_at as timestamptz)", []),
    ("at >= :starts_at group by at - :starts_at, slug", []),
]


async def test_a_comparison_that_depends_on_the_time_zone_of_the_session_is_found(settings_of):
    async with GenerateSession.open(settings_of()) as session:
        for condition, bounds in DEPEND:
            assert (
                await session.queries.plain_timestamps(f"select slug from task where :key <> '' and {condition}")
                == bounds
            )
        assert await session.queries.plain_timestamps("select nothing from nowhere where a = :starts_at") == []


async def test_a_key_that_is_no_number_costs_its_recipient_alone_a_report(settings_of):
    people = "select case id when 7 then 'seven' else id::text end as key, email from people"
    for data in (
        "select slug from task where person_id = :key::int",
        "select person_id as key, slug from task where person_id = any(:keys::int[])",
    ):
        with_one = settings_of(data, people)
        result = await generate(with_one, "progress", period_key="2026-W46" if ":keys" in data else WEEK)
        assert (result.made, list(result.failed)) == (8, ["seven"])


# What a migration does to a table while its rows are read.
MIGRATIONS = [
    "alter table task add column note text",
    "alter table task alter column slug type varchar(100)",
    "alter table task drop column uid",
    "alter table task alter column person_id type bigint",
    "alter type mood add value 'fine'",
    "alter type pair add attribute c int",
    "alter table task rename to tasks; create view task as select * from tasks",
]


async def test_a_migration_between_two_runs_of_a_statement_costs_nobody_a_report(connection, settings_of):
    await connection.execute("CREATE TYPE mood AS ENUM ('well'); CREATE TYPE pair AS (a int, b int)")
    await connection.execute("ALTER TABLE task ADD mood mood DEFAULT 'well', ADD pair pair DEFAULT (1, 2)")
    query = "select *, t from task t where person_id = :key::int"
    async with GenerateSession.open(settings_of()) as session:
        for migration in MIGRATIONS:
            assert len(await session.queries.rows(query, {"key": "3"})) == 2, migration
            await connection.execute(migration)
            for key in ("4", "5"):
                assert len(await session.queries.rows(query, {"key": key})) == 2, migration


async def test_a_statement_that_is_gone_is_prepared_again(settings_of):
    async with GenerateSession.open(settings_of()) as session:
        for key in ("1", "2"):
            assert await session.queries.rows("select :key as key", {"key": key}) == [{"key": key}]
            await session.queries.rows(
                "do $$ begin execute (select 'deallocate ' || quote_ident(name) "
                "from pg_prepared_statements where statement like '%as key'); end $$",
                {},
            )


async def test_a_deadlock_costs_nobody_a_report(connection, settings_of):
    await connection.execute(
        "CREATE SEQUENCE calls; CREATE FUNCTION meets(error text, times int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('calls') <= times THEN RAISE EXCEPTION 'met' USING ERRCODE = error; END IF; RETURN 1; END $$"
    )
    async with GenerateSession.open(settings_of()) as session:
        for error in ("40P01", "40001"):
            await connection.execute("ALTER SEQUENCE calls RESTART")
            assert await session.queries.rows(f"select meets('{error}', 2) as a", {}) == [{"a": 1}]
        await connection.execute("ALTER SEQUENCE calls RESTART")
        with pytest.raises(RowError, match="met"):
            await session.queries.rows("select meets('40P01', 99) as a", {})
        assert await connection.fetchval("SELECT last_value FROM calls") == 3


async def test_a_table_that_is_gone_is_told_as_such(connection, settings_of):
    async with GenerateSession.open(settings_of()) as session:
        await session.queries.rows("select * from task where :key <> ''", {"key": "1"})
        await connection.execute("DROP TABLE task")
        with pytest.raises(Exception, match='relation "task" does not exist'):
            await session.queries.rows("select * from task where :key <> ''", {"key": "1"})


async def test_an_error_of_one_row_stays_with_its_row(settings_of):
    async with GenerateSession.open(settings_of()) as session:
        for key in ("1", "2", "3"):
            with pytest.raises(RowError, match="division by zero"):
                await session.queries.rows("select 1 / (:key::int - :key::int)", {"key": key})
