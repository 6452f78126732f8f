"""`outbox list` and `outbox show`: which emails there are, and the whole story of one."""

import json
import re
import socket
import sys
import time
from email import message_from_bytes, policy
from pathlib import Path

import pytest

from outbox.errors import OutboxError
from outbox.mail.removed_message import LOST, PRUNED
from outbox.operations.email_filter import Selection, find
from outbox.operations.email_list import COUNTED_MAX, list_emails
from outbox.operations.retry_cancel import Act, operate
from outbox.operations.show import read_story
from outbox.sandbox.smtp_sink import Reply, Stage
from tests.acceptance.test_resolve import meets
from tests.support.fault_levers import At

WEEK = "2026-W47"
LATER = Reply(b"450 4.2.1 \x1b[31mcome back later\r\n")


@pytest.fixture
async def muddled(fleet):
    """Of progress 2026-W47 1 is sent after a second try, 2 is dead, 3 is cancelled; mail1 belongs to no report."""
    await fleet.hire(3)
    assert (await fleet.run("generate", "--period", WEEK)).code == 0
    await fleet.put_emails(1)
    mine = await find(fleet.connection, Selection(keys=(f"progress/{WEEK}/3",)))
    assert mine == await operate(fleet.connection, Act.CANCEL, mine, who="ann@here", why="she left", target="3")
    await fleet.connection.execute(  # so that it is the report's email to p1 that is told to come later
        "UPDATE outbox.delivery SET due_at = '2026-01-01'"
        " WHERE email = (SELECT id FROM outbox.email WHERE key LIKE '%/1')"
    )
    refusal = meets(Reply(b"550 5.1.1 no such user\r\n"), "p2@example.com", stage=Stage.RCPT)
    later = At(Stage.DOT, LATER, times=1, when=lambda visit: visit.recipients[-1] == "p1@example.com")
    fleet.sink.script = lambda *at: refusal(*at) or later(*at)
    fleet.top = "connections_max = 1"
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 2, "dead": 1, "cancelled": 1}
    return fleet


async def test_a_list_is_of_what_was_meant_newest_first_aligned_and_bounded(muddled):
    ended = await muddled.run("list")
    header, *lines = ended.out.splitlines()
    assert header.split("  ")[0] == "key"
    assert [line.split()[0] for line in lines] == ["mail1", *(f"progress/{WEEK}/{n}" for n in (3, 2, 1))]
    for column in ("to", "state", "tries", "since", "last heard"):
        assert all(line[header.index(column) - 1] == " " != line[header.index(column)] for line in lines), column
    assert " EST (" in lines[1], "the clocks of the report, with UTC near"
    assert "cancelled" in lines[1]
    assert lines[1].endswith("  ann@here cancelled it, because she left")
    assert lines[2].split()[1:3] == ["p2@example.com", "dead"]
    ended = await muddled.run("list", "--limit", "1")
    assert ended.out.splitlines()[-1] == "… and 3 more; --limit shows more of them."
    found = json.loads((await muddled.run("list", "--json", "--limit", "2")).out)
    assert (found["more"], found["more_is_at_least"]) == (2, False)
    one = found["emails"][1]
    assert {"key", "to", "report", "period", "state", "attempts", "due_at", "settled_at", "said"} <= set(one)
    assert (one["report"], one["period"], one["due_at"]) == ("progress", WEEK, None)
    for words, expected in {
        ("--state", "dead", "--state", "cancelled"): "32",
        ("--to", "P*@example.COM", "--edition", f"progress {WEEK}", "--state", "sent"): "1",
    }.items():
        found = json.loads((await muddled.run("list", "--json", *words)).out)
        assert "".join(one["key"][-1] for one in found["emails"]) == expected
    for selection, count in {
        Selection(to="p_@example.com"): 0,
        Selection(to="*%"): 0,
        Selection(to="p1@example.com"): 2,
        Selection(report="progress"): 3,
        Selection(period=WEEK): 3,
        Selection(states=("pending", "in_doubt")): 0,
    }.items():
        assert len((await list_emails(muddled.connection, selection, limit=9)).emails) == count, selection
    ended = await muddled.run("list", "--state", "expired")
    assert (ended.code, ended.out) == (0, "No email fits.\n")
    ended = await muddled.run("list", "--report", "nope")
    assert ended.sentences == ["--report nope: there is no such edition; `outbox status` shows the latest."]


async def test_a_list_of_many_counts_up_to_a_bound(fleet, monkeypatch):
    await fleet.put_emails(30)
    monkeypatch.setattr("outbox.operations.email_list.COUNTED_MAX", 10)
    found = await list_emails(fleet.connection, Selection(), limit=5)
    assert (len(found.emails), found.more, found.at_least) == (5, 10, True)
    assert COUNTED_MAX >= 1000


async def test_the_story_of_an_email_has_its_making_its_tries_and_its_message_where_it_is_asked_for(muddled):
    key = f"progress/{WEEK}/1"
    ended = await muddled.run("show", key)
    assert (ended.code, ended.err) == (0, "")
    head, *lines = ended.out.splitlines()
    assert head == f"{key} is sent."
    facts = {line[2:13].strip(): line[15:] for line in lines[: lines.index("")]}
    assert facts["to"] == "p1@example.com"
    assert facts["report"] == f"progress {WEEK}, recipient 1"
    assert facts["subject"].startswith("Progress")
    assert " EST (" in facts["made"]
    assert re.search(rf"UTC\) on {re.escape(socket.gethostname())}, pid \d+$", facts["made"])
    table = lines[lines.index("") + 1 :]
    assert [line.split()[1] for line in table] == ["verdict", "deferred", "accepted"]
    assert "450 4.2.1 \N{REPLACEMENT CHARACTER}[31mcome back later" in table[1]
    (relay,) = await muddled.connection.fetch("SELECT id, host, pid FROM outbox.relay")
    assert f"{relay['id']} on {relay['host']}, pid {relay['pid']}" in table[2]

    token = await muddled.connection.fetchval("SELECT token FROM outbox.report WHERE recipient_key = '1'")
    as_json = await muddled.run("show", key, "--json")
    assert token not in ended.out + as_json.out
    story = json.loads(as_json.out)
    assert [one["verdict"] for one in story["tries"]] == ["deferred", "accepted"]
    assert (story["state"], story["attempts"], story["to"], story["period"]) == ("sent", 2, "p1@example.com", WEEK)

    ended = await muddled.run("show", f"progress/{WEEK}/2")
    assert "550 5.1.1 no such user" in ended.out
    assert ended.out.splitlines()[-2:] == [
        f"  outbox retry progress/{WEEK}/2",
        f"  outbox resolve progress/{WEEK}/2 --discard",
    ]

    await _shows_its_message(muddled, f"progress/{WEEK}/1")
    await _cannot_be_shown(muddled, f"progress/{WEEK}/1")


async def _shows_its_message(muddled, key):
    message = await muddled.connection.fetchval("SELECT message FROM outbox.email WHERE key = $1", key)
    parsed = message_from_bytes(message, policy=policy.default)
    ended = await muddled.run("show", key, "--text")
    assert ended.out.split() == parsed.get_body(("plain",)).get_content().split()
    ended = await muddled.run("show", key, "--eml", "it.eml")
    assert (ended.out, (muddled.directory / "it.eml").read_bytes()) == (f"it.eml: {len(message):,} bytes\n", message)
    process = await muddled.start("show", key, "--eml", "-")
    assert await process.process.stdout.read() == message
    browser = muddled.directory / "browser"
    browser.write_text(f'#!{sys.executable}\nimport sys\nopen("seen", "w").write(sys.argv[1])\n')
    browser.chmod(0o755)
    ended = await muddled.run("show", key, "--open", environment={"BROWSER": f"{browser} %s"})
    assert ended.code == 0, ended
    path = (muddled.directory / "seen").read_text().removeprefix("file://")
    assert ended.out == f"{path}\n"
    policy_line, _, page = _taken(Path(path)).partition("\n")
    assert "default-src 'none'; img-src data:;" in policy_line, "nothing of it runs or is loaded"
    assert page.split() == parsed.get_body(("html",)).get_content().split()


def _taken(path):
    assert path.stat().st_mode & 0o077 == 0, "it holds the key to the page"
    page = path.read_text()
    path.unlink()
    return page


async def _cannot_be_shown(muddled, key):
    await muddled.connection.execute(
        "UPDATE outbox.email SET message = CASE key WHEN 'mail1' THEN $1::bytea ELSE $2::bytea END", LOST, PRUNED
    )
    for words, code, sentence in [
        ((key, "--text"), 1, f"{key} cannot be shown: `outbox prune` removed its message by its age."),
        (("mail1", "--eml", "x"), 1, "mail1 cannot be shown: a failover of Postgres lost its message, and only its "),
        (("nobody@example.com",), 1, "nobody@example.com is no email's key; `outbox list --to nobody@example.com` "),
        ((key, "--text", "--json"), 2, "Say one of --text, --eml, --open and --json."),
    ]:
        ended = await muddled.run("show", *words)
        assert (ended.code, ended.out) == (code, ""), ended
        (said,) = ended.sentences
        assert said.startswith(sentence)
    assert not (muddled.directory / "x").exists()
    with pytest.raises(OutboxError, match="is no email's key; `outbox list --report progress`, or --to with"):
        await read_story(muddled.connection, f"progress/{WEEK}/9")
    assert "gone: `outbox prune` removed its message by its age" in (await muddled.run("show", key)).out


HOSTILE_MESSAGES = {
    "semicolons": b"Subject: s\nContent-Type: text/plain" + b";" * 40_000 + b"\n\nhello\n",
    "parentheses": b"Subject: s\nContent-Type: text/plain " + b"(" * 2000 + b"\n\nhello\n",
    "words": b"Subject: " + b"=?utf-8?b?w6kg?= " * 150_000 + b"\n\nhello\n",
    "multiparts": b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(400)),
    "nothing": b"",
    "controls": b"Subject: =?utf-8?q?=1B]0;x=07=C2=9B2J=E2=80=AEtxt?=\n\n\x1b[2J\xc2\x9bhello\n",
}


@pytest.mark.parametrize("name", HOSTILE_MESSAGES)
async def test_whatever_message_is_stored_it_is_shown_at_once_and_a_terminal_obeys_nothing(fleet, name):
    await fleet.put_emails(1)
    await fleet.connection.execute("ALTER TABLE outbox.email DROP CONSTRAINT email_sizes")  # rows from before it
    await fleet.connection.execute("UPDATE outbox.email SET message = $1", HOSTILE_MESSAGES[name])
    for words in ((), ("--json",), ("--text",)):
        began = time.monotonic()
        ended = await fleet.run("show", "mail1", *words)
        assert time.monotonic() - began < 10, "a start and a fraction of a second"
        assert ended.code == 0 or "has no plain part" in ended.err, ended
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", ended.out + ended.err)
        assert "hello" in ended.out or words != ("--text",) or name in ("multiparts", "nothing")


@pytest.mark.parametrize("at", ["-infinity", "infinity", "1970-01-01", "9999-12-31 23:59:59+00", "0001-01-01 00:00+00"])
async def test_whatever_time_is_stored_it_is_shown(fleet, at):
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.email SET created_at = $1::text::timestamptz", at)
    await fleet.connection.execute(
        "INSERT INTO outbox.attempt (email, attempt, verdict, reply, marked_at, settled_at)"
        " SELECT id, 1, 'deferred', 'x', $1::text::timestamptz, $1::text::timestamptz FROM outbox.email",
        at,
    )
    for words in ((), ("--json",)):
        ended = await fleet.run("show", "mail1", *words)
        assert (ended.code, ended.err) == (0, ""), ended


async def test_an_email_with_the_largest_id_is_shown(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "WITH m AS (INSERT INTO outbox.email (id, key, sender, recipient, message_id, message)"
        " SELECT 9223372036854775807, 'last', sender, recipient, '<x@y>', message FROM outbox.email RETURNING id)"
        " INSERT INTO outbox.delivery (email) SELECT id FROM m"
    )
    assert "last is pending." in (await fleet.run("show", "last")).out
