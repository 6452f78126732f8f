"""kill -9 of relays, at every stage of the SMTP dialogue and at random."""

import asyncio
import os
import random
import signal
import time

import pytest

from outbox.sandbox.smtp_sink import Accept, Cut, Hold, Stage, Stall, Trickle
from tests.support.fault_levers import (
    SLOW,
    At,
    balance,
    delivery,
    in_state,
    locked,
    mark_held,
    no_barrier,
    no_session,
    post,
    status,
    trail,
)
from tests.support.fleet import until

TAKEOVER_S = 2.0

pipelining = pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])


@pipelining
@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.EHLO, Stage.MAIL, Stage.RCPT, Stage.DATA])
async def test_a_kill_before_the_mark_costs_nothing(fleet, stage: Stage, pipelining: bool):
    fleet.sink.pipelining = pipelining
    fleet.sink.script = script = At(stage, Stall(), times=1)
    await fleet.put_emails(1)
    first = await fleet.relay()
    await script.reached()
    await fleet.relay()
    await no_barrier(fleet)
    assert (await delivery(fleet))["relay"] == 1
    killed_at = time.monotonic()
    await first.kill()
    await until(lambda: fleet.sink.messages, "another relay has sent it", TAKEOVER_S - (time.monotonic() - killed_at))
    assert await fleet.settled() == {"sent": 1}
    assert (await delivery(fleet))["attempt"] == 1
    assert await trail(fleet) == ["accepted"]
    assert fleet.twice == {}


@pipelining
async def test_a_kill_while_the_mark_waits_costs_nothing(fleet, pipelining: bool):
    fleet.top = SLOW
    fleet.sink.pipelining = pipelining
    async with mark_held(fleet) as (first, holder):
        await first.kill()
        await no_session(fleet)  # its statement has timed out
        assert (await delivery(fleet))["state"] == "pending"
        await holder.close()
    await fleet.relay()
    assert await fleet.settled() == {"sent": 1}
    assert (await delivery(fleet))["attempt"] == 1
    assert fleet.twice == {}


@pipelining
async def test_a_kill_before_the_dot_of_a_marked_one_is_in_doubt(fleet, pipelining: bool):
    fleet.sink.pipelining = pipelining
    async with mark_held(fleet) as (first, holder):
        await first.kill()
        await holder.close()  # the mark is committed, by a session whose process is dead
    await in_state(fleet, "sending")
    await fleet.relay()
    await in_state(fleet, "in_doubt")
    assert fleet.sink.messages == 0


# What the server had done with the message when the relay was killed, and how often it was accepted in the end.
AT_THE_DOT = {
    "content read, dot not read": (Stage.CONTENT, Stall(), 0),
    "dot read, not accepted": (Stage.DOT, Stall(), 0),
    "accepted, reply not written": (Stage.DOT, Accept(Stall()), 1),
}


@pipelining
@pytest.mark.parametrize("held", AT_THE_DOT)
async def test_a_kill_between_mark_and_settle_is_in_doubt_and_never_sent_again(fleet, held: str, pipelining: bool):
    stage, action, accepted = AT_THE_DOT[held]
    fleet.sink.pipelining = pipelining
    fleet.sink.script = script = At(stage, action, times=1)
    await fleet.put_emails(1)
    first = await fleet.relay()
    await script.reached()
    await in_state(fleet, "sending")
    second = await fleet.relay()
    await no_barrier(fleet)
    await first.kill()
    await in_state(fleet, "in_doubt", deadline_s=TAKEOVER_S)

    await post(fleet, 20, first=2)  # the next relay goes on, past it
    assert await fleet.settled() == {"sent": 20, "in_doubt": 1}
    shown = await status(fleet)
    assert (shown["in_doubt"], shown["sent"]) == (1, 20)
    assert [(trouble["key"], trouble["state"]) for trouble in shown["troubles"]] == [("mail1", "in_doubt")]
    assert [relay["pid"] for relay in shown["relays"]] == [second.pid]
    assert await trail(fleet) == ["in_doubt"]
    assert fleet.sink.addresses["p1@example.com"] == accepted
    await balance(fleet, 21)


async def test_what_the_server_accepts_after_the_kill_stays_in_doubt(fleet):
    accept = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(accept), times=1)
    await fleet.put_emails(1)
    first = await fleet.relay()
    await script.reached()
    await first.kill()
    await fleet.relay()
    await in_state(fleet, "in_doubt")
    accept.set()
    await until(lambda: fleet.sink.messages, "the server has accepted it")
    await post(fleet, 5, first=2)
    assert await fleet.settled() == {"sent": 5, "in_doubt": 1}
    assert fleet.twice == {}


async def test_a_row_that_somebody_locks_holds_up_no_other_mail(fleet):
    await fleet.put_emails(10)
    async with locked(fleet, "mail3"):
        await fleet.relay()
        await until(lambda: fleet.sink.messages == 9, "the nine others are sent")
    assert await fleet.settled() == {"sent": 10}
    await balance(fleet, 10)


@pytest.mark.parametrize("stage", [Stage.DATA, Stage.DOT], ids=["before its mark", "before its verdict"])
async def test_a_row_that_is_locked_in_the_midst_of_its_try_holds_up_no_other_mail(fleet, stage: Stage):
    """Roles that decide or prune may lock a row, and so may whoever forgets to end a transaction."""
    fleet.top = SLOW
    answer = asyncio.Event()
    fleet.sink.script = script = At(stage, Hold(answer), times=1)
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await script.reached()
    async with locked(fleet, "mail1"):
        answer.set()
        await post(fleet, 9, first=2)
        await until(lambda: "p10@example.com" in fleet.sink.addresses, "the others are sent")
        await in_state(fleet, "sent", "mail10")
        await relay.says("has locked it")
        assert any("(role postgres" in line for line in relay.log), "who has locked it is named"
        assert sum("session_lost" in line for line in relay.log) == 0
        assert (await delivery(fleet))["state"] == ("sending" if stage is Stage.DOT else "pending")
    assert await fleet.settled() == {"sent": 10}
    await balance(fleet, 10)


async def test_a_locked_row_of_a_dead_relay_holds_up_no_other_relay(fleet):
    fleet.top = SLOW
    fleet.sink.script = script = At(Stage.DOT, Stall(), times=1)
    await fleet.put_emails(1)
    first = await fleet.relay()
    await script.reached()
    async with locked(fleet, "mail1"):
        await first.kill()
        await no_session(fleet)
        second = await fleet.relay()
        await second.says("is dead")
        await post(fleet, 9, first=2)
        await in_state(fleet, "sent", "mail10")
        assert sum("session_lost" in line for line in second.log) == 0
    await in_state(fleet, "in_doubt")
    assert fleet.twice == {}


async def test_a_storm_of_kills_sends_nothing_twice_and_loses_nothing(fleet):
    count, relays = 3000, 4
    seed = int(os.environ.get("STORM_SEED", random.randrange(10**6)))
    print(f"STORM_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
    dice = random.Random(seed)
    slow = Trickle(chunk=12, delay_s=0.03)  # so that a kill finds dots without a reply
    acts = [slow, slow, Accept(slow), Accept(slow), Cut(), Accept(Cut())]

    def script(stage: Stage, _: object) -> object:
        return dice.choices(acts, (60, 60, 60, 60, 1, 1))[0] if stage is Stage.DOT else None

    fleet.sink.script = script
    fleet.top = "connections_max = 8"
    await fleet.put_emails(count)
    running = [await fleet.start("relay") for _ in range(relays)]
    await running[0].says("holds its lock")
    end = asyncio.create_task(fleet.settled(90))
    kills = 0
    while not (await asyncio.wait({end}, timeout=0.3))[0]:
        victim = running.pop(dice.randrange(relays))
        victim.send(signal.SIGKILL)
        running.append(await fleet.start("relay"))
        kills += 1
    await end
    in_doubt = await balance(fleet, count)
    print(f"{kills} kills, {len(in_doubt)} in doubt, {len(in_doubt - set(fleet.sink.addresses))} of them not sent")  # noqa: T201
    assert kills >= 5
    assert 0 < len(in_doubt) < count / 3
