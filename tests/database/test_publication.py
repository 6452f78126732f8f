"""Logical replication of all tables, as Debezium, DMS and blue/green upgrades set it up, refuses nothing of outbox."""

import asyncpg
import pytest

from outbox.database import schema
from outbox.sandbox.postgres import postgres
from outbox.sandbox.smtp_sink import Sink
from outbox.testing.postgres import FAST
from tests.database.test_schema import V1
from tests.support.fleet import Fleet, until

# A key that may be deferred is no identity (PostgreSQL docs, 29.1.1 Replica Identity).
WITHOUT_IDENTITY = """
SELECT c.relname FROM pg_class c
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'p') AND c.relreplident <> 'f'
   AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indimmediate AND i.indisvalid
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END)
 ORDER BY 1
"""


async def without_identity(connection):
    return [row["relname"] for row in await connection.fetch(WITHOUT_IDENTITY)]


@pytest.mark.parametrize("begins", ["new", "upgraded"])
async def test_every_table_has_a_replica_identity(postgres_server, begins):
    name = f"identity_{begins}"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE DATABASE {name}")
    connection = await asyncpg.connect(postgres_server.database_url(name))
    if begins == "upgraded":
        await connection.execute(V1.read_text())
    await schema.initialise(connection)
    assert await without_identity(connection) == []
    await connection.execute("ALTER TABLE outbox.attempt REPLICA IDENTITY DEFAULT")
    assert await without_identity(connection) == ["attempt"]
    await connection.close()
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def test_a_subscriber_of_all_tables_has_what_was_sent_and_pruned(tmp_path, forks):
    with postgres(settings={**FAST, "wal_level": "logical"}) as server:
        admin = await asyncpg.connect(server.url)
        for name in ("publisher", "subscriber"):
            await admin.execute(f"CREATE DATABASE {name}")
        publisher = await asyncpg.connect(server.database_url("publisher"))
        subscriber = await asyncpg.connect(server.database_url("subscriber"))
        for connection in (publisher, subscriber):
            await schema.initialise(connection)
            await connection.execute("CREATE TABLE people (id int PRIMARY KEY, email text, name text)")
        await publisher.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        await publisher.execute("SELECT pg_create_logical_replication_slot('everything', 'pgoutput')")
        socket = await admin.fetchval("SELECT split_part(current_setting('unix_socket_directories'), ',', 1)")
        port = await admin.fetchval("SELECT current_setting('port')")
        await subscriber.execute(
            f"CREATE SUBSCRIPTION everything CONNECTION 'host={socket} port={port} dbname=publisher user=postgres'"
            " PUBLICATION everything WITH (create_slot = false, copy_data = false)"
        )
        async with Sink() as sink:
            fleet = Fleet(server.database_url("publisher"), publisher, sink, tmp_path, forks=forks,
                          recipients="select id::text as key, email, name from people",
                          data="select 1 as done where :key <> ''")  # fmt: skip
            await publisher.execute(
                "INSERT INTO people SELECT n, 'p' || n || '@example.com', '' FROM generate_series(1, 5) n"
            )
            for words in (("generate", "progress", "--period", "2026-W40"), ("relay", "--until-empty")):
                assert (await fleet.run(*words)).code == 0
            await publisher.execute("UPDATE outbox.email SET created_at = now() - interval '9 days'")
            await publisher.execute("UPDATE outbox.report SET created_at = now() - interval '9 days'")
            pruned = await fleet.run("prune", "--keep", "5d")
            await fleet.stop_all()
        assert (pruned.code, pruned.err) == (0, "")
        assert await publisher.fetchval("SELECT count(*) FROM outbox.attempt") == 0

        async def is_the_same():
            here, there = [
                await one.fetchrow(
                    "SELECT (SELECT count(*) FROM outbox.attempt), (SELECT count(*) FROM outbox.email),"
                    "       (SELECT max(up_to) FROM outbox.pruned),"
                    "       (SELECT count(*) FROM outbox.delivery WHERE state = 'sent')"
                )
                for one in (publisher, subscriber)
            ]
            return tuple(here) == tuple(there)

        await until(is_the_same, "the subscriber has everything")
        await subscriber.execute("DROP SUBSCRIPTION everything")
        for connection in (publisher, subscriber, admin):
            await connection.close()
