"""Which of a relay's claims may start when; no network is needed for that."""

import asyncio
import itertools
import threading
from types import SimpleNamespace

import pytest

from outbox.relay.pool import Pool
from outbox.relay.rate_limit import Grant

SETTINGS = SimpleNamespace(rate_per_s=10.0, daily_max=None, connections_max=4, batch_max=100)
CLAIM, CONNECTION = object(), object()
EMAILS = itertools.count(1)


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


async def test_what_is_to_be_signed_is_signed_off_the_loop_and_started_on_only_then():
    go_on, threads, started = threading.Event(), [], []

    def prepare(claim):
        threads.append(threading.current_thread())
        assert go_on.wait(10)
        claim.head = b"DKIM-Signature: x\r\n"

    letterhead = SimpleNamespace(is_slow=True, prepare=prepare)
    settings = SimpleNamespace(rate_per_s=None, daily_max=None, connections_max=4, batch_max=100)
    pool = Pool(SimpleNamespace(letterhead=letterhead), None, settings, wake=lambda: None)
    claims = [SimpleNamespace(head=None, fault=None, suspect=False, urgent=False) for _ in range(2)]
    pool.idle(SimpleNamespace(start=started.append))
    pool.add(claims)
    pool.staff(0.0)
    assert pool.take() is None
    await asyncio.sleep(0)
    assert not started, "the loop goes on meanwhile, and what is not signed waits"
    go_on.set()
    async with asyncio.timeout(10):
        while not (started and claims[1].head):
            await asyncio.sleep(0.001)
    assert started == claims[:1]
    pool.conversations.clear()
    assert threading.main_thread() not in threads


def test_suspects_wait_in_front_then_urgent_claims_then_the_others_each_in_their_order(pool):
    def claim(name, **kind):
        return SimpleNamespace(**{"name": name, "urgent": False, "suspect": False, **kind})

    pool.add([claim("a"), claim("b")])
    pool.add([claim("c"), claim("u", urgent=True), claim("s", suspect=True, urgent=True), claim("v", urgent=True)])
    assert [one.name for one in pool.ready] == ["s", "u", "v", "a", "b", "c"]


def claim_of(sender: str) -> SimpleNamespace:
    return SimpleNamespace(email=next(EMAILS), sender=sender, suspect=False, urgent=False, rest_s=0.0)


@pytest.fixture
def free():
    """A pool without a rate."""
    route = SimpleNamespace(letterhead=None, name="mx.example.com:25")
    return Pool(route, None, SimpleNamespace(**{**vars(SETTINGS), "rate_per_s": None}), wake=lambda: None)


@pytest.mark.parametrize(
    ("seen", "limit"),
    [([100], None), ([100, 100], None), ([100, 100, 100], 100), ([100, 99, 100, 100], None), ([7, 100, 100, 100], 100)],
)
def test_a_limit_of_messages_is_remembered_once_several_connections_in_a_row_ended_at_it(free, seen, limit):
    for messages in seen:
        free.session_full(CONNECTION, messages)
    free.session_full(CONNECTION, None)
    assert free.session_limit == limit


def test_a_learned_limit_follows_the_server(free):
    for messages in (100, 100, 100, 50, 50, 50):
        free.session_full(CONNECTION, messages)
    assert free.session_limit == 50


def test_the_mail_of_a_held_sender_waits_and_that_of_others_goes(free):
    good, bad = claim_of("good@example.com"), claim_of("bad@example.com")
    free.hold("bad@example.com", "553 not owned by user")
    free.add([bad, good])
    assert list(free.ready) == [good]
    assert free.put_off == [bad]
    assert bad.rest_s > 0
    assert "bad@example.com" in free.trouble()
    free.accept_sender("bad@example.com")
    free.add([claim_of("bad@example.com")])
    assert len(free.ready) == 2
    assert free.trouble() is None


def test_what_waits_for_a_connection_is_given_back_when_its_sender_is_refused(free):
    bad = claim_of("bad@example.com")
    free.add([bad])
    free.hold("bad@example.com", "553 not owned by user")
    assert not free.ready
    assert free.put_off == [bad]


def test_a_refused_route_gives_back_all_and_asks_with_one_email_of_a_sender_that_was_not_refused(free):
    waiting = claim_of("bad@example.com")
    free.add([waiting])
    free.refused("bad@example.com", "550 no")
    assert free.releases == [waiting]
    assert free.trouble() == "SMTP: 550 no"
    assert free.refusals == 1
    assert free.room(free.breaker.next_at - 0.01) == 0
    assert free.room(free.breaker.next_at + 0.01) > 1, "of these one is chosen"
    bad, good = claim_of("bad@example.com"), claim_of("good@example.com")
    free.add([bad, good])
    assert list(free.ready) == [good]
    assert free.releases == [waiting, bad]


def test_a_backlog_of_a_refused_sender_makes_room_for_others(free):
    free.refused("bad@example.com", "550 no")
    claims = [claim_of("bad@example.com") for _ in range(64)]
    free.add(claims)
    assert list(free.ready) == claims[:1], "nobody else's mail is there: ask with this"
    assert free.put_off == claims[1:]
    assert all(claim.rest_s > 0 for claim in claims[1:])
