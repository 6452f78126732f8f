"""How a reader's language writes dates, numbers and the packaged words. Knows no reports and no rows.

Plain `en` is written here, so that who uses it alone never loads Babel (30 ms); all others are Babel's, that is
Unicode's CLDR. What Babel would work out anew for each value (10 to 40 us) is kept per language: patterns, symbols,
and the days that were asked for last, since all recipients of an edition see the same ones. Digits are 0 to 9 in
every language, since rows may hold them as text, too.
"""

import re
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from outbox.errors import TemplateUseError
from outbox.reports.translations import PHRASES, Phrase
from outbox.suggestions import did_you_mean

if TYPE_CHECKING:
    from babel import Locale
    from babel.dates import DateTimePattern

DAYS_KEPT: Final = 4096
LANGUAGES_KEPT: Final = 1024
DASH: Final = "\N{EN DASH}"

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_MINUS = "\N{MINUS SIGN}"
# What runs to the left stands whole in an English phrase (Unicode Standard Annex 9, §2.4).
_ISOLATE, _END = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"
_THIN = "\N{NARROW NO-BREAK SPACE}"  # between thousands: no line break can part a number

# Language, script and territory (RFC 5646 §2.1) as BCP 47 or POSIX write them; what POSIX adds for itself is dropped.
_TAG = re.compile(r"([A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3})(?:\.[\w-]+)?(?:@[\w=;-]+)?")
# A pattern of CLDR that begins with the day and goes on with month and year (UTS 35 part 4, §8).
_DAY_FIRST = re.compile(r"(?P<day>d+\.?)(?:'[^']*'|[^A-Za-z'])*[ML]+(?=(?:'[^']*'|[^A-Za-z'])*y)")
_NONE = frozenset({"und", "mul", "zxx", "mis"})  # tags that say that there is no language to speak of
_SAID_AS = {"no": "nb", "iw": "he", "in": "id"}  # old codes


class Manner(Protocol):
    """The parts in which languages differ."""

    tag: str
    is_rtl: bool
    marks: tuple[str, str]
    minus: str
    wide: bool

    def plural(self, count: int) -> str:
        """CLDR's name of the form that this number takes: one, other, in some languages zero, two, few, many."""

    def day(self, value: date, *, with_year: bool) -> str:
        """A day in short: with its weekday, or with its year."""

    def clock(self, value: time) -> str:
        """Hours and minutes."""

    def moment(self, day: str, clock: str) -> str:
        """A day and a time together."""

    def span(self, first: date, last: date, cadence: str) -> str:
        """A period by its first and last day."""

    def share(self, number: str) -> str:
        """A number of hundredths as a percentage."""

    def lasting(self, count: int, unit: str) -> str:
        """So many hours, minutes or seconds."""


class Language:
    """What is asked of a language. There is one object for each (`of`), which may be used from any thread.

    `tag` is its name as HTML knows it (BCP 47: `de-CH`), `direction` is ltr or rtl. `spoken` is the tag of the language
    that the packaged words are in: `en` where there is no translation, and then `is_translated` is false.
    """

    def __init__(self, manner: Manner) -> None:
        self.tag = manner.tag
        self.direction = "rtl" if manner.is_rtl else "ltr"
        self.spoken = next((name for name in (manner.tag, manner.tag.partition("-")[0]) if name in PHRASES), "en")
        self.is_translated = self.spoken.partition("-")[0] == manner.tag.partition("-")[0]
        self._isolates = manner.is_rtl and not self.is_translated
        self._manner = manner if self.spoken != "en" else ENGLISH_MANNER
        self._phrases = PHRASES[self.spoken]
        self._decimal, self._group = manner.marks
        self._minus, self._wide = manner.minus, manner.wide
        self.day: Callable[[date, int | None], str] = lru_cache(DAYS_KEPT)(
            lambda value, year: manner.day(value, with_year=year not in {None, value.year})
        )
        self._clock = lru_cache(DAYS_KEPT)(manner.clock)
        self._span, self._moment, self._share, self._lasting = manner.span, manner.moment, manner.share, manner.lasting

    def __repr__(self) -> str:
        return f"<Language {self.tag}>"

    def __str__(self) -> str:
        return self.tag

    def say(self, phrase: str, **given: object) -> str:
        """Return a phrase of the packaged templates; where it has a plural, the whole number `n` decides which.

        Raises:
            TemplateUseError: there is no such phrase, or it needs something that is not given.

        """
        try:
            text: Phrase = self._phrases[phrase]
        except (KeyError, TypeError):
            known = ", ".join(self._phrases)
            guess = did_you_mean(str(phrase), self._phrases)
            raise TemplateUseError(f"say: there is no phrase {phrase!r}{guess}; there are {known}") from None
        if self._isolates and phrase != "entry":
            given = {name: value if name == "n" else f"{_ISOLATE}{value}{_END}" for name, value in given.items()}
        if not isinstance(text, str):
            n = given.get("n")
            if not isinstance(n, int):
                raise TemplateUseError(f"say: the phrase {phrase!r} needs a whole number n, not {n!r}; give it as n=3")
            text = text.get(self._manner.plural(n)) or text["other"]
            given["n"] = self.number(str(n), grouped=n >= GROUPED_MIN)
        if "{" not in text:
            return text
        try:
            return text.format(**given)
        except KeyError as error:
            wanted = error.args[0]
            raise TemplateUseError(
                f"say: the phrase {phrase!r} needs {wanted}; give it as say({phrase!r}, {wanted}=…)"
            ) from None

    def label(self, starts_at: datetime, ends_at: datetime, cadence: str) -> str:
        """The period as a person says it: `24 November 2026`, `November 2026`, for weeks first and last day.

        Both times are civil times of the report's zone; `ends_at` is exclusive. `cadence` is weekly, daily or
        monthly.
        """
        return self._span(starts_at.date(), (ends_at - timedelta(microseconds=1)).date(), cadence)

    def moment(self, value: datetime, year: int | None) -> str:
        """A day and the time of it; see `day`."""
        return self._moment(self.day(value.date(), year), self.clock(value.time()))

    def clock(self, value: time) -> str:
        """Hours and minutes."""
        return self._clock(value.replace(second=0, microsecond=0, tzinfo=None, fold=0))

    def number(self, digits: str, *, grouped: bool, negative: bool = False) -> str:
        """A number that is written plainly (`1234.5`, without sign) as the language writes it."""
        whole, point, fraction = digits.partition(".")
        if grouped:
            whole = self._group.join(_groups(whole, 2 if self._wide else 3))
        text = f"{whole}{self._decimal}{fraction}" if point else whole
        return f"{self._minus}{text}" if negative else text

    def percent(self, number: str) -> str:
        """A number of hundredths, as `number` gives it, with its sign."""
        return self._share(number)

    def duration(self, value: timedelta) -> str:
        """The two largest units of it, whole seconds at least."""
        minutes, seconds = divmod(round(abs(value).total_seconds()), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [(hours, "hour"), (minutes, "minute"), (seconds, "second")]
        first = next((at for at, (count, _) in enumerate(parts) if count), 2)
        said = " ".join(self._lasting(count, unit) for count, unit in parts[first : first + 2] if count)
        said = said or self._lasting(0, "second")
        return f"{self._minus}{said}" if value < timedelta(0) else said


GROUPED_MIN: Final = 10_000  # four figures read well without a gap, and may be a year


def _groups(whole: str, size: int) -> Iterator[str]:
    """The last three figures, and before them groups of `size` (two in India)."""
    head = len(whole) - 3
    if head > 0:
        first = head % size or size
        yield whole[:first]
        for at in range(first, head, size):
            yield whole[at : at + size]
    yield whole[max(head, 0) :]


class English:
    """English for readers anywhere: day before month, 24 hours, a thin space between thousands."""

    tag = "en"
    is_rtl = False
    marks = (".", _THIN)
    minus = _MINUS
    wide = False

    def plural(self, count: int) -> str:
        """One, or other."""
        return "one" if count == 1 else "other"

    def day(self, value: date, *, with_year: bool) -> str:
        """`Mon 16 Nov`, or `16 Nov 2025`."""
        month = _MONTHS[value.month - 1][:3]
        if with_year:
            return f"{value.day} {month} {value.year}"
        return f"{_DAYS[value.weekday()]} {value.day} {month}"

    def clock(self, value: time) -> str:
        """`09:05`."""
        return f"{value:%H:%M}"

    def moment(self, day: str, clock: str) -> str:
        """`Mon 16 Nov 09:05`."""
        return f"{day} {clock}"

    def span(self, first: date, last: date, cadence: str) -> str:
        """`24 November 2026`, `November 2026`, two days of these with a dash between them."""
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
        """`42%`."""
        return f"{number}%"

    def lasting(self, count: int, unit: str) -> str:
        """`2 h`, `5 min`, `1 s`."""
        shown = _THIN.join(_groups(str(count), 3)) if count >= GROUPED_MIN else str(count)
        return f"{shown} {({'hour': 'h', 'minute': 'min', 'second': 's'})[unit]}"


ENGLISH_MANNER: Final = English()


class Cldr:
    """A language as Unicode's CLDR has it."""

    def __init__(self, locale: "Locale") -> None:
        from babel.numbers import get_decimal_symbol, get_group_symbol

        self._locale = locale
        self.tag = str(locale).partition("@")[0].replace("_", "-")
        self.is_rtl = locale.text_direction == "rtl"
        group = get_group_symbol(locale, numbering_system="latn").replace("\N{NO-BREAK SPACE}", _THIN)
        self.marks = (get_decimal_symbol(locale, numbering_system="latn"), group)
        # Between letters that run to the left a sign would move to the other end of its number without the mark.
        self.minus = f"\N{LEFT-TO-RIGHT MARK}{_MINUS}" if self.is_rtl else _MINUS
        self.wide = locale.decimal_formats[None].grouping[1] == 2  # noqa: PLR2004 - lakh and crore
        self._percent = locale.percent_formats[None]

    def plural(self, count: int) -> str:
        """CLDR's name of the form that this number takes."""
        return self._locale.plural_form(count)

    def day(self, value: date, *, with_year: bool) -> str:
        """`Mo., 16. Nov.`, or `16. Nov. 2025`."""
        names = ("yMMMd",) if with_year else ("MMMEd", "MMMd")
        found = (self._locale.datetime_skeletons.get(name) for name in names)
        pattern = next((one for one in found if one is not None), self._locale.date_formats["medium"])
        return self._written(pattern, value)

    def clock(self, value: time) -> str:
        """Hours and minutes, of 12 or 24."""
        clock: str = self._locale.time_formats["short"].apply(value, self._locale)
        return clock

    def moment(self, day: str, clock: str) -> str:
        """`Mo., 16. Nov., 09:05`."""
        both = str(self._locale.datetime_formats["short"]).replace("'", "")
        return both.replace("{1}", day).replace("{0}", clock)

    def span(self, first: date, last: date, cadence: str) -> str:
        """`24. November 2026`, `November 2026`, what two days have in common only once."""
        if cadence == "monthly":
            month = self._locale.datetime_skeletons.get("yMMMM")
            return self._written(month or "MMMM y", first)
        long = self._locale.date_formats["long"]
        end = self._written(long, last)
        if cadence == "daily":
            return self._written(long, first)
        if first.year != last.year:
            return f"{self._written(long, first)} {DASH} {end}"
        if self._beginnings is not None:  # the day comes first, then the month: what both have in common is said once
            short, with_month = self._beginnings
            if first.month == last.month:
                return f"{self._written(short, first)}{DASH}{end}"
            return f"{self._written(with_month, first)} {DASH} {end}"
        return self._interval(first, last)

    @cached_property
    def _beginnings(self) -> tuple[str, str] | None:
        """The long date up to its day, and up to its month, where the language names them in this order."""
        parts = _DAY_FIRST.match(self._locale.date_formats["long"].pattern)
        return None if parts is None else (parts["day"], parts[0])

    def _interval(self, first: date, last: date) -> str:
        """The interval as CLDR writes it, with the month in full where the long date has it so."""
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
        """A number of hundredths as a percentage."""
        return f"{self._percent.prefix[0]}{number}{self._percent.suffix[0]}"

    def lasting(self, count: int, unit: str) -> str:
        """So many hours, minutes or seconds, in short."""
        from babel.units import format_unit

        return format_unit(count, f"duration-{unit}", "short", locale=self._locale)


ENGLISH: Final = Language(ENGLISH_MANNER)


@lru_cache(LANGUAGES_KEPT)
def find(tag: str) -> Language | None:
    """The language of a tag like `de`, `pt-BR`, `en_US`, `zh-Hant-TW` or `de_DE.UTF-8`; None for what names none.

    A territory or a script that is not known is passed over: `de-XX` is `de`. Never raises.
    """
    found = _TAG.fullmatch(tag.strip())
    if found is None:
        return None
    parts = found[1].replace("-", "_").split("_")
    parts[0] = _SAID_AS.get(parts[0].lower(), parts[0].lower())
    if parts[0] in _NONE:
        return None
    while parts:
        if parts == ["en"]:
            return ENGLISH
        locale = _locale("_".join(parts))
        if locale is not None:
            return _of(locale)
        parts.pop()
    return None


def _locale(name: str) -> "Locale | None":
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(name)
    except (UnknownLocaleError, ValueError):
        return None


@lru_cache(LANGUAGES_KEPT)
def _of(locale: "Locale") -> Language:
    return Language(Cldr(locale))
