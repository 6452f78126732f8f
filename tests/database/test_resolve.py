"""What a person may decide about a delivery."""

from outbox.operations.resolve import Decision, resolve
from tests.support.living_relays import (  # noqa: F401 - fixtures
    NEVER,
    SENT,
    emptied_database,
    living_relay,
    living_relays,
    put,
    settlement,
    shared_database,
)


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
