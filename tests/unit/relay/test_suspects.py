"""Which relay may take a suspect: of all that fall together one at a time, so that a guilty one falls alone."""

import time
from types import SimpleNamespace

from outbox.relay.supervisor import Relays
from outbox.settings import Settings


async def test_relays_of_one_process_hold_one_suspect_among_them():
    settings = Settings(
        database_url="postgresql://user@host/db",
        smtp_url="smtp://one.example",
        routes={"other": {"smtp_url": "smtp://two.example"}},
    )
    one, other = Relays(settings).each
    for relay in (one, other):
        relay._opened_at = time.monotonic()
        assert not relay._may_take_suspect(), "one that has just begun may die of something else"
        relay._opened_at = time.monotonic() - 60
    assert one._may_take_suspect()
    assert other._may_take_suspect()
    suspect = SimpleNamespace(suspect=True)
    for place in (one.pool.ready, one.pool.releases, one.pool.put_off):
        place.append(suspect)
        assert not one._may_take_suspect()
        assert not other._may_take_suspect(), "what one of them holds takes the other down, too"
        place.clear()
    assert other._may_take_suspect()
