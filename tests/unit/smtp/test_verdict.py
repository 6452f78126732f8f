import pytest

from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Outcome, Refused, Withdrawn, judge_silence, outcome_of


def follow(verdict, *, tries=1, doubt_s=None):
    """What follows from a verdict, with delays that cannot be mistaken for each other."""
    return outcome_of(verdict, tries=tries, tries_max=3, backoff_s=30.0, again_s=2.0, doubt_s=doubt_s)


def test_silence_before_the_final_dot_is_withdrawn():
    assert judge_silence("cut", dot_sent=False) == Withdrawn("cut")


def test_silence_after_the_final_dot_is_in_doubt():
    assert judge_silence("cut", dot_sent=True) == InDoubt("cut")


@pytest.mark.parametrize("tries", [1, 2, 3, 4])
def test_an_accepted_mail_is_sent_whatever_the_try(tries):
    assert follow(Accepted("250 ok"), tries=tries) == Outcome("sent", "accepted", "250 ok")


@pytest.mark.parametrize("tries", [1, 3])
def test_a_refused_mail_is_dead_at_once(tries):
    assert follow(Refused("550 no"), tries=tries) == Outcome("dead", "refused", "550 no")


@pytest.mark.parametrize("tries", [1, 2])
def test_a_deferred_mail_is_due_again_after_the_backoff(tries):
    assert follow(Deferred("451 later"), tries=tries) == Outcome("pending", "deferred", "451 later", 30.0)


@pytest.mark.parametrize("tries", [3, 4])
def test_the_last_deferral_makes_a_dead_letter_and_says_it_was_deferred(tries):
    assert follow(Deferred("451 later"), tries=tries) == Outcome("dead", "deferred", "451 later")


@pytest.mark.parametrize("tries", [1, 3, 99])
def test_a_withdrawn_try_never_makes_a_dead_letter(tries):
    assert follow(Withdrawn("cut"), tries=tries) == Outcome("pending", "withdrawn", "cut", 2.0)


@pytest.mark.parametrize("doubt_s", [None, 60.0])
@pytest.mark.parametrize("tries", [1, 3])
def test_doubt_is_looked_at_again_when_the_policy_says(tries, doubt_s):
    outcome = follow(InDoubt("silence"), tries=tries, doubt_s=doubt_s)
    assert outcome == Outcome("in_doubt", "in_doubt", "silence", doubt_s)


def test_what_is_pending_always_says_when_it_is_due():
    for verdict in (Deferred("451"), Withdrawn("cut")):
        assert follow(verdict).delay_s is not None
