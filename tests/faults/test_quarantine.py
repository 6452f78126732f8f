"""An email that takes its relay down does not take the fleet down in turn, and what waits beside it goes out."""

import asyncio

from outbox import ledger
from outbox.sink import Cut, Hold, Stage
from tests.faults.levers import SLOW, At, delivery, in_state, trail
from tests.fleet import until


async def test_an_email_whose_relays_die_is_quarantined_and_its_neighbours_are_sent(fleet):
    """Whoever begins on mail1 is killed at its content, as a crash in our own code would do it."""
    fleet.top = SLOW + "\nconnections_max = 2"
    begun = At(Stage.CONTENT, Hold(asyncio.Event()), when=lambda visit: visit.recipients == ["p1@example.com"])
    fleet.sink.script = begun
    await fleet.put_emails(30)
    for deaths in range(1, ledger.QUARANTINE_AFTER + 1):
        relay = await fleet.relay()
        await begun.reached(deaths)
        await relay.kill()
    await fleet.relay()
    await in_state(fleet, "dead")
    await until(lambda: len(fleet.sink.accepted) == 29, "all the others are sent")
    assert await trail(fleet) == ["quarantined"]
    assert fleet.twice == {}
    begun.on = False
    assert (await fleet.run("resolve", "mail1", "--resend")).code == 0
    await in_state(fleet, "sent")
    assert (await delivery(fleet))["orphaned"] == 0


async def test_an_email_that_a_working_server_always_drops_is_quarantined_in_the_end(fleet):
    fleet.top = SLOW
    fleet.sink.script = At(Stage.CONTENT, Cut(), when=lambda visit: visit.recipients == ["p1@example.com"])
    await fleet.put_emails(10)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 18, withdrawn = 18 WHERE email = 1")
    await fleet.relay()
    await until(lambda: len(fleet.sink.accepted) == 9, "the others are sent")
    await in_state(fleet, "dead", deadline_s=40)
    assert (await trail(fleet))[-1] == "quarantined"
