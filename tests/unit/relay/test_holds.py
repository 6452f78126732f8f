"""A relay notices at its next tick that people have paused or resumed something."""

from collections import Counter
from types import SimpleNamespace

import pytest

from outbox.database.pause_list import FLEET
from outbox.relay.holds import Holds, PauseChange
from tests.support.sending import a_pool, a_try, settings


@pytest.fixture
def holds():
    return Holds(SimpleNamespace(note_pauses=lambda **_: None), Counter())


def test_a_pause_is_news_once(holds):
    assert holds.adopt(frozenset({"progress"})) == PauseChange(has_begun=True, has_ended=False)
    assert holds.adopt(frozenset({"progress"})) == PauseChange(has_begun=False, has_ended=False)
    assert holds.holds_any
    assert not holds.holds_fleet


def test_one_pause_may_begin_while_another_ends(holds):
    holds.adopt(frozenset({"progress"}))
    assert holds.adopt(frozenset({FLEET})) == PauseChange(has_begun=True, has_ended=True)
    assert holds.holds_fleet


def test_a_new_session_reads_all_pauses_anew(holds):
    holds.adopt(frozenset({"progress"}))
    holds.forget()
    assert not holds.holds_any
    assert holds.adopt(frozenset({"progress"})).has_begun


async def test_a_stop_while_what_waits_is_looked_at_gives_it_back(monkeypatch):
    """A pause has just begun, and SIGTERM comes before Postgres has answered which emails it holds back."""
    pool = a_pool(settings(connections_max=4))
    holds = Holds(pool, Counter())
    holds.adopt(frozenset({"progress"}))
    paused, other = a_try(), a_try()
    pool.ready.add([paused, other])

    async def set_aside(*_: object) -> frozenset[int]:
        pool.close_politely()
        return frozenset({paused.outgoing.email})

    monkeypatch.setattr("outbox.relay.pauses.set_aside", set_aside)
    session = SimpleNamespace(connection=None, relay=1, quarantine=None, lost=None)
    await holds.spare_waiting(session, is_stopping=False)
    assert not pool.ready, "a relay that stops sends nothing that waits"
    assert list(pool.returns) == [other.outgoing]


async def test_what_waits_is_held_back_if_its_sender_is_refused_while_it_is_looked_at(monkeypatch):
    pool = a_pool(settings(connections_max=4))
    holds = Holds(pool, Counter())
    holds.adopt(frozenset({"progress"}))
    refused, other = a_try("bad@example.com"), a_try("good@example.com")
    pool.ready.add([refused, other])

    async def set_aside(*_: object) -> frozenset[int]:
        pool.server.hold_sender("bad@example.com", "553 not owned by user")
        return frozenset()

    monkeypatch.setattr("outbox.relay.pauses.set_aside", set_aside)
    session = SimpleNamespace(connection=None, relay=1, quarantine=None, lost=None)
    await holds.spare_waiting(session, is_stopping=False)
    assert list(pool.ready) == [other]
    assert list(pool.returns) == [refused.outgoing]
