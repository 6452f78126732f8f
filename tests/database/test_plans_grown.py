"""Statements on tables that the planner knows nothing of, or that have grown since the last ANALYZE.

A statement may read each row a few times, never each row for each other row. So rows are counted, not seconds:
EXPLAIN (ANALYZE) says for every node how often it ran and how many rows it gave and removed.
"""

import asyncio
import json

import asyncpg
import pytest

from outbox import completion

RECIPIENTS = 4_000
VISITS_MAX = 12  # for each row of the database, over all nodes of a plan
STATEMENT_MAX_S = 10

# One edition of one report, made and sent: `generate` and relays leave these rows.
SENT = """
WITH edition AS (
    INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)
    VALUES ('r', $1, '2025-01-06', '2025-01-13', $2) RETURNING id
), report AS (
    INSERT INTO outbox.report (edition, recipient_key, token, title, html)
    SELECT id, n, id || '-' || n, 't', repeat('page ', 200) FROM edition, generate_series(1, $2) n
    RETURNING id, recipient_key
), email AS (
    INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
    SELECT 'r/' || $1 || '/' || recipient_key, id, 'a@example.com', 'p' || recipient_key || '@example.com',
           '<' || id || '@x>', decode(repeat(md5(id::text) || md5('x' || id), 60), 'hex') FROM report ORDER BY id
    RETURNING id
), delivery AS (
    INSERT INTO outbox.delivery (email, state, attempt, settled_at) SELECT id, 'sent', 1, now() FROM email
    RETURNING email
)
INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, 1, 'accepted', '250 ok' FROM delivery
"""


@pytest.fixture(scope="module", params=["never analysed", "analysed when empty", "analysed at half the size"])
def grown(request, postgres_server):
    """The URL of a database with two editions, and when its statistics were made. Autovacuum makes none."""
    name = "grown_" + request.param.replace(" ", "_")

    async def make():
        admin = await asyncpg.connect(postgres_server.url)
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
        await admin.close()
        connected = await asyncpg.connect(postgres_server.database_url(name))
        for (table,) in await connected.fetch(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'outbox'"
        ):
            await connected.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        if request.param == "analysed when empty":
            await connected.execute("ANALYZE")
        await connected.execute(SENT, "2025-W02", RECIPIENTS)
        if request.param == "analysed at half the size":
            await connected.execute("ANALYZE")
        await connected.execute(SENT, "2025-W03", RECIPIENTS)
        await connected.close()

    asyncio.run(make())
    return postgres_server.database_url(name)


@pytest.fixture
async def connection(grown):
    connected = await asyncpg.connect(grown, server_settings={"statement_timeout": f"{STATEMENT_MAX_S}s", "jit": "off"})
    yield connected
    await connected.close()


def nodes(plan):
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


def visits(plan):
    """How many rows all nodes together gave and removed."""
    counted = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter", "Rows Removed by Index Recheck")
    return sum(node["Actual Loops"] * node.get(name, 0) for node in nodes(plan) for name in counted)


async def visits_of(connection, statement, *arguments):
    explained = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}"
    transaction = connection.transaction()
    await transaction.start()
    try:
        return visits(json.loads(await connection.fetchval(explained, *arguments))[0]["Plan"])
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("name", ["OPEN", "UNDONE"])
async def test_completion_reads_each_row_a_few_times_only(connection, name):
    edition = await connection.fetchval("SELECT max(id) FROM outbox.edition")
    assert await visits_of(connection, getattr(completion, name), edition) <= VISITS_MAX * 2 * RECIPIENTS
