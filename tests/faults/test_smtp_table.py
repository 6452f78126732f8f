"""The table of what an SMTP ending does to its message, row by row: pipelined and step by step, plain and TLS.

The message that meets the ending is alone, or stands between others, which must have been sent once, at their first
try. The outcomes of a row are compared as a whole, so that a failure shows which of its endings differ.
"""

import asyncio
import ssl

import pytest

from outbox.sandbox.smtp_sink import Accept, Action, Cut, Hold, Reply, Reset, Stage, Stall, Trickle
from tests.support.endings import (
    BIG,
    DEAD,
    DOUBT,
    DOUBT_THOUGH_ACCEPTED,
    PIPELINED,
    SENT,
    SENT_THOUGH_DEFERRED,
    SENT_THOUGH_WITHDRAWN,
    SEVERAL,
    STEPWISE,
    Fate,
    Line,
    Way,
    line,
    server_context,
)
from tests.support.fault_levers import CLOSING, GARBAGE, locked, mark_waits
from tests.support.fleet import Fleet, until

ways = pytest.mark.parametrize(
    "way",
    [pytest.param(PIPELINED, marks=pytest.mark.slow), SEVERAL, pytest.param(STEPWISE, marks=pytest.mark.slow)],
    ids=["pipelined", "several", "stepwise"],
)
wires = pytest.mark.parametrize("tls", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "tls"])

ENVELOPE = (Stage.MAIL, Stage.RCPT, Stage.DATA)
LATER = Reply("451 4.3.0 later")
NEVER = Reply("550 5.1.1 never")
NOTHING_NOW = Reply("454 4.3.0 nothing is taken now")
NO_TLS_AT_ALL = Trickle(b"220 go on\r\n" + b"this is no handshake\r\n" * 50, chunk=11, delay_s=0.001)

LOST: dict[str, Action] = {"cut": Cut(), "reset": Reset(), "silence": Stall(), "garbage": GARBAGE}


@ways
@wires
async def test_trouble_while_a_connection_is_set_up_touches_no_message(fleet: Fleet, way: Way, tls: bool):
    at_ehlo = {**LOST, "421": CLOSING}
    at_once = {**at_ehlo, "451": LATER, "550": NEVER}
    async with line(fleet, way, tls=tls) as it:
        fates = {
            (stage, name): await it.meet(stage, action)
            for stage, endings in ((Stage.CONNECT, at_once), (Stage.EHLO, at_ehlo))
            for name, action in endings.items()
        }
    assert fates == dict.fromkeys(fates, SENT)


@ways
async def test_trouble_with_tls_and_the_login_touches_no_message(fleet: Fleet, way: Way):
    starttls = {**LOST, "421": CLOSING, "454": NOTHING_NOW, "501": Reply("501 no"), "no handshake": NO_TLS_AT_ALL}
    auth = {**LOST, "421": CLOSING, "454": Reply("454 4.7.0 later")}  # a refused login pauses the route for minutes
    async with line(fleet, way, tls=True, login=True) as it:
        fates = {
            (stage, name): await it.meet(stage, action)
            for stage, endings in ((Stage.STARTTLS, starttls), (Stage.AUTH, auth))
            for name, action in endings.items()
        }
        it.sink.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # which has no certificate to show

        async def mend(_: str) -> None:
            await until(lambda: len(it.sink.visits) > visits, "it is tried again")
            it.sink.tls = server_context()

        visits = len(it.sink.visits) + 1
        fates[Stage.STARTTLS, "no certificate"] = await it.meet(Stage.STARTTLS, None, meanwhile=mend)
    assert fates == dict.fromkeys(fates, SENT)


@ways
@wires
async def test_a_server_that_is_not_there_is_waited_for_and_no_message_touched(fleet: Fleet, way: Way, tls: bool):
    async with line(fleet, way, tls=tls) as it:
        assert await it.meet(Stage.MAIL, None) == SENT
        await it.sink.close_listener()

        async def come_back() -> None:
            await until(lambda: it.relay.server.breaker.is_open, "the relay has noticed")
            touched = (
                "SELECT count(*) FROM outbox.delivery WHERE settled_at IS NULL AND (state, attempt) <> ('pending', 0)"
            )
            assert await fleet.connection.fetchval(touched) == 0
            await it.sink.reopen()

        back = asyncio.create_task(come_back())
        assert await it.meet(Stage.CONNECT, None) == SENT
        await back


@ways
@wires
async def test_a_server_that_takes_nothing_more_before_the_dot_touches_no_message(fleet: Fleet, way: Way, tls: bool):
    async with line(fleet, way, tls=tls) as it:
        fates = {
            (stage, name): await it.meet(stage, action)
            for stage in ENVELOPE
            for name, action in {"421": CLOSING, "454": NOTHING_NOW}.items()
        }
    assert fates == dict.fromkeys(fates, SENT)


@ways
@wires
async def test_a_refusal_before_the_dot_is_a_verdict(fleet: Fleet, way: Way, tls: bool):
    """At RCPT and DATA; at MAIL no recipient is named yet."""
    judged = (Stage.RCPT, Stage.DATA)
    async with line(fleet, way, tls=tls) as it:
        deferred = {stage: await it.meet(stage, LATER) for stage in judged}
        dead = {stage: await it.meet(stage, NEVER) for stage in judged}
    assert deferred == dict.fromkeys(judged, SENT_THOUGH_DEFERRED)
    assert dead == dict.fromkeys(judged, DEAD)


@ways
@wires
async def test_a_refusal_of_mail_costs_the_message_nothing(fleet: Fleet, way: Way, tls: bool):
    async with line(fleet, way, tls=tls) as it:
        fates = {action: await it.meet(Stage.MAIL, action) for action in (LATER, NEVER)}
    for met in fates.values():
        assert (met.state, met.attempt - met.withdrawn, met.accepted) == ("sent", 1, 1)


@ways
@wires
async def test_a_connection_that_is_lost_before_the_dot_costs_nothing(fleet: Fleet, way: Way, tls: bool):
    async with line(fleet, way, tls=tls) as it:
        fates = {(stage, name): await it.meet(stage, action) for stage in ENVELOPE for name, action in LOST.items()}
    assert fates == dict.fromkeys(fates, SENT)


@ways
@wires
async def test_what_happens_in_mid_content_is_never_doubt(fleet: Fleet, way: Way, tls: bool):
    endings: dict[str, tuple[Action, Fate]] = {
        "cut": (Cut(), SENT),
        "reset": (Reset(), SENT),
        "silence": (Stall(deaf=True), SENT),
        "garbage": (GARBAGE, SENT),
        "421": (CLOSING, SENT),
        "454": (NOTHING_NOW, SENT),
        "451": (LATER, SENT_THOUGH_DEFERRED),
        "550": (NEVER, DEAD),
    }
    async with line(fleet, way, tls=tls, command_timeout_s=2, data_done_timeout_s=10) as it:
        fates = {
            name: await it.meet(Stage.CONTENT, action, size=3 * BIG if name == "silence" else BIG)
            for name, (action, _) in endings.items()
        }
    assert fates == {name: expected for name, (_, expected) in endings.items()}


async def meet_at_the_mark(it: Line, action: Action) -> Fate:
    """The content is written and the mark waits in Postgres when it happens; the mark is committed after that."""
    go_on, now = asyncio.Event(), asyncio.Event()

    async def hold_the_mark(key: str) -> None:
        async with locked(it.fleet, key):
            go_on.set()
            await mark_waits(it.fleet)
            now.set()
            await until(lambda: not it.relay.pool.facts.is_connected, "the relay has noticed")

    return await it.meet(Stage.DATA, Hold(go_on), then={Stage.CONTENT: Hold(now, then=action)}, meanwhile=hold_the_mark)


@ways
@wires
async def test_a_connection_that_is_lost_during_the_mark_is_not_sent_and_does_not_count(
    fleet: Fleet, way: Way, tls: bool
):
    endings = {"cut": Cut(), "reset": Reset(), "garbage": GARBAGE, "421": CLOSING, "454": NOTHING_NOW}
    async with line(fleet, way, tls=tls) as it:
        fates = {name: await meet_at_the_mark(it, action) for name, action in endings.items()}
    assert fates == dict.fromkeys(fates, SENT_THOUGH_WITHDRAWN)


@ways
@wires
async def test_the_reply_to_the_dot_is_the_verdict(fleet: Fleet, way: Way, tls: bool):
    endings = {
        "250": (Reply("250 2.0.0 queued"), SENT),
        "200": (Reply("200 fine"), SENT),
        "451": (LATER, SENT_THOUGH_DEFERRED),
        "421": (CLOSING, SENT_THOUGH_WITHDRAWN),
        "454": (NOTHING_NOW, SENT_THOUGH_WITHDRAWN),
        "550": (NEVER, DEAD),
    }
    async with line(fleet, way, tls=tls) as it:
        fates = {name: await it.meet(Stage.DOT, action) for name, (action, _) in endings.items()}
    assert fates == {name: expected for name, (_, expected) in endings.items()}


@ways
@wires
async def test_no_usable_reply_to_the_dot_is_doubt_whatever_the_server_did(fleet: Fleet, way: Way, tls: bool):
    endings = {**LOST, "a reply that ends nothing": Reply("354 go on")}
    async with line(fleet, way, tls=tls) as it:
        refused = {name: await it.meet(Stage.DOT, action) for name, action in endings.items()}
        accepted = {name: await it.meet(Stage.DOT, Accept(action)) for name, action in endings.items()}
    assert refused == dict.fromkeys(endings, DOUBT)
    assert accepted == dict.fromkeys(endings, DOUBT_THOUGH_ACCEPTED)
