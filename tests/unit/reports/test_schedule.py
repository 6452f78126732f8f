"""Schedules: the civil times at which they tick, over changes of the clocks, and the editions that ticks start."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest

from outbox.generate.schedule_state import Row, Seen, Standing, caught_up_until, latest, passed_over, tick_of, upcoming
from outbox.reports.schedule import Schedule, fault_of
from outbox.settings import ReportSettings

NEW_YORK = "America/New_York"


def report(schedule, timezone=NEW_YORK, **more):
    return ReportSettings(
        link="{token}", recipients="select 1", data="select :key", timezone=timezone, schedule=schedule, **more
    )


def ticks(schedule, timezone, after, count):
    """The next ticks as that zone's clocks show them, and their offset from UTC in hours."""
    zone = ZoneInfo(timezone)
    found = islice(Schedule(schedule, zone).after(datetime.fromisoformat(after).replace(tzinfo=zone)), count)
    return [(f"{at:%d %H:%M}", at.utcoffset() / timedelta(hours=1)) for at in (at.astimezone(zone) for at in found)]


# The nights of 2026 in which clocks change; in Lord Howe by half an hour.
@pytest.mark.parametrize(
    ("schedule", "timezone", "after", "expected"),
    [
        # What clocks jump over is started at the jump, once.
        ("30 2 * * *", NEW_YORK, "2026-03-07T02:30", [("08 03:00", -4), ("09 02:30", -4)]),
        ("0,30 2,3 * * *", NEW_YORK, "2026-03-08T00:00", [("08 03:00", -4), ("08 03:30", -4), ("09 02:00", -4)]),
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T02:30", [("29 03:00", 2), ("30 02:30", 2)]),
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T02:15", [("04 02:30", 11), ("05 02:15", 11)]),
        ("*/20 2 * * *", "Australia/Lord_Howe", "2026-10-04T00:00", [("04 02:30", 11), ("04 02:40", 11)]),
        # Of an hour that comes twice, the first is meant.
        ("30 1 * * *", NEW_YORK, "2026-10-31T01:30", [("01 01:30", -4), ("02 01:30", -5)]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T02:30", [("25 02:30", 2), ("26 02:30", 1)]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T01:45", [("05 01:45", 11), ("06 01:45", 10.5)]),
        ("0 * * * *", NEW_YORK, "2026-11-01T00:30", [("01 01:00", -4), ("01 02:00", -5), ("01 03:00", -5)]),
    ],
)
def test_each_civil_time_ticks_once_when_clocks_change(schedule, timezone, after, expected):
    assert ticks(schedule, timezone, after, len(expected)) == expected


def test_the_latest_tick_is_known_in_an_hour_that_comes_again():
    at_0545 = datetime(2026, 11, 1, 5, 45, tzinfo=UTC)  # 01:45 in New York, for the first time
    schedule = Schedule("45 1 * * *", ZoneInfo(NEW_YORK))
    assert schedule.latest(at_0545 - timedelta(microseconds=1)) == datetime(2026, 10, 31, 5, 45, tzinfo=UTC)
    for later in (timedelta(), timedelta(minutes=30), timedelta(hours=1), timedelta(hours=5)):
        assert schedule.latest(at_0545 + later) == at_0545


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("0 6 * * mon", None),
        ("*/15 8-18 1,15 jan-jun fri#1", None),
        ("0 6 LW * *", None),
        ("0 0 29 2 *", None),
        ("", "has 0 fields instead of 5"),
        ("@weekly", "has 1 field instead of 5"),
        ("0 0 6 * * mon", "has 6 fields instead of 5"),
        ("60 6 * * mon", "has an unknown minute"),
        ("0 24 * * mon", "has an unknown hour"),
        ("0 6 32 * *", "has an unknown day-of-month"),
        ("0 6 * * montag", "has an unknown day-of-week"),
        ("9" * 5000 + " 6 * * *", "has an unknown number"),
        ("0 6 30 2 *", "names a day that never comes"),
        ("0 6 */15 2 mon#5", "names a day that never comes"),
    ],
)
def test_what_cron_does_not_know_or_what_never_comes_is_told(schedule, says):
    found = fault_of(schedule)
    assert found == (says and f'{says}; write one like "0 6 * * mon" (minute, hour, day of month, month, day of week)')


def test_a_tick_starts_the_edition_of_its_own_moment_however_late_it_is():
    weekly = report("0 6 * * mon")
    monday = datetime(2026, 11, 23, 11, tzinfo=UTC)
    assert tick_of(weekly, monday).period == "2026-W47"
    late = latest(weekly, None, monday + timedelta(days=6, hours=23))
    assert (late.tick, late.standing) == (tick_of(weekly, monday), Standing.DUE)
    assert [tick.period for tick in upcoming(weekly, monday, 2)] == ["2026-W48", "2026-W49"]
    midnight = report("0 0 * * *", cadence="daily", covers="current")
    assert [tick.period for tick in upcoming(midnight, monday, 2)] == ["2026-11-24", "2026-11-25"]


@pytest.mark.parametrize(
    ("more", "tick", "until"),
    [
        ({}, "2026-10-26T10:00Z", "2026-11-02T11:00Z"),  # a week of civil time, in which clocks go back
        ({"cadence": "daily"}, "2026-11-01T06:30Z", "2026-11-02T06:30Z"),
        ({"cadence": "monthly"}, "2026-12-01T11:00Z", "2027-01-01T11:00Z"),
        ({"catch_up": "90min"}, "2026-10-26T10:00Z", "2026-10-26T11:30Z"),
    ],
)
def test_a_tick_is_caught_up_with_for_one_cadence_or_as_long_as_it_is_said(more, tick, until):
    written = report("0 6 * * mon", **more)
    assert caught_up_until(written, tick_of(written, datetime.fromisoformat(tick))) == datetime.fromisoformat(until)


MONDAY = datetime(2026, 11, 23, 11, tzinfo=UTC)
HOUR = timedelta(hours=1)


def row(tick_at, done_at=None, failures=0):
    return Row(tick_at, done_at, failures, tick_at, "why" if failures else None)


def followed_since(since):
    return Row(MONDAY, since, 0, since, None, since)


@pytest.mark.parametrize(
    ("known", "hours", "standing", "tick_at"),
    [
        (None, 1, Standing.DUE, MONDAY),
        (None, 13, Standing.NEW, MONDAY),
        (row(MONDAY - 168 * HOUR, MONDAY), 1, Standing.DUE, MONDAY),
        (row(MONDAY - 168 * HOUR, MONDAY), 13, Standing.MISSED, MONDAY),
        (row(MONDAY), 1, Standing.DUE, MONDAY),
        (row(MONDAY, failures=2), 1, Standing.FAILING, MONDAY),
        (row(MONDAY, failures=2), 13, Standing.MISSED, MONDAY),
        (row(MONDAY, MONDAY, failures=2), 13, Standing.DONE, MONDAY),
        # Another server's settings say a later hour, which the fleet follows; its clock was wrong, which nobody does.
        (row(MONDAY + HOUR), 2, Standing.DUE, MONDAY + HOUR),
        (row(MONDAY + 24 * 365 * HOUR, MONDAY), 1, Standing.DUE, MONDAY),
    ],
)
def test_a_tick_stands_as_the_fleets_row_and_the_databases_clock_say(known, hours, standing, tick_at):
    found = latest(report("0 6 * * mon", catch_up="12h"), known, MONDAY + hours * HOUR)
    assert (found.standing, found.tick.at) == (standing, tick_at)


WEDNESDAY = MONDAY + 48 * HOUR
NEXT_MONDAY = MONDAY + 168 * HOUR


@pytest.mark.parametrize(
    ("known", "is_new", "more", "now", "standing", "tick_at"),
    [
        (None, True, {}, WEDNESDAY, Standing.NEW, MONDAY),  # another system may have made it
        (None, True, {"first_tick": "latest"}, WEDNESDAY, Standing.DUE, MONDAY),
        (None, False, {}, WEDNESDAY, Standing.DUE, MONDAY),  # outbox has begun that edition
        # The fleet has followed it since Wednesday: the next tick is caught up with, even if all relays slept over it.
        (followed_since(WEDNESDAY), False, {}, WEDNESDAY + HOUR, Standing.NEW, MONDAY),
        (followed_since(WEDNESDAY), False, {"first_tick": "latest"}, WEDNESDAY + HOUR, Standing.NEW, MONDAY),
        (followed_since(WEDNESDAY), False, {}, NEXT_MONDAY + 60 * HOUR, Standing.DUE, NEXT_MONDAY),
        # The schedule was changed on Thursday: a tick on Tuesday was never followed, one on Thursday is.
        (
            followed_since(WEDNESDAY),
            False,
            {"at": "0 6 * * tue"},
            WEDNESDAY + 30 * HOUR,
            Standing.NEW,
            MONDAY + 24 * HOUR,
        ),
        (
            followed_since(WEDNESDAY),
            False,
            {"at": "0 6 * * thu"},
            WEDNESDAY + 30 * HOUR,
            Standing.DUE,
            MONDAY + 72 * HOUR,
        ),
    ],
)
def test_a_report_that_is_new_to_outbox_starts_with_its_next_tick(known, is_new, more, now, standing, tick_at):
    more = dict(more)
    found = latest(report(more.pop("at", "0 6 * * mon"), **more), known, now, is_new=is_new)
    assert (found.standing, found.tick.at) == (standing, tick_at)


@pytest.mark.parametrize(
    ("made", "standing"),
    [(["2026-W47"], Standing.DUE), (["2026-W46"], Standing.NEW), ([], Standing.NEW)],
)
def test_a_new_schedule_finishes_the_edition_that_outbox_has_begun_and_no_other(made, standing):
    """An older edition may be of a trial: the old cron job has sent the latest one all the same."""
    seen = Seen(WEDNESDAY, {}, {"progress": frozenset(made)})
    assert seen.latest("progress", report("0 6 * * mon", covers="previous")).standing is standing


def test_periods_that_nobody_catches_up_with_are_named():
    weekly = report("0 6 * * mon,thu")
    tick = tick_of(weekly, MONDAY)
    assert tick.period == "2026-W47"
    assert passed_over(weekly, row(MONDAY - 168 * HOUR, MONDAY), tick) == []
    assert passed_over(weekly, row(MONDAY - 168 * HOUR), tick) == ["2026-W46"]
    assert passed_over(weekly, row(MONDAY - 4 * 168 * HOUR, MONDAY), tick) == ["2026-W44", "2026-W45", "2026-W46"]
    every_minute = report("* * * * *")
    assert len(passed_over(every_minute, row(MONDAY - 9000 * HOUR), tick)) == 10


def test_ticks_end_with_the_calendar():
    yearly = Schedule("0 6 1 1 *", ZoneInfo("UTC"))
    assert len(list(yearly.after(datetime(9990, 1, 1, 7, tzinfo=UTC)))) == 9
    assert yearly.latest(datetime(1, 1, 1, 5, tzinfo=UTC)) is None
    found = list(islice(yearly.after(MONDAY), 3))
    assert all(one < other for one, other in pairwise(found))
