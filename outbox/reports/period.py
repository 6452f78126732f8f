"""Which stretch of time a report covers. This room knows calendars and civil time; it reads no clock.

A period begins at the first instant of its first civil day and ends where the next one begins, so that
periods tile time whatever the clocks do: a week with a change of clocks has 167 or 169 hours.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo


class Cadence(StrEnum):
    """Length of a period; weeks are ISO weeks, from Monday to Sunday."""

    WEEKLY = "weekly"
    DAILY = "daily"
    MONTHLY = "monthly"


class Covers(StrEnum):
    """Period of a report that is made now: the last complete one, or the one that is running."""

    PREVIOUS = "previous"
    CURRENT = "current"


@dataclass(frozen=True, slots=True)
class Period:
    """A half-open stretch of time: `starts_at` belongs to it, `ends_at` does not. Both are UTC.

    Keys (`2026-W48`, `2026-11-24`, `2026-11`) of one cadence sort in the order of time.
    """

    key: str
    starts_at: datetime
    ends_at: datetime


# What `infinity` and `-infinity` are read as from the database: far enough from Python's own bounds for any timezone.
INFINITY: Final = datetime.max.replace(tzinfo=UTC) - timedelta(days=1)
MINUS_INFINITY: Final = datetime.min.replace(tzinfo=UTC) + timedelta(days=1)


def spoken_time(at: datetime, zone: tzinfo | None = None) -> str:
    """Return a moment on the clocks of a timezone, and in UTC if they differ: `2026-11-24 18:10:02 EST (23:10 UTC)`.

    In UTC alone without a zone. The date is repeated where it is another one. Infinity is `never`. Moments at the
    ends of the calendar, which some timezones have no name for, are shown as they are.
    """
    if at == INFINITY:
        return "never"
    if at == MINUS_INFINITY:
        return "before all time"
    try:
        universal = at.astimezone(UTC)
        there = at.astimezone(zone or UTC)
    except (OverflowError, ValueError):
        return f"{at:%Y-%m-%d %H:%M:%S} UTC"
    if there.utcoffset() == universal.utcoffset():
        return f"{universal:%Y-%m-%d %H:%M:%S} UTC"
    near = f"{universal:%H:%M}" if there.date() == universal.date() else f"{universal:%Y-%m-%d %H:%M}"
    return f"{there:%Y-%m-%d %H:%M:%S %Z} ({near} UTC)"


def in_words(period: Period, timezone: ZoneInfo) -> str:
    """Both ends of a period in civil time, with the hours of UTC near: `2026-11-16 00:00 to … UTC)`."""
    starts_at, ends_at = (at.astimezone(timezone) for at in (period.starts_at, period.ends_at))
    return (
        f"{starts_at:%Y-%m-%d %H:%M} to {ends_at:%Y-%m-%d %H:%M} {timezone.key} "
        f"({period.starts_at.astimezone(UTC):%H:%M} and {period.ends_at.astimezone(UTC):%H:%M} UTC)"
    )


# For each cadence: an example of a key, and what makes the key an ISO date, that of its first day.
_SPELLINGS = {
    Cadence.WEEKLY: ("2026-W48", "-1"),
    Cadence.DAILY: ("2026-11-24", ""),
    Cadence.MONTHLY: ("2026-11", "-01"),
}


def period_at(now: datetime, *, cadence: Cadence, timezone: ZoneInfo, covers: Covers) -> Period:
    """Return the period that contains `now`, or the last one that is complete by then; never an empty one.

    Where clocks go back over midnight, the end of a day comes twice (America/St_Johns until 2011: 00:01 to
    23:01). That day ends when the next first begins, so the hour that repeats belongs to the later one.

    Raises:
        ValueError: `now` is naive.
    """
    if now.tzinfo is None:
        raise ValueError("A period is asked for at an aware time; give now a timezone.")
    first = _first_day(now.astimezone(timezone).date(), cadence)
    while _dawn(_following(first, cadence), timezone) <= now:
        first = _following(first, cadence)
    current = _period(first, cadence, timezone)
    if covers is Covers.CURRENT:
        return current
    # A day that begins as late as the one after it did not exist: pass over it.
    while _dawn(first, timezone) == current.starts_at:
        first = _first_day(first - timedelta(days=1), cadence)
    return _period(first, cadence, timezone)


def period_of(key: str, *, cadence: Cadence, timezone: ZoneInfo) -> Period:
    """Return the period that `key` names.

    Raises:
        ValueError: the key is not spelled exactly as a key of this cadence, names no date of the calendar, or
            names a day that the zone left out (Pacific/Apia went from 2011-12-29 to 2011-12-31).
    """
    example, rest = _SPELLINGS[cadence]
    try:
        first = date.fromisoformat(key + rest)
        # fromisoformat knows more spellings than one; only the one that we write ourselves may pass.
        period = _period(first, cadence, timezone) if _key(first, cadence) == key else None
    except (ValueError, OverflowError):  # no such date, or one at the edge of the calendar (9999-12)
        period = None
    if period is None:
        raise ValueError(f"{key!r} is not a {cadence} period; write one like {example}.")
    if period.starts_at == period.ends_at:
        raise ValueError(f"{key} did not exist in {timezone.key}, which left it out; choose a day beside it.")
    return period


def _period(first: date, cadence: Cadence, timezone: ZoneInfo) -> Period:
    starts_at, ends_at = _dawn(first, timezone), _dawn(_following(first, cadence), timezone)
    return Period(_key(first, cadence), starts_at, ends_at)


def _key(first: date, cadence: Cadence) -> str:
    match cadence:
        case Cadence.WEEKLY:
            iso = first.isocalendar()  # the ISO year goes with the ISO week: 2027-01-01 is in 2026-W53
            return f"{iso.year:04}-W{iso.week:02}"
        case Cadence.DAILY:
            return first.isoformat()
        case Cadence.MONTHLY:
            return first.isoformat()[:7]


def _first_day(day: date, cadence: Cadence) -> date:
    """Return the first day of the period that `day` is in."""
    match cadence:
        case Cadence.WEEKLY:
            return day - timedelta(days=day.weekday())
        case Cadence.DAILY:
            return day
        case Cadence.MONTHLY:
            return day.replace(day=1)


def _following(first: date, cadence: Cadence) -> date:
    """Return the first day of the period after the one that begins on `first`."""
    longest = {Cadence.WEEKLY: 7, Cadence.DAILY: 1, Cadence.MONTHLY: 31}[cadence]
    return _first_day(first + timedelta(days=longest), cadence)


def _dawn(day: date, timezone: ZoneInfo) -> datetime:
    """Return the first instant at which the civil date is `day` or later, in UTC.

    It grows with `day`, hence periods tile. Two days share a dawn where the first of them did not exist.
    """
    return first_instant(datetime.combine(day, time()), timezone)


def first_instant(civil: datetime, timezone: ZoneInfo) -> datetime:
    """Return the first instant at which the clocks of `timezone` show `civil` or later, in UTC.

    Of a time that comes twice that is the first; one that clocks jump over gives the instant of the jump.
    """
    wanted = civil.replace(tzinfo=timezone, fold=0)
    # One that exists reads the same on its way back.
    found = wanted.astimezone(UTC)
    if found.astimezone(timezone).replace(tzinfo=None, fold=0) == civil:
        return found
    # The clocks jumped over it, at an instant between those that the two folds stand for (PEP 495).
    # It is not always fold 0's: in 1919 Toronto went from 23:30 to 00:30. Zones change at whole seconds,
    # so halving finds it.
    before = wanted.replace(fold=1).astimezone(UTC) - timedelta(seconds=1)
    while (gap_s := int((found - before).total_seconds())) > 1:
        middle = before + timedelta(seconds=gap_s // 2)
        if middle.astimezone(timezone).replace(tzinfo=None) >= civil:
            found = middle
        else:
            before = middle
    return found
