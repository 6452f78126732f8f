"""Tables in plain text: aligned where they fit, else one block of `Title: value` per row."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final
from unicodedata import category, combining, east_asian_width

from outbox.reports.columns import Column

if TYPE_CHECKING:
    from outbox.reports.table import Table

TEXT_WIDTH_MAX: Final = 76
_BAR_MIN, _BAR_MAX = 8, 24  # of the longest bar


def draw(table: "Table") -> str:
    """Return the table as text. Bars stand after the rows, where there is room for them."""
    titles = [column.title for column in table.columns]
    body = [[" ".join(cell.split()) for cell in row.cells] for row in table.rows]
    lines = [titles, *body, *([table.totals] if table.totals else [])]
    widths = [max(map(_width, cells)) for cells in zip(*lines, strict=True)]
    width = sum(widths) + 2 * len(widths) - 2
    if width > TEXT_WIDTH_MAX:
        return "\n\n".join(_blocks(table, titles, body))
    drawn = [_aligned(table.columns, cells, widths) for cells in lines]
    rows = slice(1, len(body) + 1)
    drawn[rows] = _with_bars(table, drawn[rows], width)
    drawn.insert(1, "-" * width)
    if table.totals:
        drawn.insert(-1, "-" * width)
    return "\n".join(drawn)


def _with_bars(table: "Table", lines: list[str], width: int) -> list[str]:
    longest = min(_BAR_MAX, TEXT_WIDTH_MAX - width - 2)
    if table.bars is None or longest < _BAR_MIN:
        return lines
    bars = (max(1, round(longest * row.percent / 100)) if row.percent else 0 for row in table.rows)
    return [
        f"{line}{' ' * (width - _width(line))}  {'█' * bar}".rstrip() for line, bar in zip(lines, bars, strict=True)
    ]


def _blocks(table: "Table", titles: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    say = table.language.say
    for cells in body:
        yield "\n".join(say("entry", name=name, value=value) for name, value in zip(titles, cells, strict=True))
    if table.totals:
        totals = (say("entry", name=column.title, value=column.total) for column in table.columns if column.total)
        yield "\n".join([say("total"), *totals])


def _aligned(columns: Iterable[Column], cells: Iterable[str], widths: Iterable[int]) -> str:
    padded = []
    for column, cell, width in zip(columns, cells, widths, strict=True):
        gap = " " * (width - _width(cell))
        padded.append(gap + cell if column.numeric else cell + gap)
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if combining(char) or category(char) == "Cf" else 2 if east_asian_width(char) in "WF" else 1 for char in text
    )
