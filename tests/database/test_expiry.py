"""`send_before`: what is too late is not sent and says so; what was accepted stays accepted."""

import asyncio

from outbox.relay import in_doubt
from outbox.relay.expiry import expire
from outbox.relay.tick import TickRequest, tick
from tests.support.living_relays import (  # noqa: F401 - fixtures
    DOUBT,
    SENT,
    emptied_database,
    living_relay,
    living_relays,
    put,
    settlement,
    shared_database,
)


async def set_last_moment(connection, emails, interval):
    await connection.execute(
        "UPDATE outbox.delivery SET send_before = now() + $2::text::interval WHERE email = ANY ($1::bigint[])",
        emails,
        interval,
    )


async def states(connection):
    return [r["state"] for r in await connection.fetch("SELECT state FROM outbox.delivery ORDER BY email")]


async def trail(connection):
    return [(r["email"], r["verdict"]) for r in await connection.fetch("SELECT email, verdict FROM outbox.attempt")]


async def test_what_is_too_late_is_not_claimed_and_expires(connection, relay):
    late, soon, never = await put(connection, 3)
    await set_last_moment(connection, [late], "-1 second")
    await set_last_moment(connection, [soon], "1 hour")
    assert {claim.email for claim in await relay.claim(10)} == {soon, never}
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 1
    assert await states(connection) == ["expired", "pending", "pending"]
    assert await trail(connection) == [(late, "expired")]
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 0


async def test_what_waits_for_its_next_try_expires_before_that(connection, relay):
    (email,) = await put(connection, 1)
    await connection.execute("UPDATE outbox.delivery SET due_at = now() + interval '1 hour'")
    await set_last_moment(connection, [email], "-1 second")
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 1


async def test_a_claim_whose_moment_passes_is_not_marked_but_expires(connection, relay):
    late, fine = await put(connection, 2)
    claims = await relay.claim(2)
    await set_last_moment(connection, [late], "-1 millisecond")
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 0, "what is claimed is its relay's"
    done = await tick(relay.connection, relay.relay, TickRequest(marks=[c.email for c in claims]))
    assert set(done.marked) == {fine}
    assert done.expired == {late}
    assert await states(connection) == ["expired", "sending"]
    assert await trail(connection) == [(late, "expired")]


async def test_what_is_past_its_mark_never_expires(connection, relay):
    (email,) = await put(connection, 1)
    claim = await relay.claim_and_mark()
    await set_last_moment(connection, [email], "-1 second")
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 0
    await relay.settle(settlement(claim, DOUBT, attempt=1))
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 0
    assert await states(connection) == ["in_doubt"]


async def test_a_late_acceptance_is_stronger_than_the_hour(connection, relay):
    """In doubt, put back by the policy, expired, and then its 250 comes after all."""
    (email,) = await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, DOUBT, attempt=1))
    await connection.execute("UPDATE outbox.delivery SET state = 'pending', doubted_at = NULL, relay = NULL")
    await set_last_moment(connection, [email], "-1 second")
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 1
    assert await relay.settle(settlement(claim, SENT, attempt=1)) == {(email, 1)}
    assert await states(connection) == ["sent"]


async def test_two_sweeps_at_once_expire_each_email_once(connection, relays):
    emails = await put(connection, 50)
    await set_last_moment(connection, emails, "-1 second")
    some = [await relays() for _ in range(4)]
    assert sum(await asyncio.gather(*(expire(one.connection, one.relay, one.quarantine) for one in some))) == 50
    assert len(await trail(connection)) == 50


async def test_what_may_have_been_sent_is_not_sent_again_after_its_hour_and_does_not_expire(connection, relays):
    """The hour is no evidence: it stays in doubt, for a person."""
    emails = await put(connection, 2)
    first, second = await relays(), await relays()
    await first.mark(*await first.claim(2))
    await connection.execute("UPDATE outbox.delivery SET send_before = now() WHERE email = $1", emails[0])
    await first.die(connection)
    await second.sweep(doubt_s=0.0)
    assert await in_doubt.resend_doubtful(second.connection, second.quarantine) == 1
    await expire(second.connection, second.relay, second.quarantine)
    assert await states(connection) == ["in_doubt", "pending"]
    assert await connection.fetchval("SELECT due_at = 'infinity' FROM outbox.delivery WHERE email = $1", emails[0])
    assert await in_doubt.resend_doubtful(second.connection, second.quarantine) == 0
