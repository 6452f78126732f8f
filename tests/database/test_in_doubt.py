"""The policy `resend`: doubt whose grace is over is sent again, once."""

import asyncio

import pytest

from outbox.relay import in_doubt as doubt
from tests.support.living_relays import (  # noqa: F401 - fixtures
    DOUBT,
    SENT,
    emptied_database,
    living_relay,
    living_relays,
    put,
    settlement,
    shared_database,
    standing,
    trail,
)


async def doubtful(connection, relay, *, doubt_s):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, DOUBT, attempt=1, doubt_s=doubt_s))
    return claim


@pytest.mark.parametrize("doubt_s", [60.0, None])
async def test_doubt_is_not_sent_again_before_its_grace_is_over_and_never_without_one(connection, relay, doubt_s):
    claim = await doubtful(connection, relay, doubt_s=doubt_s)
    assert await doubt.resend_doubtful(relay.connection, relay.quarantine) == 0
    assert await standing(connection, claim) == ("in_doubt", 1, 0)


async def test_doubt_whose_grace_is_over_is_sent_again_and_counts_as_a_try(connection, relay):
    claim = await doubtful(connection, relay, doubt_s=0)
    assert await doubt.resend_doubtful(relay.connection, relay.quarantine) == 1
    assert await standing(connection, claim) == ("pending", 1, 0)
    assert await trail(connection, claim) == [(1, "in_doubt"), (1, "resolved")]
    (again,) = await relay.claim()
    assert (again.message, again.attempt, again.withdrawn) == (claim.message, 1, 0)
    assert await relay.mark(again) == {again.email: 2}


async def test_relays_that_follow_the_policy_at_once_send_again_once(connection, relays):
    fleet = [await relays() for _ in range(4)]
    for _ in range(5):
        claim = await doubtful(connection, fleet[0], doubt_s=0)
        resent = await asyncio.gather(*(doubt.resend_doubtful(relay.connection, relay.quarantine) for relay in fleet))
        assert sorted(resent) == [0, 0, 0, 1]
        assert await trail(connection, claim) == [(1, "in_doubt"), (1, "resolved")]


async def test_the_policy_touches_nothing_but_doubt(connection, relay):
    await put(connection, 4)
    await relay.claim_and_mark()
    await relay.claim()
    sent = await relay.claim_and_mark()
    await relay.settle(settlement(sent, SENT, attempt=1))
    before = await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email")
    assert await doubt.resend_doubtful(relay.connection, relay.quarantine) == 0
    assert await connection.fetch("SELECT * FROM outbox.delivery ORDER BY email") == before


async def test_a_late_250_wins_over_the_policy_until_the_email_is_marked_again(connection, relay):
    claim = await doubtful(connection, relay, doubt_s=0)
    await doubt.resend_doubtful(relay.connection, relay.quarantine)
    assert await relay.settle(settlement(claim, SENT, attempt=1)) == {(claim.email, 1)}
    assert await standing(connection, claim) == ("sent", 1, 0)
