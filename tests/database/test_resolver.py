"""How a relay asks its resolver: a function that hangs costs threads, a bounded number, and never the relay."""

import asyncio
import threading

import pytest

from outbox.relay.quarantine import Quarantine
from outbox.relay.resolver import ASK_LEASE_S, HUNG_MAX, ResolverRunner
from tests.support.fleet import until

GRACE_S = 1.0


@pytest.fixture
async def doubtful(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'in_doubt', relay = 1, attempt = 1, marked_at = now(), doubted_at = now()"
    )
    return fleet.connection


async def make_due(connection):
    await connection.execute("UPDATE outbox.delivery SET due_at = now()")


def runner_of(resolver):
    return ResolverRunner(resolver, grace_s=GRACE_S, asks_max=3, wake=lambda: None)


async def test_a_resolver_that_hangs_is_asked_a_few_times_and_then_no_more(doubtful):
    go_on, asked = threading.Event(), []

    def hang(email):
        asked.append(email.key)
        go_on.wait()
        return True

    it, now = runner_of(hang), 1000.0
    for _ in range(HUNG_MAX + 2):
        await make_due(doubtful)
        await it.ask(doubtful, now, Quarantine())
        await it.ask(doubtful, now + ASK_LEASE_S, Quarantine())  # not yet: the answer may still come
        now += ASK_LEASE_S + 1
    await until(lambda: len(asked) == HUNG_MAX, "each question is put")
    assert it.trouble is not None
    assert "the resolver hangs" in it.trouble
    go_on.set()
    await until(lambda: len(it.answers) == HUNG_MAX, "late answers are heard")
    await it.write(doubtful, Quarantine())
    assert await doubtful.fetchval("SELECT state FROM outbox.delivery") == "sent"
    assert await doubtful.fetchval("SELECT count(*) FROM outbox.attempt WHERE verdict = 'resolved'") == 1


async def test_no_more_is_asked_while_answers_are_awaited(doubtful):
    go_on, asked = threading.Event(), []

    def wait(email):
        asked.append(email.key)
        go_on.wait()

    it = runner_of(wait)
    await make_due(doubtful)
    await it.ask(doubtful, 1000.0, Quarantine())
    await make_due(doubtful)
    await it.ask(doubtful, 1001.0, Quarantine())
    go_on.set()
    await until(lambda: it.answers, "it is heard")
    assert asked == ["mail1"]
    await it.write(doubtful, Quarantine())
    assert it.answers == []
    await make_due(doubtful)
    await it.ask(doubtful, 1002.0, Quarantine())
    await until(lambda: len(asked) == 2, "it is asked again")


async def test_a_resolver_that_hung_and_has_come_back_is_asked_again(doubtful):
    go_on, asked = threading.Event(), []

    def outage(email):
        asked.append(email.key)
        go_on.wait()

    it, now = runner_of(outage), 1000.0
    for _ in range(HUNG_MAX):
        await make_due(doubtful)
        await it.ask(doubtful, now, Quarantine())
        now += ASK_LEASE_S + 1
    await it.ask(doubtful, now, Quarantine())
    assert it.trouble is not None
    go_on.set()
    await until(lambda: len(it.answers) == HUNG_MAX, "every call has returned")
    assert it.trouble is None
    await make_due(doubtful)
    await it.ask(doubtful, now + 1, Quarantine())
    await until(lambda: len(asked) == HUNG_MAX + 1, "it is asked again")


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, StopIteration, LookupError])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_a_resolver_that_raises_whatever_it_is_does_not_know(doubtful, error, is_async):
    def plain(_email):
        raise error

    async def asynchronous(_email):
        raise error

    it = runner_of(asynchronous if is_async else plain)
    await make_due(doubtful)
    await it.ask(doubtful, 1000.0, Quarantine())
    await until(lambda: it.answers, "it does not know")
    assert it.answers[0].accepted is None
    assert "raised" in it.answers[0].reply


async def test_an_answer_is_not_taken_for_another_emails_that_has_its_id_after_a_failover(doubtful):
    go_on = threading.Event()
    it = runner_of(lambda _email: go_on.wait())
    await make_due(doubtful)
    await it.ask(doubtful, 1000.0, Quarantine())
    await doubtful.execute("UPDATE outbox.email SET key = 'other', recipient = 'other@example.com'")
    go_on.set()
    await until(lambda: it.answers, "it is heard")
    assert it.answers[0].accepted is True
    await it.write(doubtful, Quarantine())
    assert await doubtful.fetchval("SELECT state FROM outbox.delivery") == "in_doubt"
