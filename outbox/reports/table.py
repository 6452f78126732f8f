"""Rows made ready to be shown: columns, totals, bars and a headline.

All judgement on that is here and in `columns`, where it can be tested; the templates only lay it out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from math import isfinite
from typing import Any, Final

from outbox.reports.columns import Column, column_of
from outbox.reports.language import ENGLISH, Language
from outbox.reports.number_format import decimal_of
from outbox.reports.plain_table import draw

# Gmail clips a mail at 102 kB, so the mail shows the beginning of a long table and the page all of it.
_EXCERPT_ROWS_MAX: Final = 40
_EXCERPT_CELLS_MAX: Final = 320
_EXCERPT_CHARACTERS_MAX: Final = 160
_EXCERPT_BYTES_MAX: Final = 80_000
_CELL_BYTES: Final = 360  # written by the packaged template around the text of a cell
_BARS_COLUMNS_MAX: Final = 4  # where there are more, they need the room
_HEADLINE_MAX: Final = 3
_HEADLINE_CHARACTERS_MAX: Final = 18  # in large figures, beside each other on a phone


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

    `totals` has one text per column, or is empty; `more` counts the rows that are left out here. `headline` comes
    first, in large figures: the first few totals, or the numbers of the only row as totals.
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
        """Return the headline for programs, as JSON (`[["Done", 12]]`): a later edition draws a line through them."""
        figures = [(column.title, float(column.figure)) for column in self.headline if column.figure is not None]
        return json.dumps([(title, figure) for title, figure in figures if isfinite(figure)], ensure_ascii=False)

    @property
    def text(self) -> str:
        """Return the table in plain text (`plain_table`)."""
        return draw(self)


def table_of(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    starts_at: datetime,
    language: Language = ENGLISH,
    rows_max: int | None = None,
) -> Table:
    """Return the rows made ready to be shown; times are shown in the zone of `starts_at`, and its year is not named.

    Bars are drawn when there is one column of labels beside few of numbers, and then for the last of these. Sums, and
    the scale of the bars, are those of all rows even where `rows_max` cuts the table (and its long texts) short.
    """
    shown = rows if rows_max is None else rows[:rows_max]
    heads, texts = [], []
    for name in columns:
        head, cells = column_of(name, [row.get(name) for row in rows], len(shown), starts_at, language)
        heads.append(head)
        texts.append(cells if rows_max is None else [_cut(cell) for cell in cells])
    bars = _bars(heads) if len(rows) > 1 else None
    percents = [0] * len(rows) if bars is None else _percents([row.get(columns[bars]) for row in rows])
    if not any(percents):
        bars = None
    lines = [Row(list(cells), percent) for cells, percent in zip(zip(*texts, strict=True), percents, strict=False)]
    headline = _headline(heads, lines[0] if len(rows) == 1 and lines else None)
    return Table(heads, lines, _totals(heads, language), headline, bars, len(rows) - len(shown), language)


def excerpt_of(
    whole: Table, columns: Sequence[str], rows: Sequence[Mapping[str, object]], *, starts_at: datetime
) -> Table:
    """Return as much of a table as a mail should hold; the table itself where that is all of it."""
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


def _bars(columns: Sequence[Column]) -> int | None:
    """Return the number of the column that bars are drawn for; None where they would not help."""
    numeric_at = [at for at, column in enumerate(columns) if column.numeric]
    has_one_label = len(columns) - len(numeric_at) == 1 and len(columns) <= _BARS_COLUMNS_MAX
    return numeric_at[-1] if numeric_at and has_one_label else None


def _headline(columns: Sequence[Column], only: Row | None) -> list[Column]:
    found = [column for column in columns if column.total]
    if only is not None:
        cells = zip(columns, only.cells, strict=True)
        found = [Column(column.title, True, shown, figure=column.figure) for column, shown in cells if column.numeric]
    left = _HEADLINE_CHARACTERS_MAX
    chosen: list[Column] = []
    for column in found[:_HEADLINE_MAX]:
        left -= len(column.total)
        if chosen and left < 0:
            break
        chosen.append(column)
    return chosen


def _totals(columns: Sequence[Column], language: Language) -> list[str]:
    totals = [column.total for column in columns]
    if not any(totals):
        return []
    if "" in totals:
        totals[totals.index("")] = language.say("total")
    return totals


def _percents(values: Sequence[Any]) -> list[int]:
    """Return each value as a share of the largest, so that anything above nothing can be seen."""
    numbers = [Decimal(0) if value is None else max(decimal_of(value) or Decimal(0), Decimal(0)) for value in values]
    largest = max(numbers)
    return [max(1, round(100 * number / largest)) if number else 0 for number in numbers]


def _cut(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARACTERS_MAX else text[: _EXCERPT_CHARACTERS_MAX - 1].rstrip() + "…"
