"""The main loop sleeps until there is something to do, and no call for it is lost."""

import asyncio
import time

from outbox.relay.wake_up import WakeUp

LONG_S = 60.0


async def test_a_call_before_the_sleep_ends_it_at_once_and_only_once():
    wake = WakeUp()
    wake.set()
    async with asyncio.timeout(1):
        await wake.sleep_until(time.monotonic() + LONG_S)
    began_at = time.monotonic()
    await wake.sleep_until(began_at + 0.05)
    assert time.monotonic() - began_at >= 0.05


async def test_a_call_during_the_sleep_ends_it():
    wake = WakeUp()
    asyncio.get_running_loop().call_later(0.01, wake.set)
    async with asyncio.timeout(1):
        await wake.sleep_until(time.monotonic() + LONG_S)


async def test_other_tasks_have_their_turn_even_if_there_is_always_something_to_do():
    wake, turns = WakeUp(), []
    other = asyncio.create_task(asyncio.sleep(0, turns.append("other")))
    await wake.sleep_until(0.0)
    await wake.sleep_until(0.0)
    assert other.done()


async def test_a_call_while_work_is_gathered_is_kept_for_the_next_turn():
    wake = WakeUp()
    asyncio.get_running_loop().call_later(0.01, wake.set)
    async with asyncio.timeout(1):
        await wake.sleep_for_next(time.monotonic() + LONG_S)
        await wake.sleep_until(time.monotonic() + LONG_S)
