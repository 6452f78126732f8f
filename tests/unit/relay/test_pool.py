"""Which of a relay's tries start when, and where those go that come back; no network is needed for that."""

import time

import pytest

from outbox.relay.rate_limit import Grant
from outbox.relay.recent_replies import STRIKES_MAX
from outbox.smtp.connection_history import ConnectionHistory
from outbox.smtp.refusal import About, Refusal, Stage
from outbox.smtp.reply_class import classify
from outbox.smtp.verdict import Deferred
from tests.support.sending import Connection, a_pool, a_try, settings


def refusal(stage: Stage, reply: str) -> Refusal:
    code, text = int(reply[:3]), reply[4:]
    return Refusal(classify(stage, code, text), stage, code, text)


def limited(**changed):
    return a_pool(settings(rate="10/s", connections_max=4, batch_max=100, **changed))


@pytest.fixture
def pool():
    return limited()


@pytest.fixture
def free():
    """A pool without a rate."""
    return a_pool(settings(connections_max=4, batch_max=100))


def test_the_next_start_is_the_next_moment_while_a_claim_waits(pool):
    pool.server.limiter.grant(Grant(2, 0.5), 100.0, 100.0)
    assert pool.facts.next_start_at(100.0) is None, "nothing waits"
    pool.ready.put_first(a_try())
    assert pool.facts.next_start_at(100.0) == 100.5


def test_a_moment_that_has_come_is_used_at_once_where_a_connection_waits(pool):
    """A relay that slept until its next poll instead reached half of its rate."""
    pool.server.limiter.grant(Grant(2), 100.0, 100.0)
    pool.ready.put_first(a_try())
    assert pool.facts.next_start_at(100.01) is None, "connections that work take the next by themselves"
    pool.idle(Connection())
    assert pool.facts.next_start_at(100.01) == 100.01


def test_more_moments_are_asked_for_as_soon_as_it_is_worth_while(pool):
    pool.ready.put_first(a_try())
    pool.idle(Connection())
    assert pool.facts.next_start_at(100.0) == 100.0
    pool.server.limiter.grant(Grant(0, 3.0), 100.0, 100.0)
    assert 103.0 <= pool.facts.next_start_at(100.0) <= 104.0


def test_without_a_rate_nothing_waits_for_a_moment(free):
    free.ready.put_first(a_try())
    free.idle(Connection())
    assert free.facts.next_start_at(100.0) is None


async def test_when_the_day_is_used_up_what_has_its_moment_is_still_sent():
    """It is counted; given back, it would be counted and not sent."""
    daily = a_pool(settings(daily_max=10, connections_max=4))
    daily.server.limiter.grant(Grant(2), 100.0, 100.0)
    tries = [a_try() for _ in range(5)]
    daily.ready.add(tries)
    daily._connections._openings.update({1, 2})  # two connections are on their way
    daily.server.limiter.grant(Grant(0, used_up=True), 100.0, 100.0)
    daily.dispatch_ready(100.0)
    assert list(daily.ready) == tries[:2]
    assert list(daily.returns) == [tried.outgoing for tried in tries[:1:-1]]


def test_a_ready_try_starts_on_an_idle_connection(free):
    connection, tried = Connection(), a_try()
    free.idle(connection)
    free.add([tried])
    free.dispatch_ready(100.0)
    assert connection.started == [tried]
    assert tried.started_at == 100.0


def test_the_mail_of_a_held_sender_waits_and_that_of_others_goes(free):
    good, bad = a_try("good@example.com"), a_try("bad@example.com")
    free.server.hold_sender("bad@example.com", "553 not owned by user")
    free.add([bad, good])
    assert list(free.ready) == [good]
    ((rest_s, emails),) = free.returns.take()
    assert emails == [bad.outgoing.email]
    assert rest_s > 0
    assert "bad@example.com" in free.facts.trouble()
    free.server.on_accepted(a_try("bad@example.com"), time.monotonic())
    free.add([a_try("bad@example.com")])
    assert len(free.ready) == 2
    assert free.facts.trouble() is None


def test_what_waits_for_a_connection_is_given_back_when_its_sender_is_refused(free):
    free.server.on_accepted(a_try("good@example.com"), time.monotonic())
    waiting, tried = a_try("bad@example.com"), a_try("bad@example.com")
    free.add([waiting])
    free.on_refusal(Connection(), tried, refusal(Stage.MAIL, "553 5.7.1 not owned by user"), About.ROUTE)
    assert not free.ready
    assert list(free.returns) == [waiting.outgoing]
    (settlement,) = free.verdicts.take()
    assert (settlement.email, settlement.outcome.verdict) == (tried.outgoing.email, "withdrawn")


def test_a_refused_route_gives_back_all_and_asks_with_one_email_of_a_sender_that_was_not_refused(free):
    waiting, tried = a_try("bad@example.com"), a_try("bad@example.com")
    free.add([waiting])
    free.on_refusal(Connection(), tried, refusal(Stage.MAIL, "550 no"), About.ROUTE)
    assert list(free.returns) == [waiting.outgoing]
    assert free.facts.trouble() == "SMTP: 550 no (to MAIL)"
    assert free.server.refusals == 1
    assert free.facts.capacity(free.server.breaker.next_at - 0.01) == 0
    assert free.facts.capacity(free.server.breaker.next_at + 0.01) > 1, "of these one is chosen"
    bad, good = a_try("bad@example.com"), a_try("good@example.com")
    free.add([bad, good])
    assert list(free.ready) == [good]
    assert list(free.returns) == [waiting.outgoing, bad.outgoing]


def test_a_backlog_of_a_refused_sender_makes_room_for_others(free):
    free.server.refuse_route("bad@example.com", "550 no")
    tries = [a_try("bad@example.com") for _ in range(64)]
    free.add(tries)
    assert list(free.ready) == tries[:1], "no other sender's mail is there: ask with this"
    ((rest_s, emails),) = free.returns.take()
    assert emails == [tried.outgoing.email for tried in tries[1:]]
    assert rest_s > 0


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────

RATE = "450 4.7.1 rate limit exceeded"


def test_a_cut_connection_costs_a_try_nothing_the_first_time_and_withdraws_it_the_second(free):
    tried = a_try()
    free.return_unsent(tried, "cut")
    assert list(free.ready) == [tried]
    free.ready.take_all()
    free.return_unsent(tried, "cut")
    assert not free.ready
    assert [one.outcome.verdict for one in free.verdicts.settlements] == ["withdrawn"]


def test_what_comes_back_while_the_server_is_in_trouble_rests(free):
    free.paused("the server takes no mail for now")
    tried = a_try()
    free.return_unsent(tried, "cut")
    assert not free.ready
    ((rest_s, _),) = free.returns.take()
    assert rest_s > 0
    assert not free.verdicts.settlements


@pytest.mark.parametrize("end", ["a stop", "a pause by a person"])
async def test_what_comes_back_after_this_is_for_any_relay(free, end):
    if end == "a stop":
        free.close_politely()
    else:
        free.note_pauses(is_any=True)
    free.return_unsent(a_try(), "cut")
    free.on_refusal(Connection(), a_try(), refusal(Stage.MAIL, "421 bye"), About.CLOSING)
    assert not free.ready
    assert [rest_s for rest_s, _ in free.returns.take()] == [0.0]


def test_what_a_lost_session_claimed_is_kept_nowhere():
    lost = a_pool(is_held=False)
    lost.return_unsent(a_try(), "cut")
    lost.on_refusal(Connection(), a_try(), refusal(Stage.MAIL, RATE), About.RATE)
    assert not lost.in_flight.emails()
    assert not lost.verdicts.settlements


def test_a_limit_of_the_rate_costs_an_email_nothing(free):
    tried = a_try()
    free.on_refusal(Connection(), tried, refusal(Stage.RCPT, RATE), About.RATE)
    assert not free.verdicts.settlements
    assert tried.outgoing.email in free.in_flight.emails()
    assert free.server.limiter.refused is not None
    assert free.server.throttles == 1


def test_a_limit_that_one_recipient_meets_alone_is_a_try_of_its_own(free):
    """Without this a limit of one recipient would keep the email for ever, and slow down all others each time."""
    tried = a_try(recipient="full@example.com")
    for _ in range(STRIKES_MAX + 1):
        assert not free.verdicts.settlements
        free.on_refusal(Connection(), tried, refusal(Stage.RCPT, RATE), About.RATE)
        free.server.on_accepted(a_try(), time.monotonic())
    (settlement,) = free.verdicts.settlements
    assert settlement.outcome.verdict == "deferred"


async def test_a_limit_of_messages_closes_the_connection_and_is_remembered_once_three_ended_at_it(free):
    for _ in range(3):
        connection = Connection()
        connection.history = ConnectionHistory(accepted=100)
        found = refusal(Stage.MAIL, "452 4.5.3 Too many messages sent")
        free.on_refusal(connection, a_try(), found, connection.history.note_refusal(found))
        assert connection.is_draining
    assert free.server.session_limit.found == 100


async def test_where_the_server_grants_no_connection_at_all_the_route_is_paused(free):
    free.on_refusal(Connection(), a_try(), refusal(Stage.MAIL, "421 4.7.0 too many connections"), About.CONNECTIONS)
    assert free.server.breaker.is_open
    assert free.server.connection_limit.found is None


async def test_a_deferral_waits_for_the_replies_to_others_unless_it_is_marked(free):
    free.ready.put_first(a_try())
    free.on_verdict(a_try(), Deferred("450 busy (to RCPT)"))
    assert not free.verdicts.settlements
    assert len(free.verdicts.undecided) == 1
    marked = a_try()
    marked.mark(1)
    free.on_verdict(marked, Deferred("451 busy"))
    assert len(free.verdicts.settlements) == 1, "if this relay died, its sending would be in doubt"


def test_a_connection_that_ends_gives_back_the_try_whose_mark_it_only_asked_for(free):
    connection, tried = Connection(), a_try()
    free.ask_mark(connection, tried)
    assert tried.outgoing.email in free.in_flight.emails()
    free.closed(connection, "reset")
    assert len(free.marks) == 0
    assert list(free.ready) == [tried]
    assert not tried.marked
