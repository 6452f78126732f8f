"""`outbox preview` shows what a recipient would get and writes nothing; a terminal opens it."""

import json
from email import message_from_bytes, policy
from pathlib import Path

from tests.acceptance.test_watch import Terminal

PEOPLE = "select id::text as key, case id when 1 then 'nobody' else email end as email, name from people order by id"
WRITING = "with x as (insert into build (key) values (:key) returning key) select key from x"
HELD_BACK = {"edition", "definition", "report", "email", "delivery", "operation", "digest_item"}

SOURCE = """
from outbox import Recipient

class Team:
    def recipients(self, period):
        return [Recipient("ada", "ada@example.com", "Ada"), Recipient("bob", "bob@example.com")]

    async def build(self, recipient, period):
        if recipient.key == "bob":
            raise LookupError("no rows for bob")
        return [{"what": f"{recipient.name} in {period.key}", "done": 3}]
"""


async def rows(fleet):
    """How many rows each of the outbox's tables has."""
    names = await fleet.connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'outbox'")
    return {name: await fleet.connection.fetchval(f"SELECT count(*) FROM outbox.{name}") for (name,) in names}


async def test_a_preview_shows_real_rows_in_files_as_text_and_as_json_and_writes_no_row(fleet):
    await fleet.hire(3)
    fleet.recipients = PEOPLE
    before = await rows(fleet)
    assert before.keys() >= HELD_BACK
    ended = await fleet.run("preview", "progress", "--period", "2026-W47", "--out", "seen/here")
    assert ended.code == 0, ended
    shown = {line[:9].strip(): line[9:] for line in ended.out.splitlines()}
    assert shown["report"] == "progress 2026-W47, for 2", "the first who can be written to"
    assert shown["period"] == "2026-11-16 00:00 to 2026-11-23 00:00 America/New_York (05:00 and 05:00 UTC)"
    assert (shown["from"], shown["to"]) == ("Progress reports <reports@example.com>", "Person 2 <p2@example.com>")
    assert ended.out.endswith("Nothing was written to the database, and the link opens nothing.\n")
    directory = fleet.directory / "seen/here"
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(files) == {"report.html", "email.html", "email.txt", "email.eml"}
    assert all(f"seen/here/{name}" in ended.out for name in files)
    assert b"Person 2" in files["email.html"]
    assert b"https://reports.example.com/r/PREVIEW" in files["email.txt"]
    mail = message_from_bytes(files["email.eml"], policy=policy.default)
    assert (mail["To"], mail["Subject"]) == ("Person 2 <p2@example.com>", shown["subject"])
    assert files["report.html"].startswith(b"<!DOCTYPE html>")

    text = await fleet.run("preview", "progress", "--for", "3", "--text", "--period", "2026-W47")
    assert text.out.startswith("Progress\n16 \N{EN DASH} 22 November 2026\n\nHello Person 3,")
    found = json.loads((await fleet.run("preview", "progress", "--for", "3", "--json", "--period", "2026-W47")).out)
    assert found["recipient"] == {"key": "3", "email": "p3@example.com", "name": "Person 3"}
    assert (found["text"], found["subject"]) == (text.out, shown["subject"])
    assert found["period"]["starts_at"] == "2026-11-16T05:00:00+00:00"
    assert await rows(fleet) == before

    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    assert (await fleet.run("preview", "progress", "--text")).code == 0, "before `outbox init`, too"


async def test_what_keeps_a_preview_from_being_made_is_said_in_a_sentence(fleet):
    await fleet.hire(3)
    fleet.recipients = PEOPLE
    (fleet.directory / "file").write_text("in the way")

    async def refused(*words, code=2):
        ended = await fleet.run("preview", *words)
        assert (ended.code, ended.out) == (code, ""), ended
        (sentence,) = ended.sentences
        return sentence

    assert await refused("progress", "--for", "9", "--period", "2026-W47") == (
        "--for: '9' is no recipient of progress 2026-W47; the first keys there are '1', '2', '3'."
    )
    assert "recipient 1: 'nobody' is no email address" in await refused("progress", "--for", "1", code=1)
    assert await refused("progress", "--text", "--json") == (
        "--out, --text and --json are three ways to show it; say one of them."
    )
    assert "file cannot be written to (File exists); name another directory." in await refused(
        "progress", "--out", "file"
    )
    assert "'2026' is not a weekly period" in await refused("progress", "--period", "2026")
    fleet.data = WRITING
    assert await refused("progress", code=1) == (
        "reports.progress.data: the query writes, and a preview only reads; try it with a select."
    )
    assert await fleet.connection.fetchval("SELECT count(*) FROM build") == 0
    fleet.data = "select 1 / (cast(:key as int) - 2) as a"
    assert await refused("progress", code=1) == "reports.progress.data: for 2, division by zero; correct it there."
    fleet.recipients = "select 'a' as key, 'a@example.com' as email where false"
    assert "the recipients query returns no row; usual reasons are" in await refused("progress", code=1)


async def test_a_preview_of_what_a_digest_tells_of_is_its_page_and_the_digest_has_a_preview_of_its_own(fleet):
    await fleet.hire(2)
    digest = '[digest]\ntimezone = "America/New_York"\nlink = "https://reports.example.com/d/{token}"'
    fleet.report = f'deliver = "digest"\n{digest}'
    ended = await fleet.run("preview", "progress", "--out", "page")
    assert ended.code == 0, ended
    assert "title    Progress, " in ended.out
    assert "It has no email of its own: a digest tells of it, see `outbox preview digest`." in ended.out
    assert [path.name for path in (fleet.directory / "page").iterdir()] == ["report.html"]
    ended = await fleet.run("preview", "progress", "--text")
    assert (ended.code, ended.out) == (2, "")
    assert 'with deliver = "digest" it has no email of its own' in ended.err
    assert (await fleet.run("generate")).code == 0
    before = await rows(fleet)
    ended = await fleet.run("preview", "digest", "--for", "p2@example.com", "--text")
    assert ended.code == 0, ended
    assert "Progress, " in ended.out
    assert "https://reports.example.com/r/PREVIEW" in ended.out, "the page's real link is nobody else's to see"
    assert await rows(fleet) == before


async def test_a_preview_calls_a_python_class_and_opens_pages_at_a_terminal(fleet):
    (fleet.directory / "team.py").write_text(SOURCE)
    fleet.source = "team:Team"
    opened = fleet.directory / "opened"
    browser = fleet.directory / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    browser.chmod(0o755)
    terminal = Terminal(fleet)
    try:
        await terminal.start("preview", "progress", "--out", "here", BROWSER=f"{browser} %s")
        assert await terminal.ended() == 0, terminal.written
    finally:
        terminal.close()
    pages = [Path(line.removeprefix("file://")) for line in opened.read_text().split()]
    assert pages == [fleet.directory / "here/report.html", fleet.directory / "here/email.html"]
    assert "Ada in 20" in pages[0].read_text()
    ended = await fleet.run("preview", "progress", "--for", "bob")
    assert ended.code == 1
    assert ended.sentences == [
        "reports.progress.source: for bob, build() raised LookupError: no rows for bob; correct it there."
    ]
