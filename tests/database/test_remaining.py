"""When an outbox is empty."""

import pytest

from outbox.relay.remaining import is_empty
from tests.support.living_relays import (  # noqa: F401 - fixtures
    DOUBT,
    LATER,
    NEVER,
    SENT,
    emptied_database,
    living_relay,
    living_relays,
    put,
    settlement,
    shared_database,
)


async def test_an_outbox_is_empty_when_nothing_is_pending_or_being_sent_by_anybody(connection, relays):
    one, other = await relays(), await relays()
    assert await is_empty(one.connection)
    await put(connection, 1)
    assert not await is_empty(one.connection)
    claim = await other.claim_and_mark()
    assert not await is_empty(one.connection)
    await other.settle(settlement(claim, LATER, attempt=1, delay_s=3600))
    assert not await is_empty(one.connection), "what is due later is not done"
    await connection.execute("UPDATE outbox.delivery SET due_at = now()")
    claim = await other.claim_and_mark()
    await other.settle(settlement(claim, SENT, attempt=2))
    assert await is_empty(one.connection)


@pytest.mark.parametrize("verdict", [DOUBT, NEVER])
async def test_what_waits_for_a_person_does_not_make_an_outbox_full(connection, relay, verdict):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, verdict, attempt=1))
    assert await is_empty(connection)
