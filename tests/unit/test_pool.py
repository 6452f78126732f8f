"""Which of a relay's claims may start when; no network is needed for that."""

from types import SimpleNamespace

import pytest

from outbox.pace import Grant
from outbox.pool import Pool

SETTINGS = SimpleNamespace(rate_per_s=10.0, daily_max=None, connections_max=4, batch_max=100)
CLAIM, CONNECTION = object(), object()


@pytest.fixture
def pool():
    return Pool(SimpleNamespace(letterhead=None), None, SETTINGS, wake=lambda: None)


def test_the_next_start_is_the_next_moment_while_a_claim_waits(pool):
    pool.pace.grant(Grant(2, 0.5), 100.0, 100.0)
    assert pool.next_start_at(100.0) is None, "nothing waits"
    pool.ready.append(CLAIM)
    assert pool.next_start_at(100.0) == 100.5


def test_a_moment_that_has_come_is_used_at_once_where_a_connection_waits(pool):
    """A relay that slept until its next poll instead reached half of its rate."""
    pool.pace.grant(Grant(2), 100.0, 100.0)
    pool.ready.append(CLAIM)
    assert pool.next_start_at(100.01) is None, "connections that work take the next by themselves"
    pool.idle(CONNECTION)
    assert pool.next_start_at(100.01) == 100.01


def test_more_moments_are_asked_for_as_soon_as_it_is_worth_while(pool):
    pool.ready.append(CLAIM)
    pool.idle(CONNECTION)
    assert pool.next_start_at(100.0) == 100.0
    pool.pace.grant(Grant(0, 3.0), 100.0, 100.0)
    assert 103.0 <= pool.next_start_at(100.0) <= 104.0


def test_without_a_rate_nothing_waits_for_a_moment(pool):
    free = Pool(
        SimpleNamespace(letterhead=None),
        None,
        SimpleNamespace(**{**vars(SETTINGS), "rate_per_s": None}),
        wake=lambda: None,
    )
    free.ready.append(CLAIM)
    free.idle(CONNECTION)
    assert free.next_start_at(100.0) is None


async def test_when_the_day_is_used_up_what_has_its_moment_is_still_sent():
    """It is counted; given back, it would be counted and not sent."""
    daily = Pool(
        SimpleNamespace(letterhead=None),
        None,
        SimpleNamespace(**{**vars(SETTINGS), "rate_per_s": None}),
        wake=lambda: None,
    )
    daily.pace.daily_max = 10
    daily.pace.grant(Grant(2), 100.0, 100.0)
    claims = [object() for _ in range(5)]
    daily.ready.extend(claims)
    daily._openings.update({1, 2})  # two connections are on their way
    daily.pace.grant(Grant(0, used_up=True), 100.0, 100.0)
    daily.staff(100.0)
    assert list(daily.ready) == claims[:2]
    assert daily.releases == claims[:1:-1]
