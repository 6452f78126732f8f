"""Relays that live, without a process: sessions that hold their advisory locks, and emails for them."""

import asyncio

import asyncpg
import pytest

from outbox.database.locks import RELAY_LOCKS
from outbox.relay.quarantine import Quarantine
from outbox.relay.registration import register
from outbox.relay.settlement import Settlement
from outbox.relay.sweep import sweep
from outbox.relay.tick import TickRequest, tick
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Refused, Withdrawn, outcome_of
from tests.support.fleet import until

SENT = Accepted("250 queued")
LATER = Deferred("451 later")
NEVER = Refused("550 nobody")
DOUBT = InDoubt("silence")
TAKEN_BACK = Withdrawn("the guard stopped it")


def settlement(claim, verdict, *, attempt, marked=True, tries_max=12, delay_s=0.0, doubt_s=None):
    outcome = outcome_of(
        verdict, tries=attempt, tries_max=tries_max, backoff_s=delay_s, again_s=delay_s, doubt_s=doubt_s
    )
    return Settlement(claim.relay, claim.email, claim.key, attempt, marked=marked, outcome=outcome)


def made_once(server, name, fill):
    """The URL of a database that the tests of this module share; each leaves it as it found it."""

    async def make():
        admin = await asyncpg.connect(server.url)
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
        await admin.close()
        connected = await asyncpg.connect(server.database_url(name))
        await fill(connected)
        await connected.close()

    asyncio.run(make())
    return server.database_url(name)


@pytest.fixture(name="one_database", scope="module")
def shared_database(postgres_server, request):
    """The URL of a database that the tests of a module share."""
    name = request.module.__name__.rpartition(".")[2]
    return made_once(postgres_server, name, lambda connected: connected.execute("SELECT pg_stat_reset()"))


@pytest.fixture(name="database")
async def emptied_database(one_database):
    """The URL of an empty outbox: one for all tests of a module, emptied for each, since there are many."""
    return await emptied(one_database)


async def emptied(url):
    """The same URL, of an outbox in which nothing is left."""
    connected = await asyncpg.connect(url)
    await connected.execute("TRUNCATE outbox.attempt, outbox.delivery, outbox.email, outbox.relay")
    await connected.close()
    return url


class Living:
    """A relay that lives: a session with its advisory lock, registered as relays are."""

    def __init__(self, connection, relay):
        self.connection, self.relay = connection, relay
        self.quarantine = Quarantine((relay,))

    async def claim(self, room=1):
        return (await tick(self.connection, self.relay, TickRequest(claims_max=room))).claims

    async def mark(self, *claims):
        return (await tick(self.connection, self.relay, TickRequest(marks=[claim.email for claim in claims]))).marked

    async def settle(self, *settlements):
        return (await tick(self.connection, self.relay, TickRequest(settlements=settlements))).settled

    async def sweep(self, doubt_s=None):
        return await sweep(self.connection, self.relay, doubt_s=doubt_s, quarantine=self.quarantine)

    async def claim_and_mark(self):
        """One claim that is marked, its first try."""
        (claim,) = await self.claim()
        assert await self.mark(claim) == {claim.email: claim.attempt + 1}
        return claim

    async def die(self, watcher):
        """End the session as a kill does; returns when its lock is free."""
        self.connection.terminate()

        async def lock_is_free():
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND objid = $2"
            return not await watcher.fetchval(query, RELAY_LOCKS, self.relay)

        await until(lock_is_free, "its lock is free")


@pytest.fixture(name="relays")
async def living_relays(database):
    """Makes relays that live, in the test's database."""
    connections = []

    async def start():
        connections.append(await asyncpg.connect(database))
        return Living(connections[-1], await register(connections[-1], 1))

    yield start
    for connection in connections:
        connection.terminate()


@pytest.fixture(name="relay")
async def living_relay(relays):
    return await relays()


async def put(connection, count, *, due_s=0.0):
    """Emails that are due since `due_s` seconds, the first longest; gives their ids."""
    rows = await connection.fetch(
        """
        WITH made AS (
            INSERT INTO outbox.email (key, sender, recipient, message_id, message)
            SELECT 'mail' || gen_random_uuid(), 'a@example.com', 'p' || n || '@example.com', '<' || n || '@x>', 'hello'
              FROM generate_series(1, $1) n RETURNING id
        )
        INSERT INTO outbox.delivery (email, due_at)
        SELECT id, now() - $2 * interval '1 second' + row_number() OVER (ORDER BY id) * interval '1 microsecond'
               - interval '1 second'
          FROM made RETURNING email
        """,
        count,
        float(due_s),
    )
    return sorted(row["email"] for row in rows)


async def row(connection, email):
    return dict(await connection.fetchrow("SELECT * FROM outbox.delivery WHERE email = $1", email))


async def standing(connection, claim):
    found = await row(connection, claim.email)
    return found["state"], found["attempt"], found["withdrawn"]


async def trail(connection, claim):
    query = "SELECT attempt, verdict FROM outbox.attempt WHERE email = $1 ORDER BY settled_at, attempt"
    return [tuple(found) for found in await connection.fetch(query, claim.email)]


async def key_of(connection, claim):
    return await connection.fetchval("SELECT key FROM outbox.email WHERE id = $1", claim.email)
