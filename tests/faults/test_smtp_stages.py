"""Every fault at every stage of SMTP, and what servers do to mail that is no single ending.

The law for all of them: when the fault is over each message was sent once, or is in doubt, or is dead for a permanent
reply; those beside it were sent once, at their first try; and no server makes the relay take more than it needs.
"""

import asyncio
import ssl
from collections.abc import Mapping

import pytest
import trustme

from outbox.sandbox.smtp_sink import Action, Cut, Flood, Hold, Reply, Reset, Sink, Stage, Stall, Trickle, Visit
from tests.support.endings import (
    BIG,
    DEAD,
    DOUBT,
    DOUBT_THOUGH_ACCEPTED,
    LOGIN,
    SENT,
    SENT_THOUGH_DEFERRED,
    SENT_THOUGH_WITHDRAWN,
    SETUP,
    SEVERAL,
    STEPWISE,
    Fate,
    authority,
    fate,
    line,
    relaying,
    server_context,
)
from tests.support.fault_levers import CLOSING, GARBAGE, all_sent
from tests.support.fleet import Fleet, until

FLOODED_BYTES_MAX = 4_000_000  # what the kernels may hold of a flood; somebody who reads on takes more
PATIENT = {"connect_timeout_s": 10, "command_timeout_s": 10, "data_done_timeout_s": 10}

USUAL = {
    Stage.CONNECT: b"220 ready\r\n",
    Stage.EHLO: b"250-sink.invalid\r\n250 PIPELINING\r\n",
    Stage.STARTTLS: b"220 go on\r\n",
    Stage.AUTH: b"235 welcome\r\n",
    Stage.MAIL: b"250 ok\r\n",
    Stage.RCPT: b"250 ok\r\n",
    Stage.DATA: b"354 go on\r\n",
    Stage.CONTENT: b"250 ok\r\n",
    Stage.DOT: b"250 ok\r\n",
    Stage.RSET: b"250 ok\r\n",
    Stage.QUIT: b"221 bye\r\n",
}

FAULTS: Mapping[str, Action] = {
    "FIN": Cut(),
    "RST": Reset(),
    "hang": Stall(),
    "421": CLOSING,
    "4xx": Reply("451 4.3.0 later"),
    "5xx": Reply("550 5.1.1 never"),
    "garbage": GARBAGE,
    "split": Trickle(chunk=1, delay_s=0.001),
    "drip": Trickle(b"250-" + b"x" * 4000, chunk=1, delay_s=0.02),
    "megabytes": Flood(b"2" * 65536),
    "endless lines": Flood((b"250-" + b"x" * 60 + b"\r\n") * 1000),
}
TWICE = "twice"  # an extra reply, so that all that follow are out of step
PAIRS = [
    (stage, fault)
    for stage in Stage
    for fault in (*FAULTS, TWICE)
    # Nothing is answered to content; a refused login is not tried again for a minute (`test_connecting`).
    if (stage, fault) not in ((Stage.CONTENT, "split"), (Stage.AUTH, "5xx"))
]


def expected(stage: Stage, fault: str) -> Fate:
    """What a fault at a stage does to the message that meets it."""
    if stage in SETUP or stage in (Stage.RSET, Stage.QUIT) or fault == "split":
        return SENT  # no message is concerned
    if fault in ("4xx", "5xx"):  # at MAIL no recipient is named yet: another connection is asked
        judged = SENT_THOUGH_DEFERRED if fault == "4xx" else DEAD
        return SENT if stage is Stage.MAIL else judged
    if stage is Stage.DOT:
        return {"421": SENT_THOUGH_WITHDRAWN, TWICE: SENT}.get(fault, DOUBT)
    if stage is Stage.CONTENT and fault in ("hang", "drip"):
        return DOUBT  # content and dot were written, and only then is a reply missed
    return SENT  # the trouble is the server's, and the dot was not written


@pytest.mark.parametrize(
    "stage, fault",
    [
        pytest.param(stage, fault, marks=[] if stage in (Stage.DATA, Stage.DOT) else pytest.mark.slow)
        for stage, fault in PAIRS
    ],
    ids=[f"{stage}-{fault}" for stage, fault in PAIRS],
)
async def test_a_fault_at_a_stage_has_its_one_fate(fleet: Fleet, stage: Stage, fault: str):
    action = Reply(2 * USUAL[stage]) if fault == TWICE else FAULTS[fault]
    in_mid_content = stage is Stage.CONTENT and expected(stage, fault) is not DOUBT
    secure = stage in (Stage.STARTTLS, Stage.AUTH)
    changes = PATIENT if isinstance(action, Flood) else {}
    if stage is Stage.QUIT:
        changes = {**changes, "messages_per_connection_max": SEVERAL.faulty}
    async with line(fleet, SEVERAL, tls=secure, login=secure, refusing=stage is Stage.RSET, **changes) as it:
        met = await it.meet(stage, action, size=BIG if in_mid_content else 200)
        assert met == expected(stage, fault)
        if isinstance(action, Flood):
            visit = it.script.visit
            assert visit is not None
            await until(lambda: visit not in [there.visit for there in it.sink.connections], "the relay hangs up")
            assert 0 < visit.flooded < FLOODED_BYTES_MAX


@pytest.mark.parametrize("way", [SEVERAL, STEPWISE], ids=["several", "stepwise"])
async def test_a_server_that_greylists_gets_each_message_at_its_second_try(fleet: Fleet, way):
    known: set[str] = set()

    def greylist(stage: Stage, visit: Visit) -> Action | None:
        if stage is not Stage.RCPT or visit.recipients[-1] in known:
            return None
        known.add(visit.recipients[-1])
        return Reply("451 4.7.1 greylisted, come again")

    async with line(fleet, way) as it:
        it.sink.script = greylist
        await fleet.put_emails(20)
        await all_sent(fleet, 20)
    assert {await fate(fleet, number) for number in range(1, 21)} == {SENT_THOUGH_DEFERRED}


@pytest.mark.parametrize("says_so", [True, False], ids=["SIZE", "no SIZE"])
async def test_a_message_that_is_too_large_for_the_server_is_dead_and_nobody_elses_trouble(fleet: Fleet, says_so: bool):
    async with line(fleet, SEVERAL) as it:
        it.sink.size_max = 10_000
        met = await it.meet(Stage.EHLO, None if says_so else Reply("250-sink.invalid\r\n250 PIPELINING"), size=20_000)
        assert met == DEAD
        reply = await fleet.connection.fetchval("SELECT reply FROM outbox.attempt WHERE verdict = 'refused'")
        unsent = "bytes and this server takes at most 10000 (RFC 1870), so it was not sent: "
        assert (unsent if says_so else "552 5.3.4 Message too big") in reply


async def test_a_slow_answer_to_the_dot_is_waited_for(fleet: Fleet):
    slow = asyncio.Event()
    async with line(fleet, SEVERAL, data_done_timeout_s=10) as it:

        async def wait(_: str) -> None:
            asyncio.get_running_loop().call_later(1.5, slow.set)  # longer than any other reply may take

        assert await it.meet(Stage.DOT, Hold(slow), meanwhile=wait) == SENT
        assert len(it.sink.visits) == 1


async def test_an_answer_to_the_dot_that_comes_too_late_leaves_doubt_and_no_second_copy(fleet: Fleet):
    slow = asyncio.Event()
    async with line(fleet, SEVERAL) as it:

        async def wait(key: str) -> None:
            doubt = "SELECT count(*) FROM outbox.delivery WHERE state = 'in_doubt'"
            await until(lambda: fleet.connection.fetchval(doubt), f"{key} is in doubt")
            assert it.sink.addresses[f"p{key.removeprefix('mail')}@example.com"] == 0
            slow.set()

        await it.meet(Stage.DOT, Hold(slow), meanwhile=wait)
        await until(lambda: fleet.sink.messages == SEVERAL.ready, "the server took it after all")
        assert await fate(fleet, SEVERAL.faulty) == DOUBT_THOUGH_ACCEPTED


@pytest.mark.parametrize("fault", ["unknown authority", "wrong host"])
@pytest.mark.parametrize("implicit", [True, False], ids=["smtps", "login"])
async def test_a_certificate_that_does_not_verify_gets_neither_mail_nor_login(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, implicit: bool, fault: str
):
    wrong = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issuer, host = (authority(), "elsewhere.example") if fault == "wrong host" else (trustme.CA(), "localhost")
    issuer.issue_cert(host).configure_cert(wrong)
    async with Sink(lambda *_: None, tls=wrong, implicit_tls=implicit, login=LOGIN) as sink:
        fleet.sink = sink
        await fleet.put_emails(3)
        async with relaying(fleet, f"smtp{'s' * implicit}://user:se%20cret%401@localhost:{sink.port}"):
            await until(lambda: "SMTP is in trouble" in caplog.text, "it is said")
            (line,) = [record.getMessage() for record in caplog.records if "in trouble" in record.getMessage()]
            assert "certificate verify failed" in line
            assert ("Hostname mismatch" if fault == "wrong host" else "unable to get local issuer") in line
            assert "\n" not in line
            assert await fleet.states() == {"pending": 3}
            assert Stage.AUTH not in {stage for *_, stage in sink.events}

            await sink.close_listener()
            sink.tls = server_context()
            await sink.reopen()
            await all_sent(fleet, 3)
    assert {await fate(fleet, number) for number in (1, 2, 3)} == {SENT}


async def test_a_login_that_was_forgotten_makes_no_dead_letters(fleet: Fleet, caplog: pytest.LogCaptureFixture):
    async with Sink(lambda *_: None, login=LOGIN) as sink:
        fleet.sink = sink
        await fleet.put_emails(3)
        async with relaying(fleet, sink.url):
            await until(lambda: "530 5.7.0 Authentication required" in caplog.text, "it is said")
            assert await fleet.states() == {"pending": 3}
            sink.login = None
            await all_sent(fleet, 3, 60)  # the pause grows while nobody acts
    for number in (1, 2, 3):
        found = await fate(fleet, number)
        assert (found.state, found.attempt - found.withdrawn, found.accepted) == ("sent", 1, 1)


async def test_what_a_server_says_can_be_shown_and_kept(fleet: Fleet):
    """In terminals and in Postgres, whatever bytes it sends."""
    async with line(fleet, SEVERAL) as it:
        assert await it.meet(Stage.CONNECT, Reply(b"554 \xff\x1b[2J\x00no\r\n")) == SENT
        assert await it.meet(Stage.RCPT, Reply(b"550 \xff\x1b[2J\x00no\r\n")) == DEAD
        reply = await fleet.connection.fetchval("SELECT reply FROM outbox.attempt WHERE verdict = 'refused'")
        for said in (it.relay.server.breaker.reason, reply):
            assert "no" in said
            assert said.isprintable()
            assert said.encode().decode() == said
