"""Where a relay's next claim begins, and when it is worth while to claim again at once."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from outbox.relay.claiming import ClaimPlan
from outbox.relay.tick import TickResult

NOW = 1000.0
REACHED = datetime(2026, 11, 30, 6, tzinfo=UTC)
NOTHING = TickResult(settled=frozenset(), marked={}, expired=frozenset(), claims=[], pause=None, reached=None)


def claims(number, *, urgent=False):
    return [SimpleNamespace(urgent=urgent, suspect=False, size=1) for _ in range(number)]


def note(plan, tick, *, room=4, now=NOW, in_parts=False):
    return plan.note(plan.request(room, now), tick, now, in_parts=in_parts)


def test_a_first_look_that_finds_nothing_is_not_repeated_at_once():
    progress = note(ClaimPlan(), NOTHING)
    assert not progress.found
    assert not progress.has_more


def test_as_many_as_asked_for_means_that_there_may_be_more():
    assert note(ClaimPlan(), replace(NOTHING, claims=claims(4))).has_more


def test_the_next_claim_begins_where_the_last_one_ended_and_then_looks_for_all():
    plan = ClaimPlan()
    note(plan, replace(NOTHING, claims=claims(4), reached=REACHED))
    assert plan.request(4, NOW).since == REACHED
    assert note(plan, NOTHING).has_more, "what came free behind the cursor is still to be looked for"
    assert plan.request(4, NOW).since is None


@pytest.mark.parametrize(
    ("tick", "in_parts", "again"),
    [
        (NOTHING, True, True),  # a row that fails was passed over: the others are claimed with the next tick
        (replace(NOTHING, locked=frozenset({7})), True, False),  # a lock may last
        (replace(NOTHING, unfit={7: "too large"}), False, True),
        (replace(NOTHING, bytes_wanted=100_000, claims=claims(1)), False, True),
        (replace(NOTHING, bytes_wanted=100_000), False, False),  # it waits for memory, which wakes the relay
    ],
)
def test_a_claim_is_repeated_at_once_only_if_another_may_find_more(tick, in_parts, again):
    assert note(ClaimPlan(), tick, in_parts=in_parts).has_more is again


def test_urgent_emails_get_most_of_the_room():
    assert ClaimPlan().request(4, NOW).urgent_max == 3
