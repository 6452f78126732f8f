"""Late verdicts that are worth an alarm."""

import pytest

from outbox.relay.settlement import Settlement, contradicts
from outbox.smtp.verdict import Outcome

SENT = Outcome("sent", "accepted", "250 ok")
DEAD = Outcome("dead", "refused", "550 no")
LATER = Outcome("pending", "deferred", "451 later", 1.0)
DOUBT = Outcome("in_doubt", "in_doubt", "cut")
TAKEN_BACK = Outcome("pending", "withdrawn", "the guard stopped it", 1.0)


@pytest.mark.parametrize(
    ("outcome", "state", "attempt", "alarm"),
    [
        (SENT, "sent", 2, False),  # settled by a commit whose answer was lost
        (SENT, "sent", 3, True),  # sent twice
        (SENT, "dead", 2, True),
        (SENT, "pending", 3, True),  # marked again since
        (SENT, None, None, True),
        (DEAD, "sent", 2, True),
        (LATER, "in_doubt", 3, True),
        (DOUBT, "sent", 2, False),  # a person knew better
        (DOUBT, "dead", 2, False),
        (TAKEN_BACK, "pending", 1, False),  # its mark never was
        (TAKEN_BACK, "sent", 1, False),
        (TAKEN_BACK, "in_doubt", 2, False),
        (TAKEN_BACK, "dead", 2, False),
        (TAKEN_BACK, "sent", 2, True),  # somebody says that it arrived, and it was not sent
    ],
)
def test_a_late_verdict_is_an_alarm_if_it_contradicts_what_stands(outcome, state, attempt, alarm):
    settlement = Settlement(7, 1, "mail1", 2, marked=True, outcome=outcome)
    assert contradicts(settlement, state, attempt) is alarm
