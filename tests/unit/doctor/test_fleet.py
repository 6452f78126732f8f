import datetime as dt

from outbox.database.pause_list import Pause
from outbox.doctor.finding import Grade
from outbox.doctor.fleet import judge_pauses, judge_relays, judge_routes
from outbox.operations.snapshot import FailingRoute, LivingRelay
from outbox.operations.status import Status


def seen(relays=0, oldest_due_s=0.0, trouble=None):
    at = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)
    alive = [LivingRelay(n, f"host{n}", n, "0.1", at, 0, None, trouble, 0) for n in range(1, relays + 1)]
    return Status({}, oldest_due_s, alive, routes=[], pauses=[], editions=[], troubles=[])


def test_nobody_who_relays_is_a_fault_only_once_an_email_waits():
    assert judge_relays(seen()).grade is Grade.NOTE
    assert judge_relays(seen(oldest_due_s=61)).grade is Grade.PROBLEM
    assert judge_relays(seen(relays=2)).grade is Grade.OK
    assert judge_relays(seen(relays=2, trouble="stuck")).grade is Grade.PROBLEM


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
    assert judge_routes([row], {"mail:25"}, relays=1).grade is Grade.PROBLEM
    assert judge_routes([row], {"mail:25"}, relays=0).grade is Grade.NOTE
    assert judge_routes([row], {"other:25"}, relays=1).grade is Grade.NOTE
