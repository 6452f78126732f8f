"""The interleavings of digests on real Postgres: another transaction holds what one needs, and commits, or does not."""

import asyncio
from datetime import timedelta

import pytest

from outbox.generate.run import generate
from outbox.operations.audit import audit
from outbox.operations.prune import prune
from outbox.operations.status import read_status
from outbox.settings import load
from outbox.settings.urls import DatabaseUrl
from tests.support.fleet import until

WEEK, NEXT = "2026-W47", "2026-W48"

SETTINGS = """
database_url = "{database}"
sender = "Progress reports <reports@example.com>"
[digest]
link = "https://reports.example.com/d/{{token}}"
[reports.progress]
deliver = "digest"
recipients = "select id::text as key, email, name from people"
data = "select 1 as done where :key <> ''"
link = "https://reports.example.com/r/{{token}}"
"""

DIGESTS = """
SELECT e.period, r.recipient_key, array_agg(i.report ORDER BY i.report) AS items
  FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition AND e.report = 'digest'
  LEFT JOIN outbox.digest_item i ON i.digest = r.id GROUP BY e.period, r.id ORDER BY r.id
"""

EDITION = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('digest', $1, '2026-11-16', '2026-11-23')
"""

# Another hand's digest for p1, of the items that it knows.
OTHER = """
WITH report AS (
    INSERT INTO outbox.report (edition, recipient_key, token, title, html)
    SELECT id, 'p1@example.com', 'another ' || id, 'another', '' FROM outbox.edition
     WHERE report = 'digest' AND period = $1 RETURNING id
)
UPDATE outbox.digest_item SET digest = report.id FROM report WHERE digest_item.report = ANY ($2::bigint[])
"""


@pytest.fixture
async def settings(database, connection, tmp_path):
    path = tmp_path / "outbox.toml"
    path.write_text(SETTINGS.format(database=database))
    await connection.execute("INSERT INTO people VALUES (1, 'p1@example.com', 'Person 1')")
    return load(path, {})


async def items(connection, settings, *periods):
    """The ids of reports that were made for p1, one a week, each an item."""
    for period in periods:
        await generate(settings, "progress", period_key=period)
    return [row["report"] for row in await connection.fetch("SELECT report FROM outbox.digest_item ORDER BY report")]


async def digests(connection):
    return [tuple(row) for row in await connection.fetch(DIGESTS)]


async def waited_for(connection):
    """Until somebody waits for a row or a key of this connection's transaction."""

    async def waits():
        return await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
        )

    await until(waits, "somebody waits for this transaction")


async def test_of_two_digests_with_common_items_the_first_to_commit_tells_what_it_rendered(connection, settings):
    """The other waits for the first item. What it rendered is no longer open then, so it tells of what is left."""
    first, second = await items(connection, settings, "2026-W45", "2026-W46")
    await connection.execute(EDITION, WEEK)
    async with connection.transaction():
        await connection.execute(OTHER, WEEK, [first])
        closing = asyncio.create_task(generate(settings, "digest", period_key=NEXT))
        await waited_for(connection)
        third = (await items(connection, settings, WEEK))[-1]
    result = await closing
    assert (result.made, result.failed, result.waiting) == (1, {}, 0)
    assert await digests(connection) == [(WEEK, "p1@example.com", [first]), (NEXT, "p1@example.com", [second, third])]
    page = await connection.fetchval("SELECT html FROM outbox.report ORDER BY id DESC LIMIT 1")
    assert [week in page for week in ("2 \u2013 8 Nov", "9 \u2013 15 Nov", "16 \u2013 22 Nov")] == [False, True, True]

    # Nothing is left to tell when all was taken up meanwhile: no email without a report in it.
    last = (await items(connection, settings, NEXT))[-1]
    async with connection.transaction():
        await connection.execute("UPDATE outbox.digest_item SET digest = 1 WHERE report = $1", last)
        closing = asyncio.create_task(generate(settings, "digest", period_key="2026-W43"))
        await waited_for(connection)
    result = await closing
    assert (result.made, result.expected, result.failed) == (0, 0, {})
    assert len(await digests(connection)) == 2


async def test_of_two_digests_for_one_address_and_period_one_is_there_and_what_it_lacks_waits(connection, settings):
    """The other has not seen all items, or ends in a rollback."""

    async def closed(period, told, end):
        """What a digest did that met another hand's, which tells of these items and has not ended yet."""
        await connection.execute(EDITION, period)
        other = connection.transaction()
        await other.start()
        await connection.execute(OTHER, period, told)
        closing = asyncio.create_task(generate(settings, "digest", period_key=period))
        await waited_for(connection)
        await getattr(other, end)()
        result = await closing
        return result.made, result.elsewhere, result.waiting

    first, second = await items(connection, settings, "2026-W44", "2026-W45")
    assert await closed("2026-W45", [first], "commit") == (0, 1, 1)
    third = (await items(connection, settings, "2026-W46"))[-1]
    assert await closed("2026-W46", [], "commit") == (0, 1, 2), "here it waits at the unique key, and has all items"
    assert await closed("2026-W47", [second], "rollback") == (1, 0, 0)
    assert await digests(connection) == [
        (period, "p1@example.com", told)
        for period, told in (("2026-W45", [first]), ("2026-W46", [None]), ("2026-W47", [second, third]))
    ]


async def test_an_address_has_one_email_whatever_keys_and_spellings_and_too_much_waits(connection, settings):
    await connection.execute(
        "INSERT INTO people SELECT n, CASE n % 2 WHEN 0 THEN 'p1@Example.COM' ELSE 'p1@example.com' END, 'Person ' || n"
        " FROM generate_series(2, 130) n"
    )
    await connection.execute("INSERT INTO people VALUES (131, 'P1@example.com', '')")
    made = await items(connection, settings, WEEK)
    assert len(made) == 131
    first = await generate(settings, "digest", period_key=WEEK)
    assert (first.made, first.waiting) == (2, 30)
    second = await generate(settings, "digest", period_key=NEXT)
    assert (second.made, second.waiting) == (1, 0)
    told = await digests(connection)
    assert sorted(len(found) for _, _, found in told) == [1, 30, 100]
    assert sorted(item for _, _, found in told for item in found) == made
    message = await connection.fetchval("SELECT message FROM outbox.email ORDER BY octet_length(message) DESC LIMIT 1")
    assert b"\r\n30 more wait for the next email.\r\n" in message
    assert len(message) < 100_000, "Gmail clips what is longer"


async def test_a_collected_report_is_sent_when_its_digest_is_and_keeps_its_page_until_then(connection, settings):
    (item,) = await items(connection, settings, WEEK)

    async def found():
        looked = await audit(settings, "progress", WEEK)
        edition = (await read_status(connection)).editions[-1].outcome
        return [
            *[(one.state, one.said) for kind in looked.unsent.values() for one in kind.named],
            (looked.sent, edition.sent, edition.waiting, edition.collected),
        ]

    async def pruned():
        await connection.execute("UPDATE outbox.report SET created_at = created_at - interval '9 days'")
        await connection.execute("UPDATE outbox.email SET created_at = created_at - interval '9 days'")
        await prune(DatabaseUrl.parse(settings.database_url.dsn), timedelta(days=3))
        return await connection.fetchval("SELECT html = '' FROM outbox.report WHERE id = $1", item)

    assert await found() == [("collected", "it waits for the next digest"), (0, 0, 0, 1)]
    assert not await pruned()
    await connection.execute("INSERT INTO outbox.pause (report, who, why) VALUES ('progress', 'me', 'wrong figures')")
    held = await generate(settings, "digest", period_key=WEEK)
    assert (held.made, held.expected, held.waiting) == (0, 0, 1)
    await connection.execute("DELETE FROM outbox.pause")
    await generate(settings, "digest", period_key=WEEK)
    assert await found() == [("pending", ""), (0, 0, 1, 0)]
    assert not await pruned()
    await connection.execute("UPDATE outbox.delivery SET state = 'sent', settled_at = now(), attempt = 1")
    assert await found() == [(1, 1, 0, 0)]
    assert await pruned()
