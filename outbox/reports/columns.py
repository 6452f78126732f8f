"""Columns of a table: which are quantities, what adds up, and how their cells and totals read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from outbox.reports.language import Language
from outbox.reports.language_rules import DASH, GROUPED_MIN
from outbox.reports.number_format import decimal_of, places_of, write_number
from outbox.reports.values import cell

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
_WORD_MAX: Final = 24


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


def humanise(name: object) -> str:
    """Return a column's name as a heading: `done_count` as `Done count`, `person_id` as `Person ID`; None is a dash."""
    if name is None:
        return DASH
    name = str(name)
    words = [_CAPITALS.get(word, word) for word in name.replace("_", " ").split()]
    title = " ".join(words)
    return title[:1].upper() + title[1:] if title else name


def column_of(
    name: str, values: Sequence[Any], shown: int, starts_at: datetime, language: Language
) -> tuple[Column, list[str]]:
    """Return a column of all `values` and the texts of its first `shown` cells.

    Times are shown in the zone of `starts_at`, and its year is not named.
    """
    if _is_quantity(name, values):
        return _numbers(name, values, shown, language)
    return _labels(name, values, shown, starts_at, language)


def _is_quantity(name: str, values: Iterable[object]) -> bool:
    present = [value for value in values if value is not None]
    numbers = all(isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in present)
    return bool(present) and numbers and not _names_something(name)


def _names_something(name: str) -> bool:
    words = name.lower().split("_")
    return words[-1] in _NAMING_LAST_WORDS and "per" not in words


def _adds_up(name: str) -> bool:
    return _RATE_WORDS.isdisjoint(name.lower().split("_"))


def _numbers(name: str, values: Sequence[Any], shown: int, language: Language) -> tuple[Column, list[str]]:
    """Return a column of quantities, all with the same number of decimals so that they align."""
    finite = [number for value in values if value is not None and (number := decimal_of(value)) is not None]
    total = sum(finite, Decimal(0))
    summed = len(values) > 1 and _adds_up(name)
    grouped = any(abs(number) >= GROUPED_MIN for number in [*finite, *([total] if summed else [])])
    places = max(map(places_of, finite), default=0)
    texts = [
        DASH if value is None else write_number(decimal_of(value), places, language, grouped=grouped)
        for value in values[:shown]
    ]
    total_text = write_number(total, places, language, grouped=grouped) if summed else ""
    return Column(
        humanise(name), True, total_text, figure=total if summed or (len(values) == 1 and finite) else None
    ), texts


def _labels(
    name: str, values: Sequence[object], shown: int, starts_at: datetime, language: Language
) -> tuple[Column, list[str]]:
    if _names_something(name):
        values = [str(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]
    texts = [cell(value, starts_at.tzinfo, starts_at.year, language) for value in values[:shown]]
    breaks = any(len(text) > _WORD_MAX and max(map(len, text.split()), default=0) > _WORD_MAX for text in texts)
    return Column(humanise(name), False, "", breaks), texts
