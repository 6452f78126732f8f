"""Logical replication of all tables, as Debezium, DMS and blue/green upgrades set it up: nothing of outbox is refused."""

import asyncio

import asyncpg
import pytest

from outbox import schema
from outbox.embedded import postgres
from outbox.sink import Sink
from outbox.testing.postgres import FAST
from tests.database.test_schema import FIRST_VERSION
from tests.fleet import Fleet, until

# A key that may be deferred is no identity (PostgreSQL docs, 29.1).
WITHOUT_IDENTITY = """
SELECT c.relname FROM pg_class c
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'p') AND c.relreplident <> 'f'
   AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indimmediate AND i.indisvalid
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END)
 ORDER BY 1
"""
