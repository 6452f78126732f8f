from outbox.relay.sender_holds import HOLD_FIRST_S, SenderHolds

NOW, BAD = 1000.0, "bad@example.com"


def test_a_refused_sender_waits_twice_as_long_each_time():
    holds = SenderHolds()
    assert holds.refuse(BAD, "553 no", NOW)
    assert holds.wait_s(BAD, NOW) == HOLD_FIRST_S
    assert holds.wait_s("good@example.com", NOW) == 0
    assert not holds.refuse(BAD, "553 still no", NOW), "news of the same refusal"
    assert holds.wait_s(BAD, NOW) == HOLD_FIRST_S
    later = NOW + HOLD_FIRST_S
    assert holds.wait_s(BAD, later) == 0
    holds.refuse(BAD, "553 still no", later)
    assert holds.wait_s(BAD, later) == 2 * HOLD_FIRST_S
    assert holds.reasons(refusals_min=2) == [(BAD, "553 still no")]


def test_an_accepted_sender_waits_no_more_and_the_route_is_refused_by_none():
    holds = SenderHolds()
    holds.refuse(BAD, "553 no", NOW)
    holds.note_route_refusal(BAD)
    assert holds.refused_the_route(BAD)
    assert holds.accept(BAD)
    assert not holds
    assert not holds.refused_the_route(BAD)
    assert not holds.accept(BAD)
