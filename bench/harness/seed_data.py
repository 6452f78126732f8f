"""Databases with many emails in them, put in fast: the history of a company, and the backlog of its relays."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from outbox.database import schema
from outbox.database.driver import DriverConnection

AT_ONCE = 1_000_000
TABLES = ("report", "email", "delivery", "attempt")

MESSAGE = "convert_to(rpad('Subject: Your progress' || chr(13) || chr(10), 100, 'x'), 'UTF8')"
EDITION = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at, created_at, completed_at)
VALUES ('progress', '2025-W01', '2024-12-30', '2025-01-06', now() - interval '500 days', now() - interval '500 days')
"""

# As generate and a relay leave them, each table in the order of time, all older than a year.
SETTLED = (
    """
INSERT INTO outbox.report (id, edition, recipient_key, token, title, html, created_at) OVERRIDING SYSTEM VALUE
SELECT n, 1, n, md5(n::text), 'Progress', rpad('<p>', 100, 'x'), now() - interval '500 days'
  FROM generate_series($1::bigint, $2::bigint) n
""",
    f"""
INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message, created_at)
SELECT n, 'progress/2025-W01/' || n, n, 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@example.com>',
       {MESSAGE}, now() - interval '500 days'
  FROM generate_series($1::bigint, $2::bigint) n
""",
    """
INSERT INTO outbox.delivery (email, due_at, marked_at, settled_at, relay, attempt, state)
SELECT n, at, at, at, 1, 1, 'sent'
  FROM generate_series($1::bigint, $2::bigint) n,
       LATERAL (SELECT now() - interval '500 days' + n * interval '1 ms') AS t (at)
""",
    """
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
SELECT n, 1, 1, 'accepted', '250 2.0.0 Ok: queued as ' || n, now() FROM generate_series($1::bigint, $2::bigint) n
""",
)

# Indexes that no foreign key needs; made again after the rows they cost a fraction.
SPARE = """
SELECT CASE WHEN c.oid IS NULL THEN 'DROP INDEX ' || i.indexrelid::regclass
            ELSE format('ALTER TABLE %s DROP CONSTRAINT %s', i.indrelid::regclass, c.conname) END,
       CASE WHEN c.oid IS NULL THEN pg_get_indexdef(i.indexrelid)
            ELSE format('ALTER TABLE %s ADD CONSTRAINT %s %s', i.indrelid::regclass, c.conname,
                        pg_get_constraintdef(c.oid)) END
  FROM pg_index i LEFT JOIN pg_constraint c ON c.conindid = i.indexrelid AND c.contype = 'u'
 WHERE i.indrelid = ANY ($1::regclass[]) AND NOT i.indisprimary
"""

# A hundred are due at a time, as they are made; all of them for an hour already, if `in_s` is 0.
DUE = f"""
WITH made AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    SELECT 'mail' || nextval('mails'), 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@example.com>',
           {MESSAGE}
      FROM generate_series(1, $1::int) n RETURNING id)
INSERT INTO outbox.delivery (email, due_at, state, settled_at)
SELECT id, now() + $2 * interval '1 second' + id / 100 * interval '1 ms',
       CASE WHEN id % 100 < $3 THEN 'cancelled' ELSE 'pending' END,
       CASE WHEN id % 100 < $3 THEN now() END
  FROM made
"""


def beside(url: str, name: str) -> str:
    """Return the URL of another database of the same server."""
    return urlsplit(url)._replace(path=f"/{name}").geturl()


@asynccontextmanager
async def stock(url: str, name: str, *, settled: int, autovacuum: bool = False) -> AsyncIterator[tuple[str, Any]]:
    """Make a database with so many old sent emails, analysed; yield its URL, and a connection to it."""
    admin = await asyncpg.connect(url)
    await admin.execute(f"CREATE DATABASE {name}")
    there = beside(url, name)
    connection = await asyncpg.connect(there)
    try:
        await schema.initialise(connection)
        if not autovacuum:
            for table in TABLES:
                await connection.execute(f"ALTER TABLE outbox.{table} SET (autovacuum_enabled = off)")
        await _put_settled(connection, settled)
        yield there, connection
    finally:
        await connection.close()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


async def _put_settled(connection: DriverConnection, count: int) -> None:
    await connection.execute("CREATE SEQUENCE mails")
    await connection.execute(EDITION)
    spare = await connection.fetch(SPARE, [f"outbox.{table}" for table in TABLES])
    for drop, _ in spare:
        await connection.execute(drop)
    # What is put in here fits: no foreign key is looked up, once per row.
    await connection.execute("SET session_replication_role = replica; SET maintenance_work_mem = '1GB'")
    for first in range(1, count + 1, AT_ONCE):
        for statement in SETTLED:
            await connection.execute(statement, first, min(first + AT_ONCE - 1, count))
    for _, make in spare:
        await connection.execute(make)
    await connection.execute("RESET session_replication_role; RESET maintenance_work_mem")
    for table in ("report", "email"):
        await connection.execute(
            f"SELECT setval(pg_get_serial_sequence('outbox.{table}', 'id'), greatest($1::bigint, 1))", count
        )
    await connection.execute("VACUUM (ANALYZE)")
    await connection.execute("CHECKPOINT")


async def put_due(connection: DriverConnection, count: int, *, in_s: float = 0.0, cancelled_percent: int = 0) -> None:
    """Add emails that are due in so many seconds; statistics are left as they are, as on a Monday morning."""
    for first in range(0, count, AT_ONCE):
        await connection.execute(DUE, min(AT_ONCE, count - first), in_s - 3600, cancelled_percent)
