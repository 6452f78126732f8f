"""An email that takes its relay down does not take the fleet down in turn, and what waits beside it goes out."""

import asyncio

from outbox.relay.quarantine import QUARANTINE_AFTER
from outbox.sandbox.smtp_sink import Cut, Hold, Stage
from tests.support.fault_levers import SLOW, At, delivery, in_state, post, trail
from tests.support.fleet import until


async def test_an_email_whose_relays_die_is_quarantined_and_its_neighbours_are_sent(fleet):
    """Whoever begins on mail1 is killed at its DATA, as a crash in our own code would do it."""
    fleet.top = SLOW + "\nconnections_max = 2"
    begun = At(Stage.DATA, Hold(asyncio.Event()), when=lambda visit: visit.recipients == ["p1@example.com"])
    fleet.sink.script = begun
    await fleet.put_emails(30)
    for deaths in range(1, QUARANTINE_AFTER + 1):
        relay = await fleet.relay()
        await begun.reached(deaths)
        await relay.kill()
    await fleet.relay()
    await in_state(fleet, "dead")
    states = await fleet.settled()
    assert states.pop("dead") == 1
    assert states["sent"] + states.get("in_doubt", 0) == 29, "a kill may find others between their dot and the answer"
    assert await trail(fleet) == ["quarantined"]
    assert fleet.twice == {}
    begun.on = False
    assert (await fleet.run("resolve", "mail1", "--resend")).code == 0
    await in_state(fleet, "sent")
    assert (await delivery(fleet))["orphaned"] == 0


async def test_an_email_that_a_working_server_always_drops_is_quarantined_in_the_end(fleet):
    fleet.top = SLOW
    fleet.sink.script = At(Stage.DATA, Cut(), when=lambda visit: visit.recipients == ["p1@example.com"])
    await fleet.put_emails(10)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 18, withdrawn = 18 WHERE email = 1")
    await fleet.relay()
    first = 11
    while (await delivery(fleet))["state"] != "dead":  # others go out meanwhile: the server works
        await post(fleet, 2, first=first)
        first += 2
        await asyncio.sleep(0.3)
        assert first < 200
    await until(lambda: len(fleet.sink.accepted) == first - 2, "the others are sent")
    assert (await trail(fleet))[-1] == "quarantined"


async def test_an_email_that_is_always_dropped_does_not_keep_the_route_closed_for_others(fleet):
    """It alone is there, so the server looks broken; what comes then is tried in its stead."""
    fleet.top = SLOW
    script = At(Stage.DATA, Cut(), when=lambda visit: visit.recipients == ["p1@example.com"])
    fleet.sink.script = script
    await fleet.put_emails(1)
    await fleet.relay()
    await until(lambda: fleet.connection.fetchrow("SELECT name FROM outbox.route"), "the route is paused")
    await script.reached(5)
    await post(fleet, 5, first=2)
    await until(lambda: len(fleet.sink.accepted) == 5, "the others are sent", 15)
