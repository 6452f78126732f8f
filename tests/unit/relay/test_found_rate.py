"""Finding the rate that a server takes, against simulated servers; no clock is read."""

import heapq
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.relay.found_rate import (
    CUT,
    CUT_MAX,
    FIRST_RATE_MIN,
    FORGOTTEN_S,
    RATE_MIN,
    SILENCE_MAX_S,
    SILENCE_MIN_S,
    SUPPOSED_RATE_MIN,
    SUPPOSED_SILENCE_MAX_S,
    Found,
    RateRefusal,
    slow_down,
)
from outbox.relay.meter import Meter

TOO_MUCH = "450 4.7.1 Error: too much mail from 192.0.2.1"


@dataclass
class Window:
    """A server that counts by fixed spans of time, as Postfix does."""

    rate: float
    span_s: float
    began_at: float = -1e9
    count: int = 0

    def takes(self, now):
        if now - self.began_at >= self.span_s:
            self.began_at, self.count = now, 0
        self.count += 1
        return self.count <= max(self.rate * self.span_s, 1)


@dataclass
class Bucket:
    """A server with a token bucket, as Amazon SES has."""

    rate: float
    burst: float
    tokens: float = 0.0
    at: float = -1e9

    def takes(self, now):
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass
class Run:
    accepted: int = 0
    refused: int = 0
    took_s: float = 0.0
    starts: list[float] = None
    cuts: int = 0


def send(server, emails, *, connections=64, latency_s=0.005, highest=None, is_supposed=False, until_s=1e9):
    """A fleet that sends so many emails: as fast as its connections are, until something is refused."""
    run, now, next_at, left = Run(starts=[]), 0.0, 0.0, emails
    found, found_at, meter, latest_accepted = None, 0.0, Meter(), None
    in_flight = []

    def known(now):
        if found is None:
            return None
        passed_s = now - found_at
        silent_s = found.silent_s - passed_s
        return replace(found, begun_s=found.begun_s + passed_s, silent_s=silent_s, sending_s=max(-silent_s, 0.0))

    while (left or in_flight) and now < until_s:
        at = known(now)
        rates = [rate for rate in (at.rate_now if at else None, highest) if rate is not None]
        start_at = None
        if left and len(in_flight) < connections:
            start_at = max(next_at, now + max(at.silent_s if at else 0.0, 0.0)) if rates else now + 0.0002
        if start_at is not None and (not in_flight or start_at <= in_flight[0][0]):
            now, left = start_at, left - 1
            next_at = now + (1 / min(rates) if rates else 0.0)
            run.starts.append(now)
            heapq.heappush(in_flight, (now + latency_s, now, server.takes(now + latency_s / 2)))
            continue
        now, began_at, is_taken = heapq.heappop(in_flight)
        if is_taken:
            run.accepted += 1
            meter.note(now)
            latest_accepted = max(latest_accepted or began_at, began_at)
            continue
        run.refused, left = run.refused + 1, left + 1
        accepted_age_s = now - latest_accepted if latest_accepted is not None else None
        news = slow_down(
            known(now),
            RateRefusal(
                TOO_MUCH, now - began_at, accepted_age_s, meter.per_s(now), is_supposed, accepted_age_s is not None
            ),
        )
        if news is not None:
            run.cuts += news.begun_s == 0
            found, found_at = news, now
    run.took_s = now
    return run


@pytest.mark.parametrize("span_s", [1, 2, 10, 60])
@pytest.mark.parametrize("rate", [1, 3, 15, 30, 100, 1000])
def test_a_server_that_counts_by_the_window_refuses_at_most_a_tenth(rate, span_s):
    emails = max(600, min(40 * rate, 20_000), int(4 * rate * span_s) if rate <= 100 else 0)
    run = send(Window(rate, span_s), emails)
    assert run.accepted == emails
    assert run.refused <= emails / 10
    assert run.took_s <= 2.5 * emails / rate + 5, "at least four tenths of what it takes is sent"


@pytest.mark.parametrize("rate", [1, 3, 15, 30, 100, 1000])
def test_a_server_with_a_token_bucket_refuses_at_most_a_tenth(rate):
    emails = max(600, min(40 * rate, 20_000))
    run = send(Bucket(rate, burst=rate), emails)
    assert run.accepted == emails
    assert run.refused <= emails / 10
    assert run.took_s <= 2.5 * emails / rate + 5


@pytest.mark.parametrize("latency_s", [0.001, 0.05, 0.074, 0.0737, 0.1])
@pytest.mark.parametrize("rate, burst", [(1.0, 1.0), (1.0, 1.2), (1.05, 1.05), (1.5, 1.5), (2.0, 1.0)])
def test_an_email_that_starts_just_as_the_silence_ends_counts_as_started_after_it(rate, burst, latency_s):
    """Else what the server took would seem to be from before, and the silence would double as if it took nothing."""
    run = send(Bucket(rate, burst), 300, connections=32, latency_s=latency_s)
    assert run.accepted == 300
    assert run.took_s <= 2.5 * 300 / rate + 5


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(1, 1000),
    span_s=st.floats(0.5, 30),
    latency_s=st.floats(0.001, 0.1),
    is_supposed=st.booleans(),
    windowed=st.booleans(),
)
def test_each_email_is_accepted_in_the_end_whatever_the_limit(rate, span_s, latency_s, is_supposed, windowed):
    server = Window(rate, span_s) if windowed else Bucket(rate, max(rate * span_s, 1.0))
    run = send(server, 300, connections=32, latency_s=latency_s, is_supposed=is_supposed, until_s=7200)
    assert run.accepted == 300


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(1, 200), highest=st.floats(1, 200))
def test_the_rate_of_the_settings_is_never_exceeded(rate, highest):
    run = send(Window(rate, 1), 200, highest=highest)
    gaps = [later - earlier for earlier, later in zip(run.starts, run.starts[1:], strict=False)]
    assert min(gaps) >= 1 / highest * 0.999


def test_an_hour_of_refusals_is_asked_about_once_a_minute_and_ends_by_itself():
    class Closed(Window):
        def takes(self, now):
            return now > 3600 and super().takes(now)

    run = send(Closed(100, 1), 300)
    assert run.accepted == 300
    assert run.refused < 64 + 60 + 30
    assert run.took_s < 3600 + SILENCE_MAX_S + 60


def found(rate=10.0, *, since_silence_s=10.0, begun_s=None, silence_s=SILENCE_MIN_S, sending_s=None):
    begun_s = since_silence_s + silence_s if begun_s is None else begun_s
    sending_s = max(since_silence_s, 0.0) if sending_s is None else sending_s
    return Found(rate, begun_s, -since_silence_s, silence_s, sending_s, TOO_MUCH)


def test_the_first_refusal_sets_the_rate_to_less_than_what_was_taken():
    first = slow_down(None, RateRefusal(TOO_MUCH, 0.01, 0.02, 40.0))
    assert first.rate == pytest.approx(CUT * 40)
    assert first.silent_s == first.silence_s == SILENCE_MIN_S
    assert slow_down(None, RateRefusal(TOO_MUCH, 0.01)).rate == FIRST_RATE_MIN, "nothing is known yet"


def test_what_started_before_the_silence_ended_is_no_news():
    assert slow_down(found(since_silence_s=1.0), RateRefusal(TOO_MUCH, 1.5, 0.5, 10.0)) is None


def test_a_refusal_right_after_the_silence_makes_it_twice_as_long_and_cuts_nothing():
    again = slow_down(found(since_silence_s=0.1), RateRefusal(TOO_MUCH, 0.05, 5.0, 10.0))
    assert (again.rate, again.silence_s, again.begun_s) == (10.0, 2 * SILENCE_MIN_S, 0.35)
    at_most = slow_down(found(since_silence_s=0.1, silence_s=50.0), RateRefusal(TOO_MUCH, 0.05, 60.0, 10.0))
    assert at_most.silence_s == SILENCE_MAX_S


def test_a_refusal_after_others_were_accepted_cuts_the_rate():
    grown = found(since_silence_s=10.0)
    later = slow_down(grown, RateRefusal(TOO_MUCH, 0.05, 0.1, 10.0))
    assert later.rate == pytest.approx(CUT * grown.rate_now)
    assert later.begun_s == 0
    soon = slow_down(found(since_silence_s=0.2, begun_s=60.2, silence_s=32.0), RateRefusal(TOO_MUCH, 0.05, 0.1, 10.0))
    assert soon.rate < 0.1, "0.2 s of 60 were enough for all that the server takes in them"


def test_a_round_that_was_too_short_to_measure_cuts_the_rate_but_little():
    """Two relays that stall and catch up are refused again at once, though the server takes ten times as much."""
    short = slow_down(found(since_silence_s=0.2, begun_s=2.2, silence_s=0.5), RateRefusal(TOO_MUCH, 0.05, 0.1, 10.0))
    assert short.rate == pytest.approx(10 * CUT_MAX, rel=0.01)


def test_the_rate_grows_slowly_while_nothing_is_refused_then_quickly_and_is_forgotten():
    rates = [found(since_silence_s=s).rate_now for s in range(300)]
    assert rates[5] == pytest.approx(10 * (1 + 5 * 0.02))
    known = [rate for rate in rates if rate is not None]
    assert known == sorted(known)
    assert known[-1] > 1000
    assert rates[-1] is None
    assert found(since_silence_s=300, sending_s=5.0).rate_now == rates[5], "without mail nothing is learned"
    assert found(begun_s=FORGOTTEN_S).rate_now is None


def test_no_refusal_takes_the_rate_to_nothing():
    slow = found(RATE_MIN, since_silence_s=100.0)
    assert slow_down(slow, RateRefusal(TOO_MUCH, 0.05, 1.0, 0.0)).rate >= RATE_MIN
    supposed = found(SUPPOSED_RATE_MIN, since_silence_s=10.0)
    refusal = RateRefusal(TOO_MUCH, 0.05, 1.0, 0.0, is_supposed=True)
    assert slow_down(supposed, refusal).rate == SUPPOSED_RATE_MIN


def test_a_supposed_limit_delays_no_email_for_long():
    """Where the server greylists everybody, each recipient has to be tried, and waiting for an acceptance is vain."""
    refusal = RateRefusal(TOO_MUCH, 0.01, is_supposed=True, accepts=False)
    first = slow_down(None, refusal)
    again = slow_down(replace(first, begun_s=0.3, silent_s=-0.05), replace(refusal, age_s=0.01))
    assert again.silence_s <= SILENCE_MIN_S
    long = found(since_silence_s=0.1, silence_s=1.5)
    refusal = RateRefusal(TOO_MUCH, 0.05, 10.0, is_supposed=True)
    assert slow_down(long, refusal).silence_s == SUPPOSED_SILENCE_MAX_S
