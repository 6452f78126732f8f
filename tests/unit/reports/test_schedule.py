"""Schedules: the civil times at which they tick, over changes of the clocks."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest

from outbox.reports.schedule import Schedule, fault_of

NEW_YORK = "America/New_York"


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


def test_ticks_end_with_the_calendar():
    yearly = Schedule("0 6 1 1 *", ZoneInfo("UTC"))
    assert len(list(yearly.after(datetime(9990, 1, 1, 7, tzinfo=UTC)))) == 9
    assert yearly.latest(datetime(1, 1, 1, 5, tzinfo=UTC)) is None
    found = list(islice(yearly.after(datetime(2026, 11, 23, tzinfo=UTC)), 3))
    assert all(one < other for one, other in pairwise(found))
