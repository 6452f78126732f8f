"""What the doctor makes of figures, without a server."""

import datetime as dt

import pytest

from outbox.doctor.database import (
    judge_clock,
    judge_connections,
    judge_encoding,
    judge_lease,
    judge_replication,
    judge_version,
)
from outbox.doctor.finding import Grade, fault_of
from outbox.doctor.reports import judge_link
from outbox.doctor.run import judge_limits, judge_pauses, judge_relays, judge_routes
from outbox.doctor.smtp import judge_certificate, judge_envelope, judge_size
from outbox.errors import SchemaError
from outbox.operations.snapshot import FailingRoute, LivingRelay
from outbox.operations.status import Status
from outbox.relay.pauses import Pause


def test_a_sentence_of_ours_is_parted_before_its_mend():
    found = fault_of("x", SchemaError("x: it says a; b (c); correct it there."))
    assert (found.found, found.mend) == ("it says a; b (c)", "correct it there")
    assert found.sentence == "it says a; b (c); correct it there."


@pytest.mark.parametrize("major, grade", [(13, Grade.FAULT), (14, Grade.OK), (18, Grade.OK)])
def test_postgres_before_14_is_a_fault(major, grade):
    assert judge_version(major, f"{major}.1").grade is grade


def test_an_encoding_that_lacks_characters_is_a_fault():
    assert judge_encoding("UTF8").grade is Grade.OK
    assert judge_encoding("SQL_ASCII").grade is Grade.FAULT


@pytest.mark.parametrize(
    "ahead_s, bound_s, grade",
    [
        (0.0, 0.001, Grade.OK),
        (-3.0, 1.5, Grade.OK),
        (3.0, 0.1, Grade.NOTE),
        (-60.0, 0.1, Grade.NOTE),
        (60.1, 0.1, Grade.FAULT),
        (-3600.0, 0.1, Grade.FAULT),
    ],
)
def test_a_clock_is_judged_within_the_bound_of_its_measurement(ahead_s, bound_s, grade):
    found = judge_clock(ahead_s, bound_s=bound_s)
    assert found.grade is grade
    assert bool(found.mend) is (grade is not Grade.OK)


ASKED = {"idle_session_timeout": "10000", "tcp_user_timeout": "5000"}


@pytest.mark.parametrize(
    "in_force, socket, grade, says",
    [
        (ASKED, False, Grade.OK, "lost after about 6 s"),
        ({**ASKED, "tcp_user_timeout": "0"}, True, Grade.OK, "Unix socket"),
        ({**ASKED, "tcp_user_timeout": "0"}, False, Grade.NOTE, "tcp_user_timeout is 0"),
        ({**ASKED, "idle_session_timeout": "0"}, False, Grade.FAULT, "idle_session_timeout is 0 (asked: 10000)"),
        ({}, True, Grade.FAULT, "idle_session_timeout is unknown"),
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
        (True, 0, 0, 0, Grade.FAULT, "every commit waits"),
        (True, 2, 2, 0, Grade.FAULT, "none is synchronous"),
        (True, 1, 1, 1, Grade.OK, "a mark is on primary and standby before its email is sent"),
        (True, 1, 0, 0, Grade.OK, "may not see"),
    ],
)
def test_replication_is_said_as_what_a_failover_costs(wanted, standbys, visible, synchronous, grade, says):
    found = judge_replication(wanted=wanted, standbys=standbys, visible=visible, synchronous=synchronous)
    assert found.grade is grade
    assert says in found.found


@pytest.mark.parametrize("taken, grade", [(50, Grade.OK), (95, Grade.NOTE), (98, Grade.NOTE), (99, Grade.FAULT)])
def test_a_relay_and_its_self_test_need_three_connections(taken, grade):
    assert judge_connections(100, taken, "max_connections").grade is grade


@pytest.mark.parametrize(
    "offered, largest, grade",
    [
        (None, 10**9, Grade.OK),
        ("", 10**9, Grade.OK),
        ("0", 10**9, Grade.OK),
        ("1000", 1000, Grade.OK),
        ("1000", 1001, Grade.FAULT),
        ("1000", 0, Grade.FAULT),
        ("35882577", 0, Grade.OK),
    ],
)
def test_size_is_held_against_the_largest_message_or_a_usual_one(offered, largest, grade):
    assert judge_size(offered, largest).grade is grade


def test_a_certificate_is_named_and_one_that_ends_soon_is_a_note():
    ends_at = dt.datetime(2027, 1, 31, tzinfo=dt.UTC)
    certificate = {"subjectAltName": (("DNS", "mail.example.com"),), "notAfter": "Jan 31 00:00:00 2027 GMT"}
    for days, grade in ((13, Grade.NOTE), (15, Grade.OK)):
        found = judge_certificate(certificate, "TLSv1.3", (ends_at - dt.timedelta(days=days)).timestamp())
        assert found.grade is grade
        assert "mail.example.com" in found.found


@pytest.mark.parametrize(
    "command, code, login, grade, mend",
    [
        ("MAIL FROM:<a@b>", 250, False, None, ""),
        ("RCPT TO:<a@b>", 251, False, None, ""),
        ("RCPT TO:<a@b>", 451, False, Grade.NOTE, ""),
        ("RCPT TO:<a@b>", 550, True, Grade.FAULT, "relay for this host"),
        ("MAIL FROM:<a@b>", 530, False, Grade.FAULT, "give smtp_url the login"),
        ("MAIL FROM:<a@b>", 553, True, Grade.FAULT, "which senders this login may use"),
    ],
)
def test_a_reply_to_the_envelope_has_its_own_mend(command, code, login, grade, mend):
    found = judge_envelope(command, code, "said", login=login)
    assert (found and found.grade) == grade
    assert found is None or mend in found.mend


@pytest.mark.parametrize(
    "command, text, mend",
    [
        ("MAIL FROM:<a@b>", "5.4.5 Daily user sending limit exceeded", "wait until the limit ends"),
        ("RCPT TO:<a@b>", "5.7.1 Client host [192.0.2.1] blocked using zen.spamhaus.org", "allow this host"),
    ],
)
def test_a_refusal_that_another_sender_would_also_get_is_not_blamed_on_the_sender(command, text, mend):
    found = judge_envelope(command, 550, text, login=False)
    assert mend in found.mend
    assert "correct" not in found.mend


@pytest.mark.parametrize(
    "link, grade",
    [
        ("https://reports.example.com/r/{token}", Grade.OK),
        ("http://reports.example.com/r/{token}", Grade.NOTE),
        ("reports.example.com/r/{token}", Grade.FAULT),
        ("https:///r/{token}", Grade.FAULT),
    ],
)
def test_a_link_must_be_one_that_opens_and_should_hide_its_token(link, grade):
    assert judge_link("progress", link).grade is grade


def seen(relays=0, oldest_due_s=0.0, trouble=None):
    at = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)
    alive = [LivingRelay(n, f"host{n}", n, "0.1", at, 0, None, trouble, 0) for n in range(1, relays + 1)]
    return Status({}, oldest_due_s, alive, routes=[], pauses=[], editions=[], troubles=[])


def test_nobody_who_relays_is_a_fault_only_once_an_email_waits():
    assert judge_relays(seen()).grade is Grade.NOTE
    assert judge_relays(seen(oldest_due_s=61)).grade is Grade.FAULT
    assert judge_relays(seen(relays=2)).grade is Grade.OK
    assert judge_relays(seen(relays=2, trouble="stuck")).grade is Grade.FAULT


def test_what_people_hold_back_is_worth_a_note_and_no_line_where_nothing_is():
    at = dt.datetime(2026, 11, 24, 6, tzinfo=dt.UTC)
    fleet, report = judge_pauses([Pause("", at, "ann@here", "wrong", 1200), Pause("sales", at, "bob@here", "late", 1)])
    assert (fleet.grade, report.grade) == (Grade.NOTE, Grade.NOTE)
    assert fleet.sentence == (
        "the fleet is paused since 2026-11-24 06:00:00 UTC by ann@here (wrong), 1,200 emails wait;"
        " `outbox resume` lets them go."
    )
    assert "`outbox resume sales` lets" in report.sentence
    assert judge_pauses([]) == []


def test_a_route_in_trouble_is_a_fault_if_it_is_ours_and_somebody_relays():
    row = FailingRoute("mail:25", dt.datetime(2026, 11, 24, 6, tzinfo=dt.UTC), "421 closing", 3)
    assert judge_routes([], {"mail:25"}, relays=1).grade is Grade.OK
    assert judge_routes([row], {"mail:25"}, relays=1).grade is Grade.FAULT
    assert judge_routes([row], {"mail:25"}, relays=0).grade is Grade.NOTE
    assert judge_routes([row], {"other:25"}, relays=1).grade is Grade.NOTE


@pytest.mark.parametrize("files, grade", [(None, Grade.OK), (80, Grade.OK), (79, Grade.FAULT)])
def test_open_files_must_suffice_for_the_connections(files, grade):
    assert judge_limits(files, 16).grade is grade
