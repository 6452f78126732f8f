from outbox.relay.sender_holds import HOLD_FIRST_S, PASSED_OVER_S, PROBES_MAX, SenderHolds, SortedOut
from tests.support.sending import a_try

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


def test_a_server_that_refused_all_is_asked_with_mail_of_another_sender():
    holds = SenderHolds()
    holds.note_route_refusal(BAD)
    bad, good = a_try(BAD), a_try("good@example.com")
    found = holds.choose_probe(SortedOut([bad, good]), is_free=True)
    assert (found.free, found.released) == ([good], [bad])
    assert holds.choose_probe(SortedOut([good]), is_free=False).free == []


def test_a_full_choice_of_refused_senders_rests_so_that_others_are_seen():
    holds = SenderHolds()
    holds.note_route_refusal(BAD)
    tries = [a_try(BAD) for _ in range(PROBES_MAX)]
    found = holds.choose_probe(SortedOut(tries), is_free=True)
    assert found.free == tries[:1]
    assert found.held == [(tried, PASSED_OVER_S) for tried in tries[1:]]
    assert not found.released
