import time

import pytest

from outbox.relay.circuit_breaker import REFUSALS_MAX
from outbox.smtp.verdict import Deferred
from tests.support.sending import a_server, a_try, some_verdicts

LIMIT = "421 4.7.0 too many connections"


@pytest.fixture
def server():
    return a_server()


def test_a_server_that_grants_no_connection_at_all_is_broken(server):
    assert not server.on_connection_limit(LIMIT, working=0, are_opening=False)
    assert server.breaker.is_open
    assert server.connection_limit.found is None


def test_a_server_that_works_for_other_relays_only_has_no_connection_left(server):
    now = time.monotonic()
    server.on_connection_limit(LIMIT, working=0, are_opening=False)
    server.note_others(10, now, is_connected=False)
    assert server.breaker.is_open, "nothing is known of before"
    server.note_others(11, now, is_connected=False)
    assert not server.breaker.is_open
    assert server.on_connection_limit(LIMIT, working=0, are_opening=False)
    assert not server.breaker.is_open
    assert server.connection_limit.found == 1


def test_a_deferral_that_all_recipients_get_is_shown_until_an_email_is_accepted(server):
    verdicts = some_verdicts(server)
    for _ in range(4):
        verdicts.on_verdict(a_try(), Deferred("450 4.3.2 busy (to RCPT)"))
    assert "defers every email: 450 4.3.2 busy" in server.deferring()
    assert server.limiter.refused is not None, "the rate may be the reason"
    server.on_accepted(a_try(), time.monotonic())
    assert server.deferring() is None


def test_a_quota_that_is_used_up_pauses_the_route_too(server):
    server.on_rate_limit("450 4.7.1 hourly quota exceeded", time.monotonic())
    assert server.breaker.is_open
    assert server.throttles == 1


def test_a_refused_sender_ends_a_run_only_if_there_is_no_other_mail(server):
    now = time.monotonic()
    for hour in range(REFUSALS_MAX):
        server.senders.refuse("bad@example.com", "553 no", now + 3600.0 * hour)
    assert server.refused_for_good(now, has_other_mail=True) is None
    assert server.refused_for_good(now, has_other_mail=False) == "553 no"
    server.on_accepted(a_try("good@example.com"), now)
    assert server.refused_for_good(now, has_other_mail=False) is None, "the server takes mail"
