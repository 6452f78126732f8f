"""No statement of a relay reads history, whatever the statistics of the tables say."""

import asyncpg
import pytest

from outbox.relay import failover
from outbox.relay import in_doubt as doubt
from outbox.relay.claims import RELEASE
from outbox.relay.lease_connection import PLANS
from outbox.relay.remaining import EMPTY
from outbox.relay.settlement import STANDING
from outbox.relay.sweep import JUDGE
from outbox.relay.tick import TICK
from tests.support.living_relays import (  # noqa: F401 - fixtures
    emptied_database,
    living_relay,
    living_relays,
    made_once,
    put,
    settlement,
    shared_database,
    standing,
)


async def remember(connection):
    """50,000 deliveries that were sent, without statistics of them."""
    await connection.execute("""
        ALTER TABLE outbox.delivery SET (autovacuum_enabled = off);
        WITH made AS (
            INSERT INTO outbox.email (key, sender, recipient, message_id, message)
            SELECT 'old' || n, 'a@example.com', 'b@example.com', '<' || n || '@x>', 'hello'
              FROM generate_series(1, 50000) n RETURNING id)
        INSERT INTO outbox.delivery (email, due_at, marked_at, settled_at, relay, attempt, state)
        SELECT id, now() - interval '1 day', now(), now(), 1, 1, 'sent' FROM made""")


async def remember_and_count(connection):
    await remember(connection)
    await connection.execute("ANALYZE outbox.delivery")


async def remember_and_count_with_some_open(connection):
    await remember(connection)
    await put(connection, 200)
    await connection.execute("ANALYZE outbox.delivery")


async def remember_and_count_and_then_make_many(connection):
    """An ordinary Monday: last week's are sent and counted, this week's have just been made."""
    await remember(connection)
    await connection.execute("ANALYZE outbox.delivery")
    await put(connection, 5000)


HISTORIES = [
    remember,
    remember_and_count,
    remember_and_count_with_some_open,
    remember_and_count_and_then_make_many,
]


@pytest.fixture(scope="module", params=HISTORIES)
def history(postgres_server, request):
    return made_once(postgres_server, f"ledger_{request.param.__name__}", request.param)


async def plan_of(url, statement, arguments, settings):
    connected = await asyncpg.connect(url, server_settings=settings)
    try:
        await connected.execute(f"PREPARE statement AS {statement}")
        return "\n".join(line[0] for line in await connected.fetch(f"EXPLAIN EXECUTE statement {arguments}"))
    finally:
        await connected.close()


planners = pytest.mark.parametrize(
    "settings",
    [{"plan_cache_mode": "force_custom_plan"}, {"plan_cache_mode": "force_generic_plan"}, PLANS],
    ids=["custom", "generic", "a relay's"],
)


@planners
async def test_a_tick_reads_open_rows_by_their_index_whatever_history_there_is(history, settings):
    arguments = """('{1,2}', '{1,1}', '{7,7}', '{t,t}', '{sent,pending}', '{null,30}', '{accepted,deferred}',
                    '{250,451}', 7, '{3,4,5}', 32, 1, 'localhost:25', null, '', null, 24,
                    20971520, 20971520, '{}', 0)"""
    plan = await plan_of(history, TICK, arguments, settings)
    assert "delivery_due" in plan
    assert plan.count("delivery_pkey") >= 2, "a verdict and a mark find their rows by key, not along the backlog"
    assert "Seq Scan on delivery" not in plan, plan
    assert "Seq Scan on email" not in plan, plan


@planners
@pytest.mark.parametrize(
    ("statement", "arguments"),
    [
        (JUDGE, "('{7,8}', 60, 1, 6, '{}')"),
        (EMPTY, "(null, '', '{}')"),
        (RELEASE, "('{1,2}', 7, 0)"),
        (doubt.RESEND, "(100, '{}')"),
        (doubt.TAKE_DOUBTS, "(20, 60, '{}')"),
        (
            failover.REASSERT,
            "('{k}', '{a}', '{b}', '{i}', '{m}', '{7}', '{1}', '{sent}', '{accepted}', '{250}', '{null}', '', 'i')",
        ),
        (STANDING, "('{1,2}')"),
    ],
    ids=["judge", "empty", "release", "resend", "ask", "reassert", "standing"],
)
async def test_no_other_statement_of_the_relay_reads_history(history, settings, statement, arguments):
    plan = await plan_of(history, statement, arguments, settings)
    assert "Seq Scan on delivery" not in plan, plan
