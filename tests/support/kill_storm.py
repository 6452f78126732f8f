"""Relays that are killed again and again while they send."""

import signal

from tests.support.fleet import until


async def storm(fleet, dice, *, relays, kills):
    """Kill a relay that sends and start a new one, `kills` times; the last kill comes before all is sent."""
    running = [await fleet.start("relay") for _ in range(relays)]
    sent_min = 0
    for _ in range(kills):
        struck = await until(lambda least=sent_min: _victim(fleet, running, dice, least), f"{sent_min} are sent", 60)
        running.remove(struck)
        struck.send(signal.SIGKILL)
        running.append(await fleet.start("relay"))
        sent_min += dice.randrange(8, 15)  # kills keep pace with the mail, however slow this machine is


async def _victim(fleet, running, dice, sent_min):
    """Return a relay that has mail in flight, marked or not, once so many are sent; None before."""
    if (await fleet.states()).get("sent", 0) < sent_min:
        return None
    rows = await fleet.connection.fetch(
        "SELECT DISTINCT r.pid FROM outbox.delivery d JOIN outbox.relay r ON r.id = d.relay"
        " WHERE d.settled_at IS NULL AND d.state IN ('pending', 'sending')"
    )
    busy = [process for process in running if process.pid in {row["pid"] for row in rows}]
    return dice.choice(busy) if busy else None
