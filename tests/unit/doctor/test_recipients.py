import pytest

from outbox.doctor.finding import Grade
from outbox.doctor.recipients import NAMED_MAX, SAMPLE_MAX, RecipientTally
from outbox.generate.source import Recipient


def tally_of(*recipients, waived=()):
    tally = RecipientTally(waived=frozenset(waived))
    for key, address in recipients:
        tally.take(Recipient(key, address))
    return tally


def test_a_key_that_comes_twice_counts_once():
    tally = tally_of(("1", "a@example.com"), ("1", "b@example.com"), ("2", "c@example.com"))
    assert tally.judge("x").grade is Grade.NOTE
    assert "3 rows, 1 of them" in tally.judge("x").found
    assert [one.email for one in tally.sample] == ["a@example.com", "c@example.com"]


def test_a_bad_address_is_a_problem_unless_nothing_is_owed_to_it():
    bad = ("1", "nowhere"), ("2", "a@example.com")
    assert tally_of(*bad).judge_addresses("x", is_collected=False).grade is Grade.PROBLEM
    assert tally_of(*bad, waived=["1"]).judge_addresses("x", is_collected=False).grade is Grade.OK


def test_only_so_many_are_named_and_shown():
    tally = tally_of(*((str(n), "nowhere") for n in range(NAMED_MAX + 2)))
    assert "and 2 more" in tally.judge_addresses("x", is_collected=False).found
    assert len(tally_of(*((str(n), f"a{n}@example.com") for n in range(9))).sample) == SAMPLE_MAX


@pytest.mark.parametrize("is_collected, grade", [(False, Grade.NOTE), (True, Grade.OK)])
def test_an_address_of_two_keys_is_a_note_but_in_a_digest(is_collected, grade):
    tally = tally_of(("1", "a@example.com"), ("2", "a@example.com"))
    assert tally.judge_addresses("x", is_collected=is_collected).grade is grade
