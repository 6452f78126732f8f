"""What becomes of an email in doubt by itself: it is held, sent again, or asked about. Relays are real processes."""

import asyncio
import email.parser
import signal
from email import policy

import pytest

from outbox.sandbox.smtp_sink import Accept, Cut, Hold, Stage
from tests.support.fault_levers import SLOW, At, delivery, in_state, terminate_session, trail
from tests.support.fleet import until

RESEND = SLOW + '\nin_doubt = "resend"\ndoubt_grace_s = 1'
ASK = SLOW + '\nin_doubt = "ask"\ndoubt_grace_s = 1\nresolver = "mailserver:was_accepted"'

# Each question is written down, so that a test can count them; the answer is what the test has put in its way.
RESOLVER = """
import json, pathlib
here = pathlib.Path(__file__).parent
{definition} was_accepted(email):
    with (here / "questions").open("a") as questions:
        questions.write(json.dumps([email.key, email.message_id, email.attempt, email.asked]) + "\\n")
    answer = (here / "answer").read_text()
    {act}
    return {{"yes": True, "no": False, "unknown": None, "maybe": "maybe"}}[answer]
"""


def put_resolver(fleet, answer, *, definition="def", act="pass"):
    (fleet.directory / "mailserver.py").write_text(RESOLVER.format(definition=definition, act=act))
    (fleet.directory / "answer").write_text(answer)


def questions(fleet):
    path = fleet.directory / "questions"
    return path.read_text().splitlines() if path.exists() else []


async def doubt(fleet, top, *, arrived=False):
    """One email in doubt: the connection is cut after its dot."""
    fleet.top = top
    fleet.sink.script = At(Stage.DOT, Accept(Cut()) if arrived else Cut(), times=1)
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await in_state(fleet, "in_doubt")
    return relay


async def test_what_is_held_is_never_touched(fleet):
    await doubt(fleet, SLOW + '\nin_doubt = "hold"\ndoubt_grace_s = 1')
    await asyncio.sleep(2.5)
    assert (await delivery(fleet))["state"] == "in_doubt"
    assert len(fleet.sink.accepted) == 0


async def test_a_second_sending_carries_the_same_bytes_and_is_recorded(fleet):
    fleet.top = RESEND
    fleet.sink.script = At(Stage.DOT, Accept(Cut()), times=1)
    await fleet.hire(1)
    await fleet.run("generate")
    await fleet.relay()
    await until(lambda: len(fleet.sink.accepted) == 2, "it is sent a second time")
    first, second = fleet.sink.accepted
    assert first.message == second.message
    parsed = email.parser.BytesParser(policy=policy.default).parsebytes(second.message)
    assert parsed["Message-ID"] == first.message_id
    key = await fleet.connection.fetchval("SELECT key FROM outbox.email")
    await in_state(fleet, "sent", key)
    assert await trail(fleet, key) == ["in_doubt", "resolved", "accepted"]


async def test_news_within_the_grace_is_waited_for(fleet):
    """The session is lost while the 250 is under way; it comes before the policy acts."""
    fleet.top = SLOW + '\nin_doubt = "resend"\ndoubt_grace_s = 4'
    answer = asyncio.Event()
    script = At(Stage.DOT, Hold(answer), times=1)
    fleet.sink.script = script
    await fleet.put_emails(1)
    await fleet.relay()
    await script.reached()
    await terminate_session(fleet)
    await in_state(fleet, "in_doubt")
    answer.set()
    await in_state(fleet, "sent")
    await asyncio.sleep(5)
    assert len(fleet.sink.accepted) == 1


@pytest.mark.parametrize("definition", ["def", "async def"])
async def test_a_resolver_that_knows_it_arrived_ends_the_doubt(fleet, definition):
    put_resolver(fleet, "yes", definition=definition)
    await doubt(fleet, ASK, arrived=True)
    await in_state(fleet, "sent")
    assert questions(fleet) == ['["mail1", "<1@example.com>", 1, 0]']
    assert await trail(fleet) == ["in_doubt", "resolved"]
    assert len(fleet.sink.accepted) == 1


async def test_a_resolver_that_knows_it_did_not_arrive_has_it_sent_again(fleet):
    put_resolver(fleet, "no")
    await doubt(fleet, ASK)
    await in_state(fleet, "sent")
    assert await trail(fleet) == ["in_doubt", "resolved", "accepted"]
    assert len(fleet.sink.accepted) == 1


@pytest.mark.parametrize(("answer", "act"), [("unknown", "pass"), ("yes", "1 / 0"), ("maybe", "pass")])
async def test_a_resolver_that_does_not_know_is_asked_again_and_at_last_it_is_held(fleet, answer, act):
    put_resolver(fleet, answer, act=act)
    await doubt(fleet, ASK + "\nasks_max = 2")
    await until(lambda: len(questions(fleet)) == 2, "it was asked twice")

    async def is_held():
        return await fleet.connection.fetchval("SELECT due_at = 'infinity' FROM outbox.delivery")

    await until(is_held, "it is held")
    assert await trail(fleet) == ["in_doubt", "asked", "asked"]
    assert (await delivery(fleet))["state"] == "in_doubt"


async def test_a_resolver_that_hangs_keeps_nobody_from_sending_or_stopping(fleet):
    put_resolver(fleet, "yes", act="import time; time.sleep(600)")
    relay = await doubt(fleet, ASK)
    await until(lambda: len(questions(fleet)) == 1, "it is being asked")
    await fleet.put_emails(3, first=2)
    await fleet.connection.execute("NOTIFY outbox")
    await until(lambda: len(fleet.sink.accepted) == 3, "the others are sent")
    relay.send(signal.SIGTERM)
    assert (await relay.ended()).code == 0


async def test_two_relays_do_not_ask_about_the_same_email_at_once(fleet):
    put_resolver(fleet, "yes", act="import time; time.sleep(1.5)")
    await doubt(fleet, ASK, arrived=True)
    await fleet.relay()
    await in_state(fleet, "sent")
    assert len(questions(fleet)) == 1


async def test_an_answer_that_comes_after_a_persons_decision_changes_nothing(fleet):
    put_resolver(fleet, "no", act="import time\n    while not (here / 'go').exists(): time.sleep(0.02)")
    relay = await doubt(fleet, ASK, arrived=True)
    await until(lambda: len(questions(fleet)) == 1, "it is being asked")
    assert (await fleet.run("resolve", "mail1", "--sent")).code == 0
    (fleet.directory / "go").touch()
    await relay.says("it did not arrive")
    await asyncio.sleep(1)
    assert (await delivery(fleet))["state"] == "sent"
    assert len(fleet.sink.accepted) == 1


@pytest.mark.parametrize(
    ("resolver", "said"),
    [
        ("mailserver:nobody", "resolver: mailserver:nobody cannot be used (AttributeError"),
        ("nowhere:was_accepted", "resolver: nowhere:was_accepted cannot be used (ModuleNotFoundError"),
        ("mailserver:here", "resolver: mailserver:here is not callable"),
    ],
)
async def test_a_resolver_that_is_not_there_is_told_in_one_sentence(fleet, resolver, said):
    put_resolver(fleet, "yes")
    fleet.top = ASK.replace("mailserver:was_accepted", resolver)
    ended = await fleet.run("relay")
    assert ended.code == 2
    assert len(ended.sentences) == 1
    assert ended.sentences[0].startswith(said)


async def test_ask_without_a_resolver_is_told_with_its_mend(fleet):
    fleet.top = 'in_doubt = "ask"'
    ended = await fleet.run("relay")
    assert ended.code == 2
    assert ended.sentences[0].startswith('resolver: is missing; in_doubt = "ask" asks it')
