"""The checker: each law is broken by the smallest run that breaks it, and by no other."""

from dataclasses import replace

import pytest

from bench.faults.checker import Acceptance, Attempt, Delivery, Facts, check, figures

ANN, BOB = "ann@example.com", "bob@example.com"


def accepted(address, at=1.0, message_id=None):
    return Acceptance(at, address, message_id or f"<{address}>")


def delivery(address, state="sent"):
    return Delivery(address, f"<{address}>", state)


KEPT = Facts(
    recipients={ANN, BOB},
    accepted=[accepted(ANN), accepted(BOB)],
    deliveries=[delivery(ANN), delivery(BOB)],
    reports={ANN: 1, BOB: 1},
)


def broken(facts):
    return {violation.law: violation.addresses for violation in check(facts)}


def test_a_run_in_which_everybody_was_written_to_once_keeps_every_law():
    assert check(KEPT) == []


def test_an_address_that_is_accepted_twice_is_doubled():
    facts = replace(KEPT, accepted=[*KEPT.accepted, accepted(ANN, 2.0)])
    assert broken(facts) == {"no address is sent more than once": (ANN,)}
    assert figures(facts)["twice"] == 1


RESENT = replace(
    KEPT,
    policy="resend",
    accepted=[*KEPT.accepted, accepted(ANN, 9.0)],
    attempts=[Attempt(ANN, 1, "in_doubt", 3.0), Attempt(ANN, 1, "resolved", 8.0)],
)


def test_under_resend_a_second_copy_is_allowed_if_doubt_and_decision_are_on_record():
    assert check(RESENT) == []
    assert figures(RESENT)["resent"] == 1


def test_under_resend_each_further_copy_needs_a_record_of_its_own():
    assert broken(replace(RESENT, accepted=[*RESENT.accepted, accepted(ANN, 10.0)])) == {
        "no address is sent more than once": (ANN,)
    }


@pytest.mark.parametrize(
    "attempts",
    [
        [],
        [Attempt(ANN, 1, "resolved", 8.0)],
        [Attempt(ANN, 1, "in_doubt", 8.5), Attempt(ANN, 1, "resolved", 8.0)],
        [Attempt(ANN, 2, "in_doubt", 3.0), Attempt(ANN, 1, "resolved", 8.0)],
        [Attempt(BOB, 1, "in_doubt", 3.0), Attempt(BOB, 1, "resolved", 8.0)],
    ],
    ids=["no record", "no doubt", "doubt afterwards", "doubt about another try", "somebody else's"],
)
def test_under_resend_a_copy_without_doubt_before_it_is_doubled(attempts):
    assert broken(replace(RESENT, attempts=attempts)) == {"no address is sent more than once": (ANN,)}


def test_under_hold_no_record_allows_a_second_copy():
    assert broken(replace(RESENT, policy="hold")) == {"no address is sent more than once": (ANN,)}


def test_a_copy_with_another_message_id_is_another_message():
    facts = replace(KEPT, accepted=[accepted(ANN), accepted(BOB, message_id="<other@example.com>")])
    assert broken(facts) == {"what is accepted is the message that the database holds": (BOB,)}


def test_a_message_to_a_stranger_is_found():
    eve = "eve@example.com"
    facts = replace(KEPT, accepted=[*KEPT.accepted, accepted(eve)], deliveries=[*KEPT.deliveries, delivery(eve)])
    assert broken(facts) == {"only recipients get email": (eve,)}


def test_a_recipient_without_email_is_lost():
    facts = replace(KEPT, accepted=[accepted(ANN)], deliveries=[delivery(ANN)], reports={ANN: 1})
    assert set(broken(facts)) == {
        "every recipient who was not reached is in a state that says so",
        "every recipient has one report",
        "every recipient has one email",
    }
    assert figures(facts)["lost"] == 1


def test_what_is_sent_without_an_acceptance_is_lost():
    facts = replace(KEPT, accepted=[accepted(ANN)])
    assert broken(facts) == {"nothing is `sent` that was not accepted": (BOB,)}
    assert figures(facts)["lost"] == 1


@pytest.mark.parametrize("state", ["dead", "cancelled", "expired"])
def test_what_was_accepted_must_not_be_given_up(state):
    facts = replace(KEPT, deliveries=[delivery(ANN), delivery(BOB, state)], refused={BOB})
    assert broken(facts) == {"what was accepted is `sent` or `in_doubt`": (BOB,)}


def test_under_resend_a_copy_that_was_refused_after_doubt_may_be_dead():
    facts = replace(RESENT, accepted=KEPT.accepted, deliveries=[delivery(ANN, "dead"), delivery(BOB)], refused={ANN})
    assert check(facts) == []


@pytest.mark.parametrize("reached", [True, False])
def test_what_is_in_doubt_may_have_been_accepted_or_not(reached):
    facts = replace(
        KEPT,
        accepted=[accepted(ANN), *([accepted(BOB)] if reached else [])],
        deliveries=[delivery(ANN), delivery(BOB, "in_doubt")],
    )
    assert check(facts) == []
    assert figures(facts)["in_doubt"] == 1
    assert figures(facts)["in_doubt_not_accepted"] == (0 if reached else 1)
    assert figures(facts)["lost"] == 0


@pytest.mark.parametrize("state", ["pending", "sending"])
def test_what_is_open_at_the_end_is_stuck(state):
    facts = replace(KEPT, accepted=[accepted(ANN)], deliveries=[delivery(ANN), delivery(BOB, state)])
    assert broken(facts) == {"nothing is stuck": (BOB,)}
    assert figures(facts)["lost"] == 1, "no state says that it was not reached for good"


def test_a_dead_letter_that_was_refused_says_so():
    facts = replace(KEPT, accepted=[accepted(ANN)], deliveries=[delivery(ANN), delivery(BOB, "dead")], refused={BOB})
    assert check(facts) == []
    assert figures(facts)["dead"] == 1


def test_a_dead_letter_that_nobody_refused_is_found():
    facts = replace(KEPT, accepted=[accepted(ANN)], deliveries=[delivery(ANN), delivery(BOB, "dead")])
    assert broken(facts) == {"nothing is `dead` that was not refused": (BOB,)}
    assert check(replace(facts, attempts=[Attempt(BOB, 1, "quarantined", 2.0)])) == []


def test_two_reports_or_two_emails_for_one_recipient_are_found():
    assert broken(replace(KEPT, reports={ANN: 2, BOB: 1})) == {"every recipient has one report": (ANN,)}
    assert broken(replace(KEPT, deliveries=[*KEPT.deliveries, delivery(ANN)])) == {
        "every recipient has one email": (ANN,)
    }
