"""`outbox resolve`: who may decide what, that it is kept who did and why, and that of several at once one decides."""

import asyncio
import os
import pty
import sys
from contextlib import asynccontextmanager

import asyncpg
import pytest

from outbox.mail.removed_message import LOST
from outbox.operations.operator import whoami
from outbox.relay import in_doubt
from outbox.relay.quarantine import Quarantine
from outbox.sandbox.smtp_sink import Accept, Cut, Hold, Reply, Stage
from tests.support.fault_levers import At, delivery, in_state, locked, post, terminate_session, trail
from tests.support.fleet import until

WEEK = "2026-W47"
ANN = {"LOGNAME": "ann"}
WHY = "the log of the mail server has it"
REFUSED = Reply(b"550 5.1.1 no such user\r\n")


def meets(action, *addresses, stage=Stage.DOT):
    """Mail to these addresses meets trouble; all other mail is accepted."""

    def script(at, visit):
        return action if at is stage and visit.recipients and visit.recipients[-1] in addresses else None

    return script


async def relayed(fleet, script, **states):
    fleet.sink.script = script
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0, ended
    assert await fleet.states() == states


async def operations(fleet):
    rows = await fleet.connection.fetch("SELECT who, what, target, why, emails FROM outbox.operation ORDER BY id")
    return [tuple(row) for row in rows]


async def resolved(fleet, key):
    """What the trail of an email says of decisions."""
    rows = await fleet.connection.fetch(
        "SELECT a.reply FROM outbox.attempt a JOIN outbox.email m ON m.id = a.email"
        " WHERE m.key = $1 AND a.verdict = 'resolved' ORDER BY a.settled_at",
        key,
    )
    return [row["reply"] for row in rows]


async def waiting(fleet, application, count=1):
    """Wait until so many sessions of this command wait for a row."""

    async def are_waiting():
        return count == await fleet.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()"
            " AND wait_event IN ('transactionid', 'tuple')",
            application,
        )

    await until(are_waiting, f"{count} of {application} wait for the row")


@pytest.fixture
async def muddled(fleet):
    """mail1 is sent, mail2 and mail3 are in doubt, mail4 is dead."""
    await fleet.put_emails(3)
    await relayed(fleet, meets(Cut(), "p2@example.com", "p3@example.com"), sent=1, in_doubt=2)
    await fleet.put_emails(1, first=4)
    await relayed(fleet, meets(REFUSED, "p4@example.com", stage=Stage.RCPT), sent=1, in_doubt=2, dead=1)
    return fleet


@pytest.fixture
async def edition(fleet):
    """Five people: of last week 1 and 2 are in doubt, 3 and 4 dead, 5 sent; of the week before 1 is in doubt."""
    await fleet.hire(5)
    for week in ("2026-W46", WEEK):
        assert (await fleet.run("generate", "--period", week)).code == 0
        doubtful, dead = ({"1", "2"}, {"3", "4"}) if week == WEEK else ({"1"}, set())

        def script(at, visit, doubtful=doubtful, dead=dead):
            number = visit.recipients[-1][1:2] if visit.recipients else None
            if at is Stage.RCPT and number in dead:
                return REFUSED
            return Cut() if at is Stage.DOT and number in doubtful else None

        fleet.sink.script = script
        assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 5, "in_doubt": 3, "dead": 2}
    fleet.sink.script = lambda *_: None
    return fleet


async def in_edition(fleet, week=WEEK):
    rows = await fleet.connection.fetch(
        "SELECT m.key, d.state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email ORDER BY m.key"
    )
    return {row["key"].rpartition("/")[2]: row["state"] for row in rows if f"/{week}/" in row["key"]}


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_decided_what_about_which_and_why_is_kept_with_the_operation_and_with_each_email(muddled):
    ended = await muddled.run("resolve", "mail3", "mail2", "--sent", "--why", WHY, environment=ANN)
    assert (ended.code, ended.err, ended.out) == (0, "", "mail3: sent\nmail2: sent\n")
    ((who, *rest),) = await operations(muddled)
    assert who == "ann@" + whoami().partition("@")[2]
    assert rest == ["resolve sent", "mail3 mail2", WHY, 2]
    for key in ("mail2", "mail3"):
        assert await resolved(muddled, key) == [f"{who} decided: sent, because {WHY}"]

    ended = await muddled.run("resolve", "mail4", "--resend", environment=ANN)
    assert (ended.code, ended.out) == (0, "mail4: resend\n")
    assert (await operations(muddled))[1:] == [(who, "resolve resend", "mail4", "", 1)]
    assert await resolved(muddled, "mail4") == [f"{who} decided: resend"]


async def test_a_decision_that_cannot_be_kept_is_not_made(muddled):
    await muddled.connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no room'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON outbox.operation FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    before = await muddled.connection.fetch("SELECT * FROM outbox.delivery ORDER BY email")
    ended = await muddled.run("resolve", "mail2", "mail4", "--discard")
    assert (ended.code, ended.out, ended.sentences) == (1, "", ["Postgres refuses: no room."])
    assert await muddled.connection.fetch("SELECT * FROM outbox.delivery ORDER BY email") == before
    assert await resolved(muddled, "mail2") == []


@pytest.mark.parametrize("error", [KeyError, OSError, ImportError])
def test_a_user_without_a_name_is_known_by_number(monkeypatch, error):
    def raises():
        raise error("no such user")

    monkeypatch.setattr("getpass.getuser", raises)
    assert whoami().startswith(f"uid{os.getuid()}@")


# ── what is left ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_that_is_unknown_repeated_or_in_another_state_is_one_sentence_and_the_others_are_done(muddled):
    strange = os.fsdecode(b"\xff")
    ended = await muddled.run("resolve", "mail1", "mail2", "nothing", "mail4", "mail2", strange, "--sent")
    assert (ended.code, ended.out) == (1, "mail2: sent\n")
    one, nothing, dead, other, twice = ended.sentences
    assert one == "mail1 is sent; nothing was changed, since only what is in doubt or dead can be decided."
    assert nothing == "nothing is no email's key; take one that `outbox status` shows."
    assert (
        dead == "mail4 is dead: the server refused it, so it cannot be declared sent; use `outbox retry`, or --discard."
    )
    assert other.endswith(" is no email's key; take one that `outbox status` shows.")
    assert twice == "mail2 was named twice; it counts once."
    assert await muddled.states() == {"sent": 2, "in_doubt": 1, "dead": 1}
    assert [emails for *_, emails in await operations(muddled)] == [1]


async def test_what_was_decided_before_says_by_whom(muddled):
    await muddled.run("resolve", "mail2", "--discard", "--why", WHY, environment=ANN)
    ended = await muddled.run("resolve", "mail2", "--discard")
    assert (ended.code, ended.out) == (1, "")
    (sentence,) = ended.sentences
    assert sentence.startswith("mail2 is dead (ann@")
    assert f" decided: discard, because {WHY}); nothing was changed" in sentence
    assert [emails for *_, emails in await operations(muddled)] == [1, 0]
    assert len(await resolved(muddled, "mail2")) == 1


# ── a whole edition ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_whole_edition_is_decided_at_once_and_no_other(edition):
    ended = await edition.run(
        "resolve", "--edition", f"progress {WEEK}", "--sent", "--why", WHY, "--yes", environment=ANN
    )
    assert (ended.code, ended.err) == (0, ""), ended
    assert ended.out.splitlines() == [f"progress/{WEEK}/1: sent", f"progress/{WEEK}/2: sent"]
    assert await in_edition(edition) == {"1": "sent", "2": "sent", "3": "dead", "4": "dead", "5": "sent"}
    assert (await in_edition(edition, "2026-W46"))["1"] == "in_doubt"
    ((who, *rest),) = await operations(edition)
    assert rest == ["resolve sent", f"progress {WEEK}", WHY, 2]
    assert await resolved(edition, f"progress/{WEEK}/2") == [f"{who} decided: sent, because {WHY}"]

    again = await edition.run("resolve", "--edition", f"progress {WEEK}", "--resend", "--why", WHY, "--yes")
    assert (again.code, again.out) == (0, f"Nothing of progress {WEEK} is in doubt and undecided.\n")
    assert len(await operations(edition)) == 1


async def test_the_dead_letters_of_an_edition_are_decided_but_for_those_that_a_person_let_be(edition):
    assert (await edition.run("resolve", f"progress/{WEEK}/1", f"progress/{WEEK}/3", "--discard")).code == 0
    words = ("resolve", "--edition", f"progress {WEEK}", "--state", "dead", "--resend", "--why", WHY, "--yes")
    ended = await edition.run(*words)
    assert (ended.code, ended.out) == (0, f"progress/{WEEK}/4: resend\n")
    assert await in_edition(edition) == {"1": "dead", "2": "in_doubt", "3": "dead", "4": "pending", "5": "sent"}
    assert (await edition.run("relay", "--until-empty")).code == 0
    assert (await in_edition(edition))["4"] == "sent"


async def test_words_that_do_not_go_together_are_refused_before_anything_is_touched(edition):
    whole = ("resolve", "--edition", f"progress {WEEK}", "--why", WHY, "--yes")
    for words, sentence in {
        (
            "resolve",
            "--sent",
        ): 'Name keys, as `outbox list` shows them, or say which: --edition "progress 2026-W48", --to ann@example.com.',
        (*whole, "--sent", "key"): "--edition decides about a whole edition; name keys or say --edition, not both.",
        (*whole[:3], "--sent", "--yes"): "--why: say why, ",
        (*whole[:3], "--sent", "--yes", "--why", " "): "--why: say why, ",
        (*whole[:-1], "--sent"): "--edition decides about many emails at once and nobody can be asked here; add --yes.",
        (*whole, "--sent", "--state", "dead"): "--state dead: the server refused these, ",
        (
            "resolve",
            "key",
            "--sent",
            "--state",
            "dead",
        ): "--state picks among emails that are not named; name keys or say --state, not both.",
        whole: "Say one of --sent, --resend and --discard.",
        ("resolve", "--edition", "progress 2026-W01", *whole[3:], "--sent"): (
            '--edition: there is no edition "progress 2026-W01"; write one such as "progress 2026-W48".'
        ),
        ("resolve", "--edition", "progress", *whole[3:], "--sent"): '--edition: there is no edition "progress"; ',
    }.items():
        ended = await edition.run(*words)
        assert (ended.code, ended.out) == (2, ""), ended
        assert any(said.startswith(sentence) for said in ended.sentences), (words, ended.sentences)
    assert await edition.states() == {"sent": 5, "in_doubt": 3, "dead": 2}
    assert await operations(edition) == []


# ── a person at a terminal ───────────────────────────────────────────────────────────────────────────────────────────


async def at_terminal(fleet, *words, answer=""):
    """Run `outbox …` with a terminal to read from, whose user types `answer`; gives code and stderr."""
    fleet.write_settings()
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "outbox", *words,
            cwd=fleet.directory, stdin=theirs, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(60):
            _, said = await process.communicate()
    finally:
        os.close(theirs)
        os.close(ours)
    return process.returncode, said.decode()


async def test_a_person_is_asked_before_more_than_one_email_is_touched_and_may_say_no(muddled):
    words = ("resolve", "mail1", "mail2", "mail3", "--resend")
    code, said = await at_terminal(muddled, *words, answer="n\n")
    assert code == 1
    assert "  mail2 <p2@example.com> is in doubt\n  mail3 <p3@example.com> is in doubt\n" in said
    assert "Decide --resend about these 2 emails?" in said
    assert "mail1" not in said
    assert said.endswith("outbox: Nothing was changed.\n")
    assert await muddled.states() == {"sent": 1, "in_doubt": 2, "dead": 1}
    assert await operations(muddled) == []

    code, said = await at_terminal(muddled, *words, answer="y\n")
    assert code == 1, "mail1 is sent"
    assert await muddled.states() == {"sent": 1, "pending": 2, "dead": 1}


async def test_nobody_is_asked_about_one_email_or_with_yes(muddled):
    assert await at_terminal(muddled, "resolve", "mail4", "--discard") == (0, "")
    assert await at_terminal(muddled, "resolve", "mail2", "mail3", "--discard", "--yes") == (0, "")
    assert await muddled.states() == {"sent": 1, "dead": 3}


async def test_a_person_is_asked_about_a_whole_edition_too(edition):
    words = ("resolve", "--edition", f"progress {WEEK}", "--discard", "--why", WHY)
    code, said = await at_terminal(edition, *words, answer="n\n")
    assert (code, "Decide --discard about these 2 emails?" in said) == (1, True)
    assert (await in_edition(edition))["1"] == "in_doubt"
    code, _ = await at_terminal(edition, *words, answer="y\n")
    assert code == 0
    assert (await in_edition(edition))["1"] == "dead"


# ── several at once ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key, first, second",
    [
        ("mail2", "--resend", "--resend"),
        ("mail2", "--discard", "--resend"),
        ("mail2", "--discard", "--discard"),
        ("mail2", "--sent", "--discard"),
        ("mail4", "--discard", "--discard"),
        ("mail4", "--resend", "--discard"),
    ],
)
async def test_of_two_people_who_decide_at_once_one_decides_and_the_other_is_told(muddled, key, first, second):
    async with locked(muddled, key):
        one = await muddled.start("resolve", key, first, environment={"LOGNAME": "ann"})
        await waiting(muddled, "outbox resolve", 1)
        other = await muddled.start("resolve", key, second, environment={"LOGNAME": "bob"})
        await waiting(muddled, "outbox resolve", 2)
    won, lost = await one.ended(), await other.ended()
    assert (won.code, won.err) == (0, ""), "who came first has the row first"
    assert (lost.code, lost.out) == (1, "")
    (sentence,) = lost.sentences
    assert sentence.startswith(f"{key} is ")
    assert f"(ann@{whoami().partition('@')[2]} decided: {first[2:]})" in sentence
    assert sorted(emails for *_, emails in await operations(muddled)) == [0, 1]
    assert len(await resolved(muddled, key)) == 1


async def test_a_decision_about_one_doubt_is_none_about_the_next(muddled):
    async with locked(muddled, "mail2") as meanwhile:
        person = await muddled.start("resolve", "mail2", "--sent")
        await waiting(muddled, "outbox resolve")
        await meanwhile.execute(  # sent again, marked, and in doubt once more
            "UPDATE outbox.delivery d SET attempt = attempt + 1, marked_at = now()"
            " FROM outbox.email m WHERE m.id = d.email AND m.key = 'mail2'"
        )
        await meanwhile.execute("COMMIT")
    ended = await person.ended()
    assert (ended.code, ended.out) == (1, "")
    assert ended.sentences == [
        "mail2 changed at this moment and is in doubt now; look at `outbox status` and decide again."
    ]
    assert (await delivery(muddled, "mail2"))["state"] == "in_doubt"


@asynccontextmanager
async def late_news(fleet):
    """mail1 is in doubt, since its relay lost its session, and that relay lives and waits for the reply to its dot."""
    answer = asyncio.Event()
    fleet.top = "lease_s = 60"  # so that its tick waits for the row as long as the test wants
    fleet.sink.script = script = At(Stage.DOT, Hold(answer, Accept()), times=1)
    await post(fleet, 1)
    relay = await fleet.relay()
    await script.reached()
    await in_state(fleet, "sending")
    await terminate_session(fleet)
    await relay.says("lost its session")
    await in_state(fleet, "in_doubt")
    yield relay, answer


@pytest.mark.parametrize("decision, state", [("--discard", "dead"), ("--resend", "sent")])
async def test_a_late_250_behind_a_persons_decision_undoes_no_discard_and_spares_a_second_copy(fleet, decision, state):
    async with late_news(fleet) as (relay, answer):
        async with locked(fleet):
            person = await fleet.start("resolve", "mail1", decision)
            await waiting(fleet, "outbox resolve")
            answer.set()
            await waiting(fleet, "outbox relay")
        ended = await person.ended()
        assert (ended.code, ended.out) == (0, f"mail1: {decision[2:]}\n")
        if state == "dead":
            await relay.says("came too late")
        await in_state(fleet, state)
        await post(fleet, 1, first=2)
        await in_state(fleet, "sent", "mail2")
    assert (await delivery(fleet))["state"] == state
    assert fleet.sink.addresses["p1@example.com"] == 1
    assert [emails for *_, emails in await operations(fleet)] == [1]
    assert (await trail(fleet)).count("resolved") == 1


@pytest.mark.parametrize("decision", ["--discard", "--resend"])
async def test_a_late_250_before_a_persons_decision_leaves_nothing_to_decide(fleet, decision):
    async with late_news(fleet) as (_, answer):
        async with locked(fleet):
            answer.set()
            await waiting(fleet, "outbox relay")
            person = await fleet.start("resolve", "mail1", decision)
            await waiting(fleet, "outbox resolve")
        ended = await person.ended()
    assert (ended.code, ended.out) == (1, "")
    assert ended.sentences == [
        "mail1 is sent; nothing was changed, since only what is in doubt or dead can be decided."
    ]
    assert (await delivery(fleet))["state"] == "sent"
    assert fleet.sink.addresses["p1@example.com"] == 1
    assert [emails for *_, emails in await operations(fleet)] == [0]
    assert (await trail(fleet)) == ["in_doubt", "accepted"]


async def doubt_is_over(fleet, key):
    """The policy's grace is over for this email."""
    await fleet.connection.execute(
        "UPDATE outbox.delivery d SET due_at = now() FROM outbox.email m WHERE m.id = d.email AND m.key = $1", key
    )


async def test_what_the_policy_sends_again_at_this_moment_a_person_does_not_send_again_too(muddled):
    await doubt_is_over(muddled, "mail2")
    policy = await asyncpg.connect(muddled.database)
    await policy.execute("BEGIN")
    assert await in_doubt.resend_doubtful(policy, Quarantine()) == 1
    person = await muddled.start("resolve", "mail2", "--resend")
    await waiting(muddled, "outbox resolve")
    await policy.execute("COMMIT")
    await policy.close()
    ended = await person.ended()
    assert (ended.code, ended.out) == (1, "")
    assert ended.sentences[0].startswith('mail2 is pending (in_doubt = "resend": sent again); nothing was changed')
    assert [emails for *_, emails in await operations(muddled)] == [0]
    assert len(await resolved(muddled, "mail2")) == 1
    await relayed(muddled, lambda *_: None, sent=2, in_doubt=1, dead=1)
    assert muddled.sink.addresses["p2@example.com"] == 1


async def test_what_a_person_sends_again_at_this_moment_the_policy_does_not_send_again_too(muddled):
    await doubt_is_over(muddled, "mail2")
    await muddled.connection.execute(
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN new; END $$;"
        "CREATE TRIGGER hold BEFORE INSERT ON outbox.operation FOR EACH ROW EXECUTE FUNCTION hold();"
        "SELECT pg_advisory_lock(7)"
    )
    person = await muddled.start("resolve", "mail2", "--resend")

    async def has_the_row():
        return await muddled.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox resolve'"
            " AND datname = current_database() AND wait_event = 'advisory'"
        )

    await until(has_the_row, "the decision is made and not yet committed")
    policy = await asyncpg.connect(muddled.database)
    async with asyncio.timeout(20):
        assert await in_doubt.resend_doubtful(policy, Quarantine()) == 0, "it passes over the row and does not wait"
    await muddled.connection.execute("SELECT pg_advisory_unlock(7)")
    assert (await person.ended()).code == 0
    assert await in_doubt.resend_doubtful(policy, Quarantine()) == 0
    await policy.close()
    assert len(await resolved(muddled, "mail2")) == 1
    await relayed(muddled, lambda *_: None, sent=2, in_doubt=1, dead=1)
    assert muddled.sink.addresses["p2@example.com"] == 1


async def test_what_a_failover_left_without_its_message_is_never_sent(muddled):
    await muddled.connection.execute("UPDATE outbox.email SET message = $1 WHERE key = 'mail4'", LOST)
    ended = await muddled.run("resolve", "mail4", "--resend")
    assert ended.code == 1
    assert ended.sentences == [
        "mail4 cannot be sent: a failover of Postgres lost its message, and only its envelope is known."
    ]
    assert (await delivery(muddled, "mail4"))["state"] == "dead"
