"""Judgements of figures, without a server."""

import pytest

from outbox.doctor.database import (
    judge_clock,
    judge_connections,
    judge_encoding,
    judge_lease,
    judge_replication,
    judge_version,
)
from outbox.doctor.finding import Grade


@pytest.mark.parametrize("major, grade", [(13, Grade.PROBLEM), (14, Grade.OK), (18, Grade.OK)])
def test_postgres_before_14_is_a_fault(major, grade):
    assert judge_version(major, f"{major}.1").grade is grade


def test_an_encoding_that_lacks_characters_is_a_fault():
    assert judge_encoding("UTF8").grade is Grade.OK
    assert judge_encoding("SQL_ASCII").grade is Grade.PROBLEM


@pytest.mark.parametrize(
    "ahead_s, bound_s, grade",
    [
        (0.0, 0.001, Grade.OK),
        (-3.0, 1.5, Grade.OK),
        (3.0, 0.1, Grade.NOTE),
        (-60.0, 0.1, Grade.NOTE),
        (60.1, 0.1, Grade.PROBLEM),
        (-3600.0, 0.1, Grade.PROBLEM),
    ],
)
def test_a_clock_is_judged_within_the_bound_of_its_measurement(ahead_s, bound_s, grade):
    found = judge_clock(ahead_s, bound_s=bound_s)
    assert found.grade is grade
    assert bool(found.fix) is (grade is not Grade.OK)


ASKED = {"idle_session_timeout": "10000", "tcp_user_timeout": "5000"}


@pytest.mark.parametrize(
    "in_force, socket, grade, says",
    [
        (ASKED, False, Grade.OK, "lost after about 6 s"),
        ({**ASKED, "tcp_user_timeout": "0"}, True, Grade.OK, "Unix socket"),
        ({**ASKED, "tcp_user_timeout": "0"}, False, Grade.NOTE, "tcp_user_timeout is 0"),
        ({**ASKED, "idle_session_timeout": "0"}, False, Grade.PROBLEM, "idle_session_timeout is 0 (asked: 10000)"),
        ({}, True, Grade.PROBLEM, "idle_session_timeout is unknown"),
    ],
)
def test_a_lease_that_is_not_in_force_is_a_fault_and_weak_keepalives_are_a_note(in_force, socket, grade, says):
    found = judge_lease(ASKED, in_force, lease_s=10, socket=socket)
    assert found.grade is grade
    assert says in found.found


@pytest.mark.parametrize(
    "wanted, standbys, visible, synchronous, grade, says",
    [
        (False, 0, 0, 0, Grade.NOTE, "no standby"),
        (False, 1, 1, 0, Grade.NOTE, "asynchronous: a failover may lose the last commits"),
        (True, 0, 0, 0, Grade.PROBLEM, "every commit waits"),
        (True, 2, 2, 0, Grade.PROBLEM, "none is synchronous"),
        (True, 1, 1, 1, Grade.OK, "a mark is on primary and standby before its email is sent"),
        (True, 1, 0, 0, Grade.OK, "may not see"),
    ],
)
def test_replication_is_said_as_what_a_failover_costs(wanted, standbys, visible, synchronous, grade, says):
    found = judge_replication(wanted=wanted, standbys=standbys, visible=visible, synchronous=synchronous)
    assert found.grade is grade
    assert says in found.found


@pytest.mark.parametrize("taken, grade", [(50, Grade.OK), (95, Grade.NOTE), (98, Grade.NOTE), (99, Grade.PROBLEM)])
def test_a_relay_and_its_self_test_need_three_connections(taken, grade):
    assert judge_connections(100, taken, "max_connections").grade is grade
