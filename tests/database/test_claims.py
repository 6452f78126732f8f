"""Claims: of those that are due, by one relay at a time, until they are released."""

import asyncio
import random

from outbox.relay.claiming import ClaimCursor
from outbox.relay.claims import release
from outbox.relay.tick import TickRequest, tick
from tests.support.fleet import until
from tests.support.living_relays import (  # noqa: F401 - fixtures
    emptied_database,
    living_relay,
    living_relays,
    put,
    row,
    shared_database,
)


async def test_relays_that_claim_at_once_get_each_email_once(connection, relays):
    emails = await put(connection, 300)
    fleet = [await relays() for _ in range(6)]

    async def claim_until_none(relay):
        claims = []
        while found := await relay.claim(random.randint(1, 7)):
            claims += found
        return claims

    async with asyncio.timeout(30):
        hauls = await asyncio.gather(*map(claim_until_none, fleet))
    assert sorted(claim.email for haul in hauls for claim in haul) == emails
    for relay, haul in zip(fleet, hauls, strict=True):
        for claim in haul:
            assert claim.relay == relay.relay == (await row(connection, claim.email))["relay"]


async def test_a_claim_waits_for_no_row_that_another_holds(connection, relay):
    first, second = await put(connection, 2)
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox.delivery WHERE email = $1 FOR UPDATE", first)
        async with asyncio.timeout(5):
            assert [claim.email for claim in await relay.claim(2)] == [second]
    assert [claim.email for claim in await relay.claim(2)] == [first]


async def test_a_claim_takes_those_due_longest_first(connection, relay):
    late = await put(connection, 2, due_s=10)
    later = await put(connection, 2, due_s=30)
    latest = await put(connection, 2, due_s=20)
    claimed = [sorted(claim.email for claim in await relay.claim(2)) for _ in range(3)]
    assert claimed == [later, latest, late]


async def test_a_claim_begins_where_the_last_one_ended(connection, relay):
    emails = await put(connection, 5)
    first = await tick(relay.connection, relay.relay, TickRequest(claims_max=2))
    assert first.reached == (await row(connection, emails[1]))["due_at"]
    await release(relay.connection, relay.relay, emails[:1], quarantine=relay.quarantine)
    second = await tick(relay.connection, relay.relay, TickRequest(claims_max=2, since=first.reached))
    assert sorted(claim.email for claim in second.claims) == emails[2:4]
    last = await tick(relay.connection, relay.relay, TickRequest(claims_max=2, since=second.reached))
    assert ([claim.email for claim in last.claims], last.reached) == (emails[4:], None)
    assert [claim.email for claim in await relay.claim(2)] == emails[:1]  # what came free behind it


async def test_those_due_at_one_moment_are_claimed_beyond_the_frontier_too(connection, relay):
    """One transaction gives all its emails the same moment."""
    emails = await put(connection, 5)
    await connection.execute("UPDATE outbox.delivery SET due_at = now()")
    frontier, claimed = ClaimCursor(), []
    for _ in range(3):
        done = await tick(
            relay.connection, relay.relay, TickRequest(claims_max=2, since=(since := frontier.since(0.0)))
        )
        frontier.note(done.reached, since, 0.0)
        claimed += [claim.email for claim in done.claims]
    assert claimed == emails


async def test_a_claim_takes_no_more_than_there_is_room_for(connection, relay):
    await put(connection, 5)
    assert len(await relay.claim(0)) == 0
    assert len(await relay.claim(3)) == 3
    assert len(await relay.claim(3)) == 2
    assert len(await relay.claim(3)) == 0


async def test_what_is_not_due_is_not_claimed(connection, relay):
    await put(connection, 1, due_s=-60)
    assert await relay.claim() == []


async def test_a_claim_has_all_that_sending_needs(connection, relay):
    (email,) = await put(connection, 1)
    (claim,) = await relay.claim()
    made = await connection.fetchrow("SELECT * FROM outbox.email WHERE id = $1", email)
    assert (claim.key, claim.sender, claim.recipient, claim.message) == (
        *(made["key"], made["sender"], made["recipient"]),
        b"hello",
    )
    assert (claim.attempt, claim.withdrawn) == (0, 0)


async def test_what_is_given_back_is_anybodys_at_once(connection, relays):
    await put(connection, 2)
    one, other = await relays(), await relays()
    kept, given = await one.claim(2)
    await release(one.connection, one.relay, [given.email], quarantine=one.quarantine)
    assert [claim.email for claim in await other.claim(2)] == [given.email]
    assert await one.mark(kept) == {kept.email: 1}


async def test_only_unmarked_claims_of_ones_own_can_be_given_back(connection, relays):
    await put(connection, 2)
    one, other = await relays(), await relays()
    marked = await one.claim_and_mark()
    (foreign,) = await other.claim()
    await release(one.connection, one.relay, [marked.email, foreign.email], quarantine=one.quarantine)
    assert (await row(connection, marked.email))["relay"] == one.relay
    assert (await row(connection, foreign.email))["relay"] == other.relay


async def test_claims_and_marks_are_heap_only_updates(connection, relay):
    """They change no column of an index or of its predicate, so they cost no index entry."""
    await put(connection, 20)
    await connection.execute("VACUUM ANALYZE outbox.delivery")
    before = await updates(connection, relay)
    claims = await relay.claim(20)
    await relay.mark(*claims)
    await until(lambda: updates_since(before, connection, relay), "the statistics are out")
    assert await updates_since(before, connection, relay) == (40, 40)


async def updates(connection, relay):
    """How many rows were updated, and how many of them heap-only."""
    await relay.connection.execute("SELECT pg_stat_force_next_flush()")
    await relay.connection.fetchval("SELECT 1")
    return await connection.fetchrow(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'outbox.delivery'::regclass"
    )


async def updates_since(before, connection, relay):
    now = await updates(connection, relay)
    return (now[0] - before[0], now[1] - before[1]) if now[0] >= before[0] + 40 else None
