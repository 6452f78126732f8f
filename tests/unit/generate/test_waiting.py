"""Waiting for other servers: when it ends, and whom the message names."""

from outbox.generate import waiting
from outbox.generate.buckets import bucket_of
from outbox.generate.waiting import IdleHolders, Pauses


def test_patience_begins_again_with_each_new_fact_and_not_with_an_old_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    patience = waiting.Patience(10)
    for at, fact, is_over in ((5, "a", False), (14, "b", False), (23, "a", False), (25, "a", True), (25, "c", False)):
        now[0] = at
        patience.note(fact)
        assert patience.is_over is is_over, at


def test_pauses_grow_to_their_limit_until_a_bucket_was_free():
    pauses = Pauses()
    assert not pauses.is_idle
    found = [pauses.next_s() for _ in range(9)]
    assert pauses.is_idle
    assert 0.5 * waiting.PAUSE_FIRST_S <= found[0] <= 1.5 * waiting.PAUSE_FIRST_S
    assert 0.5 * waiting.PAUSE_MAX_S <= found[-1] <= 1.5 * waiting.PAUSE_MAX_S
    pauses.end()
    assert not pauses.is_idle
    assert pauses.next_s() <= 1.5 * waiting.PAUSE_FIRST_S


def test_a_session_that_made_no_report_is_named_and_not_waited_for_again():
    holders = {bucket_of("1"): "pid 4711 (role app)", bucket_of("2"): "pid 4712 (role app)"}
    idle = IdleHolders(30)
    assert not idle.hold_all(["1"], holders)
    reasons = idle.give_up(["1"], holders)
    assert reasons["1"].startswith("its report is reserved by pid 4711 (role app), and no report was made for 30 s")
    assert idle.hold_all(["1"], holders)
    assert not idle.hold_all(["1", "2"], holders)
