"""SIGTERM: what is in hand is finished, what is not is given back, and what nobody answers is in doubt."""

import asyncio
import signal

import pytest

from outbox.sink import Hold, Stage, Stall
from tests.faults.levers import SLOW, At, all_sent, balance, delivery, in_state, locked, post, trail
from tests.fleet import until


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.DOT])
async def test_a_relay_that_is_told_to_stop_finishes_what_is_in_hand_and_gives_back_the_rest(
    fleet, stage: Stage, pipelining: bool
):
    answer = asyncio.Event()
    fleet.sink.pipelining = pipelining
    fleet.sink.script = script = At(stage, Hold(answer))
    fleet.top = "connections_max = 2"
    await fleet.put_emails(30)
    relay = await fleet.relay()
    await script.reached(2)
    relay.send(signal.SIGTERM)

    async def given_back() -> bool:
        held = await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE relay IS NOT NULL")
        return held <= (4 if pipelining else 2)  # a message at its dot and, chained, an envelope behind it

    await until(given_back, "claims that nobody has begun are free, while the rest is in hand")
    assert relay.process.returncode is None
    answer.set()
    ended = await relay.ended()
    assert ended.code == 0, ended.err
    assert fleet.sink.messages == (4 if stage is Stage.DOT and pipelining else 2)
    assert await fleet.states() == {"sent": fleet.sink.messages, "pending": 30 - fleet.sink.messages}
    free = "SELECT count(*) FROM outbox.delivery WHERE state = 'pending' AND relay IS NULL AND attempt = 0"
    assert await fleet.connection.fetchval(free) == 30 - fleet.sink.messages
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.relay WHERE ended_at IS NULL") == 0
    await fleet.relay()
    await all_sent(fleet, 30)
    await balance(fleet, 30)


async def test_a_relay_with_nothing_in_hand_stops_at_once(fleet):
    await fleet.put_emails(3)
    relay = await fleet.relay()
    await all_sent(fleet, 3)
    relay.send(signal.SIGINT)
    assert (await relay.ended(2)).code == 0


async def test_what_nobody_answers_within_drain_s_is_in_doubt_and_the_exit_says_so(fleet):
    fleet.top = "drain_s = 1\nconnections_max = 2"
    fleet.sink.script = script = At(Stage.DOT, Stall(), times=1)
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await script.reached()
    relay.send(signal.SIGTERM)
    ended = await relay.ended(5)
    assert ended.code == 1, ended.err
    assert "1 of its emails" in ended.err
    assert (await delivery(fleet))["state"] == "in_doubt"
    assert await trail(fleet) == ["in_doubt"]
    await fleet.relay()
    await post(fleet, 5, first=2)
    assert await fleet.settled() == {"in_doubt": 1, "sent": 5}
    assert fleet.twice == {}


async def test_a_second_sigterm_ends_a_relay_at_once(fleet):
    fleet.sink.script = script = At(Stage.DOT, Stall(), times=1)
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await script.reached()
    relay.send(signal.SIGTERM)
    await relay.says("stopping")
    relay.send(signal.SIGTERM)
    assert (await relay.ended(1)).code == 128 + signal.SIGTERM
    assert (await delivery(fleet))["state"] == "sending"
    await fleet.relay()
    await in_state(fleet, "in_doubt")
    assert fleet.sink.messages == 0


async def test_a_relay_that_cannot_write_its_last_verdict_stops_all_the_same(fleet):
    fleet.top = SLOW + "\ndrain_s = 1"
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(answer), times=1)
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await script.reached()
    async with locked(fleet):
        answer.set()
        await until(lambda: fleet.sink.messages, "it is accepted")
        relay.send(signal.SIGTERM)
        ended = await relay.ended(5)
    assert ended.code == 1, ended.err
    assert "mail1" in ended.err
    assert (await delivery(fleet))["state"] == "sending"
    await fleet.relay()
    assert await fleet.settled() == {"in_doubt": 1}
    assert fleet.twice == {}
