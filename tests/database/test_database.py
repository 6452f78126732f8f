"""Connections of our own: their search path, what they decode, and how long they wait for a lock."""

from datetime import UTC, datetime, timedelta, timezone

import asyncpg
import pytest

from outbox.database.connection import (
    INFINITY,
    LOCK_TIMEOUT_S,
    MINUS_INFINITY,
    connect,
    engine,
    plain_timestamps,
    user_search_path,
)
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
    assert user_search_path(ours) == 'shop, "Odd, name", public'
    async with ours.transaction():
        await ours.execute(f"SET LOCAL search_path = {user_search_path(ours)}")
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
    with plain_timestamps(ours):
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
