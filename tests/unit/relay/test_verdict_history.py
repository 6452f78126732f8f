"""Verdicts that a relay remembers for a server that may lack them, and for how long."""

from outbox.relay.settlement import Settlement
from outbox.relay.verdict_history import (
    MESSAGES_BYTES_MAX,
    REMEMBERED_BYTES_MAX,
    REMEMBERED_S,
    RETURN_S,
    VerdictHistory,
)
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.verdict import Outcome

TAKEN_BACK = Outcome("pending", "withdrawn", "its mark was not confirmed", 0.3)
LATER = Outcome("pending", "deferred", "451 later", 0.3)
DOUBT = Outcome("in_doubt", "in_doubt", "the connection was lost")
SENT = Outcome("sent", "accepted", "250 ok")


def marked(key="mail1", message=b"hello"):
    tried = Try(OutgoingEmail(1, 1, key, 0, 0, "a@example.com", "b@example.com", "<1@x>", message))
    tried.mark(1)
    return tried


def test_nothing_grows_old_while_there_is_no_session():
    history = VerdictHistory()
    history.note(marked(), 1, SENT, 1000.0)
    history.note_lost(1000.0 + REMEMBERED_S - 1)
    history.note(marked(), 2, SENT, 1000.0 + 10 * REMEMBERED_S)
    told = history.recall([], [], 2000.0, doubt_s=None)
    assert [(n.key, n.attempt) for n in told] == [("mail1", 2)], "the latest of an email"
    assert len(history._verdicts) == 2


def test_verdicts_grow_old_while_there_is_one():
    history = VerdictHistory()
    history.note(marked(), 1, SENT, 1000.0)
    history.note(marked(), 2, SENT, 1001.0 + REMEMBERED_S)
    assert len(history._verdicts) == 1


def test_what_is_remembered_takes_a_bounded_memory():
    history = VerdictHistory()
    for number in range(40):
        history.note(marked(key=f"k{number}", message=b"x" * 2**20), 1, DOUBT, 1000.0)
    history.note_lost(1000.0)
    told = history.recall([], [], 2000.0, doubt_s=None)
    history.note_known()
    assert len(told) == 40, "the verdicts are all there"
    assert sum(len(n.message) for n in told if n.message is not None) <= MESSAGES_BYTES_MAX
    assert all(n.outcome.delay_s is None for n in told if n.message is None), "it is not sent by itself without them"
    long = "k" * 1000
    for number in range(60_000):
        history.note(marked(key=f"{long}{number}"), 1, SENT, 1000.0)
    assert history._bytes <= REMEMBERED_BYTES_MAX
    assert 20_000 < len(history._verdicts) < 60_000
    history.note(marked(), 2, SENT, 1001.0 + REMEMBERED_S)
    assert history._message_bytes == 0
    assert history._bytes == history._verdicts[0][1].bytes


def test_a_dot_without_an_answer_is_told_as_doubt_on_the_policys_clock():
    (told,) = VerdictHistory().recall([], [marked()], 2000.0, doubt_s=60.0)
    assert (told.outcome.state, told.outcome.delay_s, told.message) == ("in_doubt", 60.0, b"hello")


def test_a_verdict_that_no_commit_confirmed_is_told():
    unsettled = Settlement(1, 1, "mail1", 1, marked=True, outcome=LATER)
    assert [n.outcome for n in VerdictHistory().recall([unsettled], [], 2000.0, doubt_s=None)] == [LATER]


def test_after_a_change_of_servers_nothing_grows_old_for_as_long_as_the_old_one_may_come_back():
    history = VerdictHistory()
    history.note_move(0.0, 1000.0)
    history.note(marked(), 1, SENT, 1001.0)
    history.note(marked(key="mail2"), 1, SENT, 1000.0 + RETURN_S - 1)
    history.note_lost(1000.0 + RETURN_S - 1)
    assert {n.key for n in history.recall([], [], 2000.0, doubt_s=None)} == {"mail1", "mail2"}
    history.note_known()
    history.note(marked(key="mail3"), 1, SENT, 1000.0 + RETURN_S + REMEMBERED_S)
    assert len(history._verdicts) == 1


def test_an_acceptance_is_told_rather_than_a_try_with_a_later_number_on_another_server():
    history = VerdictHistory()
    history.note(marked(), 1, SENT, 1000.0)
    history.note(marked(), 5, TAKEN_BACK, 1001.0)
    history.note(marked(), 6, DOUBT, 1002.0)
    history.note_lost(1003.0)
    assert [n.outcome for n in history.recall([], [], 2000.0, doubt_s=None)] == [SENT]


def test_only_a_message_in_doubt_is_kept():
    history = VerdictHistory()
    history.note(marked(), 1, SENT, 1000.0)
    history.note(marked(key="mail2"), 1, DOUBT, 1000.0)
    kept = {n.key: n.message for n in history.recall([], [], 1001.0, doubt_s=None)}
    assert kept == {"mail1": None, "mail2": b"hello"}


def test_a_session_is_lost_at_its_first_loss_however_often_the_next_ones_fail():
    history = VerdictHistory()
    history.note(marked(), 1, SENT, 1000.0)
    history.note_lost(1001.0)
    history.note_lost(1001.0 + 10 * REMEMBERED_S)
    assert len(history.recall([], [], 1002.0 + 10 * REMEMBERED_S, doubt_s=None)) == 1
