from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from outbox.relay.circuit_breaker import CUTS_IN_A_ROW_MAX, PAUSE_FIRST_S, PAUSE_MAX_S, REFUSED_PAUSE_MAX_S, Breaker
from outbox.smtp.login import login_pause_s

NOW = 1000.0


def test_a_new_breaker_lets_connect():
    breaker = Breaker()
    assert not breaker.is_open
    assert breaker.may_connect(NOW)


def test_trouble_pauses_and_the_pause_ends_by_itself():
    breaker = Breaker()
    breaker.trip("refused", NOW, uniform=0.5)
    assert breaker.is_open
    assert breaker.reason == "refused"
    assert not breaker.may_connect(NOW)
    assert not breaker.may_connect(NOW + PAUSE_FIRST_S - 0.001)
    assert breaker.may_connect(NOW + PAUSE_FIRST_S)
    assert breaker.is_open, "a pause that is over is not yet a success"


def test_each_failure_doubles_the_pause_until_the_greatest():
    breaker, now, pauses_s = Breaker(), NOW, []
    for _ in range(8):
        breaker.trip("refused", now, uniform=0.5)
        assert breaker.retry_at is not None
        pauses_s.append(breaker.retry_at - now)
        now = breaker.retry_at
    assert pauses_s[0] == PAUSE_FIRST_S
    assert pauses_s[-1] == PAUSE_MAX_S
    assert all(later == min(2 * earlier, PAUSE_MAX_S) for earlier, later in pairwise(pauses_s))


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10))
def test_a_server_that_returns_is_found_within_five_seconds(uniform, failures):
    breaker = Breaker()
    for _ in range(failures):
        breaker.trip("refused", NOW, uniform=uniform)
    assert breaker.retry_at is not None
    assert breaker.may_connect(NOW + 5)


def test_pauses_differ_between_servers():
    pauses = set()
    for _ in range(20):
        breaker = Breaker()
        breaker.trip("refused", NOW)
        pauses.add(breaker.retry_at)
    assert len(pauses) == 20


def test_a_success_after_the_pause_closes_the_breaker_and_forgets_its_length():
    breaker = Breaker()
    for _ in range(5):
        breaker.trip("refused", NOW, uniform=0.5)
    breaker.succeed(NOW + PAUSE_MAX_S)
    assert not breaker.is_open
    breaker.trip("refused", NOW + 60, uniform=0.5)
    assert breaker.retry_at == NOW + 60 + PAUSE_FIRST_S


def test_a_success_on_a_standing_connection_does_not_shorten_the_pause():
    breaker = Breaker()
    breaker.trip("too many connections", NOW, uniform=0.5)
    breaker.succeed(NOW + PAUSE_FIRST_S / 2)
    assert breaker.is_open
    assert not breaker.may_connect(NOW + PAUSE_FIRST_S / 2)


def test_a_few_cut_connections_in_a_row_are_trouble_and_fewer_are_not():
    breaker = Breaker()
    assert 2 <= CUTS_IN_A_ROW_MAX <= 5
    for _ in range(CUTS_IN_A_ROW_MAX - 1):
        breaker.cut("reset", NOW)
        assert not breaker.is_open
    breaker.cut("reset", NOW)
    assert breaker.is_open
    assert breaker.reason == "reset"


def test_a_verdict_in_between_forgives_the_cuts():
    breaker = Breaker()
    for _ in range(5):
        for _ in range(CUTS_IN_A_ROW_MAX - 1):
            breaker.cut("reset", NOW)
        breaker.succeed(NOW)
    assert not breaker.is_open


events = st.lists(st.tuples(st.sampled_from(["trip", "cut", "succeed"]), st.floats(0, 10)), max_size=40)


@given(events)
def test_no_history_pauses_for_more_than_five_seconds_or_without_a_reason(history):
    breaker, now = Breaker(), NOW
    for event, elapsed_s in history:
        now += elapsed_s
        if event == "succeed":
            breaker.succeed(now)
        else:
            getattr(breaker, event)("trouble", now)
        assert breaker.may_connect(now + 5)
        assert not breaker.is_open or breaker.reason


def refused(times: int) -> tuple[Breaker, float]:
    """A breaker after so many refusals, and the time at which the last pause is over."""
    breaker, now = Breaker(), NOW
    for _ in range(times):
        breaker.refuse("relaying denied", now, uniform=0.5)
        assert breaker.retry_at is not None
        now = breaker.retry_at
    return breaker, now


def test_a_refusal_of_the_sender_pauses_for_longer_and_longer_up_to_its_own_bound():
    pauses_s = [b - a for a, b in pairwise(refused(times)[1] for times in range(10))]
    assert pauses_s[0] == PAUSE_FIRST_S
    assert pauses_s[-1] == REFUSED_PAUSE_MAX_S > PAUSE_MAX_S
    assert all(later == min(2 * earlier, REFUSED_PAUSE_MAX_S) for earlier, later in pairwise(pauses_s))


def test_only_a_message_that_is_taken_ends_a_refusal():
    breaker, now = refused(3)
    breaker.succeed(now, took_mail=False)
    assert breaker.is_open
    assert breaker.refusals == 3
    breaker.succeed(now)
    assert not breaker.is_open
    assert breaker.refusals == 0


def test_an_outage_during_a_refusal_is_looked_for_as_often_as_any():
    breaker, now = refused(8)
    breaker.trip("connection refused", now, uniform=0.5)
    assert breaker.may_connect(now + PAUSE_MAX_S)
    assert breaker.refusals == 8, "the refusal is not over"


def test_a_relay_tries_at_once_when_the_server_takes_mail_of_another_one():
    breaker, _ = refused(8)
    breaker.news = None
    breaker.adopt("relaying denied", 1.0, NOW)
    breaker.adopt(None, 0.0, NOW + 1)
    assert breaker.may_connect(NOW + 1)
    assert breaker.is_open, "it is not known yet whether the server takes mail from here"


def test_a_refused_login_pauses_for_as_long_as_it_is_said_and_is_told_once():
    breaker = Breaker()
    breaker.refuse_login("535", NOW, 60, is_new=True)
    assert (breaker.news, breaker.retry_at, breaker.login_refused) == ("login", NOW + 60, True)
    breaker.news = None
    breaker.refuse_login("535", NOW + 1, 59, is_new=False)
    assert (breaker.news, breaker.retry_at) == (None, NOW + 60)


def test_the_fleets_pause_for_a_refused_login_lasts_for_minutes_and_no_longer_than_it_can():
    breaker = Breaker()
    breaker.adopt("535", 60, NOW, 1)
    assert not breaker.may_connect(NOW + 59)
    assert breaker.login_refused
    breaker.adopt("535", 61, NOW, 1)
    assert breaker.next_at == NOW, "written before the server's clock was set back"
    assert [login_pause_s(n) for n in (1, 2, 3, 6, 1000)] == [60, 120, 240, 1800, 1800]


def test_a_relay_with_a_new_login_takes_the_turn_to_probe_although_a_pause_is_in_force():
    breaker = Breaker()
    breaker.refuse_login("535", NOW, 60, is_new=True)
    breaker.news = None
    breaker.adopt("535", 60, NOW, 1)
    assert not breaker.wants_probe(NOW + 1)
    breaker.insist(NOW + 1)
    assert breaker.wants_probe(NOW + 1)
    breaker.probing = True
    assert breaker.may_connect(NOW + 1)
    breaker.succeed(NOW + 2)
    assert (breaker.is_open, breaker.login_refused, breaker.news) == (False, False, "resume")
