"""What dead relays left is judged once, and living ones are left alone."""

import asyncio

import asyncpg
import pytest

from outbox.relay.quarantine import QUARANTINE_AFTER
from outbox.relay.sweep import Sweep, judge
from outbox.relay.tick import TickRequest, tick
from tests.support.fleet import until
from tests.support.living_relays import (  # noqa: F401 - fixtures
    SENT,
    emptied_database,
    living_relay,
    living_relays,
    put,
    row,
    settlement,
    shared_database,
    standing,
    trail,
)


async def test_a_sweep_passes_over_a_relay_that_lives(connection, relays):
    await put(connection, 2)
    one, other = await relays(), await relays()
    sending = await one.claim_and_mark()
    (claimed,) = await one.claim()
    found = await other.sweep()
    assert (found.dead, found.freed, found.doubted, found.alive) == ([], 0, 0, 1)
    assert await standing(connection, sending) == ("sending", 1, 0)
    assert (await row(connection, claimed.email))["relay"] == one.relay
    assert await one.settle(settlement(sending, SENT, attempt=1))


@pytest.mark.parametrize("doubt_s", [None, 60.0])
async def test_a_sweep_frees_the_claims_of_a_dead_relay_and_doubts_what_it_marked(connection, relays, doubt_s):
    await put(connection, 3)
    dead, living = await relays(), await relays()
    sending = await dead.claim_and_mark()
    claims = await dead.claim(2)
    await dead.die(connection)
    found = await living.sweep(doubt_s)
    assert (found.dead, found.freed, found.doubted, found.alive) == ([dead.relay], 2, 1, 0)
    assert await standing(connection, sending) == ("in_doubt", 1, 0)
    assert await trail(connection, sending) == [(1, "in_doubt")]
    assert (await row(connection, sending.email))["relay"] == dead.relay, "its late news must find it"
    query = "SELECT due_at = 'infinity' FROM outbox.delivery WHERE email = $1"
    assert await connection.fetchval(query, sending.email) == (doubt_s is None)
    assert sorted(c.email for c in await living.claim(5)) == sorted(c.email for c in claims)
    assert await connection.fetchval("SELECT ended_at IS NOT NULL FROM outbox.relay WHERE id = $1", dead.relay)


async def test_a_dead_relay_is_judged_once(connection, relays):
    await put(connection, 1)
    dead, living = await relays(), await relays()
    claim = await dead.claim_and_mark()
    await dead.die(connection)
    await living.sweep()
    await living.settle(settlement(claim, SENT, attempt=1))
    assert await living.sweep() == Sweep([])
    assert await standing(connection, claim) == ("sent", 1, 0)


async def test_two_sweepers_at_once_judge_a_dead_relay_once(connection, relays):
    await put(connection, 40)
    sweepers = [await relays() for _ in range(4)]
    for _ in range(5):
        dead = await relays()
        claims = await dead.claim(4)
        await dead.mark(*claims[:2])
        await dead.die(connection)
        found = await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
        assert sorted((s.freed, s.doubted) for s in found) == [(0, 0), (0, 0), (0, 0), (2, 2)]
    assert await connection.fetchval("SELECT count(*) FROM outbox.attempt WHERE verdict = 'in_doubt'") == 10


async def test_a_sweeper_that_is_stopped_half_way_keeps_others_out_and_leaves_nothing_half_done(connection, relays):
    """The lock of a third session on the trails stops one sweep between its lock and its commit."""
    await put(connection, 2)
    dead, stopped, other = await relays(), await relays(), await relays()
    sending = await dead.claim_and_mark()
    (claimed,) = await dead.claim()
    await dead.die(connection)
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox.attempt IN SHARE MODE")
        sweep = asyncio.create_task(stopped.sweep())
        watch = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1"
        pid = stopped.connection.get_server_pid()
        await until(lambda: connection.fetchval(watch, pid), "the sweep waits for the table")
        async with asyncio.timeout(10):
            assert await other.sweep() == Sweep([], alive=2, beside=2)
        stopped.connection.terminate()
        with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresError, ConnectionError)):
            await sweep
        await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    assert await standing(connection, sending) == ("sending", 1, 0)
    assert (await row(connection, claimed.email))["relay"] == dead.relay
    found = await other.sweep()
    assert (sorted(found.dead), found.freed, found.doubted) == (sorted([dead.relay, stopped.relay]), 1, 1)


async def test_late_news_and_a_sweep_at_once_end_in_what_the_news_says(connection, relays):
    """Whoever commits first: doubt never outlives the 250."""
    for _ in range(10):
        await put(connection, 1)
        dead, sweeper, successor = await relays(), await relays(), await relays()
        claim = await dead.claim_and_mark()
        await dead.die(connection)
        await asyncio.gather(sweeper.sweep(), successor.settle(settlement(claim, SENT, attempt=1)))
        assert await standing(connection, claim) == ("sent", 1, 0)


async def test_a_relay_that_ends_itself_leaves_nothing_to_sweep(connection, relays):
    await put(connection, 2)
    one, other = await relays(), await relays()
    sending = await one.claim_and_mark()
    await one.claim()
    assert await judge(one.connection, [one.relay], doubt_s=None, died=False, quarantine=one.quarantine) == (1, 1)
    assert await other.sweep() == Sweep([])
    assert len(await other.claim(5)) == 1
    assert (await standing(connection, sending))[0] == "in_doubt"


async def test_a_suspect_waits_longer_after_each_death_so_that_one_bad_minute_quarantines_nobody(relays, connection):
    """Three relays die with it, which makes it a suspect; then it comes back after 1, 2 and 4 seconds."""
    await put(connection, 1)
    watcher = await relays()
    waits_s = []
    for _ in range(QUARANTINE_AFTER - 1):
        relay = await relays()
        done = await tick(relay.connection, relay.relay, TickRequest(claims_max=1, suspects_max=1))
        assert len(done.claims) == 1
        await relay.die(connection)
        await watcher.sweep()
        waits_s.append(
            await connection.fetchval("SELECT extract(epoch FROM due_at - now())::float8 FROM outbox.delivery")
        )
        await connection.execute("UPDATE outbox.delivery SET due_at = now()")
    assert [round(max(wait_s, 0)) for wait_s in waits_s] == [0, 0, 1, 2, 4]
