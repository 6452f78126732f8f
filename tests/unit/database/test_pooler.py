import asyncio
from itertools import cycle

import asyncpg
import pytest

from outbox.database import pooler
from outbox.database.pooler import require_lease, say_pooler, shares_sessions
from outbox.errors import DatabaseUnavailableError, UnsafeDatabaseError
from outbox.settings.urls import DatabaseUrl

URL = DatabaseUrl.parse("postgresql://app:hidden@pooler/reports")


class Answering:
    """A connection whose statements raise what the server processes in turn would."""

    def __init__(self, *processes):
        self.processes = cycle(processes)
        self.ended = False

    async def execute(self, _, **__):
        raise asyncpg.RaiseError(next(self.processes))

    def terminate(self):
        self.ended = True


def opening(*connections):
    left = list(connections)

    async def opened():
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return opened


@pytest.mark.parametrize("one, other, shared", [
    (("1",), ("2",), False),
    (("1",), ("1",), True),
    (("1", "3"), ("2",), True),
])  # fmt: skip
async def test_two_connections_on_one_server_process_show_a_pooler(one, other, shared):
    connections = Answering(*one), Answering(*other)
    assert await shares_sessions(opening(*connections)) is shared
    assert all(connection.ended for connection in connections)


async def test_a_connection_that_is_refused_is_asked_for_again(monkeypatch):
    monkeypatch.setattr(pooler, "BARE_PAUSE_S", 0)
    first, busy = Answering("1"), DatabaseUnavailableError("busy")
    assert await shares_sessions(opening(first, busy, Answering("1"), Answering("1")))
    assert first.ended


async def test_a_second_connection_that_waits_for_the_first_shows_session_mode(monkeypatch):
    monkeypatch.setattr(pooler, "BARE_TIMEOUT_S", 0.05)
    opened = opening(Answering("1"))

    async def waits():
        try:
            return await opened()
        except IndexError:
            await asyncio.sleep(60)

    assert not await shares_sessions(waits)


@pytest.mark.parametrize(
    "other, words", [("2", "keeps sessions apart, but drops their settings"), ("1", "transaction mode")]
)
async def test_a_lease_that_is_not_in_force_is_refused_and_its_connection_ended(other, words):
    leased = Answering("0 ms")
    with pytest.raises(UnsafeDatabaseError, match=words) as found:
        await require_lease(URL, leased, "10000", timeout_s=1, opening=opening(Answering("1"), Answering(other)))
    assert leased.ended
    assert "idle_session_timeout is 0 ms although 10000 ms" in str(found.value)
    assert "hidden" not in str(found.value)


def test_the_sentence_names_the_mode_of_the_pooler():
    assert "is in statement mode" in say_pooler(URL, "not allowed in statement pooling mode")
    assert "is in transaction mode" in say_pooler(URL, "the server process behind a connection changes")
