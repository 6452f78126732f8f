from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from outbox.reports.period import Cadence, Covers, Period, period_at, period_of

NEW_YORK = ZoneInfo("America/New_York")


def hours(period: Period) -> float:
    return (period.ends_at - period.starts_at) / timedelta(hours=1)


@pytest.mark.parametrize(
    ("monday", "length_h"),
    [
        ("2026-W10", 167),  # 2026-03-08, clocks go forward
        ("2026-W44", 169),  # 2026-11-01, clocks go back
        ("2026-W48", 168),
    ],
)
def test_a_week_has_the_hours_that_the_clocks_give_it(monday, length_h):
    assert hours(period_of(monday, cadence=Cadence.WEEKLY, timezone=NEW_YORK)) == length_h


def test_a_period_begins_at_civil_midnight_and_is_told_in_utc():
    week = period_of("2026-W48", cadence=Cadence.WEEKLY, timezone=NEW_YORK)
    assert week == Period("2026-W48", datetime(2026, 11, 23, 5, tzinfo=UTC), datetime(2026, 11, 30, 5, tzinfo=UTC))
    assert week.starts_at.tzinfo is UTC
    assert week.ends_at.tzinfo is UTC


@pytest.mark.parametrize(
    ("cadence", "previous", "current"),
    [
        (Cadence.WEEKLY, "2026-W52", "2026-W53"),
        (Cadence.DAILY, "2026-12-31", "2027-01-01"),
        (Cadence.MONTHLY, "2026-12", "2027-01"),
    ],
)
def test_on_new_years_day_of_2027_the_iso_year_is_still_2026(cadence, previous, current):
    now = datetime(2027, 1, 1, 12, tzinfo=UTC)
    zone = ZoneInfo("UTC")
    assert period_at(now, cadence=cadence, timezone=zone, covers=Covers.PREVIOUS).key == previous
    assert period_at(now, cadence=cadence, timezone=zone, covers=Covers.CURRENT).key == current


def test_a_week_that_begins_in_the_old_year_may_be_the_first_of_the_new_one():
    now = datetime(2024, 12, 31, 12, tzinfo=UTC)
    week = period_at(now, cadence=Cadence.WEEKLY, timezone=ZoneInfo("UTC"), covers=Covers.CURRENT)
    assert (week.key, week.starts_at) == ("2025-W01", datetime(2024, 12, 30, tzinfo=UTC))


def test_on_sunday_evening_in_new_york_the_week_is_not_over_although_utc_has_monday():
    now = datetime(2026, 11, 29, 19, 30, tzinfo=NEW_YORK)
    assert now.astimezone(UTC).isoweekday() == 1
    assert period_at(now, cadence=Cadence.WEEKLY, timezone=NEW_YORK, covers=Covers.CURRENT).key == "2026-W48"
    assert period_at(now, cadence=Cadence.WEEKLY, timezone=NEW_YORK, covers=Covers.PREVIOUS).key == "2026-W47"


def test_a_period_ends_where_the_next_begins_and_that_instant_is_the_nexts():
    week = period_of("2026-W48", cadence=Cadence.WEEKLY, timezone=NEW_YORK)
    last, first = week.ends_at - timedelta(microseconds=1), week.ends_at
    assert period_at(last, cadence=Cadence.WEEKLY, timezone=NEW_YORK, covers=Covers.CURRENT) == week
    assert period_at(first, cadence=Cadence.WEEKLY, timezone=NEW_YORK, covers=Covers.PREVIOUS) == week


@pytest.mark.parametrize(
    ("zone", "day", "begins"),
    [
        # The clocks jump from midnight to 01:00, so the day begins at 01:00.
        ("America/Sao_Paulo", "2018-11-04", "2018-11-04T01:00:00-02:00"),
        ("Africa/Cairo", "2014-08-01", "2014-08-01T01:00:00+03:00"),
        ("Asia/Beirut", "2022-03-27", "2022-03-27T01:00:00+03:00"),
        # They jump from 23:30 to 00:30: midnight lies inside the gap, not at its edge.
        ("America/Toronto", "1919-03-31", "1919-03-31T00:30:00-04:00"),
        # They go back from 01:00 to midnight: the first of the two midnights.
        ("America/Havana", "2026-11-01", "2026-11-01T00:00:00-04:00"),
        # They go back from 00:01 to 23:01 of the day before, which therefore ends twice.
        ("America/St_Johns", "2010-11-07", "2010-11-07T00:00:00-02:30"),
        # They go back from midnight to 23:00: the day begins when midnight comes for good.
        ("America/Sao_Paulo", "2018-02-18", "2018-02-18T00:00:00-03:00"),
    ],
)
def test_a_day_begins_at_its_first_instant_whatever_the_clocks_do_at_midnight(zone, day, begins):
    period = period_of(day, cadence=Cadence.DAILY, timezone=ZoneInfo(zone))
    assert period.starts_at == datetime.fromisoformat(begins)


def test_an_hour_that_comes_again_after_midnight_belongs_to_the_day_that_has_begun():
    zone = ZoneInfo("America/St_Johns")
    again = datetime(2010, 11, 6, 23, 30, tzinfo=zone, fold=1)
    assert period_at(again, cadence=Cadence.DAILY, timezone=zone, covers=Covers.CURRENT).key == "2010-11-07"


@pytest.mark.parametrize(
    ("zone", "before", "skipped", "after"),
    [
        ("Pacific/Apia", "2011-12-29", "2011-12-30", "2011-12-31"),
        ("Pacific/Kwajalein", "1993-08-20", "1993-08-21", "1993-08-22"),
        ("Pacific/Kiritimati", "1994-12-30", "1994-12-31", "1995-01-01"),
    ],
)
def test_a_day_that_a_zone_left_out_is_no_period_and_its_neighbours_meet(zone, before, skipped, after):
    timezone = ZoneInfo(zone)
    first = period_of(before, cadence=Cadence.DAILY, timezone=timezone)
    second = period_of(after, cadence=Cadence.DAILY, timezone=timezone)
    assert first.ends_at == second.starts_at
    dawn = second.starts_at
    assert period_at(dawn, cadence=Cadence.DAILY, timezone=timezone, covers=Covers.CURRENT) == second
    assert period_at(dawn, cadence=Cadence.DAILY, timezone=timezone, covers=Covers.PREVIOUS) == first
    with pytest.raises(ValueError, match=f"{skipped} did not exist in {zone}, which left it out; choose"):
        period_of(skipped, cadence=Cadence.DAILY, timezone=timezone)


WRONG_KEYS = {
    Cadence.WEEKLY: (
        "2026-W48",
        ["2026-W54", "2025-W53", "2026-W00", "2026-W5", "2026W48", "2026-w48", "2026-W48-1", "2026-11", ""],
    ),
    Cadence.DAILY: (
        "2026-11-24",
        ["2026-02-30", "2026-2-3", "20261124", "2026-11", "2026-W48", "2026-W48-2", "9999-12-31", ""],
    ),
    Cadence.MONTHLY: (
        "2026-11",
        ["2026-13", "2026-00", "2026-1", "202611", "2026-11-24", "2026-W48", "9999-12", "2026-11\n", ""],
    ),
}


@pytest.mark.parametrize(
    ("cadence", "example", "key"),
    [(cadence, example, key) for cadence, (example, keys) in WRONG_KEYS.items() for key in keys],
)
def test_a_key_that_is_not_spelled_as_we_spell_it_is_refused_with_an_example(cadence, example, key):
    with pytest.raises(ValueError, match=f"is not a {cadence} period; write one like {example}\\.$"):
        period_of(key, cadence=cadence, timezone=NEW_YORK)


@pytest.mark.parametrize("year", [2020, 2026, 2032, 2037])
def test_years_with_53_weeks_have_a_week_53(year):
    week = period_of(f"{year}-W53", cadence=Cadence.WEEKLY, timezone=ZoneInfo("UTC"))
    following = period_of(f"{year + 1}-W01", cadence=Cadence.WEEKLY, timezone=ZoneInfo("UTC"))
    assert week.ends_at == following.starts_at


def test_a_naive_time_is_refused():
    with pytest.raises(ValueError, match="aware"):
        period_at(datetime(2026, 1, 1), cadence=Cadence.DAILY, timezone=NEW_YORK, covers=Covers.CURRENT)  # noqa: DTZ001
