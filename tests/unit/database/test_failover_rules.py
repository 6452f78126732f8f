"""When the barrier is raised, for whom it waits, and who lifts it: one decision a test."""

import pytest

from outbox.database.failover_rules import (
    LIFT_MIN_S,
    UNHEARD_S,
    Answer,
    Here,
    Kind,
    Other,
    Presence,
    Row,
    Standing,
    answer_of,
    awaited_by,
    may_lift,
    raised,
    reason_to_raise,
)

ONE, TWO = (1, None), (2, None)
STANDS = Row(epoch=4, kind=Kind.MOVE, awaited=frozenset("b"), until_s=20.0, is_lifted=False, moved_epoch=4)


def standing(**known):
    return Standing("a", blind_s=5.0, grace_s=30.0, **known)


def reason(here, **known):
    return reason_to_raise(here, standing(**known), 100.0)


@pytest.mark.parametrize(
    "here, kind",
    [
        (Here(TWO), None),
        (Here(TWO, is_first=True), Kind.MOVE),
        (Here(TWO, [Other("b", 2)]), Kind.START),
        (Here(TWO, [Other("b", 2), Other("c", 1)]), Kind.MOVE),
        (Here(ONE, [Other("b", 2)]), Kind.MOVE),
    ],
    ids=["alone", "the first on this timeline", "beside another", "one of the old server is not back", "an older one"],
)
def test_a_new_relay_raises_it_for_what_it_finds(here, kind):
    assert reason(here) is kind


@pytest.mark.parametrize(
    "here, known, kind",
    [
        (Here(TWO), {"server": TWO, "answered_s": 96.0}, None),
        (Here(TWO), {"server": TWO, "answered_s": 94.0}, Kind.GAP),
        (Here(TWO), {"server": TWO, "answered_s": 100.0, "has_gap": True}, Kind.GAP),
        (Here(TWO), {"server": ONE, "answered_s": 100.0}, Kind.MOVE),
        (Here(ONE), {"server": TWO, "answered_s": 100.0}, Kind.MOVE),
        (Here((2, 1), has_last=True), {"server": TWO, "answered_s": 100.0}, None),
        (Here((2, 1), has_last=True), {"server": TWO, "answered_s": 90.0}, Kind.GAP),
        (Here((2, 1)), {"server": TWO, "answered_s": 100.0}, Kind.MOVE),
        (Here((0, 1), has_last=True), {"server": (0, None), "answered_s": 100.0}, Kind.MOVE),
        (Here((2, 1), has_last=True), {"server": TWO, "answered_s": 100.0, "visited": [(2, 1), TWO]}, Kind.MOVE),
    ],
    ids=[
        "at work", "silent", "a gap that is told to nobody", "forward", "back", "restarted", "restarted after long",
        "another of the same timeline", "restarted, without timelines", "one of the same timeline and id, seen before",
    ],
)  # fmt: skip
def test_a_relay_raises_it_for_where_it_was(here, known, kind):
    assert reason(here, **known) is kind


def test_back_on_an_old_server_those_met_within_an_hour_are_waited_for_and_on_a_new_one_those_just_seen():
    known = standing(server=TWO, answered_s=5000.0, seen={"just": 4996.0, "met": 1500.0, "long ago": 1300.0})
    assert awaited_by(Kind.MOVE, Here(ONE), known) == {"a", "just", "met"}
    assert awaited_by(Kind.MOVE, Here((3, None), [Other("here", 2)]), known) == {"a", "just", "here"}
    assert awaited_by(Kind.GAP, Here(ONE), known) == {"a", "just"}
    visited = standing(server=TWO, answered_s=5000.0, seen={"met": 1500.0}, visited=[(3, None)])
    assert awaited_by(Kind.MOVE, Here((3, None)), visited) == {"a", "met"}


@pytest.mark.parametrize(
    "kind, until_s, lift_in_s",
    [(Kind.START, UNHEARD_S, 0.0), (Kind.GAP, 30.0, UNHEARD_S), (Kind.MOVE, 30.0, LIFT_MIN_S)],
)
def test_each_kind_has_its_least_and_its_longest_wait(kind, until_s, lift_in_s):
    row = raised(Row(epoch=4), kind, frozenset("a"), 30.0)
    assert (row.epoch, row.kind, row.until_s, row.lift_in_s) == (5, kind, until_s, lift_in_s)
    assert not row.is_lifted
    assert (row.moved_epoch == 5) is (kind is Kind.MOVE)


@pytest.mark.parametrize("kind", list(Kind))
def test_one_that_stands_keeps_its_end_its_kind_and_those_it_waits_for(kind):
    row = raised(STANDS, kind, frozenset("a"), 30.0)
    assert (row.epoch, row.kind, row.until_s, row.awaited) == (5, Kind.MOVE, 20.0, {"a", "b"})
    assert row.moved_epoch == 5, "who was at work here must not lift it"


def test_one_whose_time_is_over_begins_anew():
    row = raised(
        Row(epoch=4, kind=Kind.MOVE, awaited=frozenset("b"), is_lifted=False), Kind.START, frozenset("a"), 30.0
    )
    assert (row.kind, row.awaited, row.until_s) == (Kind.START, {"a"}, UNHEARD_S)


def test_relays_that_wait_lift_it_once_all_have_told_and_its_least_time_is_over():
    assert may_lift(STANDS, "b", waited_s=2.0, grace_s=30.0)
    assert not may_lift(STANDS, "a", waited_s=2.0, grace_s=30.0)
    assert may_lift(STANDS, "", waited_s=30.0, grace_s=30.0)
    early = Row(awaited=frozenset("b"), until_s=20.0, lift_in_s=0.5, is_lifted=False)
    assert not may_lift(early, "b", waited_s=2.0, grace_s=30.0)
    assert may_lift(Row(awaited=frozenset("b"), lift_in_s=0.5, is_lifted=False), "", waited_s=2.0, grace_s=30.0)


@pytest.mark.parametrize(
    "row, known, has_gap, answer",
    [
        (Row(epoch=5, moved_epoch=5), 4, False, Answer.GO_ON),
        (Row(epoch=5, is_lifted=False), 4, False, Answer.VOUCH),
        (Row(epoch=5, is_lifted=False), 4, True, Answer.WAIT),
        (Row(epoch=5, is_lifted=False), 5, False, Answer.WAIT),
        (Row(epoch=5, is_lifted=False, moved_epoch=5), 4, False, Answer.WAIT),
        (Row(epoch=6, is_lifted=False, moved_epoch=5), 4, False, Answer.WAIT),
        (Row(epoch=6, is_lifted=False, moved_epoch=4), 4, False, Answer.VOUCH),
    ],
)
def test_one_at_work_lifts_only_what_it_knows_better(row, known, has_gap, answer):
    assert answer_of(row, known, has_gap=has_gap) is answer


def test_a_time_without_an_answer_is_a_gap_until_the_barrier_is_raised_for_it():
    presence = Presence("a", blind_s=5.0, answered_s=10.0)
    presence.note_answer(15.0)
    assert not presence.has_gap
    presence.note_answer(21.0)
    presence.note_answer(22.0)
    known = presence.standing(ONE, grace_s=30.0)
    assert (known.has_gap, known.answered_s) == (True, 15.0)
    presence.arrive(ONE, 23.0)
    known = presence.standing(ONE, grace_s=30.0)
    assert (known.has_gap, known.answered_s, known.visited) == (False, 23.0, {ONE})


def test_whom_it_met_on_one_server_it_knows_on_the_next():
    """The other may come there and send before it is seen there."""
    presence = Presence("a" * 32, blind_s=5.0)
    presence.hear("joined " + "b" * 32, 10.0)
    presence.hear("joined " + "a" * 32, 10.0)
    presence.hear("joined short", 10.0)
    presence.arrive(TWO, 11.0, ["c" * 32])
    assert set(presence.standing(TWO, grace_s=30.0).seen) == {"b" * 32, "c" * 32}
    presence.hear("left " + "b" * 32, 12.0)
    assert set(presence.standing(TWO, grace_s=30.0).seen) == {"c" * 32}
