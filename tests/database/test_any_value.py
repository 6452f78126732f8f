"""Values that Python cannot hold, of any type: they belong to their row, and every other recipient gets a report."""

import json

import pytest
from sqlalchemy import text

from outbox.errors import SourceError
from outbox.generate.query_errors import QueryError, RowError
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

# A value that the driver cannot decode, its text, and one that it can.
UNREADABLE = {
    "a far date": ("date '20226-11-24'", "20226-11-24", "date '2026-11-24'"),
    "a date BC": ("date '0044-03-15 BC'", "0044-03-15 BC", "date '2026-11-24'"),
    "a far timestamp": ("timestamp '20226-11-24 12:00'", "20226-11-24 12:00:00", "timestamp '2026-11-24'"),
    "a timestamp BC": ("timestamp '0044-03-15 12:00 BC'", "0044-03-15 12:00:00 BC", "timestamp '2026-11-24'"),
    "a far timestamptz": ("timestamptz '20226-11-24 12:00+00'", "20226-11-24", "now()"),
    "a timestamptz BC": ("timestamptz '0044-03-15 12:00+00 BC'", " BC", "now()"),
    "midnight at the end": ("time '24:00'", "24:00:00", "time '23:59'"),
    "midnight at the end with a zone": ("timetz '24:00+01'", "24:00:00+01", "timetz '23:59+01'"),
    "a huge interval": ("interval '178000000 years'", "178000000 years", "interval '1 day'"),
    "a huge negative interval": ("interval '-178000000 years'", "-178000000 years", "interval '1 day'"),
    "a range of dates": ("daterange('2026-01-01', '20226-01-01')", "[2026-01-01,20226-01-01)", "daterange(null, null)"),
    "a range of times": ("tsrange('2026-01-01', '20226-01-01')", "20226", "tsrange(null, null)"),
    "a multirange": ("datemultirange(daterange('2026-01-01', '20226-01-01'))", "20226", "datemultirange()"),
    "an array of dates": ("array[date '2026-01-01', date '20226-01-01']", "20226-01-01", "array[date '2026-01-01']"),
    "an array of ranges": ("array[daterange('20226-01-01', null)]", "20226-01-01", "array[daterange(null, null)]"),
    "a domain": ("cast(date '20226-01-01' as due)", "20226-01-01", "cast(date '2026-01-01' as due)"),
    "a composite": ("cast(row(1, date '20226-01-01') as task)", "(1,20226-01-01)", "cast(row(1, null) as task)"),
    "an array of composites": ("array[cast(row(1, date '20226-01-01') as task)]", "20226", "array[]::task[]"),
}
TYPES = "CREATE DOMAIN due AS date; CREATE TYPE task AS (n int, due date);"


@pytest.fixture
async def settings_of(database, connection, tmp_path):
    await connection.execute(TYPES)
    await connection.execute(
        "INSERT INTO people SELECT n, 'p' || n || '@example.com', 'Person ' || n FROM generate_series(1, 9) n"
    )

    def write(data="select 1 as done where :key <> ''", recipients=PEOPLE):
        path = tmp_path / "outbox.toml"
        path.write_text(SETTINGS.format(database=database, recipients=json.dumps(recipients), data=json.dumps(data)))
        return load(path, {})

    return write


def by_key(bad, good):
    return f"select 'x' as note, case when :key = '7' then {bad} else {good} end as due"


def by_keys(bad, good):
    return f"select k as key, 'x' as note, case when k = '7' then {bad} else {good} end as due from unnest(:keys) k"


@pytest.mark.parametrize("query", [by_key, by_keys])
async def test_a_value_that_python_cannot_hold_costs_its_recipient_alone_a_report(connection, settings_of, query):
    for bad, shown, good in UNREADABLE.values():
        result = await generate(settings_of(query(bad, good)), "progress", period_key=WEEK)
        assert (result.made, list(result.failed)) == (8, ["7"]), bad
        (said,) = result.failed.values()
        assert said.startswith("column due has the value "), said
        assert shown in said
        await connection.execute("TRUNCATE outbox.edition CASCADE")


async def test_a_value_of_the_recipients_query_that_python_cannot_hold_is_one_error_with_column_value_and_key(
    connection, settings_of
):
    for bad, shown, good in UNREADABLE.values():
        recipients = f"select id::text as key, email, case when id = 7 then {bad} else {good} end as since from people"
        settings = settings_of(recipients=recipients)
        with pytest.raises(SourceError) as refused:
            await generate(settings, "progress", period_key=WEEK)
        words = str(refused.value)
        assert words.startswith("reports.progress.recipients: column since has the value "), words
        assert shown in words
        assert " in the row of key 7, which Python cannot represent as " in words
    for run in (audit(settings, "progress", WEEK), preview(settings, "progress", key="7", period_key=WEEK)):
        with pytest.raises(SourceError, match=r"^reports\.progress\.recipients: column since has the value"):
            await run
    assert await connection.fetchval("SELECT count(*) FROM outbox.report") == 0


async def test_a_value_far_down_in_the_recipients_is_found(settings_of):
    recipients = """select n::text as key, 'a@example.com' as email,
        case when n = 2345 then date '20226-11-24' end as since from generate_series(1, 3000) n"""
    with pytest.raises(SourceError, match="column since has the value 20226-11-24 in the row of key 2345"):
        await generate(settings_of(recipients=recipients), "progress", period_key=WEEK)


async def test_a_preview_names_column_and_value(settings_of):
    settings = settings_of(by_key("date '20226-11-24'", "null"))
    with pytest.raises(SourceError, match=r"^reports\.progress\.data: .*7.*column due has the value 20226-11-24"):
        await preview(settings, "progress", key="7", period_key=WEEK)
    assert (await preview(settings, "progress", key="6", period_key=WEEK)).recipient.key == "6"


async def test_the_session_reads_times_as_before_after_a_value_that_it_could_not_read(settings_of):
    async with GenerateSession.open(settings_of()) as session:
        again = "select timestamptz '2026-11-24 00:00+00' as at, jsonb '[1]' as j, array[date '2026-11-24'] as days"
        before = await session.queries.rows(again, {})
        for bad, _, _ in UNREADABLE.values():
            with pytest.raises(Exception, match="column due has the value"):
                await session.queries.rows(f"select {bad} as due, now() as at, '{{}}'::jsonb as j", {})
        assert await session.queries.rows(again, {}) == before
        later = "select json '{\"a\": 1}' as j, jsonb '[1]' as b, array[json '[1]'] as a, interval '1 day' as i"
        ((j, b, a, i),) = [row.values() for row in await session.queries.rows(later, {})]
        assert (j, b, a, i.days) == ({"a": 1}, [1], [[1]], 1), "a query that is prepared later reads them as before"
        ((latest,),) = await session.fetch(text("SELECT timestamptz '20226-11-24 00:00+00'"))
        assert latest.year == 9999, "our own statements read the nearest time that Python has"


# Values at the ends of every built-in type. None of them may end a run.
EXTREMES = [
    *("'NaN'::numeric", "'Infinity'::numeric", "1e131071::numeric", "1e-16383::numeric", "'-Infinity'::numeric"),
    *("'NaN'::float8", "'Infinity'::float8", "1e308::float8", "'NaN'::float4", "'-0'::float8"),
    *("(-32768)::int2", "(-2147483648)::int4", "(-9223372036854775808)::int8", "4294967295::oid"),
    *("'-92233720368547758.08'::money", "true", "'x'::\"char\"", "''::char(3)", "repeat('x', 100000)", "'ß'::name"),
    *("'\\x00ff'::bytea", "B'101'", "B'101'::varbit", "''::varbit"),
    *("'1e400'::jsonb", "'{\"a\": [1e400, null]}'::json", "'null'::jsonb", "'$.a'::jsonpath"),
    *("inet '10.0.0.1/8'", "inet '::1'", "inet 'ffff::/16'", "cidr '10.0.0.0/8'"),
    *("macaddr '08:00:2b:01:02:03'", "macaddr8 '08:00:2b:01:02:03:04:05'"),
    *("'00000000-0000-0000-0000-000000000000'::uuid", "'a & b'::tsquery", "'a:1 b:2'::tsvector"),
    *("point(1, 2)", "lseg '[(0,0),(1,1)]'", "box '(1,1),(0,0)'", "path '[(0,0),(1,1)]'", "polygon '((0,0),(1,1))'"),
    *("circle '<(0,0),1>'", "line '{1,2,3}'", "point('Infinity', 'NaN')"),
    *("'infinity'::date", "'-infinity'::date", "'infinity'::timestamp", "'infinity'::timestamptz"),
    *("'-infinity'::timestamptz", "date '4713-01-01 BC'", "date '5874897-12-31'", "timestamp '294276-12-31'"),
    *("timestamptz '4713-01-01 00:00+00 BC'", "timestamptz '9999-12-31 23:59:59.999999-15:59'", "time '24:00'"),
    *("timetz '24:00-15:59:59'", "timetz '00:00+15:59:59'", "interval '178000000 years'", "interval '-1 month 1 day'"),
    *("int4range(1, null)", "numrange('-Infinity', 'Infinity')", "'empty'::tstzrange", "int4multirange()"),
    *("daterange('infinity', null)", "tstzrange('-infinity', 'infinity')", "nummultirange(numrange(1, 2))"),
    *("array[1, null, 3]", "'{}'::int[]", "'[5:7]={1,2,3}'::int[]", "array[[1, 2], [3, 4]]", "array['a', null]"),
    *("row(1, 'x')", "row(1, date '20226-01-01', null)", "array[row(1, 2)]", "row()", "cast(null as task)"),
    "cast(row(1, '20226-01-01') as task)",
    *(
        "'pg_class'::regclass",
        "'now'::regproc",
        "'int4'::regtype",
        "'=(int,int)'::regoperator",
        "'\"C\"'::regcollation",
    ),
    *("'(0,1)'::tid", "'1'::xid", "'1'::xid8", "'1'::cid", "'0/0'::pg_lsn", "pg_current_snapshot()"),
    *("txid_current_snapshot()", "'1 2'::int2vector", "'1 2'::oidvector", "'x'::refcursor", "gen_random_uuid()"),
    *("(select relacl from pg_class where relacl is not null limit 1)", "makeaclitem(10, 10, 'SELECT', false)"),
    *("(select adbin from pg_attrdef limit 1)", "(select p from people p limit 1)", "'bad'::mood", "null", "''"),
    *("(select most_common_vals from pg_stats limit 1)", "'x'::unknown", "'z'::cstring"),
    *(
        "cast('{2026-11-24}' as due_days)",
        "'\\001'::text",
        "chr(1114109)",
        "pg_typeof(1)",
        "(select t from pg_type t limit 1)",
    ),
]

# What a run says where it does not make the report.
NAMED = {
    "date '4713-01-01 BC'": "column v has the value 4713-01-01 BC, which Python cannot represent as date",
    "date '5874897-12-31'": "column v has the value 5874897-12-31",
    "timestamp '294276-12-31'": "column v has the value 294276-12-31 00:00:00",
    "timestamptz '4713-01-01 00:00+00 BC'": "column v has the value 4714-12-31 19:03:58-04:56:02 BC",
    "timestamptz '9999-12-31 23:59:59.999999-15:59'": "column v has the value 10000-01-01 10:58:59.999999-05",
    "time '24:00'": "column v has the value 24:00:00",
    "timetz '24:00-15:59:59'": "column v has the value 24:00:00-15:59:59",
    "interval '178000000 years'": "column v has the value 178000000 years",
    "row(1, date '20226-01-01', null)": "column v or w has a value that Python cannot represent",
    "cast(row(1, '20226-01-01') as task)": "column v has the value (1,20226-01-01)",
    "(select most_common_vals from pg_stats limit 1)": "does not know a type of its columns",
    "(select t from pg_type t limit 1)": "does not know a type of its columns",
}


async def test_no_value_of_any_type_ends_in_an_error_of_another_kind(connection, settings_of):
    """Whatever else one of the rows raises while it is rendered is its recipient's, too: `generate.Run._report`."""
    await connection.execute("CREATE TYPE mood AS ENUM ('bad'); CREATE DOMAIN due_days AS date[];")
    named = {}
    async with GenerateSession.open(settings_of()) as session:
        await session.use_timezone("America/New_York")
        for value in EXTREMES:
            for query in (f"select {value} as v where :key <> ''", f"select :key as k, {value} as v, {value} as w"):
                try:
                    assert len(await session.queries.rows(query, {"key": "1"})) == 1
                except (RowError, QueryError) as error:
                    named[value] = str(error)
    assert set(named) == set(NAMED)
    for value, words in NAMED.items():
        assert words in named[value], value
