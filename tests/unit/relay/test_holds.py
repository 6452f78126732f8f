"""A relay notices at its next tick that people have paused or resumed something."""

from collections import Counter
from types import SimpleNamespace

import pytest

from outbox.database.pause_list import FLEET
from outbox.relay.holds import Holds, PauseChange


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
