"""Where a claim begins, and the share of urgent emails in it."""

from datetime import UTC, datetime

import pytest

from outbox.relay.claiming import ClaimCursor, PriorityShare
from outbox.smtp.outgoing import Claim


def test_a_cursor_takes_all_now_and_then_and_once_less_comes_back():
    moment = datetime.now(UTC)
    more, less, cursor = moment, None, ClaimCursor()
    assert cursor.since(100.0) is None
    cursor.note(more, None, 100.0)
    assert [cursor.since(now) for now in (100.5, 100.99, 101.0)] == [moment, moment, None]
    cursor.note(more, moment, 100.5)
    assert cursor.since(101.0) is None  # a claim in part puts off nothing
    cursor.note(less, moment, 100.6)
    assert cursor.since(100.7) is None


def claims(urgent, others):
    return [
        Claim(1, n, f"mail{n}", 0, 0, "a@example.com", "b@example.com", "<1@x>", b"", urgent=n < urgent)
        for n in range(urgent + others)
    ]


@pytest.mark.parametrize("claims_max", [1, 2, 3, 4, 10])
def test_of_four_claims_one_is_anothers_however_few_are_claimed_at_once(claims_max):
    share, ordinary = PriorityShare(), 0
    for _ in range(400 // claims_max):
        urgent_max = share.urgent_max(claims_max)
        share.note(claims(urgent_max, claims_max - urgent_max), claims_max, urgent_max)
        ordinary += claims_max - urgent_max
    assert abs(ordinary - 100) <= 1


def test_nothing_is_owed_once_a_place_for_others_was_left_over():
    share = PriorityShare()
    share.note(claims(3, 0), 3, 3)
    assert share.urgent_max(3) == 2
    share.note(claims(2, 0), 3, 2)
    assert share.owed == 0.0


def test_more_urgent_emails_may_wait_if_only_their_share_was_claimed():
    share = PriorityShare()
    assert share.urgent_max(4) == 3
    assert share.note(claims(3, 0), 4, 3), "the place for another's was left over"
    assert not share.note(claims(3, 1), 4, 3), "all that was asked for was claimed"
    assert not share.note(claims(2, 0), 4, 3), "no more urgent ones wait"


def test_a_suspect_is_of_neither_kind():
    share = PriorityShare()
    (suspect,) = claims(0, 1)
    suspect.suspect = True
    assert share.note([suspect, *claims(3, 0)], 4, 3)
