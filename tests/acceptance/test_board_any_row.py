"""The board shows whatever lies in the tables, and one email's page never stops `outbox web` for others."""

import asyncio
import re
import time
from html import unescape
from pathlib import Path

import pytest

from tests.acceptance.test_any_time import CHECKS, COLUMNS, TIMES
from tests.acceptance.test_any_time import ROWS as ONE_IN_EVERY_TABLE
from tests.acceptance.test_board import PAGES, hidden, signed_in

LARGEST = 2**63 - 1


async def shown(anna, paths):
    for path in paths:
        answer = await anna.get(path)
        assert answer.status == 200, (path, answer.body)
        yield answer


def peak_kilobytes(pid):
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


async def without_bounds(connection):
    """The tables as an older version made them, in which anything may lie."""
    for (statement,) in await connection.fetch(CHECKS):
        await connection.execute(statement)


@pytest.mark.parametrize("at", TIMES)
async def test_every_page_survives_any_time(fleet, at):
    await fleet.hire(2)
    assert (await fleet.run("generate")).code == 0
    await fleet.put_emails(4)
    await fleet.connection.execute(ONE_IN_EVERY_TABLE)
    await without_bounds(fleet.connection)
    for table, column in await fleet.connection.fetch(COLUMNS):
        if table != "board_session":
            await fleet.connection.execute(f"UPDATE outbox.{table} SET {column} = '{at}' WHERE {column} IS NOT NULL")
    process, anna = await signed_in(fleet)
    states = [f"/emails?state={state}" for state in ("pending", "in_doubt", "dead", "sent")]
    days = ["/emails?since=2020-01-01&until=2020-01-02", "/emails?since=2999-12-31", "/emails?until=1970-01-01"]
    paths = [*PAGES, *(f"/emails/{n}" for n in range(1, 7)), "/editions/1", *states, *days, "/emails?q=p"]
    async for _ in shown(anna, paths):
        pass
    for act, number in (("cancel", 5), ("retry", 1), ("sent", 2)):
        confirmed = await anna.confirmed(act=act, **{f"pick.{number}": "1"})
        assert (await anna.post("/decide", **hidden(confirmed), why="odd")).status == 200
    assert not [line for line in process.log if "web_fault" in line or "board_fault" in line]


async def test_ids_of_any_size_are_listed_page_by_page_and_shown_and_decided_about(fleet):
    ids = [-LARGEST - 1, -LARGEST, -5, -1, 0, 7, LARGEST - 60, *range(LARGEST - 55, LARGEST + 1)]
    await fleet.connection.execute(
        "INSERT INTO outbox.email (id, key, sender, recipient, message_id, message)"
        " SELECT n, 'k' || n, 'a@example.com', 'p@example.com', '<' || n || '@x>', 'Subject: hi'"
        "   FROM unnest($1::bigint[]) n",
        ids,
    )
    await fleet.connection.execute("INSERT INTO outbox.delivery (email) SELECT id FROM outbox.email")
    process, anna = await signed_in(fleet)
    for query in ("", "q=p", "state=pending", "where=key&q=k", "since=2020-01-01", "where=reply&q=x", "state=dead"):
        found, path = [], f"/emails?{query}"
        for _ in range(10):
            answer = await anna.get(path)
            assert answer.status == 200, path
            found += map(int, re.findall(r'name="pick\.(-?\d+)"', answer.body))
            following = re.search(r'rel="next" href="([^"]*)"', answer.body)
            if following is None:
                break
            path = unescape(following[1])
        else:
            raise AssertionError("the pages do not end")
        assert found == ([] if "reply" in query or "dead" in query else sorted(ids, reverse=True)), query
    for odd in (f"before={-LARGEST - 1}", f"before={LARGEST + 1}", f"before={-LARGEST - 2}", "before=-", "before=--1"):
        assert (await anna.get(f"/emails?{odd}")).status == 200
        assert (await anna.get(f"/decisions?{odd}")).status == 200
        assert (await anna.get(f"/editions?{odd}")).status == 200
    for number in (-LARGEST - 1, -5, 0, LARGEST):
        assert f"k{number}" in (await anna.get(f"/emails/{number}")).body
        confirmed = await anna.confirmed(act="cancel", **{f"pick.{number}": "1"})
        assert "1 cancelled" in (await anna.post("/decide", **hidden(confirmed), why="odd")).body
    for odd in (LARGEST + 1, -LARGEST - 2, "9" * 400, "-", "1.5", "x", "%20"):
        for path in (f"/emails/{odd}", f"/emails/{odd}/html", f"/emails/{odd}/source", f"/editions/{odd}"):
            assert (await anna.get(path)).status == 404, path
    assert "web_fault" not in "".join(process.log)


async def test_numbers_texts_and_control_characters_of_any_size_are_shown_or_cut(fleet):
    await fleet.put_emails(60)
    connection = fleet.connection
    await without_bounds(connection)
    nasty = "".join(map(chr, range(1, 32))) + "\x7f\x9b\u202e\ufeff\U0010ffff<b>&"
    await connection.execute(
        "UPDATE outbox.email SET key = id || $1 || repeat('k', 150000), recipient = $1 || repeat('r', 30000),"
        " sender = $1, message_id = repeat('<', 100000), made_by = repeat('m', 100000)",
        nasty,
    )
    await connection.execute(
        "UPDATE outbox.delivery SET attempt = 2147483647, withdrawn = 2147483647, orphaned = 2147483647"
    )
    await connection.execute(
        "INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)"
        " SELECT 1, 2147483647, 2147483647, 'deferred', $1 || repeat('y', 1000) FROM generate_series(1, 1000)",
        nasty,
    )
    await connection.execute(
        "INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)"
        " SELECT id, -5, -1, 'deferred', $1 || repeat('z', 1000000) FROM outbox.email WHERE id > 1",
        nasty,
    )
    await connection.execute(
        "INSERT INTO outbox.relay (host, pid, backend_pid, version, sent, last_reply)"
        " VALUES ($1, 2147483647, -1, $1, 9223372036854775807, repeat('l', 100000))",
        nasty,
    )
    await connection.execute(
        "INSERT INTO outbox.operation (who, what, target, why, emails)"
        " VALUES ($1, $1, repeat('t', 1000000), repeat('w', 1000000), 9223372036854775807)",
        nasty,
    )
    await connection.execute("INSERT INTO outbox.pause (report, who, why) VALUES ($1, $1, $1)", nasty)
    await connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)"
        " VALUES ($1, $1, '2026-11-16', '2026-11-23', 9223372036854775807)",
        nasty,
    )
    process, anna = await signed_in(fleet)
    async for answer in shown(anna, [*PAGES, "/emails/1", "/emails/2", "/editions/1", "/emails?where=reply&q=z"]):
        assert len(answer.body) < 3_000_000
        assert not re.search("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", answer.body)
        assert "<b>&" not in answer.body
    for act in ("retry", "cancel"):
        confirmed = await anna.confirmed(act=act, **{"pick.2": "1"})
        assert (await anna.post("/decide", **hidden(confirmed), why="odd")).status == 200
    assert "web_fault" not in "".join(process.log)


HOSTILE = {
    "a subject of encoded words": "'Subject: ' || repeat('=?utf-8?q?=C3=A9_?= ', 150000) || E'\\r\\n\\r\\nx'",
    "raw accents": "'Subject: ' || repeat('é ', 150000) || E'\\r\\n\\r\\nx'",
    "semicolons": "'Content-Type: text/html' || repeat(';', 40000) || E'\\r\\n\\r\\nx'",
    "parentheses": "'Content-Type: text/html ' || repeat('(', 2000) || E'\\r\\n\\r\\nx'",
    "addresses": "'To: ' || repeat('a <', 100000) || E'\\r\\n\\r\\nx'",
    "parts": "E'Content-Type: multipart/mixed; boundary=x\\r\\n\\r\\n' || repeat(E'--x\\r\\n\\r\\ny\\r\\n', 500000)",
    "pictures": "E'Content-Type: text/html\\r\\n\\r\\n' || repeat('<img src=cid:a>', 500000)",
    "blanks": "repeat(' ', 5000000)",
    "nothing": "''",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_message_never_stops_the_pages_of_others(fleet, name):
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    token = await fleet.connection.fetchval("SELECT token FROM outbox.report")
    await without_bounds(fleet.connection)
    await fleet.connection.execute(f"UPDATE outbox.email SET message = convert_to({HOSTILE[name]}, 'UTF8')")
    _, anna = await signed_in(fleet)
    stories = [asyncio.create_task(anna.get(f"/emails/1{part}")) for part in ("", "/html", "") for _ in range(3)]
    while not all(story.done() for story in stories):
        began_at = time.monotonic()
        assert (await anna.browser.ask(f"/r/{token}")).status == 200
        assert time.monotonic() - began_at < 5
    assert {story.result().status for story in stories} <= {200, 404}
    assert stories[0].result().status == 200


async def test_a_message_that_would_fill_the_memory_is_not_read(fleet):
    await fleet.put_emails(2)
    await without_bounds(fleet.connection)
    await fleet.connection.execute(
        "UPDATE outbox.email SET message = convert_to(repeat('x', 80000000), 'UTF8') WHERE id = 1"
    )
    _, anna = await signed_in(fleet)
    for part in ("", "/html", "/source"):
        answer = await anna.get(f"/emails/1{part}")
        assert (answer.status, "80000000 bytes" in answer.body) == (413, True)
    assert (await anna.get("/emails")).status == 200
    confirmed = await anna.confirmed(act="cancel", **{"pick.1": "1"})
    assert "1 cancelled" in (await anna.post("/decide", **hidden(confirmed), why="large")).body


async def test_many_large_messages_at_once_take_no_more_memory_than_the_service_has(fleet):
    await fleet.put_emails(12)
    await fleet.connection.execute(
        "UPDATE outbox.email SET message = convert_to("
        r"E'Content-Type: text/plain\r\n\r\n' || repeat(repeat('abc ', 20) || E'\r\n', 250000), 'UTF8')"
    )
    process, anna = await signed_in(fleet)
    paths = [f"/emails/{n}{part}" for part in ("", "/html") for n in range(1, 13)]
    answers = await asyncio.gather(*(anna.get(path) for path in paths))
    assert [answer.status for answer in answers] == [200] * 12 + [404] * 12  # they have a text and no page
    assert peak_kilobytes(process.pid) < 256 * 1024
