"""What a tick has read of the fleet changes what this relay does."""

from collections import Counter

import pytest

from outbox.relay.found_rate import Found
from outbox.relay.holds import Holds
from outbox.relay.route_state import RouteState
from outbox.relay.tick import RoutePause, TickResult
from outbox.relay.timers import Timers
from tests.support.sending import a_pool, a_try, settings

NOW = 100.0
PAUSED = RoutePause("421 try again later", 5.0)


def tick(**parts: object) -> TickResult:
    fields = {"settled": frozenset(), "marked": {}, "expired": frozenset(), "claims": [], "pause": None}
    return TickResult(**fields | parts, reached=None)


class Wakes:
    """Counts how often the main loop is woken."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def wakes():
    return Wakes()


@pytest.fixture
def pool():
    return a_pool(settings(connections_max=4, batch_max=100))


@pytest.fixture
def timers():
    """Timers of a relay that has just looked for work, and for what has expired, in vain."""
    timers = Timers(poll_max_s=30.0, lease_s=30.0)
    timers.note_claims(NOW, found=False, has_more=False, urgent_at=NOW)
    timers.note_sweep(NOW, 1)
    timers.note_expire(NOW, 1)
    return timers


@pytest.fixture
def state(pool, timers, wakes):
    return RouteState(pool, Holds(pool, Counter()), "", timers, wakes)


def test_the_fleets_pause_opens_the_breaker_and_its_end_lets_the_relay_claim_at_once(state, pool, timers, wakes):
    state.adopt(tick(pause=PAUSED), NOW)
    assert pool.server.breaker.is_open
    assert not timers.is_poll_due(NOW)
    state.adopt(tick(), NOW)
    assert not pool.server.breaker.is_open
    assert timers.is_poll_due(NOW)
    assert wakes.count == 1


def test_a_pause_by_a_person_is_news_once_and_its_end_resumes_what_was_set_aside(state, timers, wakes):
    assert state.adopt(tick(held=frozenset({"progress"})), NOW)
    assert not state.adopt(tick(held=frozenset({"progress"})), NOW)
    assert not timers.is_expire_due(NOW)
    assert not state.adopt(tick(), NOW)
    assert timers.is_poll_due(NOW)
    assert timers.is_sweep_due(NOW)
    assert timers.is_expire_due(NOW)
    assert wakes.count == 1


def test_a_rate_that_the_server_takes_leaves_only_a_share_of_what_waits(state, pool):
    pool.add([a_try() for _ in range(50)])
    state.adopt(tick(found=Found(2.0, 10.0, 5.0, 5.0, said="450 too fast")), NOW)
    share = pool.server.limiter.share
    assert 0 < share < 50
    assert len(pool.ready) == share
    assert len(pool.returns) == 50 - share
