"""How Postgres goes about what relays do all the time: by index, and through the backlog in the order of what is due.

Plans are the generic ones that a relay's session uses (`lease_connection.PLANS`), made by real statistics of a table
of which few rows are open, most are, or nothing is known. A check that finds nothing wrong is shown to find what is.
"""

import asyncio
import json

import asyncpg
import pytest

from outbox.monitoring import fleet
from outbox.operations import prune, route_rules, snapshot
from outbox.relay import pauses
from outbox.relay.lease_connection import PLANS
from outbox.relay.statements import MODULES
from outbox.relay.statements import STATEMENTS as PREPARED
from outbox.relay.tick import TICK

ROWS = 20_000
BIG = {"delivery", "email", "attempt", "report", "suppression"}
BACKLOG = {"delivery_due", "delivery_doubt", "delivery_suspect"}

FILL = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('r', '2025-W02', '2025-01-06', '2025-01-13');
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT 1, n, n, 't', 'h' FROM generate_series(1, {rows}) n;
INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
SELECT id, id, 'a@example.com', 'b@example.com', '<' || id || '@x>', 'hello' FROM outbox.report ORDER BY id;
INSERT INTO outbox.delivery (email, due_at, state, attempt, settled_at)
SELECT id, now() - id * interval '1 second', CASE WHEN id % {every} = 0 THEN 'pending' ELSE 'sent' END, 1,
       CASE WHEN id % {every} <> 0 THEN now() END FROM outbox.email ORDER BY id;
INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, 1, 'accepted', '250 ok' FROM outbox.delivery;
INSERT INTO outbox.suppression (address, reason, who, why)
SELECT n || '@example.com', 'bounced', 'w', '' FROM generate_series(1, {rows}) n;
"""

# What sees all open rows, by the index of those: once per death of a relay.
WALKS_THE_BACKLOG = {"JUDGE"}

STATEMENTS = {
    name: statement
    for module in MODULES
    for name, statement in vars(module).items()
    if isinstance(statement, str) and statement in module.STATEMENTS
} | {
    "PRUNE_EMAILS": prune.PRUNE_EMAILS,
    "PRUNE_REPORTS": prune.PRUNE_REPORTS,
    "FLEET_COUNTS": fleet.COUNTS,
    "OLDEST_DUE": snapshot.OLDEST_DUE,
    "UNSERVED": route_rules.UNSERVED,
    "MOVE": route_rules.MOVE,
}


@pytest.fixture(scope="module", params=["few are open", "most are open", "nothing is known"])
def backlog(request, postgres_server):
    """The URL of a database with `ROWS` emails, and what its statistics say."""
    name = "plans_" + request.param.replace(" ", "_")

    async def make():
        admin = await asyncpg.connect(postgres_server.url)
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
        await admin.close()
        connected = await asyncpg.connect(postgres_server.database_url(name))
        if request.param == "nothing is known":
            for table in BIG:
                await connected.execute(f"ALTER TABLE outbox.{table} SET (autovacuum_enabled = off)")
        await connected.execute(FILL.format(rows=ROWS, every=1 if request.param == "most are open" else 1000))
        if request.param != "nothing is known":
            await connected.execute("VACUUM ANALYZE")
        await connected.close()

    asyncio.run(make())
    return postgres_server.database_url(name)


@pytest.fixture
async def connection(backlog):
    """As a relay's session plans."""
    connected = await asyncpg.connect(backlog, server_settings=PLANS)
    yield connected
    await connected.close()


async def plan_of(connection, statement):
    """The generic plan, as JSON."""
    prepared = await connection.prepare(statement)
    nulls = ", ".join("NULL" for _ in prepared.get_parameters())
    await connection.execute(f"PREPARE planned AS {statement}")
    told = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE planned{f'({nulls})' if nulls else ''}")
    await connection.execute("DEALLOCATE planned")
    return json.loads(told)[0]["Plan"]


def nodes(plan):
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


def reads(plan):
    """What of the big tables is read in this part: the index, or the table where there is none."""
    return [node.get("Index Name", node["Relation Name"]) for node in nodes(plan) if _is_big(node)]


def _is_big(node):
    return node.get("Relation Name") in BIG and node["Node Type"] != "ModifyTable"


def _begins_at_the_frontier(node):
    return any("due_at >=" in inner.get("Index Cond", "") for inner in nodes(node))


def _walks(node, *, under):
    """Whether it is read through: not a stretch of what is due on one route, nor the first entry of the next lane."""
    if node.get("Index Name") not in BACKLOG:
        return False
    condition = node.get("Index Cond", "")
    stretch = "due_at" in condition and ("route" in condition or node["Index Name"] == "delivery_doubt")
    next_lane = under["Node Type"] == "Limit" and "Filter" not in node
    return not (stretch or next_lane)


def faults(name, plan):
    """What is wrong with it, in words."""
    found = []
    for node in nodes(plan):
        if node["Node Type"] == "Seq Scan" and _is_big(node):
            found.append(f"reads all of {node['Relation Name']}")
        if node["Node Type"] == "Sort" and reads(node):
            found.append(f"sorts what {', '.join(reads(node))} gives")
        walked = [part for part in node.get("Plans", []) if _walks(part, under=node) and name not in WALKS_THE_BACKLOG]
        found += [f"walks all of {part['Index Name']} ({part.get('Index Cond', 'no condition')})" for part in walked]
        if node.get("Relation Name") == "suppression" and "address =" not in node.get("Index Cond", ""):
            found.append("looks through the suppression list")
        held = [part for part in node.get("Plans", []) if part.get("Index Name") == "delivery_paused"]
        if node["Node Type"] != "Limit" and any("Index Cond" not in part for part in held):
            found.append("walks all that is set aside")
        claims = {"CTE due": "delivery_due", "CTE urgent": "delivery_due", "CTE suspect": "delivery_suspect"}
        for part, index in claims.items():
            if node.get("Subplan Name") == part and reads(node) != [index]:
                found.append(f"{part} reads {', '.join(reads(node))}")
        if node.get("Subplan Name") in ("CTE due", "CTE urgent") and not _begins_at_the_frontier(node):
            found.append(f"{node['Subplan Name']} begins with what is long settled")
    return found


def test_the_statements_are_all_that_a_relay_prepares():
    assert set(PREPARED) <= set(STATEMENTS.values())


@pytest.mark.parametrize("name", sorted(STATEMENTS))
async def test_it_goes_by_index_and_never_through_all_that_is_open(connection, name):
    assert faults(name, await plan_of(connection, STATEMENTS[name])) == []


@pytest.mark.parametrize(
    "name, gone, found",
    [
        ("TICK", "INDEX outbox.delivery_due", "CTE due "),
        ("TICK", "INDEX outbox.delivery_suspect", "CTE suspect "),
        ("EMPTY", "INDEX outbox.delivery_due", "reads all of delivery"),
        ("PRUNE_EMAILS", "INDEX outbox.attempt_email", "reads all of attempt"),
        ("PRUNE_REPORTS", "INDEX outbox.email_report", "reads all of email"),
        ("STANDING", "CONSTRAINT delivery_pkey", ""),
    ],
)
async def test_a_check_sees_that_an_index_is_missing(connection, name, gone, found):
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(f"ALTER TABLE outbox.delivery DROP {gone}" if "pkey" in gone else f"DROP {gone}")
    seen = faults(name, await plan_of(connection, STATEMENTS[name]))
    await transaction.rollback()
    assert any(said.startswith(found) for said in seen), seen


OPEN = "LIMIT CASE WHEN (SELECT is_open FROM gate) THEN"


@pytest.mark.parametrize(
    "good, bad, found",
    [
        (f"ORDER BY due_at, email\n     {OPEN} $11", f"ORDER BY attempt, email\n     {OPEN} $11", "sorts what "),
        (f"ORDER BY due_at, email\n     {OPEN} $17", f"ORDER BY attempt, email\n     {OPEN} $17", "sorts what "),
        ("AND route = $15 AND priority = 0", "AND route || '' = $15 AND priority = 0", "walks all of delivery_due"),
        ("AND route = $15 AND priority = 1", "AND route = $15 AND priority > 0", "sorts what "),
        ("AND route = $15\n", "AND route || '' = $15\n", "walks all of delivery_suspect"),
        (f"ORDER BY due_at, email\n     {OPEN} $12", f"ORDER BY email\n     {OPEN} $12", ""),
        ("due_at >= coalesce", "due_at + interval '0 s' >= coalesce", "CTE due begins "),
        ("c WHERE d.email = c.email", "c WHERE d.email + 0 = c.email", "reads all of delivery"),
        ("s.address = lower(", "s.address || '' = lower(", "looks through the suppression list"),
        ("JOIN outbox.email e ON e.id = c.email", "JOIN outbox.email e ON e.id + 0 = c.email", "reads all of email"),
    ],
)
async def test_a_check_sees_that_a_statement_is_wrong(connection, good, bad, found):
    assert good in TICK
    seen = faults("TICK", await plan_of(connection, TICK.replace(good, bad)))
    assert any(said.startswith(found) for said in seen), seen


async def test_a_check_sees_that_all_that_is_set_aside_is_walked_through(connection):
    everything = pauses.TAKE_UP.replace("ORDER BY paused LIMIT 1)", "ORDER BY paused)")
    assert "walks all that is set aside" in faults("TAKE_UP", await plan_of(connection, everything))
