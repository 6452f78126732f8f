import pytest

from outbox.relay.rate_limit import PORTION_MAX, STALE_S, USED_UP_S, Grant, RateLimiter


def test_without_a_limit_everything_may_start_and_nothing_is_asked_for():
    pace = RateLimiter()
    assert pace.may_start(1.0)
    assert pace.wants(100, 1.0) == 0
    assert pace.next_at(1.0) == 1.0


def test_an_email_may_start_at_each_moment_and_not_before():
    pace = RateLimiter(10)
    pace.grant(Grant(3, 0.5), 100.0, 100.0)
    assert not pace.may_start(100.4)
    assert pace.next_at(100.4) == 100.5
    assert pace.next_at(100.6) == 100.6, "what is due waits for nobody"
    assert pace.may_start(100.5)
    assert not pace.may_start(100.55), "each moment is for one email"
    assert pace.may_start(100.62)
    assert pace.may_start(100.71)
    assert not pace.may_start(100.9), "all are used"


def test_moments_count_from_when_they_were_asked_for():
    pace = RateLimiter(10)
    pace.grant(Grant(2, 0.1), asked_at=100.0, now=100.4)
    assert pace.may_start(100.4)
    assert pace.may_start(100.4), "a late answer moves nothing into the stretch that is drawn next"
    pace = RateLimiter(10, alive=1)
    pace.grant(Grant(0, 0.1), asked_at=100.0, now=100.4)
    assert pace.next_at(100.4) >= 100.5, "but nobody asks again at once"


def test_what_came_to_nothing_is_told_until_it_is_off_the_days_count():
    pace = RateLimiter(10, daily_max=1000)
    pace.grant(Grant(3), 100.0, 100.0)
    assert pace.may_start(100.0)
    assert pace.wants(5, 101.0) == 3
    assert pace.unused == 2
    pace.grant(Grant(0, 0.005), 101.0, 101.0)  # another relay was at the row
    assert pace.unused == 2
    pace.grant(Grant(1, taken_back=2), 102.0, 102.0)
    assert pace.unused == 0
    pace.forget()
    assert pace.unused == 1


def test_without_a_rate_a_moment_waits_as_long_as_its_email():
    """Else a slow server's day would be counted down by emails that were never sent."""
    pace = RateLimiter(daily_max=1000)
    pace.grant(Grant(2), 100.0, 100.0)
    assert pace.wants(2, 200.0) == 0
    assert pace.may_start(200.0)


def test_a_moment_that_was_missed_for_long_is_not_made_up_for():
    pace = RateLimiter(10)
    pace.grant(Grant(2, 0.0), 100.0, 100.0)
    assert not pace.may_start(100.2 + STALE_S)
    assert pace.wants(2, 100.2 + STALE_S) == 2


@pytest.mark.parametrize(
    ("rate", "alive", "share"), [(14, 1, 4), (14, 4, 1), (14, 50, 1), (300, 1, 75), (8000, 1, PORTION_MAX)]
)
def test_a_relay_holds_its_part_of_a_quarter_of_a_second_but_at_least_one(rate, alive, share):
    pace = RateLimiter(rate, alive=alive)
    assert pace.share == share
    assert pace.capacity(0) == pace.share
    assert pace.capacity(pace.share + 3) == 0


def test_no_more_is_asked_for_than_waits_or_than_is_fair():
    pace = RateLimiter(14)
    assert pace.wants(1, 0.0) == 1
    assert pace.wants(100, 0.0) == 4
    pace.grant(Grant(3), 0.0, 0.0)
    assert pace.wants(100, 0.0) == 1


def test_who_was_turned_away_asks_again_after_the_wait_and_all_within_a_second_of_it():
    pace = RateLimiter(0.1, alive=50)
    pace.grant(Grant(0, 8.0), 100.0, 100.0)
    assert pace.wants(1, 107.9) == 0
    assert pace.wants(1, 109.1) == 1
    assert 108.0 <= pace.next_at(100.0) <= 109.0


def test_a_day_that_is_used_up_is_said_and_looked_at_again_later():
    pace = RateLimiter(daily_max=1000)
    pace.grant(Grant(0, used_up=True), 100.0, 100.0)
    assert "1,000" in pace.used_up
    assert pace.is_used_up(100.0)
    assert not pace.is_used_up(101.0 + USED_UP_S)
    assert pace.wants(1, 101.0 + USED_UP_S) == 1
    pace.grant(Grant(1), 101.0 + USED_UP_S, 101.0 + USED_UP_S)
    assert pace.used_up is None


def test_with_a_daily_bound_alone_all_that_is_given_may_start_at_once():
    pace = RateLimiter(daily_max=1000)
    pace.grant(Grant(5), 100.0, 100.0)
    assert [pace.may_start(100.0) for _ in range(6)] == [True] * 5 + [False]
