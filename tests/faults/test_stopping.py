"""SIGTERM: what is in hand is finished, what is not is given back, and what nobody answers is in doubt."""

import asyncio
import signal

import pytest

from bench.harness.fault_proxy import Proxy
from outbox.relay import lock_proof
from outbox.relay.relay import Relay
from outbox.sandbox.smtp_sink import Hold, Stage, Stall
from outbox.settings import load
from tests.support.fault_levers import (
    SLOW,
    At,
    all_sent,
    balance,
    by_port,
    delivery,
    in_state,
    locked,
    post,
    socket_of,
    trail,
)
from tests.support.fleet import until


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
        return held <= 2

    await until(given_back, "claims that nobody has begun are free, while the rest is in hand")
    assert relay.process.returncode is None
    answer.set()
    ended = await relay.ended()
    assert ended.code == 0, ended.err
    assert fleet.sink.messages == 2
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


async def test_a_relay_that_is_stopped_while_postgres_goes_from_refusing_to_silent_ends_in_its_time(fleet):
    fleet.top = "lease_s = 12\ndrain_s = 2\nconnections_max = 1"
    fleet.sink.script = dot = At(Stage.DOT, Hold(asyncio.Event()), times=1)
    await fleet.put_emails(1)
    async with Proxy(socket_of(fleet.database)) as proxy:
        relay = await fleet.relay(environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        await dot.reached()
        proxy.refuse = True
        proxy.cut(reset=True)
        await relay.says("no session yet")
        relay.send(signal.SIGTERM)
        await relay.says("stopping")
        proxy.refuse, proxy.black_hole = False, True
        assert (await relay.ended(2 + 5)).code == 1


async def test_a_relay_that_waits_for_its_first_session_can_be_stopped(fleet):
    fleet.top = "lease_s = 20\ndrain_s = 10"
    async with Proxy(socket_of(fleet.database)) as proxy:
        proxy.refuse = True
        relay = await fleet.start("relay", environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        await relay.says("Trying again")
        relay.send(signal.SIGTERM)
        assert (await relay.ended(5)).code == 0


async def test_a_stop_at_the_moment_when_an_opening_is_given_up_is_no_error(fleet, monkeypatch):
    fleet.top = SLOW
    async with Proxy(socket_of(fleet.database)) as proxy:
        settings = load(fleet.write_settings(), {"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        prove = lock_proof._prove_exclusion

        async def prove_in_silence(*arguments):
            proxy.black_hole = True
            await prove(*arguments)

        monkeypatch.setattr(lock_proof, "_prove_exclusion", prove_in_silence)
        relay = Relay(settings)
        running = asyncio.create_task(relay.run())
        await until(lambda: relay.sessions._opening is not None, "it opens")
        await until(relay.sessions._opening.expired, "it is given up", 10)
        relay.stop()
        async with asyncio.timeout(10):
            await running


async def test_a_relay_is_stopped_although_its_look_for_complete_editions_meets_a_silent_postgres(fleet):
    fleet.top = "lease_s = 2\nguard_s = 1\ndrain_s = 1"
    waits = """
        SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox completion' AND wait_event_type = 'Lock'
    """

    async def is_looking() -> bool:
        return await fleet.connection.fetchval(waits) > 0

    async with Proxy(socket_of(fleet.database)) as proxy:
        relay = await fleet.relay(environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        async with locked(fleet) as holder:
            await holder.execute("LOCK TABLE outbox.edition IN ACCESS EXCLUSIVE MODE")
            await post(fleet, 1)
            await until(is_looking, "it looks")
            proxy.black_hole = True
            relay.send(signal.SIGTERM)
            await relay.ended(15)
