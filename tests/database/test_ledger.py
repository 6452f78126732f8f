import asyncio
import random
from datetime import UTC, datetime

import asyncpg
import pytest

from outbox.database.locks import RELAY_LOCKS
from outbox.operations.resolve import Decision, resolve
from outbox.relay import failover, ledger, session
from outbox.relay import in_doubt as doubt
from outbox.relay.ledger import Frontier, Settlement
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


@pytest.fixture(scope="module")
def one_database(postgres_server):
    return made_once(postgres_server, "ledger", lambda connected: connected.execute("SELECT pg_stat_reset()"))


@pytest.fixture
async def database(one_database):
    """The URL of an empty outbox: one for all tests here, emptied for each, since there are many."""
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

    async def claim(self, room=1):
        return (await ledger.tick(self.connection, self.relay, room=room)).claims

    async def mark(self, *claims):
        return (await ledger.tick(self.connection, self.relay, marks=[claim.email for claim in claims])).marked

    async def settle(self, *settlements):
        return (await ledger.tick(self.connection, self.relay, settlements=settlements)).settled

    async def sweep(self, doubt_s=None):
        return await ledger.sweep(self.connection, self.relay, doubt_s=doubt_s)

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


@pytest.fixture
async def relays(database):
    """Makes relays that live, in the test's database."""
    connections = []

    async def start():
        connections.append(await asyncpg.connect(database))
        return Living(connections[-1], await session._register(connections[-1], 1))

    yield start
    for connection in connections:
        connection.terminate()


@pytest.fixture
async def relay(relays):
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


# ── claim ────────────────────────────────────────────────────────────────────────────────────────────────────


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
    first = await ledger.tick(relay.connection, relay.relay, room=2)
    assert first.reached == (await row(connection, emails[1]))["due_at"]
    await ledger.release(relay.connection, relay.relay, emails[:1])
    second = await ledger.tick(relay.connection, relay.relay, room=2, since=first.reached)
    assert sorted(claim.email for claim in second.claims) == emails[2:4]
    last = await ledger.tick(relay.connection, relay.relay, room=2, since=second.reached)
    assert ([claim.email for claim in last.claims], last.reached) == (emails[4:], None)
    assert [claim.email for claim in await relay.claim(2)] == emails[:1]  # what came free behind it


async def test_those_due_at_one_moment_are_claimed_beyond_the_frontier_too(connection, relay):
    """One transaction gives all its emails the same moment."""
    emails = await put(connection, 5)
    await connection.execute("UPDATE outbox.delivery SET due_at = now()")
    frontier, claimed = Frontier(), []
    for _ in range(3):
        done = await ledger.tick(relay.connection, relay.relay, room=2, since=(since := frontier.since(0.0)))
        frontier.note(done.reached, since, 0.0)
        claimed += [claim.email for claim in done.claims]
    assert claimed == emails


def test_a_frontier_looks_for_all_now_and_then_and_once_less_comes_back():
    moment = datetime.now(UTC)
    more, less, frontier = moment, None, Frontier()
    assert frontier.since(100.0) is None
    frontier.note(more, None, 100.0)
    assert [frontier.since(now) for now in (100.5, 100.99, 101.0)] == [moment, moment, None]
    frontier.note(more, moment, 100.5)
    assert frontier.since(101.0) is None  # a claim in part puts off nothing
    frontier.note(less, moment, 100.6)
    assert frontier.since(100.7) is None


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
    assert (claim.attempt, claim.withdrawn, claim.marked) == (0, 0, False)


async def test_what_is_given_back_is_anybodys_at_once(connection, relays):
    await put(connection, 2)
    one, other = await relays(), await relays()
    kept, given = await one.claim(2)
    await ledger.release(one.connection, one.relay, [given.email])
    assert [claim.email for claim in await other.claim(2)] == [given.email]
    assert await one.mark(kept) == {kept.email: 1}


async def test_only_unmarked_claims_of_ones_own_can_be_given_back(connection, relays):
    await put(connection, 2)
    one, other = await relays(), await relays()
    marked = await one.claim_and_mark()
    (foreign,) = await other.claim()
    await ledger.release(one.connection, one.relay, [marked.email, foreign.email])
    assert (await row(connection, marked.email))["relay"] == one.relay
    assert (await row(connection, foreign.email))["relay"] == other.relay


# ── mark ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_ones_own_unmarked_claims_can_be_marked(connection, relays):
    emails = await put(connection, 4)
    one, other = await relays(), await relays()
    marked = await one.claim_and_mark()
    (claimed,) = await one.claim()
    (foreign,) = await other.claim()
    answer = await ledger.tick(one.connection, one.relay, marks=emails)
    assert answer.marked == {claimed.email: 1}, "not what is marked already, another's, or nobody's"
    assert await standing(connection, marked) == ("sending", 1, 0)
    assert await standing(connection, foreign) == ("pending", 0, 0)


async def test_a_mark_counts_the_attempt_and_says_when(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    found = await row(connection, claim.email)
    assert (found["state"], found["attempt"], found["relay"]) == ("sending", 1, relay.relay)
    assert found["marked_at"] is not None
    assert found["settled_at"] is None


async def test_one_commit_settles_marks_and_claims(connection, relay):
    await put(connection, 3)
    sending = await relay.claim_and_mark()
    (ready,) = await relay.claim()
    done = await ledger.tick(
        relay.connection, relay.relay, settlements=[settlement(sending, SENT, attempt=1)], marks=[ready.email], room=5
    )
    assert done.settled == {(sending.email, 1)}
    assert done.marked == {ready.email: 1}
    assert len(done.claims) == 1
    times = await connection.fetch(
        "SELECT DISTINCT coalesce(settled_at, marked_at) FROM outbox.delivery WHERE attempt > 0"
    )
    assert len(times) == 1


# ── settle ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("verdict", "state", "withdrawn", "relay_kept"),
    [
        (SENT, "sent", 0, True),
        (LATER, "pending", 0, False),
        (NEVER, "dead", 0, True),
        (DOUBT, "in_doubt", 0, True),
        (TAKEN_BACK, "pending", 1, False),
    ],
)
async def test_a_verdict_moves_its_delivery_and_leaves_one_trail(
    connection, relay, verdict, state, withdrawn, relay_kept
):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    assert await relay.settle(settlement(claim, verdict, attempt=1)) == {(claim.email, 1)}
    found = await row(connection, claim.email)
    assert (found["state"], found["attempt"], found["withdrawn"]) == (state, 1, withdrawn)
    assert (found["relay"] == relay.relay) == relay_kept
    assert (found["settled_at"] is not None) == (state in ("sent", "dead"))
    (said,) = await connection.fetch("SELECT * FROM outbox.attempt")
    assert (said["email"], said["attempt"], said["relay"]) == (claim.email, 1, relay.relay)
    assert (said["reply"], said["marked_at"]) == (verdict.reply, found["marked_at"])


async def test_a_deferred_delivery_is_due_again_after_its_delay_and_not_before(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, LATER, attempt=1, delay_s=60))
    assert await relay.claim() == []
    query = "SELECT extract(epoch FROM due_at - now()) FROM outbox.delivery"
    assert 55 < await connection.fetchval(query) <= 60
    await connection.execute("UPDATE outbox.delivery SET due_at = now() - interval '1 second'")
    (again,) = await relay.claim()
    assert again.attempt == 1
    assert await relay.mark(again) == {again.email: 2}


@pytest.mark.parametrize("doubt_s", [None, 60.0])
async def test_doubt_says_when_the_policy_acts_next(connection, relay, doubt_s):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, DOUBT, attempt=1, doubt_s=doubt_s))
    query = "SELECT due_at = 'infinity', due_at > now() + interval '55 seconds' FROM outbox.delivery"
    never, later = await connection.fetchrow(query)
    assert never == (doubt_s is None)
    assert later


async def test_what_is_in_doubt_is_never_claimed_however_long_it_is_due(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, DOUBT, attempt=1, doubt_s=0))
    assert await connection.fetchval("SELECT due_at <= now() FROM outbox.delivery")
    assert await relay.claim() == []
    assert await relay.mark(claim) == {}


async def test_a_withdrawn_mark_does_not_count_as_a_try(connection, relay):
    await put(connection, 1)
    for attempt in (1, 2, 3):
        claim = await relay.claim_and_mark()
        assert (claim.attempt, claim.withdrawn) == (attempt - 1, attempt - 1)
        await relay.settle(settlement(claim, TAKEN_BACK, attempt=attempt))
    (claim,) = await relay.claim()
    assert claim.attempt - claim.withdrawn == 0


async def test_a_refusal_before_the_mark_counts_as_a_try(connection, relay):
    await put(connection, 2)
    deferred, refused = await relay.claim(2)
    news = [
        settlement(deferred, LATER, attempt=1, marked=False),
        settlement(refused, NEVER, attempt=1, marked=False),
    ]
    assert await relay.settle(*news) == {(deferred.email, 1), (refused.email, 1)}
    assert await standing(connection, deferred) == ("pending", 1, 0)
    assert await standing(connection, refused) == ("dead", 1, 0)
    assert await trail(connection, refused) == [(1, "refused")]
    assert await relay.mark(deferred, refused) == {}, "the claims ended with the refusal"
    assert await connection.fetchval("SELECT count(*) FROM outbox.attempt WHERE marked_at IS NOT NULL") == 0


async def test_a_stale_settle_writes_nothing(connection, relays):
    await put(connection, 1)
    one, other = await relays(), await relays()
    stale = await one.claim_and_mark()
    await one.settle(settlement(stale, LATER, attempt=1))
    fresh = await other.claim_and_mark()
    before, said = await row(connection, fresh.email), await trail(connection, fresh)
    for verdict in (SENT, LATER, NEVER, DOUBT, TAKEN_BACK):
        for fence in [
            settlement(stale, verdict, attempt=1),  # an attempt that is over
            settlement(stale, verdict, attempt=2),  # the other's attempt under one's own name
            settlement(fresh, verdict, attempt=1),
            settlement(fresh, verdict, attempt=3),
            settlement(fresh, verdict, attempt=2, marked=False),
            settlement(fresh, verdict, attempt=3, marked=False),
        ]:
            assert await one.settle(fence) == frozenset()
            assert await other.settle(fence) == frozenset()
    assert await row(connection, fresh.email) == before
    assert await trail(connection, fresh) == said


@pytest.mark.parametrize("verdict", [SENT, NEVER])
async def test_what_is_settled_stays_so(connection, relay, verdict):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, verdict, attempt=1))
    before = await row(connection, claim.email)
    for late in (SENT, LATER, NEVER, DOUBT, TAKEN_BACK):
        assert await relay.settle(settlement(claim, late, attempt=1)) == frozenset()
    assert await row(connection, claim.email) == before
    assert len(await trail(connection, claim)) == 1


@pytest.mark.parametrize("verdict", [SENT, LATER, NEVER, DOUBT, TAKEN_BACK])
async def test_settling_twice_changes_nothing_the_second_time(connection, relay, verdict):
    """A tick whose commit is unknown is said again through the next session."""
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    news = settlement(claim, verdict, attempt=1, delay_s=5, doubt_s=60)
    await relay.settle(news)
    before, said = await row(connection, claim.email), await trail(connection, claim)
    await relay.settle(news)
    assert await row(connection, claim.email) == before
    assert await trail(connection, claim) == said


async def test_one_delivery_told_twice_in_one_tick_is_settled_once(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    news = settlement(claim, SENT, attempt=1)
    assert await relay.settle(news, news) == {(claim.email, 1)}
    assert await trail(connection, claim) == [(1, "accepted")]


async def test_a_relays_unmarked_claims_are_untouched_by_its_settles(connection, relay):
    await put(connection, 2)
    sending = await relay.claim_and_mark()
    (claimed,) = await relay.claim()
    before = await row(connection, claimed.email)
    await relay.settle(
        settlement(sending, SENT, attempt=1), *(settlement(claimed, v, attempt=1) for v in (SENT, NEVER, TAKEN_BACK))
    )
    assert await row(connection, claimed.email) == before
    assert await relay.mark(claimed) == {claimed.email: 1}


async def test_a_nul_in_a_reply_does_not_stop_the_ledger(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    assert await relay.settle(settlement(claim, Refused("550 a\0b � ü"), attempt=1))
    assert await connection.fetchval("SELECT reply FROM outbox.attempt") == "550 ab � ü"


# ── late news ────────────────────────────────────────────────────────────────────────────────────────────────


async def in_doubt(connection, relays):
    """A claim that its relay marked and then died over, judged by one that lives."""
    await put(connection, 1)
    dead, living = await relays(), await relays()
    claim = await dead.claim_and_mark()
    await dead.die(connection)
    assert (await living.sweep()).doubted == 1
    assert await standing(connection, claim) == ("in_doubt", 1, 0)
    return claim, living


@pytest.mark.parametrize(
    ("verdict", "state"), [(SENT, "sent"), (LATER, "pending"), (NEVER, "dead"), (TAKEN_BACK, "pending")]
)
async def test_late_news_of_its_own_attempt_ends_doubt(connection, relays, verdict, state):
    claim, living = await in_doubt(connection, relays)
    assert await living.settle(settlement(claim, verdict, attempt=1)) == {(claim.email, 1)}
    assert (await standing(connection, claim))[0] == state
    assert [said for _, said in await trail(connection, claim)][:-1] == ["in_doubt"]


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_late_250_settles_a_delivery_that_is_to_be_sent_again_and_is_not_marked_yet(
    connection, relays, claimed
):
    claim, living = await in_doubt(connection, relays)
    await resolve(connection, [claim.key], Decision.RESEND)
    again = await living.claim() if claimed else []
    assert await living.settle(settlement(claim, SENT, attempt=1)) == {(claim.email, 1)}
    assert await standing(connection, claim) == ("sent", 1, 0)
    assert await living.mark(*again) == {}, "so it is not sent again"


async def test_a_late_250_settles_a_dead_letter_that_is_to_be_sent_again(connection, relays):
    """It counts no tries any more, and the one that was accepted is one again."""
    claim, living = await in_doubt(connection, relays)
    await resolve(connection, [claim.key], Decision.DISCARD)
    await resolve(connection, [claim.key], Decision.RESEND)
    assert await living.settle(settlement(claim, SENT, attempt=1)) == {(claim.email, 1)}
    assert await standing(connection, claim) == ("sent", 1, 0)


@pytest.mark.parametrize("verdict", [LATER, NEVER, DOUBT, TAKEN_BACK])
async def test_other_late_news_does_not_undo_the_decision_to_send_again(connection, relays, verdict):
    claim, living = await in_doubt(connection, relays)
    await resolve(connection, [claim.key], Decision.RESEND)
    before = await row(connection, claim.email)
    assert await living.settle(settlement(claim, verdict, attempt=1)) == frozenset()
    assert await row(connection, claim.email) == before


async def test_a_late_250_does_not_settle_a_delivery_that_was_marked_again(connection, relays):
    claim, living = await in_doubt(connection, relays)
    await resolve(connection, [claim.key], Decision.RESEND)
    again = await living.claim_and_mark()
    assert await living.settle(settlement(claim, SENT, attempt=1)) == frozenset()
    assert await standing(connection, again) == ("sending", 2, 0)


@pytest.mark.parametrize("what", ["claim", "mark"])
async def test_a_late_250_in_the_very_tick_that_takes_its_delivery_up_again_wins(connection, relays, what):
    claim, living = await in_doubt(connection, relays)
    await resolve(connection, [claim.key], Decision.RESEND)
    marks = [found.email for found in await living.claim()] if what == "mark" else []
    done = await ledger.tick(
        living.connection, living.relay, settlements=[settlement(claim, SENT, attempt=1)], marks=marks, room=5
    )
    assert (done.settled, done.marked, done.claims) == ({(claim.email, 1)}, {}, [])
    assert await standing(connection, claim) == ("sent", 1, 0)


@pytest.mark.parametrize("decision", [Decision.SENT, Decision.DISCARD])
async def test_what_a_person_decided_for_good_is_final(connection, relays, decision):
    claim, living = await in_doubt(connection, relays)
    assert await resolve(connection, [claim.key], decision) == [claim.key]
    before = await row(connection, claim.email)
    for verdict in (SENT, LATER, NEVER, DOUBT, TAKEN_BACK):
        assert await living.settle(settlement(claim, verdict, attempt=1)) == frozenset()
    assert await row(connection, claim.email) == before


async def test_a_mark_whose_commit_is_unknown_can_be_taken_back_whether_it_was_made_or_not(connection, relays):
    await put(connection, 2)
    lost, living = await relays(), await relays()
    made = await lost.claim_and_mark()
    (not_made,) = await lost.claim()
    await lost.die(connection)
    news = [settlement(claim, TAKEN_BACK, attempt=1) for claim in (made, not_made)]
    assert await living.settle(*news) == {(made.email, 1)}
    assert await standing(connection, made) == ("pending", 1, 1)
    assert await standing(connection, not_made) == ("pending", 0, 0)
    await living.sweep()
    assert sorted(claim.email for claim in await living.claim(5)) == sorted([made.email, not_made.email])


@pytest.mark.parametrize("verdict", [SENT, LATER, NEVER, DOUBT, TAKEN_BACK])
async def test_taking_back_a_mark_that_was_never_made_leaves_anothers_mark_of_the_same_number(
    connection, relays, verdict
):
    """The lost relay's mark did not commit; its successor made attempt 1 and is past its dot when the news comes."""
    await put(connection, 1)
    lost, living, bearer = await relays(), await relays(), await relays()
    (not_made,) = await lost.claim()
    await lost.die(connection)
    await living.sweep()
    made = await living.claim_and_mark()
    before = await row(connection, made.email)
    assert await bearer.settle(settlement(not_made, verdict, attempt=1)) == frozenset()
    assert await row(connection, made.email) == before
    assert await living.settle(settlement(made, SENT, attempt=1))


# ── sweep ────────────────────────────────────────────────────────────────────────────────────────────────────


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
    assert await living.sweep() == ledger.Sweep([])
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
            assert await other.sweep() == ledger.Sweep([], alive=2, beside=2)
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
    assert await ledger.judge(one.connection, [one.relay], doubt_s=None, died=False) == (1, 1)
    assert await other.sweep() == ledger.Sweep([])
    assert len(await other.claim(5)) == 1
    assert (await standing(connection, sending))[0] == "in_doubt"


# ── the policy `resend` ──────────────────────────────────────────────────────────────────────────────────────


async def doubtful(connection, relay, *, doubt_s):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, DOUBT, attempt=1, doubt_s=doubt_s))
    return claim


@pytest.mark.parametrize("doubt_s", [60.0, None])
async def test_doubt_is_not_sent_again_before_its_grace_is_over_and_never_without_one(connection, relay, doubt_s):
    claim = await doubtful(connection, relay, doubt_s=doubt_s)
    assert await doubt.resend_doubtful(relay.connection) == 0
    assert await standing(connection, claim) == ("in_doubt", 1, 0)


async def test_doubt_whose_grace_is_over_is_sent_again_and_counts_as_a_try(connection, relay):
    claim = await doubtful(connection, relay, doubt_s=0)
    assert await doubt.resend_doubtful(relay.connection) == 1
    assert await standing(connection, claim) == ("pending", 1, 0)
    assert await trail(connection, claim) == [(1, "in_doubt"), (1, "resolved")]
    (again,) = await relay.claim()
    assert (again.message, again.attempt, again.withdrawn) == (claim.message, 1, 0)
    assert await relay.mark(again) == {again.email: 2}


async def test_relays_that_follow_the_policy_at_once_send_again_once(connection, relays):
    fleet = [await relays() for _ in range(4)]
    for _ in range(5):
        claim = await doubtful(connection, fleet[0], doubt_s=0)
        resent = await asyncio.gather(*(doubt.resend_doubtful(relay.connection) for relay in fleet))
        assert sorted(resent) == [0, 0, 0, 1]
        assert await trail(connection, claim) == [(1, "in_doubt"), (1, "resolved")]


async def test_the_policy_touches_nothing_but_doubt(connection, relay):
    await put(connection, 4)
    await relay.claim_and_mark()
    await relay.claim()
    sent = await relay.claim_and_mark()
    await relay.settle(settlement(sent, SENT, attempt=1))
    before = await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email")
    assert await doubt.resend_doubtful(relay.connection) == 0
    assert await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email") == before


async def test_a_late_250_wins_over_the_policy_until_the_email_is_marked_again(connection, relay):
    claim = await doubtful(connection, relay, doubt_s=0)
    await doubt.resend_doubtful(relay.connection)
    assert await relay.settle(settlement(claim, SENT, attempt=1)) == {(claim.email, 1)}
    assert await standing(connection, claim) == ("sent", 1, 0)


# ── empty, standing ──────────────────────────────────────────────────────────────────────────────────────────


async def test_an_outbox_is_empty_when_nothing_is_pending_or_being_sent_by_anybody(connection, relays):
    one, other = await relays(), await relays()
    assert await ledger.is_empty(one.connection)
    await put(connection, 1)
    assert not await ledger.is_empty(one.connection)
    claim = await other.claim_and_mark()
    assert not await ledger.is_empty(one.connection)
    await other.settle(settlement(claim, LATER, attempt=1, delay_s=3600))
    assert not await ledger.is_empty(one.connection), "what is due later is not done"
    await connection.execute("UPDATE outbox.delivery SET due_at = now()")
    claim = await other.claim_and_mark()
    await other.settle(settlement(claim, SENT, attempt=2))
    assert await ledger.is_empty(one.connection)


@pytest.mark.parametrize("verdict", [DOUBT, NEVER])
async def test_what_waits_for_a_person_does_not_make_an_outbox_full(connection, relay, verdict):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, verdict, attempt=1))
    assert await ledger.is_empty(connection)


async def test_standing_tells_where_deliveries_are_and_which_are_gone(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    found = await ledger.standing(connection, [claim.email, 10**9])
    assert found == {claim.email: ("sending", 1), 10**9: (None, None)}


# ── resolve ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_person_decides_only_about_what_is_in_doubt_or_dead(connection, relay):
    await put(connection, 4)
    (claimed,) = await relay.claim()
    sending, sent = await relay.claim_and_mark(), await relay.claim_and_mark()
    await relay.settle(settlement(sent, SENT, attempt=1))
    before = await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email")
    keys = [row["key"] for row in await connection.fetch("SELECT key FROM outbox.email")]
    for decision in Decision:
        assert await resolve(connection, [*keys, "nobody's"], decision) == []
    assert await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email") == before
    assert claimed.email != sending.email


async def test_a_dead_letter_that_is_sent_again_has_all_its_tries_and_cannot_be_called_sent(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, NEVER, attempt=1))
    assert await resolve(connection, [claim.key], Decision.SENT) == []
    assert await resolve(connection, [claim.key], Decision.RESEND) == [claim.key]
    (again,) = await relay.claim()
    assert (again.attempt, again.attempt - again.withdrawn) == (1, 0)
    assert await relay.mark(again) == {again.email: 2}, "an attempt's number is never used twice"


# ── the schema refuses impossible rows ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def one_email(postgres_server):
    return made_once(postgres_server, "ledger_one_email", lambda connected: put(connected, 1))


@pytest.fixture
async def spoiled(one_email):
    """A connection to a database with one email; what a test does to it is rolled back."""
    connected = await asyncpg.connect(one_email)
    await connected.execute("BEGIN")
    yield connected
    await connected.close()


@pytest.mark.parametrize(
    "change",
    [
        "state = 'sending', attempt = 1, marked_at = now()",
        "state = 'sending', attempt = 1, relay = 1",
        "state = 'sending', relay = 1, marked_at = now()",
        "state = 'sending', relay = 1, marked_at = now(), attempt = 2, withdrawn = 2",
        "state = 'sending', relay = 1, marked_at = now(), attempt = 1, settled_at = now()",
        "state = 'in_doubt', attempt = 1, marked_at = now()",
        "state = 'in_doubt', attempt = 1, relay = 1",
        "state = 'in_doubt', relay = 1, marked_at = now()",
        "state = 'in_doubt', relay = 1, marked_at = now(), attempt = 1, settled_at = now()",
        "state = 'sent', relay = 1, marked_at = now(), attempt = 1",
        "state = 'sent', relay = 1, marked_at = now(), settled_at = now()",
        "state = 'sent', relay = 1, marked_at = now(), settled_at = now(), attempt = 1, withdrawn = 1",
        "state = 'dead', attempt = 1",
        "state = 'dead', settled_at = now()",
        "state = 'cancelled'",
        "state = 'expired'",
        "settled_at = now()",
        "attempt = -1",
        "withdrawn = -1",
        "withdrawn = 1",
        "state = 'failed'",
        "state = NULL",
        "due_at = NULL",
        "attempt = NULL",
        "withdrawn = NULL",
        "email = 10 ^ 9",
    ],
)
async def test_an_impossible_delivery_is_refused(spoiled, change):
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await spoiled.execute(f"UPDATE outbox.delivery SET {change}")


@pytest.mark.parametrize("column", ["sender", "recipient"])
@pytest.mark.parametrize(
    "address",
    [
        "a\r\nRCPT TO:<x@y>",
        "a\r@x",
        "a\n@x",
        "a b@x",
        "a\t@x",
        "<a@x>",
        "a@x>",
        "a<b@x",
        "a@x ",
        " a@x",
        "a\x7f@x",
        "\x01",
    ],
)
async def test_an_address_that_could_say_another_command_is_refused(spoiled, column, address):
    with pytest.raises(asyncpg.CheckViolationError):
        await spoiled.execute(f"UPDATE outbox.email SET {column} = $1", address)


async def test_only_the_sender_may_be_empty(spoiled):
    await spoiled.execute("UPDATE outbox.email SET sender = ''")
    with pytest.raises(asyncpg.CheckViolationError):
        await spoiled.execute("UPDATE outbox.email SET recipient = ''")


async def test_one_key_is_one_email(spoiled):
    with pytest.raises(asyncpg.UniqueViolationError):
        await spoiled.execute("""
            INSERT INTO outbox.email (key, sender, recipient, message_id, message)
            SELECT key, sender, recipient, message_id, message FROM outbox.email""")


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────


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
    [{"plan_cache_mode": "force_custom_plan"}, {"plan_cache_mode": "force_generic_plan"}, session.PLANS],
    ids=["custom", "generic", "a relay's"],
)


@planners
async def test_a_tick_reads_open_rows_by_their_index_whatever_history_there_is(history, settings):
    arguments = """('{1,2}', '{1,1}', '{7,7}', '{t,t}', '{sent,pending}', '{null,30}', '{accepted,deferred}',
                    '{250,451}', 7, '{3,4,5}', 32, 1, 'localhost:25', null, '', null, 24,
                    20971520, 20971520, '{}', 0)"""
    plan = await plan_of(history, ledger.TICK, arguments, settings)
    assert "delivery_due" in plan
    assert plan.count("delivery_pkey") >= 2, "a verdict and a mark find their rows by key, not along the backlog"
    assert "Seq Scan on delivery" not in plan, plan
    assert "Seq Scan on email" not in plan, plan


@planners
@pytest.mark.parametrize(
    ("statement", "arguments"),
    [
        (ledger.JUDGE, "('{7,8}', 60, 1, 6, '{}')"),
        (ledger.EMPTY, "(null, '', '{}')"),
        (ledger.RELEASE, "('{1,2}', 7, 0)"),
        (doubt.RESEND, "(100, '{}')"),
        (doubt.TAKE_DOUBTS, "(20, 60, '{}')"),
        (
            failover.REASSERT,
            "('{k}', '{a}', '{b}', '{i}', '{m}', '{7}', '{1}', '{sent}', '{accepted}', '{250}', '{null}', '', 'i')",
        ),
        (ledger.STANDING, "('{1,2}')"),
    ],
    ids=["judge", "empty", "release", "resend", "ask", "reassert", "standing"],
)
async def test_no_other_statement_of_the_relay_reads_history(history, settings, statement, arguments):
    plan = await plan_of(history, statement, arguments, settings)
    assert "Seq Scan on delivery" not in plan, plan


async def test_a_suspect_waits_longer_after_each_death_so_that_one_bad_minute_quarantines_nobody(relays, connection):
    """Three relays die with it, which makes it a suspect; then it comes back after 1, 2 and 4 seconds."""
    await put(connection, 1)
    watcher = await relays()
    waits_s = []
    for _ in range(ledger.QUARANTINE_AFTER - 1):
        relay = await relays()
        done = await ledger.tick(relay.connection, relay.relay, room=1, suspects=1)
        assert len(done.claims) == 1
        await relay.die(connection)
        await watcher.sweep()
        waits_s.append(
            await connection.fetchval("SELECT extract(epoch FROM due_at - now())::float8 FROM outbox.delivery")
        )
        await connection.execute("UPDATE outbox.delivery SET due_at = now()")
    assert [round(max(wait_s, 0)) for wait_s in waits_s] == [0, 0, 1, 2, 4]


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
