"""Relays that are stopped (SIGSTOP) and come back after others took over: a VM that was paused, a laptop that slept."""

import asyncio
import signal

import pytest

from outbox.sandbox.smtp_sink import Hold, Stage
from tests.support.fault_levers import (
    SLOW,
    At,
    all_sent,
    balance,
    delivery,
    in_state,
    mark_held,
    no_session,
    post,
    terminate_session,
    trail,
)
from tests.support.fleet import Fleet, Process, until


async def marked_for(fleet: Fleet, seconds: float) -> None:
    """Wait until mail1 has been marked for so long, on Postgres' clock."""
    await until(
        lambda: fleet.connection.fetchval(
            "SELECT bool_or(clock_timestamp() - marked_at > $1 * interval '1 second') FROM outbox.delivery", seconds
        ),
        f"the mark is {seconds} s old",
    )


async def identities(relay: Process, count: int) -> list[str]:
    """Wait until it has had so many; gives their ids."""

    def found() -> list[str]:
        return [line.split("relay ")[1].split()[0] for line in relay.log if "holds its lock" in line]

    await until(lambda: len(found()) >= count, f"it has had {count} identities")
    return found()


async def test_a_relay_stopped_beyond_its_lease_loses_its_claims_and_comes_back_as_another(fleet):
    fleet.top = SLOW + "\nconnections_max = 2"
    fleet.sink.script = script = At(Stage.MAIL, Hold(asyncio.Event()), times=2)
    await fleet.put_emails(10)
    stopped = await fleet.relay()
    await script.reached(2)
    claims = await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE relay = 1")
    assert claims >= 2
    stopped.send(signal.SIGSTOP)
    other = await fleet.relay()
    await all_sent(fleet, 10)

    script.action.event.set()  # the server answers the stopped one's MAIL, RCPT and DATA now
    stopped.send(signal.SIGCONT)
    assert await identities(stopped, 2) == ["1", "3"]
    other.send(signal.SIGTERM)
    assert (await other.ended()).code == 0
    await post(fleet, 10, first=11)
    await all_sent(fleet, 20)
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.attempt WHERE relay = 1") == 0
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.attempt WHERE relay = 3") == 10
    await balance(fleet, 20)


async def test_a_relay_stopped_after_its_dot_brings_the_news_late(fleet):
    fleet.top = SLOW
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(answer), times=1)
    await fleet.put_emails(1)
    stopped = await fleet.relay()
    await script.reached()
    stopped.send(signal.SIGSTOP)
    await fleet.relay()
    await in_state(fleet, "in_doubt")
    answer.set()
    await until(lambda: fleet.sink.messages, "the server has accepted it")
    assert (await delivery(fleet))["state"] == "in_doubt"
    stopped.send(signal.SIGCONT)
    await all_sent(fleet, 1)
    assert await trail(fleet) == ["in_doubt", "accepted"]
    await balance(fleet, 1)


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside another"])
async def test_a_relay_stopped_between_mark_and_dot_beyond_its_lease_does_not_send(fleet, others: int):
    fleet.top = SLOW
    async with mark_held(fleet) as (stopped, holder):
        stopped.send(signal.SIGSTOP)
        await holder.close()
        await in_state(fleet, "sending")
    for _ in range(others):
        await fleet.relay()
        await in_state(fleet, "in_doubt")
    await marked_for(fleet, 2.2)
    assert (await delivery(fleet))["state"] == ("in_doubt" if others else "sending")
    assert fleet.sink.messages == 0
    stopped.send(signal.SIGCONT)
    await all_sent(fleet, 1)
    assert len(fleet.sink.accepted) == 1
    row = await delivery(fleet)
    assert (row["attempt"], row["tries"]) == (2, 1)
    assert (await trail(fleet))[-2:] == ["withdrawn", "accepted"]
    assert await identities(stopped, 2)


async def test_a_relay_stopped_between_mark_and_dot_beyond_the_guard_does_not_send(fleet):
    fleet.top = "lease_s = 20\nguard_s = 0.5"
    async with mark_held(fleet) as (stopped, holder):
        stopped.send(signal.SIGSTOP)
        await holder.close()
        await in_state(fleet, "sending")
    await marked_for(fleet, 0.6)
    stopped.send(signal.SIGCONT)
    await stopped.says("the guard stopped it")
    assert fleet.sink.messages == 0
    await all_sent(fleet, 1)
    assert await trail(fleet) == ["withdrawn", "accepted"]
    assert (await delivery(fleet))["tries"] == 1
    assert await identities(stopped, 1) == ["1"]
    await balance(fleet, 1)


async def test_a_relay_stopped_for_less_than_its_lease_and_guard_sends(fleet):
    async with mark_held(fleet) as (stopped, holder):
        stopped.send(signal.SIGSTOP)
        await holder.close()
        await in_state(fleet, "sending")
    stopped.send(signal.SIGCONT)
    await all_sent(fleet, 1)
    assert await trail(fleet) == ["accepted"]


async def test_a_verdict_on_a_try_that_never_was_leaves_the_next_relays_try_alone(fleet):
    """Both are attempt 1: the stopped one's mark was never committed, the other's was. The relay tells them apart."""
    fleet.top = "connections_max = 1"
    async with mark_held(fleet) as (stopped, holder):
        stopped.send(signal.SIGSTOP)
        await terminate_session(fleet)
        await no_session(fleet)
        await holder.close()
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(answer), times=1)
    await fleet.relay()
    await script.reached()
    await in_state(fleet, "sending")
    stopped.send(signal.SIGCONT)
    await identities(stopped, 2)
    await post(fleet, 6, first=2)
    await until(lambda: fleet.sink.messages, "it sends again, so it has settled what it knew")
    row = await delivery(fleet)
    assert (row["state"], row["relay"], row["attempt"], row["withdrawn"]) == ("sending", 2, 1, 0)
    answer.set()
    await all_sent(fleet, 7)
    assert await trail(fleet) == ["accepted"]
    await balance(fleet, 7)
