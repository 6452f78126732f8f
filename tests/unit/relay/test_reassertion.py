"""What was not settled when Postgres was lost is settled on the next server under the fence that it has there."""

from types import SimpleNamespace

from outbox.relay.failover import EmailThere
from outbox.relay.reassertion import Adaptation
from outbox.relay.settlement import Settlement
from outbox.smtp.verdict import Outcome

DOUBT = Outcome("in_doubt", "in_doubt", "its answer was waited for")
SENT = Outcome("sent", "accepted", "250 ok")


def settlement(key, outcome, *, email=1, attempt=1):
    return Settlement(7, email, key, attempt, marked=True, outcome=outcome)


def test_a_verdict_that_was_written_again_is_not_settled_as_well():
    one = settlement("a", SENT)
    there = Adaptation({"a": EmailThere(1)}, {("a", 1)}, [one])
    assert there.settlements([one]) == []


def test_a_verdict_that_comes_while_its_doubt_is_written_is_kept():
    """The reply to a final dot may come at that moment: it has the same key and attempt as the doubt."""
    there = Adaptation({"a": EmailThere(1)}, {("a", 1)}, [])
    late = settlement("a", SENT)
    assert there.settlements([late]) == [late]


def test_what_is_left_gets_the_ids_of_the_new_server():
    there = Adaptation({"a": EmailThere(41), "b": EmailThere(42)}, {("a", 1)}, [])
    found = there.settlements([settlement("b", SENT, email=1), settlement("c", DOUBT, email=3)])
    assert [(one.key, one.email) for one in found] == [("b", 42), ("c", 3)]


def test_a_claim_whose_dot_awaits_its_reply_gets_id_and_attempt_of_the_new_server():
    claims = [SimpleNamespace(key=key, email=1, attempt=1) for key in "abc"]
    Adaptation({"a": EmailThere(41, 5), "b": EmailThere(42)}).renumber(claims)
    assert [(one.email, one.attempt) for one in claims] == [(41, 5), (42, 1), (1, 1)]
