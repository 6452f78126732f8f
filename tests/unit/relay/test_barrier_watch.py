"""A relay's place at the failover barrier, across its sessions."""

from datetime import UTC, datetime

import pytest

from outbox.database import failover_rules
from outbox.database.failover_rules import Kind, Row
from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.session import Session, SessionEvents
from outbox.relay.verdict_history import RETURN_S, VerdictHistory
from tests.support.sending import settings

NOW = 100.0
STARTED_AT = datetime(2026, 11, 30, tzinfo=UTC)
HERE, ELSEWHERE = (1, STARTED_AT), (2, STARTED_AT)
STANDS = Row(3, Kind.MOVE, frozenset({"other"}), is_lifted=False)


@pytest.fixture
def history():
    return VerdictHistory()


@pytest.fixture
def watch(history):
    return BarrierWatch(settings(), history)


def session(barrier=Row(), server=HERE):  # noqa: B008 - a frozen value
    return Session(None, 7, *server, SessionEvents(), barrier, frozenset())


def test_a_relay_that_finds_the_barrier_raised_waits_and_looks_at_once(watch):
    watch.begin(session(STANDS), None, NOW)
    assert watch.is_up
    assert watch.epoch == 3
    assert watch.look_at <= NOW


def test_a_relay_that_finds_the_barrier_lifted_sends(watch):
    watch.begin(session(Row(3)), None, NOW)
    assert not watch.is_up
    assert watch.epoch == 3
    assert watch.look_at is None


def test_a_new_session_knows_the_barrier_as_it_is_then(watch):
    watch.begin(session(STANDS), None, NOW)
    watch.begin(session(Row(4)), HERE, NOW)
    assert not watch.is_up
    assert watch.epoch == 4


def test_only_news_of_the_barrier_itself_is_looked_at(watch):
    watch.begin(session(STANDS), None, NOW)
    assert not watch.hear(failover_rules.JOINED + "b" * 32)
    assert not watch.hear(failover_rules.LEFT + "b" * 32)
    assert watch.hear(failover_rules.RAISED)


def test_a_relay_that_has_joined_is_known_in_the_next_session_until_it_leaves(watch):
    watch.begin(session(), None, NOW)
    watch.hear(failover_rules.JOINED + "b" * 32)
    assert set(watch.standing(HERE).seen) == {"b" * 32}
    watch.hear(failover_rules.LEFT + "b" * 32)
    assert not watch.standing(HERE).seen


@pytest.mark.parametrize(("former", "keep_until"), [(None, 0.0), (HERE, 0.0), (ELSEWHERE, NOW + RETURN_S)])
def test_after_a_change_of_servers_no_verdict_is_forgotten(watch, history, former, keep_until):
    watch.begin(session(), former, NOW)
    assert history.keep_until == keep_until


def test_a_move_of_others_counts_from_the_moment_when_they_moved(watch, history):
    watch.begin(session(Row(3, moved_s=60.0)), HERE, NOW)
    assert history.keep_until == NOW + RETURN_S - 60.0


def test_a_time_without_an_answer_is_a_gap_until_the_next_session(watch, monkeypatch):
    watch.begin(session(), None, NOW)
    watch.note_answer()
    assert not watch.has_gap
    late_s = boot_clock_s() + 1000.0
    monkeypatch.setattr("outbox.relay.barrier_watch.boot_clock_s", lambda: late_s)
    watch.note_answer()
    assert watch.has_gap
    assert watch.standing(HERE).has_gap
    watch.begin(session(), HERE, NOW)
    assert not watch.has_gap
