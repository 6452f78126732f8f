"""What is said: one recipient's rows become a subject, a mail and a page. Reads templates, and nothing else.

The packaged templates show any rows well. All judgement on how (which columns are numbers, what can be
summed, when bars help) lies here, where it can be tested; the templates only lay it out.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from functools import cache
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width

from outbox.errors import SourceError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

PACKAGED = Path(__file__).parent / "templates"

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_DASH = "\u2013"
_MINUS = "\u2212"
_THIN = "\u202f"  # the narrow no-break space between thousands: no line break can part a number
_GROUPED_MIN = 10_000  # four figures read well without a gap, and may be a year

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
_TEXT_WIDTH_MAX = 76


@dataclass(frozen=True, slots=True)
class Rendered:
    """What one recipient is told: the subject in one line, the two bodies of the mail, and the page."""

    subject: str
    text: str
    html: str
    page: str


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column; `total` is empty where a sum would mean nothing."""

    title: str
    numeric: bool
    total: str


@dataclass(frozen=True, slots=True)
class Row:
    """One text per column; `percent` of the longest bar, 0 where there are no bars."""

    cells: list[str]
    percent: int


@dataclass(frozen=True, slots=True)
class Table:
    """Rows made ready to be shown. Bars, where they help, belong to the column numbered `bars`.

    `totals` has one text per column, or is empty; `more` counts the rows that are left out here.
    """

    columns: list[Column]
    rows: list[Row]
    totals: list[str]
    bars: int | None
    more: int

    @property
    def text(self) -> str:
        """The table in plain text: aligned where it fits, else one block of `Title: value` per row."""
        titles = [column.title for column in self.columns]
        body = [[" ".join(cell.split()) for cell in row.cells] for row in self.rows]
        lines = [titles, *body, *([self.totals] if self.totals else [])]
        widths = [max(map(_width, cells)) for cells in zip(*lines, strict=True)]
        if sum(widths) + 2 * len(widths) - 2 > _TEXT_WIDTH_MAX:
            return "\n\n".join(self._blocks(titles, body))
        drawn = [self._drawn(cells, widths) for cells in lines]
        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        drawn.insert(1, rule)
        if self.totals:
            drawn.insert(-1, rule)
        return "\n".join(drawn)

    def _blocks(self, titles: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
        for cells in body:
            yield "\n".join(map("{}: {}".format, titles, cells))
        if self.totals:
            yield "\n".join(["Total", *(f"{column.title}: {column.total}" for column in self.columns if column.total)])

    def _drawn(self, cells: Iterable[str], widths: Iterable[int]) -> str:
        padded = []
        for column, cell, width in zip(self.columns, cells, widths, strict=True):
            gap = " " * (width - _width(cell))
            padded.append(gap + cell if column.numeric else cell + gap)
        return "  ".join(padded).rstrip()


class Templates:
    """The four templates of one report: `{subject.txt,email.txt,email.html,report.html}.j2`.

    Each is the first found of `<directory>/<report>/<name>`, `<directory>/<name>` and the packaged one. What begins
    with `{% extends "outbox:email.html.j2" %}` builds upon that, with `{% set own_content = true %}` and a block
    `content`. The digest has packaged ones of its own (`outbox:digest/email.html.j2`), which come before
    `<directory>/<name>`. Only `.html.j2` is autoescaped; a name that is not there is an error.

    They are given:

    - `report` (the name, `progress`), `title` (`Progress`), `link`, `sender` (the sender's name): str
    - `period`: `.key` (`2026-W48`), `.label` (see `label`), `.starts_at`, `.ends_at` (civil times)
    - `recipient`: `key`, `email`, `name` (may be empty) and the further columns of the recipients query
    - `rows`: the mappings that the data query gave; `columns`: their names, in order
    - `table`: all rows made ready (a `Table`), and `excerpt`: as much of it as a mail should hold
    - the filters `cell` (any value as text) and `humanise` (`done_count` as `Done count`)

    Raises:
        SourceError: one of them cannot be read or compiled; the sentence names file, line and fault.
    """

    def __init__(self, directory: Path | None, report: str) -> None:
        self._subject, self._text, self._html, self._page = (
            _compiled(directory, report, f"{name}.j2")
            for name in ("subject.txt", "email.txt", "email.html", "report.html")
        )

    def render(self, context: Mapping[str, object]) -> Rendered:
        """One recipient's report. What a template raises comes through; `explain` puts it into words."""
        given = self._given(context)
        return Rendered(
            subject=" ".join(self._subject.render(given).split()),
            text=self._text.render(given).strip("\n") + "\n",
            html=self._html.render(given).strip() + "\n",
            page=self._page.render(given).strip() + "\n",
        )

    def page(self, context: Mapping[str, object]) -> str:
        """The page alone, as `render` gives it."""
        return self._page.render(self._given(context)).strip() + "\n"

    @staticmethod
    def _given(context: Mapping[str, object]) -> dict[str, object]:
        period: Any = context["period"]
        columns: Any = context["columns"]
        rows: Any = context["rows"]
        table = _Later(lambda: table_of(columns, rows, starts_at=period.starts_at))
        excerpt = _Later(lambda: _excerpt(table.there(), columns, rows, starts_at=period.starts_at))
        return {**context, "table": table, "excerpt": excerpt}


class _Later:
    """A table that is made when a template first looks into it: half of a trivial report's time, and many need none."""

    def __init__(self, make: Callable[[], Table]) -> None:
        self._make = make
        self._made: Table | None = None

    def there(self) -> Table:
        """The table itself."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getattr__(self, name: str) -> object:
        return getattr(self.there(), name)


def explain(error: Exception) -> str:
    """What went wrong in a template, in one sentence, with the template's path and line if they are known."""
    from jinja2 import TemplateNotFound, TemplateSyntaxError

    lines = [(frame.filename, frame.lineno) for frame in extract_tb(error.__traceback__)]
    fault = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        lines.append((f"{error.filename or error.name}.j2".removesuffix(".j2"), error.lineno))
        fault = " ".join(str(error.message).split()).rstrip(".")
    elif isinstance(error, TemplateNotFound):
        fault = f"there is no template {error.message}"
    elif not type(error).__module__.startswith("jinja2"):
        fault = f"{type(error).__name__}: {fault}"
    places = [f"{path}, line {line}: " for path, line in lines if path.endswith(".j2")]
    return f"{places[-1] if places else ''}{fault}."


def label(starts_at: datetime, ends_at: datetime, cadence: str) -> str:
    """The period as a person says it: `24 November 2026`, `November 2026`, for weeks first and last day.

    Both times are civil times of the report's zone; `ends_at` is exclusive. `cadence` is weekly, daily or
    monthly.
    """
    first, last = starts_at.date(), (ends_at - timedelta(microseconds=1)).date()
    end = f"{last.day} {_MONTHS[last.month - 1]} {last.year}"
    if cadence == "monthly":
        return f"{_MONTHS[first.month - 1]} {first.year}"
    if cadence == "daily":
        return f"{first.day} {_MONTHS[first.month - 1]} {first.year}"
    if (first.year, first.month) == (last.year, last.month):
        return f"{first.day} {_DASH} {end}"
    if first.year == last.year:
        return f"{first.day} {_MONTHS[first.month - 1]} {_DASH} {end}"
    return f"{first.day} {_MONTHS[first.month - 1]} {first.year} {_DASH} {end}"


def humanise(name: str) -> str:
    """A column's name as a heading: `done_count` as `Done count`, `person_id` as `Person ID`."""
    words = [_CAPITALS.get(word, word) for word in name.replace("_", " ").split()]
    title = " ".join(words)
    return title[:1].upper() + title[1:] if title else name


def table_of(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    starts_at: datetime,
    rows_max: int | None = None,
) -> Table:
    """The rows made ready to be shown; times are shown in the zone of `starts_at`, and its year is not named.

    Bars are drawn when there is one column of labels, and then for the last column of numbers. Sums, and the
    scale of the bars, are those of all rows even where `rows_max` cuts the table (and its long texts) short.
    """
    shown = rows if rows_max is None else rows[:rows_max]
    heads, texts = [], []
    numeric_at = []
    for at, name in enumerate(columns):
        values = [row.get(name) for row in rows]
        numeric = _is_quantity(name, values)
        if numeric:
            numeric_at.append(at)
        head, cells = (_numbers if numeric else _labels)(name, values, len(shown), starts_at)
        heads.append(head)
        texts.append(cells if rows_max is None else [_cut(cell) for cell in cells])
    bars = numeric_at[-1] if numeric_at and len(columns) - len(numeric_at) == 1 and len(rows) > 1 else None
    percents = [0] * len(rows) if bars is None else _percents([row.get(columns[bars]) for row in rows])
    if not any(percents):
        bars = None
    lines = [Row(list(cells), percent) for cells, percent in zip(zip(*texts, strict=True), percents, strict=False)]
    return Table(heads, lines, _totals(heads), bars, len(rows) - len(shown))


def _excerpt(
    whole: Table, columns: Sequence[str], rows: Sequence[Mapping[str, object]], *, starts_at: datetime
) -> Table:
    """As much of a table as a mail should hold; the table itself where that is all of it."""
    rows_max = min(_EXCERPT_ROWS_MAX, max(5, _EXCERPT_CELLS_MAX // max(1, len(columns))))
    if len(rows) <= rows_max and all(len(text) <= _EXCERPT_CHARACTERS_MAX for row in whole.rows for text in row.cells):
        return whole
    return table_of(columns, rows, starts_at=starts_at, rows_max=rows_max)


def cell(value: object, zone: tzinfo | None = None, year: int | None = None) -> str:
    """Any value as short text: None is a dash, a date `Mon 16 Nov`, an aware time is shown in `zone`.

    A date outside `year` (where one is given) shows its own year instead of the day of the week.
    """
    match value:
        case None:
            return _DASH
        case date() | time() | timedelta():
            return _when(value, zone, year)
        case int() | float() | Decimal():
            return _figure(value)
        case dict() | list() | tuple():
            return json.dumps(value, ensure_ascii=False, default=str)
        case bytes():
            return f"{len(value)} bytes"
        case _:
            return str(value)


def _is_markup(name: str | None) -> bool:
    return name is not None and name.endswith(".html.j2")


@cache
def _environment(directory: Path | None) -> "Environment":
    """One per directory, so that the packaged templates are compiled once for all reports."""
    # 74 ms that only those pay who have something to render.
    from jinja2 import (
        ChoiceLoader,
        Environment,
        FileSystemLoader,
        PrefixLoader,
        StrictUndefined,
        pass_context,
    )
    from jinja2.runtime import Context

    def cell_here(context: Context, value: object) -> str:
        starts_at = context["period"].starts_at
        return cell(value, starts_at.tzinfo, starts_at.year)

    packaged = FileSystemLoader(PACKAGED)
    # No report's name has a colon, so the packaged names cannot be shadowed, nor extend themselves.
    loaders = [
        PrefixLoader({"outbox": packaged}, delimiter=":"),
        *([FileSystemLoader(directory)] if directory else []),
    ]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=_is_markup,  # noqa: S701 — text and subject are no markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = pass_context(cell_here)
    environment.filters["humanise"] = humanise
    return environment


def _compiled(directory: Path | None, report: str, name: str) -> "Template":
    environment = _environment(directory)
    from jinja2 import TemplateError

    try:
        template = environment.select_template([f"{report}/{name}", f"outbox:{report}/{name}", name, f"outbox:{name}"])
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        fault = explain(error).rstrip(".")
        raise SourceError(
            f"The template {name} of the report {report} cannot be used: {fault}; "
            "mend it, or remove it and the packaged one is used."
        ) from error
    # A chain of mappings as Jinja leaves it, which each rendering walks through: flat, it saves 10 us a time.
    template.globals = dict(template.globals)
    return template


def _is_quantity(name: str, values: Iterable[object]) -> bool:
    present = [value for value in values if value is not None]
    numbers = all(isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in present)
    return bool(present) and numbers and not _names_something(name)


def _names_something(name: str) -> bool:
    words = name.lower().split("_")
    return words[-1] in _NAMING_LAST_WORDS and "per" not in words


def _adds_up(name: str) -> bool:
    return _RATE_WORDS.isdisjoint(name.lower().split("_"))


def _numbers(name: str, values: Sequence[Any], shown: int, _starts_at: datetime) -> tuple[Column, list[str]]:
    """A column of quantities, all with the same number of decimals so that they align."""
    finite = [number for value in values if value is not None and (number := _decimal(value)) is not None]
    total = sum(finite, Decimal(0))
    summed = len(values) > 1 and _adds_up(name)
    grouped = any(abs(number) >= _GROUPED_MIN for number in [*finite, *([total] if summed else [])])
    places = max(map(_places, finite), default=0)
    texts = [_DASH if value is None else _number(value, places, grouped=grouped) for value in values[:shown]]
    return Column(humanise(name), True, _number(total, places, grouped=grouped) if summed else ""), texts


def _labels(name: str, values: Sequence[object], shown: int, starts_at: datetime) -> tuple[Column, list[str]]:
    if _names_something(name):
        values = [str(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]
    texts = [cell(value, starts_at.tzinfo, starts_at.year) for value in values[:shown]]
    return Column(humanise(name), False, ""), texts


def _totals(columns: Sequence[Column]) -> list[str]:
    totals = [column.total for column in columns]
    if not any(totals):
        return []
    if "" in totals:
        totals[totals.index("")] = "Total"
    return totals


def _percents(values: Sequence[Any]) -> list[int]:
    """Each value as a share of the largest, so that anything above nothing can be seen."""
    numbers = [Decimal(0) if value is None else max(_decimal(value) or Decimal(0), Decimal(0)) for value in values]
    largest = max(numbers)
    return [max(1, round(100 * number / largest)) if number else 0 for number in numbers]


def _decimal(value: float | Decimal) -> Decimal | None:
    """The number as a person reads it (0.1 is 0.1), or None for what is no number or endless."""
    number = value if isinstance(value, Decimal) else Decimal(repr(value))
    return number if number.is_finite() else None


def _places(value: float | Decimal) -> int:
    """How many decimals say enough: at most two, or two figures for what is smaller than one."""
    number = _decimal(value)
    if not number:
        return 0
    places = 2 if abs(number) >= 1 else min(6, 1 - number.adjusted())
    return len(f"{number:.{places}f}".rstrip("0").partition(".")[2])


def _number(value: float | Decimal, places: int, *, grouped: bool) -> str:
    number = _decimal(value)
    if number is None:
        return _DASH
    text = f"{abs(number):,.{places}f}".replace(",", _THIN if grouped else "")
    return f"{_MINUS}{text}" if number < 0 and text.strip("0.") else text


def _figure(value: float | Decimal) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    number = _decimal(value)
    return _number(value, _places(value), grouped=number is not None and abs(number) >= _GROUPED_MIN)


def _when(value: date | time | timedelta, zone: tzinfo | None, year: int | None) -> str:
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, time):
        return f"{value:%H:%M}"
    if not isinstance(value, datetime):
        return _day(value, year)
    if value.tzinfo is not None and value.replace(tzinfo=UTC) not in _ENDLESS:
        value = value.astimezone(zone)
    return f"{_day(value, year)} {value:%H:%M}"


def _day(value: date, year: int | None) -> str:
    month = _MONTHS[value.month - 1][:3]
    if year not in {None, value.year}:
        return f"{value.day} {month} {value.year}"
    return f"{_DAYS[value.weekday()]} {value.day} {month}"


# PostgreSQL's ±infinity, as asyncpg gives it: no other zone can hold it.
_ENDLESS = frozenset({datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)})


def _duration(value: timedelta) -> str:
    minutes, seconds = divmod(round(abs(value).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((at for at, (count, _) in enumerate(parts) if count), 2)
    said = " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"
    return f"{_MINUS}{said}" if value < timedelta(0) else said


def _cut(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARACTERS_MAX else text[: _EXCERPT_CHARACTERS_MAX - 1].rstrip() + "…"


def _width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)
