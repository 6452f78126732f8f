from dataclasses import dataclass, field

import pytest

from outbox.relay.marks import Marks
from outbox.relay.tick import TickResult
from outbox.smtp.outgoing import Try
from tests.support.sending import a_server, a_try, some_verdicts


@dataclass(eq=False)
class Connection:
    """A connection that waits for a mark, unless it has ended."""

    is_waiting: bool = True
    abandoned: list[str] = field(default_factory=list)
    dots: int = 0

    def is_marking(self, _tried: Try) -> bool:
        return self.is_waiting

    def abandon(self, reason: str) -> None:
        self.is_waiting = False
        self.abandoned.append(reason)

    def send_final_dot(self) -> None:
        self.dots += 1


def tick(**parts: object) -> TickResult:
    return TickResult(
        **({"settled": frozenset(), "marked": {}, "expired": frozenset(), "claims": [], "pause": None} | parts),
        reached=None,
    )


@pytest.fixture
def marks():
    return Marks(some_verdicts(a_server()), is_held=lambda _: True)


def asked_of(marks: Marks, *, is_waiting: bool = True):
    tried, connection = a_try(), Connection()
    marks.ask(connection, tried)
    connection.is_waiting = is_waiting
    return tried, connection, tried.outgoing.email


def act(marks: Marks, done: TickResult, *, is_too_late: bool = False) -> list[Try]:
    return marks.act_on(marks.take(), done, is_too_late=lambda: is_too_late)


def verdicts_of(marks: Marks) -> list[str]:
    return [one.outcome.verdict for one in marks.verdicts.settlements]


def test_what_is_marked_and_fresh_goes_on_to_its_dot(marks):
    tried, connection, email = asked_of(marks)
    assert act(marks, tick(marked={email: 3})) == []
    assert connection.dots == 1
    assert (tried.marked, tried.attempt) == (True, 3)
    assert verdicts_of(marks) == []


def test_what_is_marked_too_late_is_not_sent(marks):
    tried, connection, email = asked_of(marks)
    act(marks, tick(marked={email: 1}), is_too_late=True)
    assert connection.dots == 0
    assert connection.abandoned
    assert verdicts_of(marks) == ["withdrawn"]
    assert tried.marked, "the row says sending: its verdict takes that back"


def test_a_mark_whose_connection_has_ended_is_withdrawn(marks):
    _, connection, email = asked_of(marks, is_waiting=False)
    act(marks, tick(marked={email: 1}))
    assert connection.dots == 0
    assert verdicts_of(marks) == ["withdrawn"]


def test_what_is_no_longer_this_relays_is_let_go_of_without_a_verdict(marks):
    tried, connection, _ = asked_of(marks)
    assert act(marks, tick()) == [tried]
    assert connection.abandoned
    assert connection.dots == 0
    assert verdicts_of(marks) == []
    assert not tried.marked


@pytest.mark.parametrize("part", ["expired", "quarantined"])
def test_what_expired_or_cannot_be_marked_is_let_go_of(marks, part):
    _, connection, email = asked_of(marks)
    assert act(marks, tick(**{part: frozenset({email})})) == []
    assert connection.abandoned
    assert verdicts_of(marks) == []


def test_a_locked_row_withdraws_the_try(marks):
    _, connection, email = asked_of(marks)
    assert act(marks, tick(locked=frozenset({email}))) == []
    assert connection.abandoned
    assert verdicts_of(marks) == ["withdrawn"]


def test_after_a_failed_tick_each_try_is_withdrawn_under_the_number_that_its_mark_may_have(marks):
    tried, connection, _ = asked_of(marks)
    marks.withdraw(marks.take())
    assert connection.abandoned
    (settlement,) = marks.verdicts.settlements
    assert (settlement.attempt, settlement.marked) == (tried.outgoing.attempt + 1, True)


def test_behind_the_barrier_marks_wait_and_what_has_ended_is_given_back(marks):
    waiting, _, email = asked_of(marks)
    ended, _, _ = asked_of(marks, is_waiting=False)
    expired, _, late = asked_of(marks)
    decided, given_back = marks.keep_refused(marks.take(), tick(expired=frozenset({late}), is_open=False))
    assert list(decided) == [late]
    assert given_back == [ended.outgoing]
    assert marks.emails() == [waiting.outgoing]
    assert list(marks.take()) == [email]
    assert not expired.marked


def test_nothing_is_marked_for_a_lost_session_or_twice():
    lost = Marks(some_verdicts(a_server()), is_held=lambda _: False)
    _, connection, _ = asked_of(lost)
    assert connection.abandoned
    assert len(lost) == 0
    held = Marks(some_verdicts(a_server()), is_held=lambda _: True)
    tried, first, _ = asked_of(held)
    second = Connection()
    held.ask(second, Try(tried.outgoing))
    assert second.abandoned
    assert not first.abandoned
    assert held.retract(second) == []
    assert held.retract(first) == [tried]
    assert len(held) == 0
