"""A server that refuses the sender, this host or our syntax, or that limits its sessions: no email pays for it."""

import json

import pytest

from outbox.sandbox.smtp_sink import Reply, Stage, Visit
from tests.support.fault_levers import SLOW, At, all_sent, delivery, in_state, post, status, trail
from tests.support.fleet import Fleet, until

HELO = Reply("504 5.5.2 <f3a1b2c4d5e6>: Helo command rejected: need fully-qualified hostname")
LIMIT = Reply("550 5.4.5 Daily user sending limit exceeded")
RELAYING = Reply("554 5.7.1 <p@example.org>: Relay access denied")
GO_AWAY = Reply("550 go away")
NOBODY = Reply("550 5.1.1 user unknown")


async def costs(fleet: Fleet) -> set[int]:
    """How many tries were charged, over all emails."""
    rows = await fleet.connection.fetch("SELECT DISTINCT attempt - withdrawn AS tries FROM outbox.delivery")
    return {row["tries"] for row in rows}


def all_pending(fleet: Fleet, count: int):
    async def are_pending() -> bool:
        return await fleet.states() == {"pending": count}

    return are_pending


def refused(fleet: Fleet):
    async def is_refused() -> bool:
        return bool(await fleet.connection.fetchval("SELECT count(*) FROM outbox.route"))

    return is_refused


# ── the sender, this host, our syntax ────────────────────────────────────────────────────────────────────────

ROUTE = {
    "the HELO name, said to RCPT": (Stage.RCPT, HELO),
    "relaying": (Stage.RCPT, RELAYING),
    "a login": (Stage.MAIL, Reply("530 5.7.0 Authentication required")),
    "a sender that is not ours": (Stage.RCPT, Reply("553 5.7.1 <r@e.x>: Sender address rejected: not owned by user")),
    "a blocklist": (Stage.RCPT, Reply("554 5.7.1 Client host [192.0.2.1] blocked using zen.spamhaus.org")),
    "a sequence": (Stage.MAIL, Reply("503 Bad sequence of commands - pipelined after end of DATA")),
    "a command that it does not know": (Stage.DATA, Reply("502 5.5.2 Command not implemented")),
    "a parameter that it does not know": (Stage.MAIL, Reply("555 5.5.4 Unsupported option: SIZE=1234")),
    "a sending limit at the dot": (Stage.DOT, Reply("550 5.1.90 You have reached your daily limit")),
    "the sender at the dot": (Stage.DOT, Reply("550 5.7.60 Client does not have permissions to send as this sender")),
    "words that nobody knows at MAIL": (Stage.MAIL, Reply("554 no thanks")),
}


@pytest.mark.parametrize(("stage", "reply"), ROUTE.values(), ids=ROUTE)
async def test_a_refusal_of_the_sender_or_this_host_costs_no_email_a_try(fleet: Fleet, stage: Stage, reply: Reply):
    fleet.top = SLOW
    fleet.sink.script = script = At(stage, reply)
    await fleet.put_emails(20)
    relay = await fleet.relay()
    await relay.says("refuses this sender or host")
    await script.reached(3)
    await until(all_pending(fleet, 20), "all are pending")
    assert await costs(fleet) == {0}
    shown = await status(fleet)
    assert any(str(reply.text) in one["reason"] for one in shown["routes"])
    script.on = False
    await all_sent(fleet, 20)
    assert await costs(fleet) == {1}
    assert fleet.twice == {}


async def test_a_server_that_refuses_all_is_asked_seldom(fleet: Fleet):
    fleet.top = SLOW
    fleet.sink.script = script = At(Stage.RCPT, HELO)
    await fleet.put_emails(200)
    relay = await fleet.relay()
    await relay.says("refuses this sender or host")
    await script.reached(4)
    assert script.count <= 4 + 16, "what was under way, and then one email at a time"


async def test_a_sending_limit_leaves_the_rest_pending_and_the_exit_code_says_so(fleet: Fleet):
    """Gmail: from the sixth message on."""
    fleet.top = SLOW
    fleet.sink.script = At(Stage.MAIL, LIMIT, when=lambda _: fleet.sink.messages >= 5)
    await fleet.put_emails(200)
    ended = await fleet.run("relay", "--until-empty")
    states = await fleet.states()
    assert set(states) == {"sent", "pending"}
    assert 5 <= states["sent"] <= 5 + 16
    assert ended.code == 1
    sentence = ended.err.splitlines()[-1]
    assert "550 5.4.5 Daily user sending limit exceeded" in sentence
    assert "stay pending" in sentence
    fleet.sink.script = None
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 200}
    assert fleet.twice == {}


async def test_an_outage_is_still_waited_for_by_until_empty(fleet: Fleet):
    fleet.sink.script = At(Stage.CONNECT, Reply("421 4.3.2 Service shutting down", then_cut=True), times=4)
    await fleet.put_emails(5)
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 5}


async def test_the_same_refusal_of_several_recipients_is_the_routes_and_the_first_ones_are_put_back(fleet: Fleet):
    fleet.top = SLOW + "\nconnections_max = 1"
    fleet.sink.script = script = At(Stage.RCPT, GO_AWAY)
    await fleet.put_emails(20)
    relay = await fleet.relay()
    await relay.says("dead letters are pending again")
    assert await fleet.states() == {"pending": 20}
    assert await costs(fleet) == {0}
    assert await trail(fleet, "mail1") == ["refused", "retried"]
    script.on = False
    await all_sent(fleet, 20)
    assert fleet.twice == {}


async def test_unknown_users_in_a_row_are_dead_letters_and_no_trouble_of_the_route(fleet: Fleet):
    fleet.top = SLOW
    fleet.sink.script = At(Stage.RCPT, NOBODY)
    await fleet.put_emails(20)
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0
    assert await fleet.states() == {"dead": 20}


async def test_relaying_denied_for_one_recipient_is_a_dead_letter_where_others_are_taken(fleet: Fleet):
    fleet.top = SLOW + "\nconnections_max = 1"
    fleet.sink.script = At(Stage.RCPT, RELAYING, when=lambda visit: visit.recipients[-1] == "p7@example.com")
    await fleet.put_emails(20)
    await fleet.relay()
    assert await fleet.settled() == {"sent": 19, "dead": 1}
    assert (await delivery(fleet, "mail7"))["state"] == "dead"


async def put_from(fleet: Fleet, sender: str, count: int, *, first: int) -> None:
    await post(fleet, count, first=first)
    await fleet.connection.execute(
        "UPDATE outbox.email SET sender = $1 WHERE substr(key, 5)::int BETWEEN $2 AND $3",
        sender,
        first,
        first + count - 1,
    )


async def test_a_sender_that_is_refused_does_not_stop_the_others(fleet: Fleet):
    fleet.top = SLOW
    fleet.sink.script = script = At(
        Stage.MAIL, Reply("553 5.7.1 Sender address rejected"), when=lambda visit: visit.sender == "bad@example.com"
    )
    await put_from(fleet, "bad@example.com", 30, first=101)
    await fleet.put_emails(20)
    relay = await fleet.relay()
    await relay.says("refuses")

    async def the_good_are_sent() -> bool:
        return await fleet.states() == {"sent": 20, "pending": 30}

    await until(the_good_are_sent, "the mail of the other sender is sent")
    await post(fleet, 20, first=21)

    async def more_are_sent() -> bool:
        return await fleet.states() == {"sent": 40, "pending": 30}

    await until(more_are_sent, "and goes on")
    script.on = False
    await all_sent(fleet, 70, 75)
    assert await costs(fleet) == {1}


# ── limits of a session ──────────────────────────────────────────────────────────────────────────────────────

SESSIONS = {
    "OpenSMTPD": Reply("452 4.5.3 Too many messages sent"),
    "Exim": Reply("421 too many messages in this connection", then_cut=True),
    "words that nobody knows": Reply("451 come again"),
    "421 without words": Reply("421", then_cut=True),
    "a permanent one": Reply("550 that was all for this session"),
}


@pytest.mark.parametrize("reply", SESSIONS.values(), ids=SESSIONS)
@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
async def test_a_limit_of_messages_per_session_costs_nothing(fleet: Fleet, pipelining: bool, reply: Reply):
    fleet.top = SLOW + "\nconnections_max = 4"
    fleet.sink.pipelining = pipelining
    fleet.sink.script = script = At(Stage.MAIL, reply, when=lambda visit: visit.accepted >= 20)
    await fleet.put_emails(400)
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0
    assert await fleet.states() == {"sent": 400}
    assert await costs(fleet) == {1}
    rows = await fleet.connection.fetch("SELECT verdict, count(*) AS n FROM outbox.attempt GROUP BY verdict")
    assert {row["verdict"]: row["n"] for row in rows} == {"accepted": 400}, "nothing was deferred, nor withdrawn"
    assert fleet.twice == {}
    if "550" not in str(reply.text):
        assert script.count <= 3 + 3, "the limit is remembered"


async def test_a_server_that_counts_resets_takes_all_that_it_would(fleet: Fleet):
    """Exim's smtp_accept_max_nonmail; each unknown recipient makes a RSET."""

    def is_too_many(visit: Visit) -> bool:
        resets[visit.number] = resets.get(visit.number, 0) + 1
        return resets[visit.number] > 3

    resets: dict[int, int] = {}
    scripts = [
        At(Stage.RSET, Reply("554 Too many nonmail commands", then_cut=True), when=is_too_many),
        At(Stage.RCPT, NOBODY, when=lambda visit: int(visit.recipients[-1][1:].split("@")[0]) % 2 == 0),
    ]
    fleet.top = SLOW + "\nconnections_max = 2"
    fleet.sink.script = lambda stage, visit: next((a for one in scripts if (a := one(stage, visit))), None)
    await fleet.put_emails(60)
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0
    assert await fleet.states() == {"sent": 30, "dead": 30}
    assert await costs(fleet) == {1}
    assert {json.dumps(sorted(await trail(fleet, f"mail{n}"))) for n in range(1, 61)} == {'["accepted"]', '["refused"]'}


async def test_too_many_errors_cost_the_next_email_nothing(fleet: Fleet):
    """Postfix's smtpd_hard_error_limit: the command behind the error that was one too many gets 421."""
    errors: dict[int, int] = {}

    def script(stage: Stage, visit: Visit) -> Reply | None:
        if stage in (Stage.MAIL, Stage.RCPT, Stage.DATA) and errors.get(visit.number, 0) >= 4:
            return Reply("421 4.7.0 mx Error: too many errors", then_cut=True)
        if stage is Stage.RCPT and int(visit.recipients[-1][1:].split("@")[0]) % 3:
            errors[visit.number] = errors.get(visit.number, 0) + 1
            return NOBODY
        return None

    fleet.top = SLOW + "\nconnections_max = 2"
    fleet.sink.script = script
    await fleet.put_emails(60)
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 20, "dead": 40}
    assert await costs(fleet) == {1}


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
async def test_nothing_is_written_behind_a_dot(fleet: Fleet, pipelining: bool):
    """Haraka refuses it (503, to MAIL), and another server lost what it had read."""
    behind: list[bytes] = []
    fleet.sink.pipelining = pipelining
    fleet.sink.script = lambda stage, visit: behind.append(visit.behind) if stage is Stage.DOT else None
    await fleet.put_emails(200)
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 200}
    assert set(behind) == {b""}


async def test_the_refused_email_is_named_with_its_reply(fleet: Fleet):
    fleet.top = SLOW
    fleet.sink.script = At(Stage.RCPT, HELO)
    await fleet.put_emails(1)
    await fleet.relay()
    await until(refused(fleet), "the fleet knows")
    await in_state(fleet, "pending")
    shown = await fleet.run("status")
    assert "Helo command rejected" in shown.out
    doctor = await fleet.run("doctor")
    assert "Helo command rejected" in doctor.out + doctor.err
    assert doctor.code != 0
