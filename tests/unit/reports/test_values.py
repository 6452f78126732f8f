"""Values of any type as text."""

import re
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from asyncpg import BitString, Circle, Point, Polygon, Range
from babel.localedata import locale_identifiers

from outbox.reports.language import find
from outbox.reports.values import cell

ZONE = ZoneInfo("America/New_York")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"), (True, "yes"), (False, "no"), (0, "0"), (2026, "2026"),
        (1234567, "1\u202f234\u202f567"),
        (-3, "\u22123"), (2.0, "2"), (0.1 + 0.2, "0.3"), (1234.5, "1234.5"), (0.00123, "0.0012"),
        (1e-9, "0"), (-1e-9, "0"), (float("nan"), "\u2013"), (float("inf"), "\u2013"),
        (Decimal("12.50"), "12.5"),
        (Decimal("1E+6"), "1\u202f000\u202f000"), (date(2026, 11, 16), "Mon 16 Nov"),
        (date(2025, 11, 16), "16 Nov 2025"), (datetime(2026, 11, 16, 9, 5), "Mon 16 Nov 09:05"),  # noqa: DTZ001
        (datetime(2026, 11, 16, 3, 0, tzinfo=UTC), "Sun 15 Nov 22:00"),
        (time(9, 5), "09:05"),
        (datetime.max.replace(tzinfo=UTC), "31 Dec 9999 23:59"),
        (timedelta(hours=26, minutes=5), "26 h 5 min"),
        (timedelta(seconds=-61), "\u22121 min 1 s"), (timedelta(0), "0 s"),
        ("text", "text"), (b"abc", "3 bytes"),
        ({"a": [1, "ü"], "b": None}, "a: (1, ü), b: \u2013"), ({}, "\u2013"),
        (["backend", "urgent"], "backend, urgent"), ([], "\u2013"), (["a", None], "a, \u2013"),
        ([[1, 2], [3, 4]], "(1, 2), (3, 4)"), ([{"a": 1}, {"a": True}], "(a: 1), (a: yes)"),
        ([date(2026, 11, 16), Decimal("1.50")], "Mon 16 Nov, 1.5"), ((1, "x", None), "1, x, \u2013"),
        (Range(1, 5), "1 \u2013 4"), (Range(1, 2), "1"), (Range(5), "5 \u2013 …"), (Range(None, 5), "… \u2013 4"),
        (Range(), "… \u2013 …"), (Range(empty=True), "\u2013"),
        (Range(1, 5, lower_inc=False, upper_inc=True), "2 \u2013 5"),
        (Range(Decimal("1.5"), Decimal("2.5")), "1.5 \u2013 2.5"),
        (Range(date(2026, 11, 16), date(2026, 11, 23)), "Mon 16 Nov \u2013 Sun 22 Nov"),
        (Range(date(2026, 11, 16), date.max), "Mon 16 Nov \u2013 …"),
        (Range(date.min, date(2026, 11, 16)), "… \u2013 Sun 15 Nov"),
        (Range(datetime(2026, 11, 16, 3, 0, tzinfo=UTC), None), "Sun 15 Nov 22:00 \u2013 …"),
        ([Range(1, 5), Range(8, 9)], "1 \u2013 4, 8"), (BitString("101"), "101"), (Point(1.5, 2), "1.5, 2"),
        (Polygon((0, 0), (1, 1)), "(0, 0), (1, 1)"), (Circle((0, 0), 5), "(0, 0), 5"),
        (bytearray(b"ab"), "2 bytes"), (memoryview(b"abc"), "3 bytes"),
        (10**20, "100\u202f000\u202f000\u202f000\u202f000\u202f000\u202f000"),
        (-15 * 10**29, "\u22121.5E+30"), (Decimal("1E+131071"), "1E+131071"), (1.5e300, "1.5E+300"), (1e-300, "0"),
        (timedelta.max, "24\u202f000\u202f000\u202f000 h"), (timedelta(days=30), "720 h"),
        (UUID(int=0), "00000000-0000-0000-0000-000000000000"),
    ],
)  # fmt: skip
def test_any_value_is_shown_in_a_way_a_person_reads(value, shown):
    assert cell(value, ZONE, 2026) == shown


@pytest.mark.parametrize("zone", [UTC, *map(ZoneInfo, ("America/New_York", "Europe/Berlin", "Pacific/Kiritimati"))])
@pytest.mark.parametrize("offset", [-14, 0, 14])
def test_a_time_at_an_end_of_the_calendar_is_shown_in_every_zone(zone, offset):
    ours = timezone(timedelta(hours=offset))
    assert re.fullmatch(
        r"(31 Dec|1 Jan) \d+ \d\d:\d\d", cell(datetime(9999, 12, 31, 23, 59, 59, tzinfo=ours), zone, 2026)
    )
    assert re.fullmatch(r"(1 Jan|31 Dec) \d+ \d\d:\d\d", cell(datetime(1, 1, 1, 1, tzinfo=ours), zone, 2026))


def test_the_usual_sentinels_are_shown_as_the_dates_that_they_are():
    berlin, new_york = ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York")
    assert cell(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), berlin, 2026) == "31 Dec 9999 23:59"
    assert cell(datetime(9999, 12, 31, tzinfo=UTC), new_york, 2026) == "30 Dec 9999 19:00"
    assert cell(datetime(1, 1, 1, 1, tzinfo=UTC), new_york, 2026) == "1 Jan 1 01:00"
    assert cell(datetime(1970, 1, 1, tzinfo=UTC), new_york, 2026) == "31 Dec 1969 19:00"


def test_every_language_can_write_the_first_and_the_last_day():
    first, last = datetime.min, datetime.max  # noqa: DTZ901 - as asyncpg gives -infinity and infinity
    for tag in locale_identifiers()[::7]:
        language = find(tag)
        for value in (first, last, date.min, date.max, time.min, time.max, timedelta.min, timedelta.max):
            for year in (None, 1, 2026):
                assert cell(value, ZONE, year, language)
        assert language.label(first, last, "weekly")


def test_an_immense_number_is_written_with_its_power_of_ten():
    assert cell(10**5000) == "1E+5000"
