"""The fleet's line of moments, on real Postgres: what relays take at once never overlaps."""

import asyncio

import asyncpg
import pytest

from outbox.relay.found_rate import CUT, SILENCE_MIN_S, RateRefusal
from outbox.relay.rate_limit import HORIZON_S, report_refusal, reserve
from outbox.relay.tick import TickRequest, tick

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


TOO_MUCH = "450 4.7.1 Error: too much mail from 192.0.2.1"


def refusal(*, age_s=0.01, accepted_age_s=0.02, fleet_rate=40.0):
    return RateRefusal(TOO_MUCH, age_s, accepted_age_s, fleet_rate)


async def report(connection, **what):
    return await report_refusal(connection, "mail:25", refusal(**what))


async def silence_is_over(connection, *, s=10.0):
    """As if the silence had ended so long ago, and mail had been sent since."""
    await connection.execute(
        "UPDATE outbox.pace SET found_at = now() - ($1::float8 + silence_s) * interval '1 second',"
        " resumes_at = now() - $1::float8 * interval '1 second', next_at = now()",
        s,
    )


async def test_relays_that_get_refusals_at_the_same_moment_slow_down_once(relays, connection):
    async def tell(own):
        while not (told := await report(own))[0]:
            pass
        return told[1]

    found = await asyncio.gather(*(tell(own) for own in relays))
    assert {one.rate for one in found} == {CUT * 40}
    await silence_is_over(connection)
    found = await asyncio.gather(*(tell(own) for own in relays))
    assert len({one.rate for one in found}) == 1
    assert CUT * CUT * 40 < found[0].rate < CUT * 40 * 1.2


async def test_the_rate_that_was_found_holds_for_relays_whose_settings_have_none_or_a_higher_one(relays, connection):
    _, found = await report(relays[0])
    await silence_is_over(connection, s=0.0)
    for rate in (None, 1000.0, 1.0):
        grant = await ask(relays[1], 3, rate=rate)
        speed = min(rate or found.rate, found.rate)
        assert grant.emails == 3
        assert grant.gap_s == pytest.approx(1 / speed, rel=0.05)


async def test_the_fleet_sends_nothing_during_the_silence(relays):
    _, found = await report(relays[0])
    grant = await ask(relays[1], 1, rate=None)
    assert grant.wait_s == pytest.approx(found.silence_s, abs=0.2)
    for _ in range(3):  # each one right after the silence before
        await relays[0].execute("UPDATE outbox.pace SET resumes_at = now(), next_at = now(), silence_s = silence_s * 4")
        _, found = await report(relays[0], age_s=0.0, accepted_age_s=None)
    assert found.silence_s > 10 * SILENCE_MIN_S
    grant = await ask(relays[1], 1, rate=None)
    assert grant.emails == 0
    assert grant.wait_s == pytest.approx(found.silence_s - HORIZON_S, abs=0.5)


async def test_the_rate_does_not_grow_while_nothing_is_sent(relays, connection):
    await report(relays[0])
    await silence_is_over(connection, s=3600.0)
    await connection.execute("UPDATE outbox.pace SET next_at = resumes_at + interval '1 second'")
    before = (await ask(relays[1], 1, rate=None)).found.rate_now
    after = (await ask(relays[1], 1, rate=None)).found.rate_now
    assert before == pytest.approx(CUT * 40, rel=0.05)
    assert after == pytest.approx(before, rel=0.05)


async def test_every_tick_tells_the_rate_that_was_found(relays, connection):
    relay = await connection.fetchval(
        "INSERT INTO outbox.relay (host, pid, backend_pid, version) VALUES ('h', 1, 1, '') RETURNING id"
    )
    assert (await tick(connection, relay, TickRequest(server="mail:25"))).found is None
    _, found = await report(relays[0])
    told = (await tick(connection, relay, TickRequest(server="mail:25"))).found
    assert (told.rate, told.silence_s, told.said) == (found.rate, found.silence_s, TOO_MUCH)
    assert (await tick(connection, relay, TickRequest(server="other:25"))).found is None


async def test_a_silence_of_a_clock_that_was_set_back_is_over(relays, connection):
    await report(relays[0])
    await connection.execute(
        "UPDATE outbox.pace SET (resumes_at, next_at) = (SELECT now() + interval '1 hour', now() + interval '1 hour')"
    )
    grant = await ask(relays[1], 1, rate=None)
    assert (grant.emails, grant.wait_s) == (1, 0)


async def test_a_relay_does_not_wait_for_another_that_reports_a_refusal(relays):
    async with relays[0].transaction():
        await relays[0].fetch("SELECT FROM outbox.pace FOR UPDATE")
        assert await asyncio.wait_for(report(relays[1]), 5) == (False, None)
    assert (await report_refusal(relays[1], "new:25", refusal()))[1].rate == CUT * 40


async def test_a_rate_is_found_whole_or_not_at_all(connection):
    for columns in (
        "found_rate = 1",
        "found_rate = -1, found_at = now(), resumes_at = now(), silence_s = 1, said = ''",
    ):
        await connection.execute("INSERT INTO outbox.pace (route) VALUES ('x') ON CONFLICT DO NOTHING")
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE outbox.pace SET {columns}")
