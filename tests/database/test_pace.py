"""The fleet's line of moments, on real Postgres: what relays take at once never overlaps."""

import asyncio

import asyncpg
import pytest

from outbox.pace import HORIZON_S, reserve

RATE = 50.0
GAP_S = 1 / RATE


@pytest.fixture
async def relays(database):
    """Eight connections that have met the row before."""
    connections = [await asyncpg.connect(database) for _ in range(8)]
    await ask(connections[0], 1)
    yield connections
    for connection in connections:
        connection.terminate()


async def ask(connection, emails, *, rate=RATE, daily_max=None, unused=0):
    return await reserve(connection, "mail:25", emails, rate_per_s=rate, daily_max=daily_max, unused=unused)


async def line(connection):
    """The moment up to which the line is given out."""
    return await connection.fetchval("SELECT next_at FROM outbox.pace WHERE route = 'mail:25'")


async def test_moments_that_many_take_at_once_are_each_given_once(relays, connection):
    before = await line(connection)
    grants = []

    async def take(own):
        while sum(g.emails for g in grants) < 40:
            grant = await ask(own, 2)
            if grant.emails:
                grants.append(grant)

    await asyncio.gather(*(take(own) for own in relays))
    given = sum(g.emails for g in grants)
    walked = (await line(connection) - before).total_seconds()
    assert walked >= given * GAP_S - 1e-6, "two of them got the same place"


async def test_nobody_waits_for_a_relay_that_is_at_it(relays):
    async with relays[0].transaction():
        await relays[0].fetch("SELECT FROM outbox.pace FOR UPDATE")
        grant = await asyncio.wait_for(ask(relays[1], 1), 5)
    assert grant.emails == 0
    assert not grant.used_up
    assert (await ask(relays[1], 1)).emails == 1


async def test_the_line_is_given_out_for_a_second_ahead_and_no_further(relays):
    given = []
    while (grant := await ask(relays[0], 10)).emails:
        given.append(grant)
    assert sum(g.emails for g in given) == pytest.approx(HORIZON_S * RATE, abs=20)
    assert given[-1].wait_s <= HORIZON_S
    assert grant.wait_s <= 10 * GAP_S


async def test_moments_that_nobody_took_are_not_made_up_for(relays, connection):
    await connection.execute("UPDATE outbox.pace SET next_at = now() - interval '1 hour'")
    first, second = await ask(relays[0], 1, rate=2), await ask(relays[1], 1, rate=2)
    assert first.wait_s == pytest.approx(0, abs=0.01)
    assert second.wait_s > 0


async def test_a_line_of_a_clock_that_was_set_back_is_drawn_anew(relays, connection):
    await connection.execute("UPDATE outbox.pace SET next_at = now() + interval '1 hour'")
    grant = await ask(relays[0], 1)
    assert (grant.emails, grant.wait_s) == (1, 0)


async def test_a_slow_rate_holds_for_the_whole_fleet(relays):
    await ask(relays[0], 1, rate=0.01)  # one in 100 s
    for own in relays:
        grant = await ask(own, 1, rate=0.01)
        assert grant.emails == 0
        assert 90 < grant.wait_s <= 100 - HORIZON_S


async def test_the_daily_bound_is_exact_when_all_ask_at_once(relays, connection):
    async def take(own):
        given = 0
        for _ in range(200):
            given += (await ask(own, 7, rate=None, daily_max=100)).emails
        return given

    given = sum(await asyncio.gather(*(take(own) for own in relays)))
    assert given == 100
    assert await connection.fetchval("SELECT sum(emails) FROM outbox.allowance") == 100
    assert (await ask(relays[0], 1, rate=None, daily_max=100)).used_up


async def test_what_came_to_nothing_is_taken_off_the_days_count(relays, connection):
    assert (await ask(relays[0], 10, rate=None, daily_max=10)).emails == 10
    assert (await ask(relays[1], 1, rate=None, daily_max=10)).used_up
    grant = await ask(relays[0], 3, rate=None, daily_max=10, unused=4)
    assert (grant.emails, grant.taken_back) == (3, 4)
    assert await connection.fetchval("SELECT sum(emails) FROM outbox.allowance") == 9
    assert (await ask(relays[1], 5, rate=None, daily_max=10)).emails == 1
    async with relays[1].transaction():
        await relays[1].fetch("SELECT FROM outbox.pace FOR UPDATE")
        assert (await ask(relays[0], 1, rate=None, daily_max=10, unused=2)).taken_back == 0, "told again next time"


async def test_the_day_is_over_after_24_hours(relays, connection):
    assert (await ask(relays[0], 10, rate=None, daily_max=10)).emails == 10
    for age, used_up in (("23 hours 59 minutes", True), ("24 hours 31 minutes", False)):
        await connection.execute("DELETE FROM outbox.allowance")
        await connection.execute("INSERT INTO outbox.allowance VALUES ('mail:25', now() - $1::text::interval, 10)", age)
        assert (await ask(relays[0], 1, rate=None, daily_max=10)).used_up is used_up
    await connection.execute("UPDATE outbox.allowance SET since = since - interval '26 hours'")
    await ask(relays[0], 1, rate=None, daily_max=10)
    assert await connection.fetchval("SELECT count(*) FROM outbox.allowance") == 1, "old quarters are forgotten"


async def test_each_route_has_a_line_of_its_own(relays):
    await ask(relays[0], 1, rate=0.01)
    await reserve(relays[0], "other:25", 1, rate_per_s=0.01, daily_max=None)
    assert (await reserve(relays[0], "other:25", 1, rate_per_s=0.01, daily_max=None)).emails == 1
    assert (await ask(relays[0], 1, rate=0.01)).emails == 0
