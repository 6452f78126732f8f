"""Connections of our own: their search path, what they decode, how long they wait for a lock, and how they end."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import asyncpg
import pytest

from outbox.database.connection import LOST_SESSION
from outbox.database.engine import engine
from outbox.database.opening import LOCK_TIMEOUT_S, connect
from outbox.reports.period import INFINITY, MINUS_INFINITY
from outbox.settings.urls import DatabaseUrl
from outbox.web.queries import Store


@pytest.fixture
async def ours(database):
    connected = await connect(DatabaseUrl.parse(database), application="outbox test")
    yield connected
    await connected.close()


async def path_of(connection):
    return await connection.fetchval("SHOW search_path")


async def test_a_session_of_ours_trusts_the_catalog_alone_and_knows_the_path_of_its_role(database, connection):
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"""ALTER DATABASE {name} SET search_path = shop, "Odd, name", public""")
    ours = await connect(DatabaseUrl.parse(database), application="outbox test")
    assert await path_of(ours) == "pg_catalog, pg_temp"
    assert ours.user_search_path == 'shop, "Odd, name", public'
    async with ours.transaction():
        await ours.execute(f"SET LOCAL search_path = {ours.user_search_path}")
        assert await path_of(ours) == 'shop, "Odd, name", public'
    assert await path_of(ours) == "pg_catalog, pg_temp"
    await ours.close()


async def test_sqlalchemy_leaves_the_path_as_it_is(database):
    async with engine(DatabaseUrl.parse(database), application="outbox test").connect() as session:
        assert (await session.exec_driver_sql("SHOW search_path")).scalar() == "pg_catalog, pg_temp"


async def test_a_connection_that_the_pool_has_reset_keeps_its_path_and_its_bound(database):
    store = Store(DatabaseUrl.parse(database))
    for _ in range(2):
        async with store.connection() as held:
            assert await path_of(held) == "pg_catalog, pg_temp"
            assert await held.fetchval("SHOW lock_timeout") == "500ms"
            assert await held.fetchval("SELECT timestamptz 'infinity'") == INFINITY
    await store.close()


async def test_every_session_waits_for_a_lock_for_a_while_only(ours):
    assert await ours.fetchval("SHOW lock_timeout") == f"{LOCK_TIMEOUT_S:g}s"


OUT_OF_RANGE = {
    "infinity": INFINITY,
    "-infinity": MINUS_INFINITY,
    "4000-01-01 BC": MINUS_INFINITY + timedelta(microseconds=1),
    "4713-01-01 00:00:00+00 BC": MINUS_INFINITY + timedelta(microseconds=1),
    "0001-01-01 00:00:00+00": MINUS_INFINITY + timedelta(microseconds=1),
    "9999-12-31 23:59:59.999999+00": INFINITY - timedelta(microseconds=1),
    "10000-01-01 00:00:00+00": INFINITY - timedelta(microseconds=1),
    "294276-12-31 23:59:59+00": INFINITY - timedelta(microseconds=1),
}


@pytest.mark.parametrize("value", OUT_OF_RANGE)
async def test_a_time_out_of_range_is_decoded_to_the_nearest_that_any_zone_can_show(ours, value):
    found = await ours.fetchval("SELECT $1::text::timestamptz", value)
    assert found == OUT_OF_RANGE[value]
    assert await ours.fetchval("SELECT array[$1::text::timestamptz]", value) == [found]
    for hours in (-23, 23):
        assert found.astimezone(timezone(timedelta(hours=hours))) == found
    assert found.astimezone() == found


@pytest.mark.parametrize("value", ["infinity", "-infinity"])
async def test_an_infinite_time_comes_back_as_the_same(ours, value):
    found = await ours.fetchval("SELECT $1::text::timestamptz", value)
    assert await ours.fetchval("SELECT $1::timestamptz::text", found) == value


TIMES = [
    datetime(2026, 11, 24, 6, 0, 0, 123456, tzinfo=UTC),
    datetime(1969, 7, 20, 20, 17, 40, 1, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
    datetime(1, 1, 3, tzinfo=UTC),
    datetime(9999, 12, 29, tzinfo=UTC),
    datetime(2026, 11, 24, 6, 0),  # noqa: DTZ001 - asyncpg takes it as local time
    datetime(2026, 11, 24, 6, 0).date(),  # noqa: DTZ001
    datetime.max,  # noqa: DTZ901 - asyncpg's infinity
    datetime.min,  # noqa: DTZ901
]


@pytest.mark.parametrize("time", TIMES)
async def test_times_in_range_are_as_asyncpg_has_them(ours, connection, time):
    assert await ours.fetchval("SELECT $1::timestamptz::text", time) == await connection.fetchval(
        "SELECT $1::timestamptz::text", time
    )


async def test_the_users_own_queries_decode_as_asyncpg_does(ours):
    with ours.plain_timestamps():
        assert await ours.fetchval("SELECT timestamptz 'infinity'") == datetime.max  # noqa: DTZ901
        assert await ours.fetchval("SELECT timestamptz '-infinity'") == datetime.min  # noqa: DTZ901
        with pytest.raises(OverflowError):
            await ours.fetchval("SELECT timestamptz '4000-01-01 BC'")
    assert await ours.fetchval("SELECT timestamptz 'infinity'") == INFINITY


@pytest.mark.parametrize("value", [1, "2026-11-24", None])
async def test_a_parameter_that_is_no_time_is_refused_as_asyncpg_does(ours, value):
    if value is None:
        assert await ours.fetchval("SELECT $1::timestamptz", value) is None
    else:
        with pytest.raises(asyncpg.DataError):
            await ours.fetchval("SELECT $1::timestamptz", value)


async def statement(connection):
    await connection.fetch("SELECT 1, $1::int", 1)


async def transaction(connection):
    async with connection.transaction():
        await connection.execute("SELECT 1")


async def prepared(connection):
    await (await connection.prepare("SELECT 1")).fetch()


async def types(connection):
    await connection.fetch("SELECT ARRAY[$1::pg_catalog.pg_class]")


@pytest.mark.parametrize("work", [statement, transaction, prepared, types])
async def test_a_connection_that_is_ended_between_two_steps_of_a_statement_raises_an_error_of_a_lost_session(
    database, work
):
    for turns in range(12):
        ours = await connect(DatabaseUrl.parse(database), application="outbox test")

        async def working(ours=ours):
            while True:
                await work(ours)

        task = asyncio.create_task(working())
        for _ in range(turns):
            await asyncio.sleep(0)
        ours.end("it is enough")
        with pytest.raises(LOST_SESSION):
            await task
        with pytest.raises(LOST_SESSION):
            await work(ours)


async def test_what_runs_when_a_connection_is_ended_finds_the_reason(ours):
    statement = await ours._get_statement("SELECT 1", None)
    ours.end("it is enough")
    with pytest.raises(asyncpg.InterfaceError, match="it is enough"):
        await ours._protocol.bind_execute(statement, [], "", 0, True, 1)
    assert ours.is_closed()


async def test_a_server_that_is_silent_for_too_long_loses_its_connection(ours):
    with pytest.raises(TimeoutError, match=r"Postgres did not answer within 0.05 s"), ours.end_if_silent(0.05):
        await ours.execute("SELECT pg_sleep(30)")
    assert ours.is_closed()
    with pytest.raises(LOST_SESSION):
        await ours.execute("SELECT 1")


async def test_the_rollback_of_a_statement_that_a_silent_server_does_not_answer_ends_too(ours):
    with pytest.raises(TimeoutError), ours.end_if_silent(0.05):
        async with ours.transaction():
            await ours.execute("SELECT pg_sleep(30)")
    assert ours.is_closed()


async def test_another_error_within_the_time_stays_as_it_is(ours):
    with pytest.raises(asyncpg.UndefinedTableError), ours.end_if_silent(10):
        await ours.execute("SELECT FROM nowhere")
    assert not ours.is_closed()


async def test_a_close_behind_a_pooler_that_is_cancelled_ends_the_connection(ours, monkeypatch):
    is_resetting = asyncio.Event()

    async def reset(*_: object, **__: object) -> None:
        is_resetting.set()
        await asyncio.Event().wait()

    ours.is_pooled = True
    monkeypatch.setattr(ours, "execute", reset)
    closing = asyncio.create_task(ours.close())
    await is_resetting.wait()
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert ours.is_closed()


async def test_a_silence_that_is_broken_starts_again(ours):
    with ours.end_if_silent(0.4) as silence:
        for _ in range(4):
            await ours.execute("SELECT pg_sleep(0.15)")
            silence.restart()
    assert not ours.is_closed()
    await asyncio.sleep(0.5)
    assert not ours.is_closed()
