"""Language of a reader: dates, numbers and the packaged phrases. Knows no reports and no rows.

What Babel would work out anew for each value (10 to 40 us) is kept per language: patterns, symbols, and the days that
were asked for last, since all recipients of an edition see the same ones. Digits are 0 to 9 in every language, since
rows may hold them as text, too.
"""

import re
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from outbox.errors import TemplateUseError
from outbox.reports.cldr import CldrRules
from outbox.reports.english import ENGLISH_RULES
from outbox.reports.language_rules import GROUPED_MIN, LanguageRules, groups
from outbox.reports.translations import PHRASES, Phrase
from outbox.suggestions import did_you_mean

if TYPE_CHECKING:
    from babel import Locale

DAYS_KEPT: Final = 4096
LANGUAGES_KEPT: Final = 1024

# What runs to the left stands whole in an English phrase (Unicode Standard Annex 9, §2.4).
_ISOLATE, _END = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"

# Language, script and territory (RFC 5646 §2.1) as BCP 47 or POSIX write them; what POSIX adds for itself is dropped.
_TAG = re.compile(r"([A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3})(?:\.[\w-]+)?(?:@[\w=;-]+)?")
_NONE = frozenset({"und", "mul", "zxx", "mis"})  # tags that say that there is no language to speak of
_SAID_AS = {"no": "nb", "iw": "he", "in": "id"}  # old codes


class Language:
    """Language of a reader. There is one object for each (`find`), which may be used from any thread.

    `tag` is its name as HTML knows it (BCP 47: `de-CH`), `direction` is ltr or rtl. `spoken` is the tag of the language
    that the packaged words are in: `en` where there is no translation, and then `is_translated` is false.
    """

    def __init__(self, rules: LanguageRules) -> None:
        self.tag = rules.tag
        self.direction = "rtl" if rules.is_rtl else "ltr"
        self.spoken = next((name for name in (rules.tag, rules.tag.partition("-")[0]) if name in PHRASES), "en")
        self.is_translated = self.spoken.partition("-")[0] == rules.tag.partition("-")[0]
        self._isolates = rules.is_rtl and not self.is_translated
        self._rules = rules if self.spoken != "en" else ENGLISH_RULES
        self._phrases = PHRASES[self.spoken]
        self._decimal, self._group = rules.marks
        self._minus, self._wide = rules.minus, rules.wide
        self.day: Callable[[date, int | None], str] = lru_cache(DAYS_KEPT)(
            lambda value, year: rules.day(value, with_year=year not in {None, value.year})
        )
        self._clock = lru_cache(DAYS_KEPT)(rules.clock)
        self._span, self._moment, self._share, self._lasting = rules.span, rules.moment, rules.share, rules.lasting

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
            text = text.get(self._rules.plural(n)) or text["other"]
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
        """Return the period for people: `24 November 2026`, `November 2026`, for weeks first and last day.

        Both times are civil times of the report's zone; `ends_at` is exclusive. `cadence` is weekly, daily or
        monthly.
        """
        return self._span(starts_at.date(), (ends_at - timedelta(microseconds=1)).date(), cadence)

    def moment(self, value: datetime, year: int | None) -> str:
        """Return a day and the time of it; `year` as for `day`."""
        return self._moment(self.day(value.date(), year), self.clock(value.time()))

    def clock(self, value: time) -> str:
        """Return hours and minutes."""
        return self._clock(value.replace(second=0, microsecond=0, tzinfo=None, fold=0))

    def number(self, digits: str, *, grouped: bool, negative: bool = False) -> str:
        """Return a number that is written plainly (`1234.5`, without sign) as the language writes it."""
        whole, point, fraction = digits.partition(".")
        if grouped:
            whole = self._group.join(groups(whole, 2 if self._wide else 3))
        text = f"{whole}{self._decimal}{fraction}" if point else whole
        return f"{self._minus}{text}" if negative else text

    def percent(self, number: str) -> str:
        """Return a number of hundredths, as `number` returns it, as a percentage."""
        return self._share(number)

    def duration(self, value: timedelta) -> str:
        """Return the two largest units of it, whole seconds at least."""
        minutes, seconds = divmod(round(abs(value).total_seconds()), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [(hours, "hour"), (minutes, "minute"), (seconds, "second")]
        first = next((at for at, (count, _) in enumerate(parts) if count), 2)
        text = " ".join(self._lasting(count, unit) for count, unit in parts[first : first + 2] if count)
        text = text or self._lasting(0, "second")
        return f"{self._minus}{text}" if value < timedelta(0) else text


ENGLISH: Final = Language(ENGLISH_RULES)


@lru_cache(LANGUAGES_KEPT)
def find(tag: str) -> Language | None:
    """Return the language of a tag like `de`, `pt-BR`, `en_US`, `zh-Hant-TW` or `de_DE.UTF-8`, or None.

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
    return Language(CldrRules(locale))
