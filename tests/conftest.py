"""Real Postgres for every test: one embedded server per session, one template database, one copy per test."""

import asyncio
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from outbox import schema
from outbox.embedded import Server, postgres
from outbox.sink import Sink
from tests.fleet import Fleet
from tests.forkserver import ForkServer

# Commits need not survive a power cut of the machine that runs the tests; crashes of Postgres they do survive.
FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}

_numbers = itertools.count(1)

# A shell starts what runs in its background deaf to Ctrl-C, and children inherit that; ours are to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    with postgres(settings=FAST) as server:
        asyncio.run(_make_template(server))
        yield server


async def _make_template(server: Server) -> None:
    admin = await asyncpg.connect(server.url)
    await admin.execute("CREATE DATABASE outbox_template")
    await admin.close()
    connection = await asyncpg.connect(server.database_url("outbox_template"))
    await schema.initialise(connection)
    await connection.execute("""
        CREATE TABLE people (id int PRIMARY KEY, email text, name text, active boolean NOT NULL DEFAULT true);
        CREATE TABLE progress (person_id int NOT NULL, day timestamptz NOT NULL, done int NOT NULL);
        CREATE TABLE build (key text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
    """)
    await connection.close()


@pytest.fixture
async def database(postgres_server):
    """The URL of an empty outbox of this test's own, beside people, progress and build tables."""
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template STRATEGY file_copy")
    yield postgres_server.database_url(name)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def connection(database):
    connected = await asyncpg.connect(database)
    yield connected
    await connected.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
async def sink():
    async with Sink() as server:
        yield server


@pytest.fixture
async def fleet(database, connection, sink, forks, tmp_path: Path):
    """A company of several servers: its people, its settings, and processes that are really started and killed."""
    company = Fleet(database, connection, sink, tmp_path, forks=forks)
    yield company
    await company.stop_all()
