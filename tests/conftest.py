"""Real Postgres for every test, from the plugin that users have (`outbox.testing`), with tables of our own."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from outbox.sandbox.postgres import Server
from outbox.sandbox.smtp_sink import Sink
from outbox.testing.postgres import make_template
from tests.support.fleet import Fleet
from tests.support.fork_server import ForkServer

# A shell starts what runs in its background deaf to Ctrl-C, and children inherit that; ours are to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def outbox_template(outbox_template: str) -> str:
    asyncio.run(_make_tables(outbox_template))
    return outbox_template


@pytest.fixture(scope="session")
def postgres_server(outbox_postgres: Server, outbox_template: str) -> Server:
    """The session's server, with its template made."""
    return outbox_postgres


async def _make_template(server: Server) -> str:
    url = await make_template(server)
    await _make_tables(url)
    return url


async def _make_tables(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("""
        CREATE TABLE people (id int PRIMARY KEY, email text, name text, active boolean NOT NULL DEFAULT true);
        CREATE TABLE progress (person_id int NOT NULL, day timestamptz NOT NULL, done int NOT NULL);
        CREATE TABLE build (key text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
    """)
    await connection.close()


@pytest.fixture
def database(outbox_database) -> str:
    """The URL of an empty outbox of this test's own, beside people, progress and build tables."""
    return outbox_database.url


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
