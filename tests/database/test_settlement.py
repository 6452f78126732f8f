"""How deliveries stand, for a settlement that changed nothing."""

from outbox.relay.settlement import states_of
from tests.support.living_relays import (  # noqa: F401 - fixtures
    emptied_database,
    living_relay,
    living_relays,
    put,
    settlement,
    shared_database,
)


async def test_standing_tells_where_deliveries_are_and_which_are_gone(connection, relay):
    await put(connection, 1)
    claim = await relay.claim_and_mark()
    found = await states_of(connection, [claim.email, 10**9])
    assert found == {claim.email: ("sending", 1), 10**9: (None, None)}
