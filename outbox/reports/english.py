"""English, written here so that a fleet that uses it alone never loads Babel (30 ms)."""

from datetime import date, time
from typing import Final

from outbox.reports.language_rules import DASH, GROUPED_MIN, MINUS, THIN, groups

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


class EnglishRules:
    """English for readers anywhere: day before month, 24 hours, a thin space between thousands."""

    tag = "en"
    is_rtl = False
    marks = (".", THIN)
    minus = MINUS
    wide = False

    def plural(self, count: int) -> str:
        """Return one, or other."""
        return "one" if count == 1 else "other"

    def day(self, value: date, *, with_year: bool) -> str:
        """Return `Mon 16 Nov`, or `16 Nov 2025`."""
        month = _MONTHS[value.month - 1][:3]
        if with_year:
            return f"{value.day} {month} {value.year}"
        return f"{_DAYS[value.weekday()]} {value.day} {month}"

    def clock(self, value: time) -> str:
        """Return `09:05`."""
        return f"{value:%H:%M}"

    def moment(self, day: str, clock: str) -> str:
        """Return `Mon 16 Nov 09:05`."""
        return f"{day} {clock}"

    def span(self, first: date, last: date, cadence: str) -> str:
        """Return `24 November 2026`, `November 2026`, or two such days with a dash between them."""
        day, month = f"{first.day}", f" {_MONTHS[first.month - 1]}"
        end = f"{last.day} {_MONTHS[last.month - 1]} {last.year}"
        if cadence == "monthly":
            return f"{month[1:]} {first.year}"
        if cadence == "daily":
            return f"{day}{month} {first.year}"
        if first.year != last.year:
            return f"{day}{month} {first.year} {DASH} {end}"
        return f"{day}{month if first.month != last.month else ''} {DASH} {end}"

    def share(self, number: str) -> str:
        """Return `42%`."""
        return f"{number}%"

    def lasting(self, count: int, unit: str) -> str:
        """Return `2 h`, `5 min`, `1 s`."""
        shown = THIN.join(groups(str(count), 3)) if count >= GROUPED_MIN else str(count)
        return f"{shown} {({'hour': 'h', 'minute': 'min', 'second': 's'})[unit]}"


ENGLISH_RULES: Final = EnglishRules()
