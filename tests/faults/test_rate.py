"""Real relays under the fleet's rate, its daily bound, and emails whose time is over."""

from datetime import timedelta

from tests.support.fault_levers import balance, post
from tests.support.fleet import until


async def test_relays_that_share_a_rate_keep_its_distance_between_any_two_emails(fleet):
    """20 a second: 30 emails of three relays take 1.45 s or more, however they come and go. A floor, not a race."""
    fleet.top = 'rate = "20/s"'
    relays = [await fleet.relay() for _ in range(3)]
    await post(fleet, 30)
    await until(lambda: fleet.sink.messages >= 8, "some are sent")
    await relays[0].kill()

    async def are_over():  # what the dead relay had past its dot is in doubt
        states = await fleet.states()
        return sum(states.get(state, 0) for state in ("sent", "in_doubt")) == 30

    await until(are_over, "all 30 are sent, or in doubt")
    ats = sorted(accepted.at for accepted in fleet.sink.accepted)
    assert len(ats) >= 28
    assert ats[-1] - ats[0] >= (len(ats) - 1) / 20 * 0.95
    assert all(later - earlier >= 0.15 for earlier, later in zip(ats, ats[14:], strict=False)), "no burst"
    assert len({a.peer_port for a in fleet.sink.accepted}) > 1, "more than one of them sends"
    await balance(fleet, 30)


async def test_the_daily_bound_stops_the_fleet_and_says_so(fleet):
    fleet.top = "daily_max = 10"
    await fleet.put_emails(25)
    relays = [await fleet.relay() for _ in range(2)]
    await until(lambda: fleet.sink.messages == 10, "ten are sent")
    await relays[0].says("daily_max is reached")

    async def status_says():
        return "daily_max" in (await fleet.run("status")).out

    await until(status_says, "status tells why nothing moves")
    await until(lambda: at_rest(fleet), "what it cannot send it does not hold")
    assert fleet.sink.messages == 10
    await fleet.connection.execute("UPDATE outbox.allowance SET since = since - interval '25 hours'")
    await fleet.relay()  # those that are there look again in half a minute
    await until(lambda: fleet.sink.messages == 20, "the next day's are sent")


async def at_rest(fleet):
    held = "SELECT count(*) FROM outbox.delivery WHERE relay IS NOT NULL AND state = 'pending'"
    return not await fleet.connection.fetchval(held)


async def test_an_email_whose_time_is_over_expires_and_the_others_are_sent(fleet):
    await fleet.put_emails(4)
    await fleet.connection.execute(
        "UPDATE outbox.delivery"
        " SET send_before = now() + CASE email % 2 WHEN 0 THEN interval '-1 hour' ELSE interval '1 hour' END"
    )
    await fleet.relay()
    assert await fleet.settled() == {"sent": 2, "expired": 2}
    assert fleet.sink.messages == 2
    found = (await fleet.run("status")).out
    assert "expired" in found


async def test_reports_carry_the_last_moment_of_their_settings(fleet):
    fleet.report = 'send_before = "48h"'
    await fleet.hire(3)
    assert (await fleet.run("generate")).code == 0
    rows = await fleet.connection.fetch(
        "SELECT d.send_before - e.created_at AS kept FROM outbox.delivery d JOIN outbox.email e ON e.id = d.email"
    )
    assert [row["kept"] for row in rows] == 3 * [timedelta(hours=48)]
    await fleet.connection.execute("UPDATE outbox.delivery SET send_before = now()")
    await fleet.relay()
    assert await fleet.settled() == {"expired": 3}
    assert fleet.sink.messages == 0
    assert (await fleet.run("audit", "progress")).code == 1
