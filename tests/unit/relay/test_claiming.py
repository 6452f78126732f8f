"""Where a relay's next claim begins, the share of urgent emails in it, and when it is worth while to claim again."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from outbox.relay.claiming import ClaimCursor, ClaimPlan, PriorityShare
from outbox.relay.tick import TickResult
from outbox.smtp.outgoing import OutgoingEmail

NOW = 1000.0
REACHED = datetime(2026, 11, 30, 6, tzinfo=UTC)
NOTHING = TickResult(settled=frozenset(), marked={}, expired=frozenset(), claims=[], pause=None, reached=None)


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
        OutgoingEmail(1, n, f"mail{n}", 0, 0, "a@example.com", "b@example.com", "<1@x>", b"", urgent=n < urgent)
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
    suspect = claims(0, 1)[0]._replace(suspect=True)
    assert share.note([suspect, *claims(3, 0)], 4, 3)


def note(plan, tick, *, room=4, now=NOW, in_parts=False):
    return plan.note(plan.request(room, now), tick, now, in_parts=in_parts)


def test_a_first_look_that_finds_nothing_is_not_repeated_at_once():
    progress = note(ClaimPlan(), NOTHING)
    assert not progress.found
    assert not progress.has_more


def test_as_many_as_asked_for_means_that_there_may_be_more():
    assert note(ClaimPlan(), replace(NOTHING, claims=claims(0, 4))).has_more


def test_the_next_claim_begins_where_the_last_one_ended_and_then_looks_for_all():
    plan = ClaimPlan()
    note(plan, replace(NOTHING, claims=claims(0, 4), reached=REACHED))
    assert plan.request(4, NOW).since == REACHED
    assert note(plan, NOTHING).has_more, "what came free behind the cursor is still to be looked for"
    assert plan.request(4, NOW).since is None


@pytest.mark.parametrize(
    ("tick", "in_parts", "again"),
    [
        (NOTHING, True, True),  # a row that fails was passed over: the others are claimed with the next tick
        (replace(NOTHING, locked=frozenset({7})), True, False),  # a lock may last
        (replace(NOTHING, unfit={7: "too large"}), False, True),
        (replace(NOTHING, bytes_wanted=100_000, claims=claims(0, 1)), False, True),
        (replace(NOTHING, bytes_wanted=100_000), False, False),  # it waits for memory, which wakes the relay
    ],
)
def test_a_claim_is_repeated_at_once_only_if_another_may_find_more(tick, in_parts, again):
    assert note(ClaimPlan(), tick, in_parts=in_parts).has_more is again


def test_urgent_emails_get_most_of_the_room():
    assert ClaimPlan().request(4, NOW).urgent_max == 3
