"""Which relay may take a suspect: of all that fall together one at a time, so that a guilty one falls alone."""

import time

from outbox.relay.supervisor import Relays
from outbox.settings import Settings
from outbox.smtp.outgoing import OutgoingEmail, Try


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
    suspect = OutgoingEmail(1, 1, "mail1", 0, 0, "a@example.com", "b@example.com", "<1@x>", b"x", suspect=True)
    pool = one.pool
    for hold, forget in (
        (lambda: pool.ready.put_first(Try(suspect)), pool.ready.take_all),
        (lambda: pool.returns.release(suspect), pool.returns.take),
        (lambda: pool.returns.rest(suspect), pool.returns.take),
        (lambda: pool.returns.hold(suspect, 1.0), pool.returns.take),
        (lambda: pool.verdicts.dropped.append((Try(suspect), "cut")), pool.verdicts.forget_undecided),
    ):
        hold()
        assert not one._may_take_suspect()
        assert not other._may_take_suspect(), "what one of them holds takes the other down, too"
        forget()
        assert other._may_take_suspect()
