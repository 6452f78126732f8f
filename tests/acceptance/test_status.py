"""`outbox status` and `outbox resolve`: what people see, and that what it tells them to do works."""

import asyncio
import json
import shlex
import sys

import pytest

from outbox.sandbox.smtp_sink import Accept, Cut, Reply, Stage
from tests.support.fleet import until

KEYS = {
    "pending", "sending", "sent", "in_doubt", "dead", "cancelled", "expired",
    "oldest_due_s", "relays", "editions", "troubles",
}  # fmt: skip


async def look(fleet):
    ended = await fleet.run("status", "--json")
    assert (ended.code, ended.err) == (0, ""), ended
    return json.loads(ended.out)


def counts(found):
    return {state: found[state] for state in ("pending", "sending", "sent", "in_doubt", "dead") if found[state]}


def play(fleet, address, action, stage=Stage.DOT):
    """One recipient's mail meets trouble, the first time only."""
    met = []

    def script(at, visit):
        if at is stage and visit.recipients and visit.recipients[-1] == address and not met:
            met.append(address)
            return action
        return None

    fleet.sink.script = script


async def relayed(fleet, **states):
    """Relay until nothing is left to send, and see what came of it."""
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0, ended
    assert await fleet.states() == states


async def test_the_json_keeps_its_contract(fleet):
    await fleet.put_emails(3)
    await fleet.connection.execute("UPDATE outbox.delivery SET due_at = now() - interval '90 s' WHERE email = 1")
    found = await look(fleet)
    assert set(found) >= KEYS
    assert counts(found) == {"pending": 3}
    assert all(isinstance(found[state], int) for state in ("pending", "sending", "sent", "in_doubt", "dead"))
    assert 90 <= found["oldest_due_s"] < 120
    assert found["relays"] == found["editions"] == found["troubles"] == []
    await relayed(fleet, sent=3)
    found = await look(fleet)
    assert (counts(found), found["oldest_due_s"]) == ({"sent": 3}, 0)


async def test_a_relay_is_listed_while_it_lives_and_not_after_a_kill(fleet):
    relays = [await fleet.relay(), await fleet.relay()]
    found = await look(fleet)
    assert {relay["pid"] for relay in found["relays"]} == {relay.pid for relay in relays}
    for relay in found["relays"]:
        assert {"id", "host", "pid", "version", "started_at", "in_hand"} <= set(relay)
    text = (await fleet.run("status")).out
    assert "relays alive: 2" in text
    assert all(f" {relay.pid} " in text for relay in relays)

    await relays[0].kill()

    async def one_is_left():
        return [relay["pid"] for relay in (await look(fleet))["relays"]] == [relays[1].pid]

    await until(one_is_left, "only the living relay is listed", 5)

    await relays[1].kill()  # nobody is left who could note it down: the lock alone tells

    async def none_is_left():
        return not (await look(fleet))["relays"]

    await until(none_is_left, "no relay is listed", 5)
    assert "No relay is alive: start `outbox relay`." in (await fleet.run("status")).out


async def test_an_edition_shows_what_became_of_each_recipient_in_one_word(fleet):
    await fleet.hire(4)
    fleet.data = "select 1 / (cast(:key as int) - 4) as share"
    assert (await fleet.run("generate", "--period", "2026-W46")).code == 1
    play(fleet, "p2@example.com", Reply(b"550 5.1.1 no such user\r\n"), Stage.RCPT)
    await relayed(fleet, sent=2, dead=1)
    await fleet.run("generate", "--period", "2026-W47")
    found = await look(fleet)
    assert [tuple(edition.values()) for edition in found["editions"]] == [
        ("progress", "2026-W47", 4, 3, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, None),
        ("progress", "2026-W46", 4, 3, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0, None),
    ]
    assert list(found["editions"][0]) == [
        *("report", "period", "expected", "made", "sent", "waiting", "in_doubt", "failed", "cancelled"),
        *("missing", "waived", "collected", "suppressed", "bounced", "done_elsewhere_at"),
    ]
    text = (await fleet.run("status")).out.splitlines()
    rows = [line.split() for line in text if line.startswith("progress")]
    assert rows == [
        ["progress", "2026-W47", "4", "3", "0", "3", "0", "1"],
        ["progress", "2026-W46", "4", "3", "2", "0", "1", "1"],
    ]
    (header,) = [line.split() for line in text if line.startswith("report ")]
    assert header == ["report", "period", "expected", "made", "sent", "waiting", "failed", "missing"]


async def test_seldom_states_are_shown_to_people_only_where_there_are_some_and_to_scripts_always(fleet):
    await fleet.put_emails(2)
    (header, numbers) = (await fleet.run("status")).out.splitlines()[1:3]
    assert header.split() == ["pending", "sending", "sent", "in_doubt", "dead"]
    assert numbers.split() == ["2", "0", "0", "0", "0"]
    assert (await look(fleet))["expired"] == 0
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'expired', settled_at = now()"
        " WHERE email = (SELECT min(id) FROM outbox.email)"
    )
    (header, numbers) = (await fleet.run("status")).out.splitlines()[1:3]
    assert header.split() == ["pending", "sending", "sent", "in_doubt", "dead", "expired"]
    assert numbers.split() == ["1", "0", "0", "0", "0", "1"]


async def test_help_says_each_command_in_one_whole_line(fleet):
    out = (await fleet.run("--help", environment={"COLUMNS": "80"})).out
    commands = [line.split(None, 1) for line in out.partition("Commands:\n")[2].splitlines()]
    assert {"init", "generate", "relay", "status", "audit", "resolve", "demo"} <= {name for name, _ in commands}
    assert all(says.endswith(".") and not says.endswith("..") for _, says in commands), commands


async def test_text_for_a_pipe_has_no_escapes_even_where_a_mail_server_sends_some(fleet):
    await fleet.put_emails(1)
    play(fleet, "p1@example.com", Reply(b"550 5.7.1 \x1b[31mred\x1b[0m \x07bell\r\n"), Stage.RCPT)
    relay = await fleet.run("relay", "--until-empty")
    assert "5.7.1" in relay.err
    assert "\x1b" not in relay.err
    assert await fleet.states() == {"dead": 1}
    for words in (("status",), ("status", "--json"), ("--help",)):
        ended = await fleet.run(*words, environment={"TERM": "xterm-256color"})
        assert "\x1b" not in ended.out + ended.err, words
        assert "\x07" not in ended.out + ended.err, words
    assert "5.7.1" in (await fleet.run("status")).out


async def test_a_reader_who_has_seen_enough_is_no_fault(fleet):
    fleet.write_settings()
    shell = await asyncio.create_subprocess_shell(
        f"{shlex.quote(sys.executable)} -m outbox status | true", cwd=fleet.directory, stderr=asyncio.subprocess.PIPE
    )
    _, said = await shell.communicate()
    assert said == b""


@pytest.fixture
async def doubted(fleet):
    """Three emails: one in doubt (the server cut after the dot), two sent."""
    await fleet.put_emails(3)
    play(fleet, "p2@example.com", Cut())
    await relayed(fleet, sent=2, in_doubt=1)
    return fleet


def told(found, decision):
    """The words of the command that status offers for one of the decisions."""
    (trouble,) = found["troubles"]
    (choice,) = [choice for choice in trouble["choices"] if choice["name"] == decision]
    program, *words = shlex.split(choice["command"])
    assert program == "outbox"
    return tuple(words)


@pytest.mark.parametrize("decision, state", [("--sent", "sent"), ("--discard", "dead"), ("--resend", "pending")])
async def test_the_command_that_status_tells_for_doubt_resolves_it(doubted, decision, state):
    found = await look(doubted)
    (trouble,) = found["troubles"]
    assert (trouble["key"], trouble["state"]) == ("mail2", "in_doubt")
    text = (await doubted.run("status")).out.splitlines()
    at = text.index("These need a person:")
    assert text[at + 1].startswith("  mail2 is in doubt: ")
    assert text[at + 1].endswith(".")
    assert text[at + 2 : at + 6] == [
        "    outbox show mail2",
        *(f"    outbox resolve mail2 {choice}" for choice in ("--sent", "--resend", "--discard")),
    ]
    assert [f"    {line}" for line in (trouble["command"], *(one["command"] for one in trouble["choices"]))] == (
        text[at + 2 : at + 6]
    )
    assert all(f"  {choice['name']:<9}  {choice['effect']}" in text for choice in trouble["choices"])
    assert "Needs a person: 1 email is in doubt." in text

    ended = await doubted.run(*told(found, decision))
    assert (ended.code, ended.err) == (0, "")
    assert (await doubted.states()).get(state), await doubted.states()
    found = await look(doubted)
    assert (found["in_doubt"], found["troubles"]) == (0, [])
    assert "Nothing needs a person." in (await doubted.run("status")).out


async def test_what_is_resent_is_accepted_again_with_the_same_bytes(doubted):
    play(doubted, "nobody", None)
    await doubted.run(*told(await look(doubted), "--resend"))
    await relayed(doubted, sent=3)
    assert doubted.sink.addresses["p2@example.com"] == 1
    (again,) = [mail for mail in doubted.sink.accepted if mail.recipients == ("p2@example.com",)]
    assert again.message == await doubted.connection.fetchval("SELECT message FROM outbox.email WHERE key = 'mail2'")


async def test_doubt_about_what_did_arrive_is_resent_only_because_a_person_says_so(fleet):
    await fleet.put_emails(1)
    play(fleet, "p1@example.com", Accept(then=Cut()))
    await relayed(fleet, in_doubt=1)
    await relayed(fleet, in_doubt=1)
    assert fleet.sink.addresses["p1@example.com"] == 1
    await fleet.run(*told(await look(fleet), "--resend"))
    await relayed(fleet, sent=1)
    assert fleet.sink.addresses["p1@example.com"] == 2
    assert fleet.sink.accepted[0].message == fleet.sink.accepted[1].message


@pytest.mark.parametrize("decision", ["retry", "--discard"])
async def test_the_command_that_status_tells_for_a_dead_letter_resolves_it(fleet, decision):
    await fleet.put_emails(1)
    play(fleet, "p1@example.com", Reply(b"550 5.1.1 no such user\r\n"), Stage.RCPT)
    await relayed(fleet, dead=1)
    found = await look(fleet)
    (trouble,) = found["troubles"]
    assert (trouble["key"], trouble["state"]) == ("mail1", "dead")
    assert "no such user" in trouble["said"]
    assert [choice["name"] for choice in trouble["choices"]] == ["retry", "--discard"]
    ended = await fleet.run(*told(found, decision))
    assert (ended.code, ended.err) == (0, "")
    assert (await look(fleet))["troubles"] == []
    if decision == "retry":
        await relayed(fleet, sent=1)
        assert fleet.sink.addresses["p1@example.com"] == 1
    else:
        assert await fleet.states() == {"dead": 1}


async def test_the_command_works_in_a_shell_whatever_is_in_the_key(fleet):
    await fleet.connection.execute("INSERT INTO people VALUES (1, 'p1@example.com')")
    key = "a b; touch 'it' $(date) \\ \"q\" *"
    fleet.source = "mine:Mine"
    (fleet.directory / "mine.py").write_text(
        "class Mine:\n    def recipients(self, period):\n"
        f"        return [{{'key': {key!r}, 'email': 'p1@example.com'}}]\n"
        "    def build(self, recipient, period):\n        return []\n"
    )
    assert (await fleet.run("generate", "--period", "2026-W47")).code == 0
    play(fleet, "p1@example.com", Cut())
    await relayed(fleet, in_doubt=1)
    words = told(await look(fleet), "--sent")
    assert words == ("resolve", f"progress/2026-W47/{key}", "--sent")
    assert (await fleet.run(*words)).code == 0
    assert await fleet.states() == {"sent": 1}


async def test_resolve_changes_only_what_is_in_doubt_or_dead_and_says_what_it_left(doubted):
    ended = await doubted.run("resolve", "mail1", "mail2", "nothing", "--sent")
    assert ended.code == 1
    assert ended.out == "mail2: sent\n"
    assert [sentence.split()[0] for sentence in ended.sentences] == ["mail1", "nothing"]
    assert await doubted.states() == {"sent": 3}
    again = await doubted.run("resolve", "mail2", "--resend")
    assert (again.code, again.out) == (1, "")
    assert await doubted.states() == {"sent": 3}


async def test_a_dead_letter_cannot_be_declared_sent(fleet):
    await fleet.put_emails(1)
    play(fleet, "p1@example.com", Reply(b"550 5.1.1 no such user\r\n"), Stage.RCPT)
    await relayed(fleet, dead=1)
    ended = await fleet.run("resolve", "mail1", "--sent")
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.sentences) == 1
    assert await fleet.states() == {"dead": 1}
