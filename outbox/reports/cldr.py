"""All other languages: Babel's, that is Unicode's CLDR."""

import re
from datetime import date, time
from functools import cached_property
from typing import TYPE_CHECKING

from outbox.reports.language_rules import DASH, MINUS, THIN

if TYPE_CHECKING:
    from babel import Locale
    from babel.dates import DateTimePattern

# A pattern of CLDR that begins with the day and goes on with month and year (UTS 35 part 4, §8).
_DAY_FIRST = re.compile(r"(?P<day>d+\.?)(?:'[^']*'|[^A-Za-z'])*[ML]+(?=(?:'[^']*'|[^A-Za-z'])*y)")


class CldrRules:
    """Rules of a language as Unicode's CLDR has them."""

    def __init__(self, locale: "Locale") -> None:
        from babel.numbers import get_decimal_symbol, get_group_symbol

        self._locale = locale
        self.tag = str(locale).partition("@")[0].replace("_", "-")
        self.is_rtl = locale.text_direction == "rtl"
        group = get_group_symbol(locale, numbering_system="latn").replace("\N{NO-BREAK SPACE}", THIN)
        self.marks = (get_decimal_symbol(locale, numbering_system="latn"), group)
        # Between letters that run to the left a sign would move to the other end of its number without the mark.
        self.minus = f"\N{LEFT-TO-RIGHT MARK}{MINUS}" if self.is_rtl else MINUS
        self.wide = locale.decimal_formats[None].grouping[1] == 2  # noqa: PLR2004 - lakh and crore
        self._percent = locale.percent_formats[None]

    def plural(self, count: int) -> str:
        """Return CLDR's name of the form that this number takes."""
        return self._locale.plural_form(count)

    def day(self, value: date, *, with_year: bool) -> str:
        """Return `Mo., 16. Nov.`, or `16. Nov. 2025`."""
        names = ("yMMMd",) if with_year else ("MMMEd", "MMMd")
        found = (self._locale.datetime_skeletons.get(name) for name in names)
        pattern = next((one for one in found if one is not None), self._locale.date_formats["medium"])
        return self._written(pattern, value)

    def clock(self, value: time) -> str:
        """Return hours and minutes, of 12 or 24."""
        clock: str = self._locale.time_formats["short"].apply(value, self._locale)
        return clock

    def moment(self, day: str, clock: str) -> str:
        """Return `Mo., 16. Nov., 09:05`."""
        both = str(self._locale.datetime_formats["short"]).replace("'", "")
        return both.replace("{1}", day).replace("{0}", clock)

    def span(self, first: date, last: date, cadence: str) -> str:
        """Return `24. November 2026`, `November 2026`, or two days with their common part written once."""
        if cadence == "monthly":
            month = self._locale.datetime_skeletons.get("yMMMM")
            return self._written(month or "MMMM y", first)
        long = self._locale.date_formats["long"]
        end = self._written(long, last)
        if cadence == "daily":
            return self._written(long, first)
        if first.year != last.year:
            return f"{self._written(long, first)} {DASH} {end}"
        if self._beginnings is not None:  # the day comes first, then the month
            short, with_month = self._beginnings
            if first.month == last.month:
                return f"{self._written(short, first)}{DASH}{end}"
            return f"{self._written(with_month, first)} {DASH} {end}"
        return self._interval(first, last)

    @cached_property
    def _beginnings(self) -> tuple[str, str] | None:
        """Return the long date up to its day, and up to its month, where the language names them in this order."""
        parts = _DAY_FIRST.match(self._locale.date_formats["long"].pattern)
        return None if parts is None else (parts["day"], parts[0])

    def _interval(self, first: date, last: date) -> str:
        """Return the interval as CLDR writes it, with the month in full where the long date has it so."""
        greatest = "M" if first.month != last.month else "d"
        parts = self._locale.interval_formats.get("yMMMd", {}).get(greatest)
        if parts is None or len(parts) != 2:  # noqa: PLR2004 - from and to
            long = self._locale.date_formats["long"]
            return f"{self._written(long, first)} {DASH} {self._written(long, last)}"
        if "MMMM" in self._locale.date_formats["long"].pattern:
            parts = [re.sub("M{3,4}", "MMMM", part) for part in parts]
        return "".join(map(self._written, parts, (first, last))).replace("\N{THIN SPACE}", " ")

    def _written(self, pattern: "DateTimePattern | str", value: date) -> str:
        from babel.dates import parse_pattern

        return parse_pattern(pattern).apply(value, self._locale)

    def share(self, number: str) -> str:
        """Return a number of hundredths as a percentage."""
        return f"{self._percent.prefix[0]}{number}{self._percent.suffix[0]}"

    def lasting(self, count: int, unit: str) -> str:
        """Return so many hours, minutes or seconds, in short."""
        from babel.units import format_unit

        return format_unit(count, f"duration-{unit}", "short", locale=self._locale)
