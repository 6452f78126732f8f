"""Rows made ready to be shown: which columns are numbers, what can be summed, when bars help, how a value reads.

All judgement on that lies here, where it can be tested; the templates only lay it out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal, InvalidOperation
from math import isfinite
from numbers import Integral, Real
from typing import Any
from unicodedata import category, combining, east_asian_width

from outbox.errors import TemplateUseError
from outbox.reports.language import DASH, ENGLISH, GROUPED_MIN, Language

# Figures that name something are not quantities, and some quantities do not add up. Both are told by the
# column's name, since a row tells only the type.
_NAMING_LAST_WORDS = frozenset({
    "id", "year", "month", "week", "day", "no", "number", "code", "key", "zip", "rank", "position", "version",
})  # fmt: skip
_RATE_WORDS = frozenset({
    "per", "rate", "ratio", "percent", "percentage", "pct", "share", "average", "avg", "mean", "median",
    "min", "max", "price", "balance", "cumulative",
})  # fmt: skip
_CAPITALS = {"id": "ID", "url": "URL"}

# Gmail clips a mail at 102 kB, so the mail shows the beginning of a long table and the page all of it.
_EXCERPT_ROWS_MAX = 40
_EXCERPT_CELLS_MAX = 320
_EXCERPT_CHARACTERS_MAX = 160
_EXCERPT_BYTES_MAX = 80_000
_CELL_BYTES = 360  # what the packaged template writes around the text of a cell
TEXT_WIDTH_MAX = 76
_TEXT_BAR_MIN, _TEXT_BAR_MAX = 8, 24  # of a longest bar
_BARS_COLUMNS_MAX = 4  # where there are more, they need the room
_WORD_MAX = 24
_HEADLINE_MAX = 3
_DEPTH_MAX = 8  # of values within values
_PLAIN_MAX = Decimal(10) ** 21  # a larger number is written with its power of ten
_PLACES_MAX = 30
_EXPONENT_MAX = 200_000  # more than PostgreSQL's numeric has; arithmetic with larger numbers could overflow
_QUOTED_MAX = 60
_HEADLINE_CHARACTERS_MAX = 18  # in large figures, beside each other on a phone


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column; `total` is empty where a sum would mean nothing.

    `breaks` is true where a text has a word so long that it must be broken for want of room. `figure` is the
    number that `total` writes, or the only one that there is.
    """

    title: str
    numeric: bool
    total: str
    breaks: bool = False
    figure: Decimal | None = None

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True, slots=True)
class Row:
    """One text per column; `percent` of the longest bar, 0 where there are no bars."""

    cells: list[str]
    percent: int

    def __str__(self) -> str:
        return ", ".join(self.cells)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows made ready to be shown. Bars, where they help, belong to the column numbered `bars`.

    `totals` has one text per column, or is empty; `more` counts the rows that are left out here. `headline` is what to
    say first, in large figures: the first few totals, or the numbers of the only row as totals.
    """

    columns: list[Column]
    rows: list[Row]
    totals: list[str]
    headline: list[Column]
    bars: int | None
    more: int
    language: Language

    def __str__(self) -> str:
        return self.text

    @property
    def figures(self) -> str:
        """The headline for programs, as JSON (`[["Done", 12]]`): a later edition draws a line through them."""
        told = [(column.title, float(column.figure)) for column in self.headline if column.figure is not None]
        return json.dumps([(title, figure) for title, figure in told if isfinite(figure)], ensure_ascii=False)

    @property
    def text(self) -> str:
        """The table in plain text: aligned where it fits, else one block of `Title: value` per row.

        Bars stand after the rows, where there is room for them.
        """
        titles = [column.title for column in self.columns]
        body = [[" ".join(cell.split()) for cell in row.cells] for row in self.rows]
        lines = [titles, *body, *([self.totals] if self.totals else [])]
        widths = [max(map(_width, cells)) for cells in zip(*lines, strict=True)]
        width = sum(widths) + 2 * len(widths) - 2
        if width > TEXT_WIDTH_MAX:
            return "\n\n".join(self._blocks(titles, body))
        drawn = [self._drawn(cells, widths) for cells in lines]
        longest = min(_TEXT_BAR_MAX, TEXT_WIDTH_MAX - width - 2)
        if self.bars is not None and longest >= _TEXT_BAR_MIN:
            bars = (max(1, round(longest * row.percent / 100)) if row.percent else 0 for row in self.rows)
            drawn[1 : len(body) + 1] = [
                f"{line}{' ' * (width - _width(line))}  {'█' * bar}".rstrip()
                for line, bar in zip(drawn[1 : len(body) + 1], bars, strict=True)
            ]
        drawn.insert(1, "-" * width)
        if self.totals:
            drawn.insert(-1, "-" * width)
        return "\n".join(drawn)

    def _blocks(self, titles: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
        said = self.language.say
        for cells in body:
            yield "\n".join(said("entry", name=name, value=value) for name, value in zip(titles, cells, strict=True))
        if self.totals:
            totals = (said("entry", name=column.title, value=column.total) for column in self.columns if column.total)
            yield "\n".join([said("total"), *totals])

    def _drawn(self, cells: Iterable[str], widths: Iterable[int]) -> str:
        padded = []
        for column, cell, width in zip(self.columns, cells, widths, strict=True):
            gap = " " * (width - _width(cell))
            padded.append(gap + cell if column.numeric else cell + gap)
        return "  ".join(padded).rstrip()


def humanise(name: object) -> str:
    """Return a column's name as a heading: `done_count` as `Done count`, `person_id` as `Person ID`; None is a dash."""
    if name is None:
        return DASH
    name = str(name)
    words = [_CAPITALS.get(word, word) for word in name.replace("_", " ").split()]
    title = " ".join(words)
    return title[:1].upper() + title[1:] if title else name


def table_of(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    starts_at: datetime,
    language: Language = ENGLISH,
    rows_max: int | None = None,
) -> Table:
    """The rows made ready to be shown; times are shown in the zone of `starts_at`, and its year is not named.

    Bars are drawn when there is one column of labels beside few of numbers, and then for the last of these. Sums, and
    the scale of the bars, are those of all rows even where `rows_max` cuts the table (and its long texts) short.
    """
    shown = rows if rows_max is None else rows[:rows_max]
    heads, texts = [], []
    numeric_at = []
    for at, name in enumerate(columns):
        values = [row.get(name) for row in rows]
        numeric = _is_quantity(name, values)
        if numeric:
            numeric_at.append(at)
        head, cells = (_numbers if numeric else _labels)(name, values, len(shown), starts_at, language)
        heads.append(head)
        texts.append(cells if rows_max is None else [_cut(cell) for cell in cells])
    one_label = numeric_at and len(columns) - len(numeric_at) == 1 and len(columns) <= _BARS_COLUMNS_MAX
    bars = numeric_at[-1] if one_label and len(rows) > 1 else None
    percents = [0] * len(rows) if bars is None else _percents([row.get(columns[bars]) for row in rows])
    if not any(percents):
        bars = None
    lines = [Row(list(cells), percent) for cells, percent in zip(zip(*texts, strict=True), percents, strict=False)]
    headline = _headline(heads, lines[0] if len(rows) == 1 and lines else None)
    return Table(heads, lines, _totals(heads, language), headline, bars, len(rows) - len(shown), language)


def excerpt_of(
    whole: Table, columns: Sequence[str], rows: Sequence[Mapping[str, object]], *, starts_at: datetime
) -> Table:
    """As much of a table as a mail should hold; the table itself where that is all of it."""
    rows_max = min(_EXCERPT_ROWS_MAX, max(5, _EXCERPT_CELLS_MAX // max(1, len(columns))))
    room = _EXCERPT_BYTES_MAX
    for at, row in enumerate(whole.rows[:rows_max]):
        room -= sum(_CELL_BYTES + 4 * min(len(text), _EXCERPT_CHARACTERS_MAX) for text in row.cells)
        if room < 0:
            rows_max = max(at, 1)
            break
    if len(rows) <= rows_max and all(len(text) <= _EXCERPT_CHARACTERS_MAX for row in whole.rows for text in row.cells):
        return whole
    return table_of(columns, rows, starts_at=starts_at, language=whole.language, rows_max=rows_max)


def cell(value: object, zone: tzinfo | None = None, year: int | None = None, language: Language = ENGLISH) -> str:
    """Return any value as short text: None is a dash, a date `Mon 16 Nov`, an aware time is shown in `zone`.

    A date outside `year` (where one is given) shows its own year instead of the day of the week. The elements of an
    array stand after commas (`backend, urgent`), those of JSON and of composite types with their names, and ranges of
    whole numbers and of days from first to last.
    """
    return _cell(value, _Look(zone, year, language), 0)


@dataclass(frozen=True, slots=True)
class _Look:
    """How the values of one cell are shown."""

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


def number_of(value: float | Decimal, places: int | None = None, language: Language = ENGLISH) -> str:
    """Return a number with so many decimals, or as many as say enough; NaN and the infinities are a dash.

    From `_PLAIN_MAX` on it is written as 1.5E+30.
    """
    number = _decimal(value)
    grouped = number is not None and abs(number) >= GROUPED_MIN
    return _number(number, _places(value) if places is None else places, language, grouped=grouped)


def percent_of(value: float | Decimal, places: int = 0, language: Language = ENGLISH) -> str:
    """Return a share of one (0.42) as a percentage; NaN and the infinities are a dash."""
    number = _decimal(value)
    if number is None:
        return DASH
    return language.percent(number_of(number.scaleb(2), places, language))


def asked_number(value: object, name: str, places: object) -> float | Decimal | None:
    """Return what a template gave the filter `name`, as a number; None for NULL and for an empty text.

    A number that comes as text is one, as of a `text` column or of JSON.

    Raises:
        TemplateUseError: it is no number, or `places` is no number of decimals.

    """
    if places is not None and (
        not isinstance(places, int) or isinstance(places, bool) or not 0 <= places <= _PLACES_MAX
    ):
        raise TemplateUseError(
            f"{name}: {_quoted(places)} is not a number of decimals; give a whole number from 0 to {_PLACES_MAX}"
        )
    match value:
        case None:
            return None
        case bool():
            pass
        case int() | float() | Decimal():
            return value
        case Integral():
            return int(value)
        case Real():
            return float(value)
        case str():
            if not value.strip():
                return None
            try:
                return Decimal(value.strip())
            except InvalidOperation:
                pass
    raise TemplateUseError(f"{name}: {_quoted(value)} is not a number; give a number, or use cell for other values")


def _quoted(value: object) -> str:
    text = " ".join(str(value).split()) if isinstance(value, str) else repr(value)
    text = text if len(text) <= _QUOTED_MAX else f"{text[:_QUOTED_MAX]}…"
    return f'"{text}"' if isinstance(value, str) else text


def _is_quantity(name: str, values: Iterable[object]) -> bool:
    present = [value for value in values if value is not None]
    numbers = all(isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in present)
    return bool(present) and numbers and not _names_something(name)


def _names_something(name: str) -> bool:
    words = name.lower().split("_")
    return words[-1] in _NAMING_LAST_WORDS and "per" not in words


def _adds_up(name: str) -> bool:
    return _RATE_WORDS.isdisjoint(name.lower().split("_"))


def _numbers(name: str, values: Sequence[Any], shown: int, _: datetime, language: Language) -> tuple[Column, list[str]]:
    """A column of quantities, all with the same number of decimals so that they align."""
    finite = [number for value in values if value is not None and (number := _decimal(value)) is not None]
    total = sum(finite, Decimal(0))
    summed = len(values) > 1 and _adds_up(name)
    grouped = any(abs(number) >= GROUPED_MIN for number in [*finite, *([total] if summed else [])])
    places = max(map(_places, finite), default=0)
    texts = [
        DASH if value is None else _number(_decimal(value), places, language, grouped=grouped)
        for value in values[:shown]
    ]
    said = _number(total, places, language, grouped=grouped) if summed else ""
    return Column(humanise(name), True, said, figure=total if summed or (len(values) == 1 and finite) else None), texts


def _labels(
    name: str, values: Sequence[object], shown: int, starts_at: datetime, language: Language
) -> tuple[Column, list[str]]:
    if _names_something(name):
        values = [str(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]
    texts = [cell(value, starts_at.tzinfo, starts_at.year, language) for value in values[:shown]]
    breaks = any(len(text) > _WORD_MAX and max(map(len, text.split()), default=0) > _WORD_MAX for text in texts)
    return Column(humanise(name), False, "", breaks), texts


def _headline(columns: Sequence[Column], only: Row | None) -> list[Column]:
    found = [column for column in columns if column.total]
    if only is not None:
        cells = zip(columns, only.cells, strict=True)
        found = [Column(column.title, True, shown, figure=column.figure) for column, shown in cells if column.numeric]
    left = _HEADLINE_CHARACTERS_MAX
    told: list[Column] = []
    for column in found[:_HEADLINE_MAX]:
        left -= len(column.total)
        if told and left < 0:
            break
        told.append(column)
    return told


def _totals(columns: Sequence[Column], language: Language) -> list[str]:
    totals = [column.total for column in columns]
    if not any(totals):
        return []
    if "" in totals:
        totals[totals.index("")] = language.say("total")
    return totals


def _percents(values: Sequence[Any]) -> list[int]:
    """Each value as a share of the largest, so that anything above nothing can be seen."""
    numbers = [Decimal(0) if value is None else max(_decimal(value) or Decimal(0), Decimal(0)) for value in values]
    largest = max(numbers)
    return [max(1, round(100 * number / largest)) if number else 0 for number in numbers]


def _decimal(value: float | Decimal) -> Decimal | None:
    """The number as a person reads it (0.1 is 0.1), or None for what is no number or endless."""
    match value:
        case Decimal():
            number = value
        case int():
            number = Decimal(value)  # its repr may not have more than 4,300 digits
        case _:
            number = Decimal(float.__repr__(value))  # that of a subclass, as numpy's, may be no number
    return number if number.is_finite() and number.adjusted() <= _EXPONENT_MAX else None


def _places(value: float | Decimal) -> int:
    """How many decimals say enough: at most two, or two figures for what is smaller than one."""
    number = _decimal(value)
    if not number:
        return 0
    places = 2 if abs(number) >= 1 else min(6, 1 - number.adjusted())
    return len(f"{number:.{places}f}".rstrip("0").partition(".")[2])


def _number(number: Decimal | None, places: int, language: Language, *, grouped: bool) -> str:
    if number is None:
        return DASH
    if abs(number) >= _PLAIN_MAX:
        text, _, power = f"{abs(number):.2E}".partition("E")
        shown = language.number(text.rstrip("0").rstrip("."), grouped=False, negative=number < 0)
        return f"{shown}E{power}"
    text = f"{abs(number):.{places}f}"
    return language.number(text, grouped=grouped, negative=number < 0 and bool(text.strip("0.")))


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


# PostgreSQL's ±infinity, as asyncpg gives it: the same in every zone.
_ENDLESS = frozenset({datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)})


def _cut(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARACTERS_MAX else text[: _EXCERPT_CHARACTERS_MAX - 1].rstrip() + "…"


def _width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if combining(char) or category(char) == "Cf" else 2 if east_asian_width(char) in "WF" else 1 for char in text
    )
