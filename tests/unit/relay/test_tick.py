"""A tick's request as the parameters of its statement."""

import re

from outbox.relay.settlement import Settlement
from outbox.relay.tick import TICK, TickRequest
from outbox.smtp.verdict import Outcome


def test_a_request_has_a_value_for_each_parameter_of_the_statement():
    numbers = {int(number) for number in re.findall(r"\$(\d+)", TICK)}
    assert numbers == set(range(1, len(TickRequest().parameters(1)) + 1))


def test_urgent_emails_and_large_messages_have_no_bound_of_their_own_unless_one_is_given():
    parameters = TickRequest(claims_max=5, bytes_max=1000).parameters(1)
    assert (parameters[16], parameters[17]) == (5, 1000)
    bounded = TickRequest(claims_max=5, bytes_max=1000, urgent_max=0, budget=0).parameters(1)
    assert (bounded[16], bounded[17]) == (0, 0)


def test_a_reply_that_postgres_cannot_store_does_not_stop_the_tick():
    outcome = Outcome("sent", "accepted", "250 \0 ok")
    request = TickRequest(settlements=[Settlement(1, 7, "mail7", 2, marked=True, outcome=outcome)])
    (reply,) = request.parameters(1)[7]
    assert "\0" not in reply
