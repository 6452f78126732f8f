"""Which emails a relay has in flight, wherever they are."""

import pytest

from outbox.smtp.verdict import Accepted, Refused
from tests.support.sending import Connection, a_pool, a_try, settings


@pytest.fixture
def free():
    """A pool without a rate."""
    return a_pool(settings(connections_max=4, batch_max=100))


def test_a_relay_has_work_until_the_last_verdict_is_written(free):
    assert free.in_flight.is_empty
    assert not free.in_flight.has_work
    tried, connection = a_try(), Connection()
    free.add([tried])
    assert list(free.in_flight.emails()) == [tried.outgoing.email]
    assert not free.in_flight.is_empty
    assert not free.in_flight.has_work, "what waits for a connection is given back by a relay that stops"
    connection.current = free.ready.pop(0.0)
    free._connections._all.add(connection)
    assert list(free.in_flight.emails()) == [tried.outgoing.email]
    assert not free.in_flight.is_empty
    assert free.in_flight.has_work
    assert not free.in_flight.is_waiting_for_marks
    free.ask_mark(connection, tried)
    assert free.in_flight.is_waiting_for_marks
    free.marks.take()
    connection.current = None
    free.on_verdict(tried, Refused("550 no"))
    assert not free.in_flight.emails()
    assert not free.in_flight.is_empty
    assert free.in_flight.has_work
    free.verdicts.take()
    assert free.in_flight.is_empty
    assert not free.in_flight.has_work


def test_an_email_that_goes_back_is_work_until_it_is_given_back(free):
    tried = a_try()
    free.release([tried.outgoing])
    assert list(free.in_flight.emails()) == [tried.outgoing.email]
    assert free.in_flight.has_work
    free.returns.take()
    assert not free.in_flight.has_work


def test_after_a_failover_a_try_past_its_dot_has_the_numbers_of_the_other_server(free):
    first, other = a_try(), a_try()
    for tried in (first, other):
        tried.mark(1)
        free._connections._all.add(Connection())
    for connection, tried in zip(free._connections._all, (first, other), strict=True):
        connection.awaiting_reply = tried
    free.in_flight.renumber({first.outgoing.key: (4711, 3), other.outgoing.key: (4712, None)})
    assert (first.outgoing.email, first.attempt) == (4711, 3)
    assert (other.outgoing.email, other.attempt) == (4712, 1)
    free.on_verdict(first, Accepted("250 ok"))
    assert free.verdicts.settlements[0].identity == (4711, 3)
