"""How soon a relay sees new mail: at once when it is told, and by its poll alone when it is not."""

import asyncio
import time

import asyncpg

from outbox.relay.relay import Relay
from outbox.settings import load
from tests.support.fault_levers import all_sent, balance, post
from tests.support.fleet import until


async def test_a_notification_wakes_a_relay_that_polls_seldom(fleet):
    fleet.top = "lease_s = 60\npoll_max_s = 60"
    await fleet.relay()
    begun_at = time.monotonic()
    # Its pauses double from 0.1 s: by now it pauses for 2.5 s or more, and has just begun to.
    await until(lambda: time.monotonic() - begun_at > 3.3, "the relay polls seldom by now")
    await post(fleet, 1)
    await until(lambda: fleet.sink.messages, "it is accepted", 1)
    await all_sent(fleet, 1)


async def test_the_poll_alone_suffices(fleet):
    fleet.top = "poll_max_s = 0.5"
    await fleet.relay()
    for number in range(1, 4):
        await fleet.put_emails(1, first=number)  # nobody is told
        await until(lambda number=number: fleet.sink.messages == number, "it is accepted", 2)
    await all_sent(fleet, 3)
    await balance(fleet, 3)


class Ticks:
    """An observer that counts."""

    def __init__(self):
        self.count = 0

    def judged(self, *_):
        pass

    def ticking(self):
        self.count += 1

    def ticked(self, *_):
        pass

    def session_lost(self):
        pass


async def test_a_flood_of_notifications_does_not_keep_a_relay_busy(fleet):
    """Every role may NOTIFY. Mail that comes meanwhile waits for a second at most."""
    ticks = Ticks()
    relay = Relay(load(fleet.write_settings(), {}), observers=[ticks])
    running = asyncio.create_task(relay.run())
    await until(lambda: ticks.count, "it ticks")
    before, begun_at, sent = ticks.count, time.monotonic(), 0
    flooder = await asyncpg.connect(fleet.database)
    while time.monotonic() - begun_at < 3:
        await flooder.execute("NOTIFY outbox")
        sent += 1
    assert sent > 100
    assert ticks.count - before < 40, "its own polls and pulse are some of them"
    put_at = time.monotonic()
    await post(fleet, 1)
    while not fleet.sink.messages:
        await flooder.execute("NOTIFY outbox")
        await asyncio.sleep(0)
        assert time.monotonic() - put_at < 2
    await flooder.close()
    relay.stop()
    await running
