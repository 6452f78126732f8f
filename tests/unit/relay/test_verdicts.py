import pytest

from outbox.relay.verdicts import WITHDRAWALS_MAX
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Refused, Withdrawn
from tests.support.sending import a_server, a_try, settings, some_verdicts


@pytest.fixture
def verdicts():
    return some_verdicts(a_server())


class Connection:
    """A database that knows how often these emails were withdrawn by a reply."""

    def __init__(self, by_reply):
        self.by_reply = by_reply

    async def fetch(self, _sql, emails):
        return [{"email": email, "times": self.by_reply} for email in emails]


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (Accepted("250 ok"), "sent"),
        (Refused("550 no"), "dead"),
        (Deferred("450 later"), "pending"),
        (InDoubt("silence"), "in_doubt"),
        (Withdrawn("cut"), "pending"),
    ],
)
def test_a_verdict_becomes_one_settlement_under_the_fence_of_its_try(verdicts, verdict, state):
    tried = a_try()
    tried.mark(3)
    verdicts.on_verdict(tried, verdict)
    (settlement,) = verdicts.take()
    assert settlement.identity == (tried.outgoing.email, 3)
    assert (settlement.relay, settlement.marked, settlement.outcome.state) == (1, True, state)
    assert verdicts.take() == []
    assert verdicts.server.last_reply == verdict.reply


def test_a_refusal_before_the_mark_counts_as_the_next_attempt(verdicts):
    tried = a_try()
    verdicts.on_verdict(tried, Refused("550 no (to RCPT)"))
    (settlement,) = verdicts.take()
    assert (settlement.attempt, settlement.marked) == (1, False)


def test_the_last_deferral_is_a_dead_letter_and_withdrawn_tries_do_not_count():
    verdicts = some_verdicts(a_server(settings(retry={"attempts_max": 2})))
    verdicts.on_verdict(a_try(withdrawn=5), Deferred("450 later"))
    tried = a_try()
    tried.mark(2)
    verdicts.on_verdict(tried, Deferred("450 greylisted"))
    assert [one.outcome.state for one in verdicts.take()] == ["pending", "dead"]
    assert verdicts.counts == {"deferred": 1, "dead": 1}


@pytest.mark.parametrize(("by_reply", "state"), [(0, "dead"), (1, "pending")])
async def test_an_email_that_a_working_server_drops_too_often_is_quarantined(verdicts, by_reply, state):
    tried = a_try(withdrawn=WITHDRAWALS_MAX - 1)
    verdicts.on_cut(tried, "reset")
    assert not verdicts.settlements, "the database knows how often a reply was the reason"
    assert verdicts.waiting() == [tried.outgoing]
    await verdicts.judge_dropped(Connection(by_reply))
    (settlement,) = verdicts.take()
    assert settlement.outcome.state == state
    assert verdicts.waiting() == []


def test_after_a_failover_settlements_have_the_ids_of_the_other_server_unless_they_are_written_there(verdicts):
    written, later = a_try(), a_try()
    for tried in (written, later):
        verdicts.on_verdict(tried, Accepted("250 ok"))
    asserted = list(verdicts.settlements)
    verdicts.renumber(
        {written.outgoing.key: 4711, later.outgoing.key: 4712},
        asserted=asserted[:1],
        reported={(written.outgoing.key, 1)},
    )
    assert [(one.key, one.email) for one in verdicts.settlements] == [(later.outgoing.key, 4712)]
