"""What a relay's log looks like: lines of JSON, or sentences for people; no addresses unless they are asked for."""

import ast
import io
import json
import logging
import re
import string
import sys
from datetime import datetime
from pathlib import Path

import pytest

import outbox
from outbox.log import Events, configure, redacted
from outbox.sandbox.smtp_sink import Reply, Stage
from tests.support.fault_levers import At

HOUSE = Path(outbox.__file__).parent
ADDRESS = "p1@example.com"
ON_A_TERMINAL = (sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)")


async def refused(fleet, **how):
    """The log of a relay that empties the outbox; one email is accepted, one refused with its address in the reply."""
    await fleet.connection.execute("TRUNCATE outbox.email CASCADE")
    await fleet.put_emails(2)
    await fleet.connection.execute("UPDATE outbox.email SET key = 'progress/2026-W48/' || recipient")
    fleet.sink.script = At(
        Stage.RCPT, Reply(f"550 <{ADDRESS}>: \x9b31mno such user"), when=lambda visit: ADDRESS in visit.recipients
    )
    process = await fleet.start("relay", "--until-empty", **how)
    ended = await process.ended()
    assert ended.code == 0, ended
    return ended


async def test_a_log_that_no_person_watches_is_json_without_addresses(fleet):
    log = (await refused(fleet)).err
    lines = [json.loads(line) for line in log.splitlines()]
    for line in lines:
        assert list(line)[:4] == ["timestamp", "level", "event", "message"]
        assert datetime.fromisoformat(line["timestamp"]).utcoffset().total_seconds() == 0
    assert [line["event"] for line in lines] == ["session_opened", "email_refused", "outbox_empty", "relay_stopped"]
    found = lines[1]
    assert (found["level"], found["key"]) == ("info", "progress/2026-W48/<address>")
    assert found["reply"].startswith("550 <address>: ")
    assert found["attempt"] == 1
    assert found["relay"] == lines[0]["relay"]
    assert "@" not in log


async def test_addresses_gravity_and_form_are_settings(fleet):
    loud = {"OUTBOX_LOG_ADDRESSES": "true", "OUTBOX_LOG_LEVEL": "debug", "OUTBOX_LOG_FORMAT": "human"}
    log = (await refused(fleet, environment=loud)).err
    assert f"info    progress/2026-W48/{ADDRESS}, try 1: 550 <{ADDRESS}>: " in log
    assert "p2@example.com was accepted: 250" in log
    assert "\x1b" not in log, "colours are for terminals"
    assert "\x9b" not in log
    assert (await refused(fleet, environment={"OUTBOX_LOG_LEVEL": "warning"})).err == ""
    wrong = {"OUTBOX_LOG_LEVEL": "loud", "OUTBOX_LOG_ADDRESSES": '"yes"', "OUTBOX_DEAD_MAN_URL": "hc-ping.com/{id}"}
    ended = await fleet.run("relay", environment=wrong)
    assert ended.code == 2
    assert sorted(sentence.split(":")[0] for sentence in ended.sentences) == sorted(wrong)


async def test_on_a_terminal_it_is_sentences_in_colour(fleet):
    shown = (await refused(fleet, within=ON_A_TERMINAL)).out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert plain != shown
    assert re.search(r"^\S+ info    relay \d+ holds its lock and relays to \S+ session_opened\r?$", plain, re.MULTILINE)
    assert "progress/2026-W48/<address>, try 1: 550 <address>: \N{REPLACEMENT CHARACTER}31mno such user" in plain


def test_no_line_has_what_a_terminal_would_obey(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.NOTSET)
    monkeypatch.setattr(logging.getLogger("outbox"), "level", logging.NOTSET)
    for form in ("human", "json"):
        stream = io.StringIO()
        configure(form, stream=stream)
        Events("outbox.test").warning("told", "it said: {reply}", reply="one\x1b[2J\ntwo\x9b2J")
        line = stream.getvalue().removesuffix("\n")
        assert "told" in line
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("to <a.b+c@mail.example.com>.", "to <address>."),
        ('"john doe"@example.com, ü@exämple.de; x@[192.0.2.1]', "<address>, <address>; <address>"),
        ("progress/2026-W48/p1@example.com", "progress/2026-W48/<address>"),
        ("mailto:p1@example.com?x", "mailto:<address>?x"),
        ("Postgres at postgresql://app@db.internal:5432/app", "Postgres at postgresql://app@db.internal:5432/app"),
        ("@property, user@ and 5 @ 3", "@property, user@ and 5 @ 3"),
    ],
)
def test_an_address_is_hidden_wherever_it_stands_and_nothing_else_is(said, shown):
    assert redacted(said) == shown


SAYING = r"log\.(debug|info|warning|error|exception)|say"


def facts():
    """Every fact that the code says: its event's name, its sentence, its fields (None if some are not literal)."""
    for path in sorted(HOUSE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(SAYING, ast.unparse(node.func)) and len(node.args) > 1:
                event, sentence = node.args
                if not isinstance(sentence, ast.Constant):
                    continue  # a `say` of another kind
                events = [event.body, event.orelse] if isinstance(event, ast.IfExp) else [event]
                fields = None if any(k.arg is None for k in node.keywords) else {k.arg for k in node.keywords}
                for one in events:
                    yield one.value, sentence.value, fields


def test_each_event_has_one_name_that_its_page_explains_and_its_sentence_has_its_fields():
    page = (HOUSE.parent / "docs" / "monitoring.md").read_text()
    for event, sentence, fields in facts():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", event)
        told = [line for line in page.splitlines() if line.startswith("| `") and f"`{event}`" in line]
        assert len(told) <= 1, f"docs/monitoring.md says twice what {event} is"
        assert f"`{event}`" in page, f"docs/monitoring.md does not say what {event} is"
        wanted = {name.split(".")[0] for _, name, _, _ in string.Formatter().parse(sentence) if name}
        assert fields is None or wanted <= fields, sentence
