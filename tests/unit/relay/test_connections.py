import pytest

from outbox.smtp.verdict import Accepted
from tests.support.sending import Connection, a_pool, a_try, settings


@pytest.fixture
def free():
    """A pool without a rate."""
    return a_pool(settings(connections_max=4, batch_max=100))


def test_a_server_that_is_silent_on_all_connections_is_unresponsive(free):
    assert free.connections.is_unresponsive, "there is none"
    lively, hanging = Connection(), Connection()
    for connection in (lively, hanging):
        connection.current = a_try()
        free.connections._all.add(connection)
    hanging.silence_s = 60.0
    assert not free.connections.is_unresponsive
    assert "on 1 connections" in free.connections.broken()
    lively.silence_s = 60.0
    assert free.connections.is_unresponsive
    assert not free.connections.is_stuck, "more may be opened"


def test_a_connection_that_closes_politely_waits_for_no_more_mail(free):
    """Its server may take seconds to answer QUIT, and may take mail again before that."""
    connection = Connection()
    free.connections._all.add(connection)
    free.idle(connection)
    free.connections.close_politely()
    assert connection.is_draining
    assert free.connections.idle == 0


def test_after_a_failover_a_try_past_its_dot_has_the_numbers_of_the_other_server(free):
    first, other = a_try(), a_try()
    for tried in (first, other):
        tried.mark(1)
        free.connections._all.add(Connection())
    for connection, tried in zip(free.connections._all, (first, other), strict=True):
        connection.awaiting_reply = tried
    free.connections.renumber({first.outgoing.key: (4711, 3), other.outgoing.key: (4712, None)})
    assert (first.outgoing.email, first.attempt) == (4711, 3)
    assert (other.outgoing.email, other.attempt) == (4712, 1)
    free.on_verdict(first, Accepted("250 ok"))
    assert free.verdicts.settlements[0].identity == (4711, 3)
