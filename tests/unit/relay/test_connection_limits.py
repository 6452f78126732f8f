import pytest

from outbox.relay.connection_limits import LIMIT_KEPT_S, MORE_AFTER_S, ConnectionLimit, SessionLimit


def test_the_limit_of_connections_is_what_was_open_when_one_more_was_refused():
    limit = ConnectionLimit()
    assert limit.may_open(63, 0.0)
    limit.refuse(0, "421 too many connections", 0.0)  # those that are granted are not ready yet
    for working in (1, 2, 3, 4):
        limit.note_working(working, 0.1)
    assert limit.found == 4
    assert not limit.may_open(4, 10.0)
    assert limit.may_open(3, 10.0)
    assert not limit.may_open(3, 0.2), "not at once"


def test_one_more_connection_is_tried_ever_more_rarely():
    limit, now, tries = ConnectionLimit(), 0.0, []
    limit.refuse(4, "421", now)
    for now in range(1, 4000):
        if limit.may_open(4, now):
            tries.append(now)
            limit.refuse(4, "421", now)
    assert tries[0] >= MORE_AFTER_S
    assert len(tries) <= 7
    limit.note_working(5, now)
    assert limit.found == 5


def test_a_server_that_grants_no_connection_is_asked_with_growing_pauses():
    limit, asked = ConnectionLimit(), []
    for tenth in range(6000):
        if limit.may_open(0, tenth / 10):
            asked.append(tenth / 10)
            limit.refuse(0, "421", tenth / 10)
    assert asked[1] - asked[0] < 1
    assert len(asked) <= 30


@pytest.mark.parametrize(
    ("seen", "limit"),
    [([100], None), ([100, 100], None), ([100, 100, 100], 100), ([100, 99, 100, 100], None), ([7, 100, 100, 100], 100)],
)
def test_a_limit_of_messages_is_remembered_once_several_connections_in_a_row_ended_at_it(seen, limit):
    session = SessionLimit()
    shown = [session.note(messages, 1000.0) for messages in seen]
    assert session.found == limit
    assert shown == [False] * (len(seen) - 1) + [limit is not None]
    assert session.at(1000.0 + LIMIT_KEPT_S) is None, "it is tried again"


def test_a_learned_limit_of_messages_follows_the_server():
    session = SessionLimit()
    for messages in (100, 100, 100, 50, 50, 50):
        session.note(messages, 1000.0)
    assert session.at(1000.0) == 50
