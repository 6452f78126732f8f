"""What every ending of the SMTP dialogue does to the message: the table of the design, row by row.

One relay meets a row's endings one after the other, each with a message of its own, so a test compares whole columns.
"""

from collections.abc import Mapping

import pytest

from outbox.sandbox.smtp_sink import Accept, Action, Cut, Reply, Reset, Stage, Stall, Visit
from tests.support.fault_levers import CLOSING, GARBAGE, At, delivery, in_state, post, trail
from tests.support.fleet import Fleet, until

pipelining = pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])

BEFORE_THE_DOT = (Stage.MAIL, Stage.RCPT, Stage.DATA)
OF_THE_EMAIL = (Stage.RCPT, Stage.DATA)
IMPATIENT = "connect_timeout_s = 0.5\ncommand_timeout_s = 0.5\ndata_done_timeout_s = 0.5"
LATER = Reply("451 4.3.0 later")
NEVER = Reply("550 5.1.1 never")
CODE_OF_NO_USE = Reply("354 go on")

# The server's trouble, never the message's.
TROUBLE: dict[str, Action] = {"421": CLOSING, "cut": Cut(), "reset": Reset(), "silence": Stall(), "garbage": GARBAGE}


def named(actions: Mapping[str, Action]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("action", actions.values(), ids=actions)


class Table:
    """Endings met by one relay after the other; each is one message, whose row and trail are kept."""

    def __init__(self, fleet: Fleet, times: int = 1) -> None:
        self.fleet = fleet
        self.times = times
        self.met = 0
        fleet.sink.script = self.script = At(Stage.MAIL, CLOSING, times=0)

    async def meet(self, stage: Stage, action: Action, state: str) -> tuple[str, int, int, list[str], int]:
        """Its state at last, its attempts, those that count, its verdicts, and how often it was accepted."""
        self.met += 1
        key, address = f"mail{self.met}", f"p{self.met}@example.com"
        self.script.stage, self.script.action, self.script.count, self.script.times = stage, action, 0, self.times
        await post(self.fleet, 1, first=self.met)
        await in_state(self.fleet, state, key)
        assert self.script.count == self.times
        await self.send_another()
        row = await delivery(self.fleet, key)
        verdicts = await trail(self.fleet, key)
        return row["state"], row["attempt"], row["tries"], verdicts, self.fleet.sink.addresses[address]

    async def send_another(self) -> None:
        """The relay goes on after it, and the server is known to work."""
        self.met += 1
        await post(self.fleet, 1, first=self.met)
        await in_state(self.fleet, "sent", f"mail{self.met}")


@pipelining
async def test_a_4xx_before_the_dot_defers_and_counts(fleet, pipelining: bool):
    fleet.sink.pipelining = pipelining
    table = Table(fleet, times=2)
    relay = await fleet.relay()
    outcomes = {stage: await table.meet(stage, LATER, "sent") for stage in OF_THE_EMAIL}
    assert outcomes == dict.fromkeys(OF_THE_EMAIL, ("sent", 3, 3, ["deferred", "deferred", "accepted"], 1))
    for stage in OF_THE_EMAIL:
        assert any(f"451 4.3.0 later (to {stage})" in line for line in relay.log)
    # After two deferrals in a row the connection is not used again: it may have reached a limit in unknown words.
    assert len(fleet.sink.visits) <= len(OF_THE_EMAIL)


@pipelining
async def test_a_5xx_before_the_dot_is_a_dead_letter(fleet, pipelining: bool):
    fleet.sink.pipelining = pipelining
    table = Table(fleet)
    await fleet.relay()
    outcomes = {stage: await table.meet(stage, NEVER, "dead") for stage in OF_THE_EMAIL}
    assert outcomes == dict.fromkeys(OF_THE_EMAIL, ("dead", 1, 1, ["refused"], 0))
    assert len(fleet.sink.visits) == 1


@pipelining
@pytest.mark.parametrize("action", [LATER, NEVER], ids=["4xx", "5xx"])
async def test_a_refusal_of_mail_is_no_try_of_the_message(fleet, action: Action, pipelining: bool):
    """No recipient is named yet: it may be a limit of this connection, so another one asks."""
    fleet.sink.pipelining = pipelining
    table = Table(fleet)
    await fleet.relay()
    await table.send_another()
    state, _, tries, _, accepted = await table.meet(Stage.MAIL, action, "sent")
    assert (state, tries, accepted) == ("sent", 1, 1)


@pipelining
@named(TROUBLE)
async def test_trouble_of_the_server_before_the_dot_is_not_counted(fleet, action: Action, pipelining: bool):
    fleet.top = IMPATIENT
    fleet.sink.pipelining = pipelining
    table = Table(fleet)
    await fleet.relay()
    outcomes = {stage: await table.meet(stage, action, "sent") for stage in BEFORE_THE_DOT}
    assert outcomes == dict.fromkeys(BEFORE_THE_DOT, ("sent", 1, 1, ["accepted"], 1))


@pipelining
async def test_a_code_of_no_use_before_the_dot_is_not_counted(fleet, pipelining: bool):
    fleet.sink.pipelining = pipelining
    table = Table(fleet)
    await fleet.relay()
    for stage in (Stage.MAIL, Stage.RCPT):
        assert await table.meet(stage, CODE_OF_NO_USE, "sent") == ("sent", 1, 1, ["accepted"], 1), stage


async def test_a_message_that_meets_only_cut_connections_is_put_off_and_never_dies_of_it(fleet):
    def is_the_first(visit: object) -> bool:
        return visit.recipients[-1] == "p1@example.com"

    fleet.sink.script = script = At(Stage.RCPT, Cut(), times=10, when=is_the_first)  # attempts_max is 4
    await fleet.put_emails(1)
    await fleet.relay()
    for cuts in range(2, 11, 2):
        await script.reached(cuts)
        await post(fleet, 1, first=cuts)  # the server takes others, so the route is not paused for long
    await in_state(fleet, "sent")
    verdicts = await trail(fleet)
    assert verdicts == ["withdrawn"] * (len(verdicts) - 1) + ["accepted"]
    assert len(verdicts) > 4
    assert (await delivery(fleet))["tries"] == 1


@pipelining
async def test_a_4xx_to_the_dot_defers_and_counts(fleet, pipelining: bool):
    fleet.sink.pipelining = pipelining
    table = Table(fleet, times=2)
    await fleet.relay()
    assert await table.meet(Stage.DOT, LATER, "sent") == ("sent", 3, 3, ["deferred", "deferred", "accepted"], 1)


@pipelining
async def test_a_421_to_the_dot_is_no_try_of_the_message(fleet, pipelining: bool):
    """RFC 5321 §3.8: the server closes, whatever it was asked."""
    fleet.sink.pipelining = pipelining
    table = Table(fleet, times=2)
    await fleet.relay()
    outcome = await table.meet(Stage.DOT, CLOSING, "sent")
    assert outcome == ("sent", 3, 1, ["withdrawn", "withdrawn", "accepted"], 1)


@pipelining
async def test_a_5xx_to_the_dot_is_a_dead_letter(fleet, pipelining: bool):
    fleet.sink.pipelining = pipelining
    table = Table(fleet)
    await fleet.relay()
    assert await table.meet(Stage.DOT, NEVER, "dead") == ("dead", 1, 1, ["refused"], 0)
    assert len(fleet.sink.visits) == 1


# No usable reply to the dot: the server may have the mail, or not.
NO_REPLY: dict[str, Action] = {
    "cut": Cut(),
    "reset": Reset(),
    "silence": Stall(),
    "garbage": GARBAGE,
    "a code of no use": CODE_OF_NO_USE,
}


@pipelining
@pytest.mark.parametrize("accepted", [0, 1], ids=["not accepted", "accepted"])
async def test_no_usable_reply_to_the_dot_is_in_doubt(fleet, accepted: int, pipelining: bool):
    fleet.top = IMPATIENT
    fleet.sink.pipelining = pipelining
    table = Table(fleet)
    relay = await fleet.relay()
    outcomes = {
        name: await table.meet(Stage.DOT, Accept(action) if accepted else action, "in_doubt")
        for name, action in NO_REPLY.items()
    }
    assert outcomes == dict.fromkeys(NO_REPLY, ("in_doubt", 1, 1, ["in_doubt"], accepted))
    assert fleet.twice == {}
    assert sum("is in doubt" in line for line in relay.log) == len(NO_REPLY)


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.EHLO])
async def test_trouble_before_any_message_leaves_the_message_untouched(fleet, stage: Stage):
    fleet.top = IMPATIENT + "\nmessages_per_connection_max = 1"  # so that each message meets the banner
    fleet.sink.script = script = At(stage, CLOSING)
    relay = await fleet.relay()
    for number, (name, action) in enumerate({**TROUBLE, "451": LATER, "550": NEVER}.items(), 1):
        script.action, script.on = action, True
        await post(fleet, 1, first=number)
        await until(lambda n=number: sum("SMTP is in trouble" in line for line in relay.log) == n, f"{name} is trouble")
        row = await delivery(fleet, f"mail{number}")
        assert (row["state"], row["attempt"], row["withdrawn"]) == ("pending", 0, 0), name
        assert fleet.sink.messages == number - 1
        script.on = False
        await in_state(fleet, "sent", f"mail{number}")
        assert (await delivery(fleet, f"mail{number}"))["attempt"] == 1, name
    assert relay.process.returncode is None


@pytest.mark.parametrize("stage", [Stage.RCPT, Stage.DOT])
async def test_a_message_that_is_deferred_too_often_is_a_dead_letter(fleet, stage: Stage):
    fleet.sink.script = script = At(stage, LATER)
    await fleet.put_emails(1)
    await fleet.relay()
    await in_state(fleet, "dead")
    assert script.count == 4
    assert await trail(fleet) == ["deferred"] * 4
    assert (await delivery(fleet))["tries"] == 4
    assert fleet.sink.messages == 0


async def test_one_refused_recipient_is_nobody_elses_trouble(fleet):
    fleet.top = "connections_max = 1"
    fleet.sink.script = At(Stage.RCPT, NEVER, when=lambda visit: visit.recipients[-1] == "p7@example.com")
    await fleet.put_emails(20)
    await fleet.relay()
    assert await fleet.settled() == {"sent": 19, "dead": 1}
    assert len(fleet.sink.addresses) == 19
    assert fleet.sink.addresses["p7@example.com"] == 0
    assert len(fleet.sink.visits) == 1


async def test_a_server_that_asks_for_the_content_of_a_refused_message_gets_none(fleet):
    """RFC 2920 §3.1: DATA went out with the RCPT that is refused; a lone dot ends it, and the connection goes on."""

    def takes_somebody_else(visit: Visit) -> bool:
        if visit.recipients[-1] != "p1@example.com":
            return False
        visit.recipients.insert(0, "somebody@example.com")  # so that DATA is in order for the server
        return True

    fleet.top = "connections_max = 1"
    fleet.sink.script = At(Stage.RCPT, NEVER, when=takes_somebody_else)
    await fleet.put_emails(5)
    await fleet.relay()
    assert await fleet.settled() == {"dead": 1, "sent": 4}
    (nothing,) = [kept for kept in fleet.sink.accepted if kept.recipients == ("somebody@example.com",)]
    assert nothing.message == b""
    assert len(fleet.sink.addresses) == 5
    assert len(fleet.sink.visits) == 1
