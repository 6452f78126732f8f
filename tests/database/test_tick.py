"""Marks and settlements: each under its fence, whatever happened to the delivery meanwhile."""

import pytest

from outbox.operations.resolve import Decision, resolve
from outbox.relay.tick import TickRequest, tick
from outbox.smtp.verdict import Refused
from tests.support.living_relays import (  # noqa: F401 - fixtures
    DOUBT,
    LATER,
    NEVER,
    SENT,
    TAKEN_BACK,
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


async def test_only_ones_own_unmarked_claims_can_be_marked(connection, relays):
    emails = await put(connection, 4)
    one, other = await relays(), await relays()
    marked = await one.claim_and_mark()
    (claimed,) = await one.claim()
    (foreign,) = await other.claim()
    answer = await tick(one.connection, one.relay, TickRequest(marks=emails))
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
    done = await tick(
        relay.connection,
        relay.relay,
        TickRequest(settlements=[settlement(sending, SENT, attempt=1)], marks=[ready.email], claims_max=5),
    )
    assert done.settled == {(sending.email, 1)}
    assert done.marked == {ready.email: 1}
    assert len(done.claims) == 1
    times = await connection.fetch(
        "SELECT DISTINCT coalesce(settled_at, marked_at) FROM outbox.delivery WHERE attempt > 0"
    )
    assert len(times) == 1


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


async def test_a_nul_in_a_reply_does_not_stop_the_tick(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    assert await relay.settle(settlement(claim, Refused("550 a\0b � ü"), attempt=1))
    assert await connection.fetchval("SELECT reply FROM outbox.attempt") == "550 ab � ü"


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
    done = await tick(
        living.connection,
        living.relay,
        TickRequest(settlements=[settlement(claim, SENT, attempt=1)], marks=marks, claims_max=5),
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
