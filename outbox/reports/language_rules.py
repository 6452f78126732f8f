"""Rules in which languages differ, and the signs that all of them share."""

from collections.abc import Iterator
from datetime import date, time
from typing import Final, Protocol

DASH: Final = "\N{EN DASH}"
MINUS: Final = "\N{MINUS SIGN}"
THIN: Final = "\N{NARROW NO-BREAK SPACE}"  # between thousands: no line break can part a number
GROUPED_MIN: Final = 10_000  # four figures read well without a gap, and may be a year


def groups(whole: str, size: int) -> Iterator[str]:
    """Yield groups of `size` figures (two in India), and the last three."""
    head = len(whole) - 3
    if head > 0:
        first = head % size or size
        yield whole[:first]
        for at in range(first, head, size):
            yield whole[at : at + size]
    yield whole[max(head, 0) :]


class LanguageRules(Protocol):
    """Rules of one language, where languages differ."""

    tag: str
    is_rtl: bool
    marks: tuple[str, str]
    minus: str
    wide: bool

    def plural(self, count: int) -> str:
        """Return CLDR's name of the form that this number takes: one, other, in some languages zero, two, few, many."""

    def day(self, value: date, *, with_year: bool) -> str:
        """Return a day in short: with its weekday, or with its year."""

    def clock(self, value: time) -> str:
        """Return hours and minutes."""

    def moment(self, day: str, clock: str) -> str:
        """Return a day and a time together."""

    def span(self, first: date, last: date, cadence: str) -> str:
        """Return a period by its first and last day; `cadence` is weekly, daily or monthly."""

    def share(self, number: str) -> str:
        """Return a number of hundredths as a percentage."""

    def lasting(self, count: int, unit: str) -> str:
        """Return so many hours, minutes or seconds."""
