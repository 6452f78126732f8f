"""`outbox retry`, `cancel`, `pause` and `resume`: a person's hands on emails, and that relays obey."""

import asyncio
import json

import asyncpg
import pytest

from outbox.mail.removed_message import LOST, PRUNED
from outbox.operations.operator import whoami
from outbox.sandbox.smtp_sink import Hold, Reply, Stage
from tests.acceptance.test_resolve import ANN, at_terminal, operations, waiting
from tests.support.fault_levers import At, all_sent, delivery, in_state, locked, mark_held, post, trail
from tests.support.fleet import until

WEEK = "2026-W47"
WHOLE = ("--edition", f"progress {WEEK}", "--why", "wrong figures", "--yes")
ANNS = f"ann@{whoami().partition('@')[2]}"


async def states_by_key(fleet):
    rows = await fleet.connection.fetch(
        "SELECT m.key, d.state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email ORDER BY m.id"
    )
    return {row["key"].rpartition("/")[2]: row["state"] for row in rows}


async def put_in_state(fleet, state, key):
    await fleet.connection.execute(
        """UPDATE outbox.delivery d
              SET state = $1::text, attempt = CASE WHEN $1 IN ('dead', 'in_doubt', 'sent') THEN 1 ELSE 0 END,
                  settled_at = CASE WHEN $1 <> 'in_doubt' THEN now() END,
                  doubted_at = CASE WHEN $1 = 'in_doubt' THEN now() END,
                  due_at = CASE WHEN $1 = 'in_doubt' THEN 'infinity' ELSE d.due_at END,
                  marked_at = now(), relay = CASE WHEN $1 = 'in_doubt' THEN 999 END,
                  send_before = CASE WHEN $1 = 'expired' THEN now() END
             FROM outbox.email m WHERE m.id = d.email AND m.key = $2""",
        state,
        key,
    )


@pytest.fixture
async def muddled(fleet):
    """mail1 is sent, 2 in doubt, 3 dead, 4 cancelled, 5 expired, 6 waits for its next try, 7 is due."""
    await fleet.put_emails(7)
    for number, state in enumerate(("sent", "in_doubt", "dead", "cancelled", "expired"), start=1):
        await put_in_state(fleet, state, f"mail{number}")
    await fleet.connection.execute(
        "UPDATE outbox.delivery d SET due_at = now() + interval '1 hour', attempt = 2 FROM outbox.email m"
        " WHERE m.id = d.email AND m.key = 'mail6'"
    )
    return fleet


# ── retry and cancel, by key ─────────────────────────────────────────────────────────────────────────────────────────


async def test_retry_sends_what_is_dead_cancelled_expired_or_waits_and_says_of_all_else_why_not(muddled):
    keys = [f"mail{n}" for n in range(1, 8)]
    ended = await muddled.run("retry", *keys, "mail3", "nothing", "--why", "the\nbox is back", environment=ANN)
    assert (ended.code, ended.out) == (1, "".join(f"mail{n}: retried\n" for n in (3, 4, 5, 6)))
    assert ended.sentences == [
        "mail1 is sent; nothing was changed, since what arrived is not sent again.",
        (
            "mail2 is in doubt: the server may have it already; "
            "`outbox resolve mail2 --resend` sends it at the risk of a second copy."
        ),
        "mail7 is due already; the next free relay sends it (`outbox status` says whether one is alive).",
        "nothing is no email's key; `outbox list --to ADDRESS` finds it.",
        "mail3 was named twice; it counts once.",
    ]
    assert (await operations(muddled)) == [
        (ANNS, "retry", f"{' '.join(keys)} nothing", "the\nbox is back", 4),
    ]
    dead, expired, waits = [await delivery(muddled, f"mail{n}") for n in (3, 5, 6)]
    assert (dead["attempt"], dead["tries"]) == (1, 0), "it has all its tries before it"
    assert expired["send_before"] is None
    assert (waits["attempt"], waits["tries"]) == (2, 2), "it is only due earlier"
    assert await trail(muddled, "mail3") == ["retried"]
    assert (await muddled.run("relay", "--until-empty")).code == 0
    assert await muddled.states() == {"sent": 6, "in_doubt": 1}
    assert muddled.twice == {}


async def test_cancel_ends_what_is_pending_for_good_and_says_of_all_else_why_not(muddled):
    keys = [f"mail{n}" for n in range(1, 8)]
    ended = await muddled.run("cancel", *keys, environment=ANN)
    assert (ended.code, ended.out) == (1, "mail6: cancelled\nmail7: cancelled\n")
    assert ended.sentences == [
        "mail1 is sent, and cannot be called back.",
        "mail2 is in doubt: the server may have it already; `outbox resolve mail2 --discard` lets it be.",
        "mail3 is dead, so it is not sent anyway; `outbox resolve mail3 --discard` lets it be.",
        "mail4 is cancelled already (it is not known by whom).",
        "mail5 has expired, so it is not sent anyway.",
    ]
    again = await muddled.run("cancel", "mail7")
    assert again.sentences == [f"mail7 is cancelled already ({ANNS} cancelled it)."]
    assert await trail(muddled, "mail7") == ["cancelled"]
    assert next(row[1:] for row in await operations(muddled)) == ("cancel", " ".join(keys), "", 2)
    assert (await muddled.run("relay", "--until-empty")).code == 0
    assert await muddled.states() == {"sent": 1, "in_doubt": 1, "dead": 1, "cancelled": 3, "expired": 1}


async def test_what_has_lost_its_message_is_never_retried(muddled):
    for key, message in {"mail3": LOST, "mail5": PRUNED}.items():
        await muddled.connection.execute("UPDATE outbox.email SET message = $1 WHERE key = $2", message, key)
    ended = await muddled.run("retry", "mail3", "mail5")
    assert (ended.code, ended.out) == (1, "")
    assert [said.partition(":")[2].split()[:2] for said in ended.sentences[:1]] == [["a", "failover"]]
    assert ended.sentences[1].startswith("mail5 cannot be sent: `outbox prune` removed")
    ended = await muddled.run("retry", "--state", "dead", "--state", "expired", "--why", "all", "--yes")
    assert (ended.code, ended.out) == (0, "Nothing that fits can be retried.\n")
    assert (await delivery(muddled, "mail3"))["state"] == "dead"


# ── by filter ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_all_that_fits_is_retried_or_cancelled_but_what_a_person_let_be_only_by_name(muddled):
    await put_in_state(muddled, "dead", "mail7")
    assert (await muddled.run("resolve", "mail7", "--discard")).code == 0
    words = ("retry", "--to", "P*@Example.com", "--why", "all of it", "--yes")
    ended = await muddled.run(*words)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [f"mail{n}: retried" for n in (3, 5, 6)]
    assert (await operations(muddled))[-1][2:] == ("--to 'P*@Example.com'", "all of it", 3)
    ended = await muddled.run(*words, "--state", "cancelled")
    assert ended.out == "mail4: retried\n"
    assert (await operations(muddled))[-1][2] == "--to 'P*@Example.com' --state cancelled"
    await muddled.put_emails(11, first=8)
    ended = await muddled.run("cancel", "--to", "p*", "--why", "no more", "--yes")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "… and 5 more: cancelled"
    assert (await muddled.states())["cancelled"] == 15


async def test_a_person_is_asked_before_all_that_fits_is_touched_and_may_say_no(muddled):
    for words in (("--report", "nope"), ("--edition", f"progress {WEEK}")):
        ended = await muddled.run("cancel", *words, *WHOLE[2:])
        assert (ended.code, ended.out) == (2, "")
        assert "there is no " in ended.sentences[0]
    assert await operations(muddled) == []
    words = ("retry", "--state", "dead", "--state", "expired", "--why", "x")
    code, said = await at_terminal(muddled, *words, answer="n\n")
    assert (code, said.splitlines()[:2]) == (
        1,
        ["  mail3 <p3@example.com> is dead", "  mail5 <p5@example.com> is expired"],
    )
    assert "Retry these 2 emails?" in said
    assert await operations(muddled) == []
    code, _ = await at_terminal(muddled, *words, answer="y\n")
    assert (code, (await muddled.states()).get("dead")) == (0, None)


async def test_resolve_takes_the_same_filters(muddled):
    ended = await muddled.run("resolve", "--to", "p2@*", "--sent", "--why", "their log has it", "--yes")
    assert (ended.code, ended.out) == (0, "mail2: sent\n")
    ended = await muddled.run("resolve", "--state", "dead", "--discard", "--why", "gone", "--yes")
    assert (ended.code, ended.out) == (0, "mail3: discard\n")
    assert [row[1:4] for row in await operations(muddled)] == [
        ("resolve sent", "--to 'p2@*'", "their log has it"),
        ("resolve discard", "--state dead", "gone"),
    ]
    ended = await muddled.run("resolve", "--to", "p2@*", "--sent", "--why", "x", "--yes")
    assert (ended.code, ended.out) == (0, "Nothing of --to 'p2@*' is in doubt and undecided.\n")


# ── against relays ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_cancelled_before_its_mark_is_not_sent_and_nothing_is_to_blame(fleet):
    fleet.top = "lease_s = 30"
    async with mark_held(fleet) as (relay, holder):
        # The mark waits for the row. Who waits longer has it first, so the decision is made in the holder's place.
        await holder.execute("UPDATE outbox.delivery SET state = 'cancelled', settled_at = now(), relay = NULL; COMMIT")
        await relay.says("mail1 was cancelled at the last moment; it was not sent")
    assert not any("no longer" in line or "ERROR" in line for line in relay.log)
    await post(fleet, 1, first=2)
    await in_state(fleet, "sent", "mail2")
    assert fleet.sink.addresses == {"p2@example.com": 1}
    assert json.loads((await fleet.run("status", "--json")).out)["routes"] == []


async def test_of_cancel_and_mark_the_first_has_the_email_and_the_other_is_told(fleet):
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.DATA, Hold(answer), times=1)
    await post(fleet, 1)
    relay = await fleet.relay()
    await script.reached()  # claimed, and its content is not written
    ended = await fleet.run("cancel", "mail1")
    assert (ended.code, ended.out) == (0, "mail1: cancelled\n"), ended
    answer.set()
    await relay.says("mail1 was cancelled at the last moment")
    assert (await delivery(fleet))["state"] == "cancelled"

    hold = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(hold), times=1)
    await post(fleet, 1, first=2)
    await script.reached()
    await in_state(fleet, "sending", "mail2")
    ended = await fleet.run("cancel", "mail2")
    assert (ended.code, ended.out) == (1, "")
    assert ended.sentences == [
        "mail2 is being sent at this moment, and cannot be cancelled; `outbox show mail2` says what comes of it."
    ]
    hold.set()
    await in_state(fleet, "sent", "mail2")
    assert fleet.sink.addresses == {"p2@example.com": 1}


async def test_a_refusal_of_what_is_cancelled_meanwhile_is_no_trouble(fleet):
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.RCPT, Hold(answer, Reply(b"550 5.1.1 no such user\r\n")), times=1)
    await post(fleet, 1)
    relay = await fleet.relay()
    await script.reached()
    assert (await fleet.run("cancel", "mail1")).code == 0
    answer.set()
    await relay.says("mail1, try 1: 550")
    await post(fleet, 1, first=2)
    await in_state(fleet, "sent", "mail2")
    assert (await trail(fleet), (await delivery(fleet))["state"]) == (["cancelled"], "cancelled")
    assert not any("too late" in line for line in relay.log)


async def test_many_are_cancelled_in_batches_that_wait_for_nobody_for_long(fleet):
    await fleet.put_emails(2500)
    async with locked(fleet, "mail1500") as holder:
        process = await fleet.start("cancel", "--to", "*", "--why", "all", "--yes")
        await waiting(fleet, "outbox cancel")
        assert (await fleet.states())["cancelled"] == 1000, "the first batch is committed"
        await until(lambda: _is_free(fleet, "mail1001"), "the second one holds no row while it waits", 5)
        await holder.execute("COMMIT")
    ended = await process.ended()
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "… and 2,490 more: cancelled")
    assert await fleet.states() == {"cancelled": 2500}
    assert [row[-1] for row in await operations(fleet)] == [2500]


async def _is_free(fleet, key):
    try:
        await fleet.connection.execute(
            "SELECT FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email WHERE m.key = $1"
            " FOR UPDATE OF d NOWAIT",
            key,
        )
    except asyncpg.LockNotAvailableError:
        return False
    return True


# ── pause and resume ─────────────────────────────────────────────────────────────────────────────────────────────────


async def status(fleet):
    return json.loads((await fleet.run("status", "--json")).out)


async def test_while_the_fleet_is_paused_nothing_is_sent_and_after_it_all_is(fleet):
    relays = [await fleet.relay(), await fleet.relay()]
    ended = await fleet.run("pause", "--why", "the figures are wrong", environment=ANN)
    assert (ended.code, ended.out.startswith("The fleet is now paused since 20")) == (0, True)
    assert ended.out.endswith(f"({ANNS}: the figures are wrong): 0 emails are waiting; `outbox resume` lets them go.\n")
    for relay in relays:
        await relay.says("the fleet is paused")
    await post(fleet, 5)
    written = "SELECT array_agg(xmin::text) FROM outbox.delivery"
    before = await fleet.connection.fetchval(written)
    again = await fleet.run("pause", "--why", "me too")
    assert (again.code, again.out.startswith("The fleet is already paused")) == (0, True)
    assert f"({ANNS}: the figures are wrong): 5 emails are waiting" in again.out

    found = await status(fleet)
    assert [(one["report"], one["who"], one["waiting"]) for one in found["pauses"]] == [("", ANNS, 5)]
    assert "The fleet is paused since " in (await fleet.run("status")).out
    assert await fleet.connection.fetchval(written) == before, "nobody claims"
    until_empty = await fleet.run("relay", "--until-empty")
    assert (until_empty.code, fleet.sink.addresses) == (1, {})
    assert until_empty.err.splitlines()[-1] == (
        f"outbox: 5 emails were not sent, since the fleet is paused ({ANNS}: the figures are wrong); "
        "`outbox resume` lets them go."
    )
    assert await fleet.states() == {"pending": 5}

    ended = await fleet.run("resume", environment=ANN)
    assert (ended.code, ended.out) == (0, "The fleet goes on: 5 emails are no longer held back.\n")
    await all_sent(fleet, 5, 5)
    assert (await fleet.run("resume")).out == "The fleet is not paused.\n"
    assert await operations(fleet) == [
        (ANNS, "pause", "the fleet", "the figures are wrong", 0),
        (ANNS, "resume", "the fleet", "", 5),
    ]


async def test_a_paused_report_is_set_aside_and_hinders_nobody_and_goes_when_it_is_resumed(fleet):
    await fleet.hire(30)
    assert (await fleet.run("pause", "progress", "--why", "wrong week")).code == 0
    assert (await fleet.run("generate", "--period", WEEK)).code == 0
    await fleet.put_emails(3, first=101)
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 1
    assert "outbox: 30 emails were not sent, since progress is paused" in ended.err
    assert sorted(fleet.sink.addresses) == ["p101@example.com", "p102@example.com", "p103@example.com"]
    held = "SELECT count(*) FROM outbox.delivery WHERE paused = 'progress' AND due_at = 'infinity' AND relay IS NULL"
    assert await fleet.connection.fetchval(held) == 30
    assert (await status(fleet))["pauses"][0]["waiting"] == 30
    assert "held back while progress is paused" in (await fleet.run("audit", "progress", WEEK)).out

    key = f"progress/{WEEK}/1"
    ended = await fleet.run("retry", key)
    assert ended.sentences == [f"{key} waits since progress is paused; `outbox resume progress` lets it go."]
    assert (await fleet.run("cancel", key)).code == 0
    relay = await fleet.relay()
    await relay.says("progress is paused")
    assert "29 emails are no longer held back" in (await fleet.run("resume", "progress")).out
    await until(lambda: len(fleet.sink.addresses) == 32, "all but the cancelled one are sent", 8)
    assert await fleet.states() == {"sent": 32, "cancelled": 1}
    assert not await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE paused IS NOT NULL")
    assert fleet.twice == {}


async def test_a_pause_that_comes_while_mail_is_in_hand_holds_back_all_but_what_was_begun(fleet):
    await fleet.hire(40)
    fleet.top = "connections_max = 1"
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(answer), times=1)
    assert (await fleet.run("generate", "--period", WEEK)).code == 0
    relay = await fleet.relay()
    await script.reached()
    await in_hand(fleet)
    assert (await fleet.run("pause", "progress", "--why", "stop")).code == 0
    await relay.says("progress is paused")
    answer.set()

    async def held():
        return (
            await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE paused = 'progress'")
            + len(fleet.sink.addresses)
            == 40
        )

    await until(held, "all is either set aside or sent")
    assert len(fleet.sink.addresses) == 1, "the one that was past its dot"
    relay.send(15)
    assert (await relay.ended()).code == 0
    assert set(await fleet.states()) == {"pending", "sent"}


async def in_hand(fleet):
    async def some():
        return await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE relay IS NOT NULL")

    await until(some, "some are claimed")


async def test_words_of_pause_that_cannot_be_meant_are_one_sentence_and_change_nothing(fleet):
    for words, sentence in {
        ("pause", "progress"): "--why: say why, ",
        (
            "pause",
            "progres",
            "--why",
            "x",
        ): "reports.progres: is not configured; write one of progress (did you mean progress?).",
        ("pause", "", "--why", "x"): "REPORT: is empty; ",
    }.items():
        ended = await fleet.run(*words)
        assert (ended.code, ended.out) == (2, ""), ended
        assert ended.sentences[0].startswith(sentence), ended.sentences
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.pause") == 0
