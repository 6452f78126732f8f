"""Times that Python cannot represent, and the largest numbers, in every table: whoever looks survives them."""

import io
import json

import pytest
from rich.console import Console

from outbox.monitoring.fleet import read_fleet
from outbox.operations.status import read_status
from outbox.operations.watch import Watcher
from outbox.operations.watch_view import draw
from outbox.operations.wording import Frame
from outbox.settings import load
from outbox.settings.urls import DatabaseUrl

TIMES = ["infinity", "-infinity", "4000-01-01 BC", "20000-01-01", "294276-12-31", "0001-01-01 00:00+00"]

CHECKS = """
SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) FROM pg_constraint
 WHERE connamespace = 'outbox'::regnamespace AND contype = 'c'
"""
COLUMNS = """
SELECT c.relname::text, a.attname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind = 'r' AND a.atttypid = 'timestamptz'::regtype
"""
ROWS = """
INSERT INTO outbox.route (name, reason, retry_at) VALUES ('mail:25', 'x', now() + interval '1 hour');
INSERT INTO outbox.pace (route) VALUES ('mail:25');
INSERT INTO outbox.allowance (route, since, emails) VALUES ('mail:25', now(), 1);
INSERT INTO outbox.pruned (what, up_to) VALUES ('email', 1);
INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ('x', 'retry', 'x', 'x', 1);
INSERT INTO outbox.pause (report, who, why) VALUES ('other', 'x', 'x');
INSERT INTO outbox.schedule (report, tick_at, failures, said) VALUES ('progress', now(), 1, 'x');
INSERT INTO outbox.suppression (address, reason, who, why) VALUES ('x@example.com', 'decided', 'x', 'x');
INSERT INTO outbox.bounce (email, message, kind) VALUES (1, 'x', 'soft');
UPDATE outbox.delivery SET state = 'dead', attempt = 1, settled_at = now() WHERE email = 1;
UPDATE outbox.delivery
   SET state = 'in_doubt', attempt = 1, relay = 1, marked_at = now(), doubted_at = now() WHERE email = 2;
UPDATE outbox.delivery SET paused = 'other', due_at = 'infinity' WHERE email = 3;
UPDATE outbox.delivery SET state = 'sent', attempt = 1, settled_at = now() WHERE email = 4;
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
VALUES (1, 1, 1, 'refused', 'x', now());
"""


@pytest.fixture
async def odd(fleet):
    """A fleet with a row in every table, and a function that gives all of them a time by hand."""
    await fleet.hire(2)
    fleet.report = 'schedule = "0 6 * * 1"\n[web]\nboard_token = "0123456789abcdef0123456789abcdef"'
    ended = await fleet.run("generate")
    assert ended.code == 0, ended
    await fleet.put_emails(4)
    await fleet.connection.execute(ROWS)
    for (statement,) in await fleet.connection.fetch(CHECKS):
        await fleet.connection.execute(statement)

    async def give(time):
        for table, column in await fleet.connection.fetch(COLUMNS):
            await fleet.connection.execute(
                f"UPDATE outbox.{table} SET {column} = '{time}' WHERE {column} IS NOT NULL"  # those that have one
            )
        return fleet

    yield give
    await fleet.stop_all()


LOOKS = [
    ("status",), ("list",), ("show", "mail1"), ("show", "mail2"), ("show", "mail3"), ("show", "mail4"), ("schedule",),
    ("suppress",), ("audit", "progress"), ("prune", "--keep", "400d", "--dry-run"), ("doctor",),
]  # fmt: skip
JSON = [
    ("status", "--json"), ("list", "--json"), ("show", "mail1", "--json"), ("show", "mail2", "--json"),
    ("audit", "progress", "--json"), ("doctor", "--json"), ("schedule", "--json"),
]  # fmt: skip


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("time", TIMES)
async def test_every_look_survives_any_time(odd, time):
    await all_survive(await odd(time))


async def all_survive(fleet):
    for words in (*LOOKS, *JSON):
        ended = await fleet.run(*words)
        assert ended.code in (0, 1), (words, ended)
        assert "Traceback" not in ended.err, (words, ended)
        assert "Postgres refuses" not in ended.err, (words, ended)
        assert "out of range" not in ended.out + ended.err, (words, ended)
        if words in JSON:
            json.loads(ended.out, parse_constant=refuse)


@pytest.mark.parametrize("time", TIMES)
async def test_metrics_survive_any_time(odd, time):
    fleet = await odd(time)
    found = await read_fleet(DatabaseUrl.parse(fleet.database))
    assert 0 <= found.oldest_due_s < 4e9


@pytest.mark.parametrize("time", TIMES)
async def test_watch_survives_any_time(odd, time):
    fleet = await odd(time)
    settings = load(fleet.write_settings())
    watcher = Watcher(settings)
    try:
        for _ in range(2):
            await watcher.look_again()
            assert watcher.trouble is None
            console = Console(file=io.StringIO(), width=200)
            console.print(draw(watcher.snapshot, watcher.rates, Frame.of(settings)))
    finally:
        watcher.close()


@pytest.mark.parametrize("column", ["id", "attempt"])
async def test_every_look_survives_the_largest_numbers(odd, column):
    fleet = await odd("2026-11-24")
    await fleet.connection.execute("ALTER TABLE outbox.delivery DROP CONSTRAINT delivery_email_fkey")
    await fleet.connection.execute(
        {
            "id": "UPDATE outbox.email SET id = 9223372036854775807 WHERE key = 'mail1';"
            " UPDATE outbox.delivery SET email = 9223372036854775807 WHERE email = 3",
            "attempt": "UPDATE outbox.delivery SET attempt = 2147483647, withdrawn = 2147483647, orphaned = 2147483647;"
            " UPDATE outbox.attempt SET attempt = 2147483647, relay = 2147483647;"
            " UPDATE outbox.operation SET emails = 9223372036854775807;"
            " UPDATE outbox.allowance SET emails = 9223372036854775807;"
            " UPDATE outbox.schedule SET failures = 2147483647; UPDATE outbox.route SET failures = 2147483647",
        }[column]
    )
    await all_survive(fleet)


LONG_TEXTS = """
UPDATE outbox.attempt SET reply = repeat('x', 20000000);
INSERT INTO outbox.attempt (email, attempt, verdict, reply)
SELECT id, 0, 'asked', repeat('x', 20000000) FROM outbox.email;
UPDATE outbox.pause SET who = repeat('x', 20000000), why = repeat('x', 20000000);
UPDATE outbox.suppression SET who = repeat('x', 20000000), why = repeat('x', 20000000);
"""


async def test_every_look_is_bounded_whatever_texts_a_role_wrote(odd):
    """Roles that read bounces or decide may write trails, reasons and names of any length."""
    fleet = await odd("2026-11-24")
    await fleet.connection.execute(LONG_TEXTS)
    for words in (*LOOKS, *JSON):
        ended = await fleet.run(*words)
        assert ended.code in (0, 1), (words, ended.err[-300:])
        assert len(ended.out) + len(ended.err) < 100_000, words


async def test_an_infinite_time_is_said_in_words(odd):
    fleet = await odd("infinity")
    listed = await fleet.run("list")
    assert "never" in listed.out
    assert "9999" not in listed.out


async def test_nothing_that_is_due_has_been_so_for_no_time(fleet, connection):
    assert (await read_status(connection)).oldest_due_s == 0
    assert (await read_fleet(DatabaseUrl.parse(fleet.database))).oldest_due_s == 0
