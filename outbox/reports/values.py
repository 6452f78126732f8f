"""Values of any type as short text: dates, times, arrays, JSON, ranges."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Final

from outbox.reports.language import ENGLISH, Language
from outbox.reports.language_rules import DASH
from outbox.reports.number_format import number_of

_DEPTH_MAX: Final = 8  # of values within values
# PostgreSQL's ±infinity, as asyncpg gives it: the same in every zone.
_ENDLESS: Final = frozenset({datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)})


def cell(value: object, zone: tzinfo | None = None, year: int | None = None, language: Language = ENGLISH) -> str:
    """Return any value as short text: None is a dash, a date `Mon 16 Nov`, an aware time is shown in `zone`.

    A date outside `year` (where one is given) shows its own year instead of the day of the week. The elements of an
    array stand after commas (`backend, urgent`), those of JSON and of composite types with their names, and ranges of
    whole numbers and of days from first to last.
    """
    return _cell(value, _Look(zone, year, language), 0)


@dataclass(frozen=True, slots=True)
class _Look:
    """Zone, year and language in which the values of one cell are shown."""

    zone: tzinfo | None
    year: int | None
    language: Language


def _cell(value: object, look: _Look, depth: int) -> str:
    match value:
        case None | bool():
            return DASH if value is None else look.language.say("yes" if value else "no")
        case date() | time() | timedelta():
            return _when(value, look.zone, look.year, look.language)
        case int() | float() | Decimal():
            return number_of(value, None, look.language)
        case bytes() | bytearray() | memoryview():
            return look.language.say("bytes", n=memoryview(value).nbytes)
        case str():
            return str(value)
        case _:
            return _compound(value, look, depth)


def _compound(value: Any, look: _Look, depth: int) -> str:
    """Return a value with parts: an array, an object of JSON, a row, a range, a shape; other values as str does."""
    if hasattr(value, "isempty") and hasattr(value, "lower_inc"):  # a range of asyncpg, psycopg or SQLAlchemy
        text = DASH if value.isempty else _range(value, look, depth)
        is_one = True
    elif hasattr(value, "items") and hasattr(value, "keys"):  # a mapping; asyncpg's rows are not registered as such
        pairs = [(str(key), _part(one, look, depth)) for key, one in value.items()]
        text = ", ".join(look.language.say("entry", name=key, value=part) for key, part in pairs)
        is_one = False
    elif isinstance(value, list | tuple | set | frozenset) or hasattr(value, "points"):  # a path or polygon has points
        text = ", ".join(_part(one, look, depth) for one in getattr(value, "points", value))
        is_one = False
    else:
        return str(value.as_string() if hasattr(value, "as_string") else value).strip()  # bits as 101
    if not text:
        return DASH
    return text if is_one or depth == 0 else f"({text})"


def _part(value: object, look: _Look, depth: int) -> str:
    return _cell(value, look, depth + 1) if depth < _DEPTH_MAX else "…"


def _range(value: Any, look: _Look, depth: int) -> str:
    """Return first and last value of a range, with an ellipsis where it has no bound.

    Those of whole numbers and days are stored half-open (PostgreSQL docs, 8.17.7), which people do not expect.
    """
    first, last = value.lower, value.upper
    first = None if first in (date.min, datetime.min) else first  # noqa: DTZ901 - asyncpg's own values of infinity
    last = None if last in (date.max, datetime.max) else last  # noqa: DTZ901
    if first is not None and not value.lower_inc and (step := _step(first)) is not None:
        first += step
    if last is not None and not value.upper_inc and (step := _step(last)) is not None:
        last -= step
    if first is not None and first == last:
        return _part(first, look, depth)
    ends = ("…" if end is None else _part(end, look, depth) for end in (first, last))
    return f" {DASH} ".join(ends)


def _step(value: object) -> Any:
    """Return the distance to the next value of a discrete type; None for others."""
    if isinstance(value, int):
        return 1
    return timedelta(days=1) if isinstance(value, date) and not isinstance(value, datetime) else None


def _when(value: date | time | timedelta, zone: tzinfo | None, year: int | None, language: Language) -> str:
    if isinstance(value, timedelta):
        return language.duration(value)
    if isinstance(value, time):
        return language.clock(value)
    if not isinstance(value, datetime):
        return language.day(value, year)
    if value.tzinfo is not None and value.replace(tzinfo=UTC) not in _ENDLESS:
        with suppress(OverflowError, ValueError):  # at an end of the calendar, beyond which the zone is: shown as it is
            value = value.astimezone(zone)
    return language.moment(value, year)
