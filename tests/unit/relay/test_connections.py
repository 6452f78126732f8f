import pytest

from tests.support.sending import Connection, a_pool, a_try, settings


@pytest.fixture
def free():
    """A pool without a rate."""
    return a_pool(settings(connections_max=4, batch_max=100))


def test_a_server_that_is_silent_on_all_connections_is_unresponsive(free):
    assert free._connections.is_unresponsive, "there is none"
    lively, hanging = Connection(), Connection()
    for connection in (lively, hanging):
        connection.current = a_try()
        free._connections._all.add(connection)
    hanging.silence_s = 60.0
    assert not free._connections.is_unresponsive
    assert "on 1 connections" in free._connections.broken()
    lively.silence_s = 60.0
    assert free._connections.is_unresponsive
    assert not free._connections.is_stuck, "more may be opened"


def test_a_connection_that_closes_politely_waits_for_no_more_mail(free):
    """Its server may take seconds to answer QUIT, and may take mail again before that."""
    connection = Connection()
    free._connections._all.add(connection)
    free.idle(connection)
    free._connections.close_politely()
    assert connection.is_draining
    assert free._connections.idle == 0
