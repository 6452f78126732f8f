"""The list of emails on real Postgres: every filter page by page gives what fits, each once, and goes by index."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from outbox.database.plans import BY_INDEX
from outbox.web.board import decision_scope, editions, emails, live, search
from outbox.web.board.search import Wanted, browse

EMAILS = 400
STATES = ("sent", "pending", "in_doubt", "dead", "expired", "cancelled")
FILL = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at)
SELECT 'r' || n % 2, 'p' || n, date '2026-01-05' + 7 * n, date '2026-01-12' + 7 * n FROM generate_series(1, 4) n;
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT 1 + n % 4, n, n, 't', 'h' FROM generate_series(1, {emails}) n;
INSERT INTO outbox.email (key, report, sender, recipient, message_id, message, created_at)
SELECT 'key_' || id, CASE WHEN id % 5 > 0 THEN id END, 'a@example.com',
       CASE id % 3 WHEN 0 THEN 'Anna' WHEN 1 THEN 'anna_' ELSE 'bob' END || id || '@example.com',
       '<' || id || '@x>', 'm',
       timestamptz '2026-02-01 00:00Z' + id * interval '1 hour' + (id % 7) * interval '3 minutes'
  FROM outbox.report ORDER BY id;
INSERT INTO outbox.delivery (email, state, attempt, relay, marked_at, settled_at, doubted_at, due_at)
SELECT id, state, 1, CASE WHEN state IN ('in_doubt', 'sent') THEN 1 END, now(),
       CASE WHEN state NOT IN ('pending', 'in_doubt') THEN now() END, CASE WHEN state = 'in_doubt' THEN now() END,
       CASE WHEN state = 'in_doubt' THEN 'infinity' ELSE now() END
  FROM (SELECT id, (ARRAY['sent', 'pending', 'in_doubt', 'dead', 'expired', 'cancelled'])[1 + id % 6] AS state
          FROM outbox.email) e;
INSERT INTO outbox.attempt (email, attempt, verdict, reply)
SELECT email, 1, 'deferred', '45' || email % 10 || ' 50%_off' FROM outbox.delivery;
"""
MODEL = """
SELECT m.id FROM outbox.email m JOIN outbox.delivery d ON d.email = m.id
  LEFT JOIN outbox.report r ON r.id = m.report LEFT JOIN outbox.edition e ON e.id = r.edition
 WHERE {} ORDER BY m.id DESC
"""
DAYS = {"since": "2026-02-05", "until": "2026-02-09"}
IN_DAYS = "m.created_at >= '2026-02-05 00:00Z' AND m.created_at < '2026-02-10 00:00Z'"
CASES = {
    "": ({}, "true"),
    "state": ({"state": "dead"}, "d.state = 'dead'"),
    "in doubt": ({"state": "in_doubt"}, "d.state = 'in_doubt'"),
    "pending": ({"state": "pending"}, "d.state = 'pending'"),
    "a report": ({"report": "r1"}, "e.report = 'r1'"),
    "an edition": ({"report": "r1", "period": "p3", "state": "sent"}, "e.id = 3 AND d.state = 'sent'"),
    "an edition that is none": ({"report": "r1", "period": "p2"}, "false"),
    "an address": ({"q": "ANNA_12"}, "m.recipient LIKE 'anna\\_12%'"),
    "any case": ({"q": "anna"}, "lower(m.recipient) LIKE 'anna%'"),
    "a domain": ({"q": "*2@example.com"}, "m.recipient LIKE '%2@example.com'"),
    "a key": ({"where": "key", "q": "key_77"}, "m.key = 'key_77'"),
    "a part of keys": ({"where": "key", "q": "y_7"}, "m.key LIKE '%y\\_7%'"),
    "a reply": ({"where": "reply", "q": "457 50%_OFF"}, "d.email % 10 = 7"),
    "a reply to what is open": ({"where": "reply", "q": "457", "state": "pending"}, "m.id % 10 = 7 AND m.id % 6 = 1"),
    "days": (DAYS, IN_DAYS),
    "days of a state": (DAYS | {"state": "sent"}, f"{IN_DAYS} AND d.state = 'sent'"),
}  # fmt: skip


@pytest.fixture
async def filled(connection):
    await connection.execute("SET TimeZone = 'UTC'")
    await connection.execute(FILL.format(emails=EMAILS))
    return connection


async def pages(connection, said):
    """All ids, page by page, and how many were looked through in vain."""
    found, looked, before = [], 0, None
    for _ in range(EMAILS):
        query = said if before is None else said | {"before": str(before)}
        page = await browse(connection, Wanted.of(query), UTC)
        assert not page.is_cut
        found += [row.id for row in page.rows]
        looked += page.looked
        if page.more_below is None:
            return found, looked
        assert before is None or page.more_below < before
        before = page.more_below
    raise AssertionError("it does not end")


@pytest.mark.parametrize("bounds", ["all at once", "many walks"])
@pytest.mark.parametrize("name", CASES)
async def test_page_by_page_every_email_that_fits_is_seen_once(filled, monkeypatch, name, bounds):
    said, condition = CASES[name]
    monkeypatch.setattr(search, "PAGE", 7)
    if bounds == "many walks":
        for bound in ("WALK_MAX", "WALK_EMAILS_MAX", "WALK_REPLIES_MAX", "NARROW_MAX"):
            monkeypatch.setattr(search, bound, 20)
        monkeypatch.setattr(search, "MARGIN", 5)
    fitting = [row["id"] for row in await filled.fetch(MODEL.format(condition))]
    found, looked = await pages(filled, said)
    assert found == fitting
    if bounds == "all at once":
        assert looked == 0


async def test_ids_are_put_off_by_a_margin_so_no_day_is_cut(filled, monkeypatch):
    monkeypatch.setattr(search, "MARGIN", 0)
    first = await search._first_made(filled, datetime(2026, 2, 5, tzinfo=UTC), 1, EMAILS)
    at = await filled.fetchval("SELECT created_at FROM outbox.email WHERE id = $1", first)
    assert abs(at - datetime(2026, 2, 5, tzinfo=UTC)) < timedelta(hours=2)
    assert await search._first_made(filled, datetime(2030, 1, 1, tzinfo=UTC), 1, EMAILS) == EMAILS + 1
    assert await search._first_made(filled, datetime(2020, 1, 1, tzinfo=UTC), 1, EMAILS) == 1


async def test_a_page_is_planned_by_index_whatever_the_statistics_say(filled, monkeypatch):
    by_index = "SELECT email / (current_setting('enable_seqscan') = 'off')::int"
    monkeypatch.setattr(search, "BOUND", search.BOUND.replace("SELECT email", by_index))
    assert (await browse(filled, Wanted.of({"state": "dead"}), UTC)).rows


async def test_a_search_that_takes_too_long_is_cut_and_says_so(filled, monkeypatch):
    monkeypatch.setattr(search, "TIME_MAX_S", 0.05)
    monkeypatch.setattr(search, "BOUND", search.BOUND.replace("SELECT email", "SELECT pg_sleep(9), email"))
    assert (await browse(filled, Wanted.of({"state": "dead"}), UTC)).is_cut


@pytest.mark.parametrize(
    "said", [{"since": "9999-12-31", "until": "0001-01-01"}, {"before": "9" * 30}, {"q": "\0x", "state": "nonsense"}]
)
async def test_what_is_no_filter_counts_for_nothing(filled, said):
    wanted = Wanted.of(said)
    assert (wanted.since, wanted.until, wanted.before, wanted.state) == (None, None, None, "")
    assert not (await browse(filled, wanted, UTC)).is_cut


BIG = {"delivery", "email", "attempt", "report", "relay"}
STATEMENTS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": statement
    for module in (search, editions, live, emails, decision_scope)
    for name, statement in vars(module).items()
    if isinstance(statement, str) and statement.lstrip(" (\n").startswith("SELECT")
}
# What reads all of an edition does so within its time; what is about few rows may be read whole.
COUNTS = {"editions.BY_STATE"}


@pytest.fixture(scope="module")
def plans_database(postgres_server):
    import asyncio

    import asyncpg

    async def make():
        admin = await asyncpg.connect(postgres_server.url)
        await admin.execute("DROP DATABASE IF EXISTS plans_board")  # a module that is begun twice makes it twice
        await admin.execute("CREATE DATABASE plans_board TEMPLATE outbox_template")
        await admin.close()
        connected = await asyncpg.connect(postgres_server.database_url("plans_board"))
        await connected.execute(FILL.format(emails=20_000))
        await connected.execute(
            "INSERT INTO outbox.relay (host, pid, backend_pid, version, ended_at)"
            " SELECT 'h', 1, 1, '0', now() FROM generate_series(1, 5000)"
        )
        await connected.execute("VACUUM ANALYZE")
        await connected.close()

    asyncio.run(make())
    return postgres_server.database_url("plans_board")


def reads(plan):
    """What is read, each table or index with how, from the top."""
    if plan.get("Relation Name") in BIG:
        yield plan["Node Type"], plan.get("Index Name", plan["Relation Name"])
    for part in plan.get("Plans", []):
        yield from reads(part)


async def planned(url, statement, *, by_index=True):
    import asyncpg

    connected = await asyncpg.connect(url)
    try:
        async with connected.transaction():
            await connected.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            if by_index:
                await connected.execute(BY_INDEX)
            prepared = await connected.prepare(statement)
            nulls = ", ".join("NULL" for _ in prepared.get_parameters())
            await connected.execute(f"PREPARE planned AS {statement}")
            told = await connected.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE planned{f'({nulls})' if nulls else ''}")
            return list(reads(json.loads(told)[0]["Plan"]))
    finally:
        await connected.close()


@pytest.mark.parametrize("name", sorted(set(STATEMENTS) - COUNTS))
async def test_every_page_goes_by_index(plans_database, name):
    found = await planned(plans_database, STATEMENTS[name], by_index=name.startswith("browsing."))
    assert [read for read in found if read[0] == "Seq Scan"] == []


async def test_an_address_is_found_by_its_beginning(plans_database):
    ((_, index),) = await planned(plans_database, search.BY_ADDRESS)
    assert index == "email_recipient"


@pytest.mark.parametrize("name", CASES)
async def test_a_page_begins_at_its_newest_and_stops_when_it_is_full(plans_database, name):
    wanted = Wanted.of(CASES[name][0])
    page = search.page_of(search.query_of(wanted, [], UTC), 1, 20_000)
    found = await planned(plans_database, page)
    assert {index for kind, index in found if kind == "Seq Scan"} == set()
    assert "delivery_pkey" in {index for _, index in found}
