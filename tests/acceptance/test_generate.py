"""`outbox generate` as cron runs it: on every server at once, again, and killed."""

import asyncio


async def test_eight_crons_and_four_relays_send_one_email_per_person(fleet):
    fleet.data = "with counted as (insert into build (key) values (:key) returning key) select key as person, 1 as done from counted"
    await fleet.hire(40)
    relays = [await fleet.relay() for _ in range(4)]
    crons = await asyncio.gather(*(fleet.start("generate") for _ in range(8)))
    ends = [await cron.ended() for cron in crons]
    assert [end.code for end in ends] == [0] * 8, ends
    assert (await fleet.settled()) == {"sent": 40}
    assert len(fleet.sink.addresses) == 40
    assert fleet.twice == {}
    assert await fleet.connection.fetchval("SELECT count(*) FROM build") == 40
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 40

    again = await fleet.run("generate")
    assert again.code == 0
    await fleet.hire(1, first=41)
    assert (await fleet.run("generate")).code == 0
    assert (await fleet.settled()) == {"sent": 41}
    assert len(fleet.sink.accepted) == 41
    for relay in relays:
        relay.send(15)
        assert (await relay.ended()).code == 0
