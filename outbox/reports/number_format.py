"""Numbers as people read them: grouped digits, as many decimals as say enough, percentages."""

from decimal import Decimal, InvalidOperation
from numbers import Integral, Real
from typing import Final

from outbox.errors import TemplateUseError
from outbox.reports.language import ENGLISH, Language
from outbox.reports.language_rules import DASH, GROUPED_MIN

_PLAIN_MAX: Final = Decimal(10) ** 21  # a larger number is written with its power of ten
_PLACES_MAX: Final = 30
_EXPONENT_MAX: Final = 200_000  # more than PostgreSQL's numeric has; arithmetic with larger numbers could overflow
_QUOTED_MAX: Final = 60


def number_of(value: float | Decimal, places: int | None = None, language: Language = ENGLISH) -> str:
    """Return a number with so many decimals, or as many as say enough; NaN and the infinities are a dash.

    From `_PLAIN_MAX` on it is written as 1.5E+30.
    """
    number = decimal_of(value)
    grouped = number is not None and abs(number) >= GROUPED_MIN
    return write_number(number, places_of(value) if places is None else places, language, grouped=grouped)


def percent_of(value: float | Decimal, places: int = 0, language: Language = ENGLISH) -> str:
    """Return a share of one (0.42) as a percentage; NaN and the infinities are a dash."""
    number = decimal_of(value)
    if number is None:
        return DASH
    return language.percent(number_of(number.scaleb(2), places, language))


def asked_number(value: object, name: str, places: object) -> float | Decimal | None:
    """Return the number that a template gave the filter `name`; None for NULL and for an empty text.

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


def decimal_of(value: float | Decimal) -> Decimal | None:
    """Return the number as a person reads it (0.1 is 0.1); None for NaN, infinities and immense numbers."""
    match value:
        case Decimal():
            number = value
        case int():
            number = Decimal(value)  # its repr may not have more than 4,300 digits
        case _:
            number = Decimal(float.__repr__(value))  # that of a subclass, as numpy's, may be no number
    return number if number.is_finite() and number.adjusted() <= _EXPONENT_MAX else None


def places_of(value: float | Decimal) -> int:
    """Return how many decimals say enough: at most two, or two figures for what is smaller than one."""
    number = decimal_of(value)
    if not number:
        return 0
    places = 2 if abs(number) >= 1 else min(6, 1 - number.adjusted())
    return len(f"{number:.{places}f}".rstrip("0").partition(".")[2])


def write_number(number: Decimal | None, places: int, language: Language, *, grouped: bool) -> str:
    """Return a number with so many decimals, grouped in thousands or not; None is a dash."""
    if number is None:
        return DASH
    if abs(number) >= _PLAIN_MAX:
        text, _, power = f"{abs(number):.2E}".partition("E")
        shown = language.number(text.rstrip("0").rstrip("."), grouped=False, negative=number < 0)
        return f"{shown}E{power}"
    text = f"{abs(number):.{places}f}"
    return language.number(text, grouped=grouped, negative=number < 0 and bool(text.strip("0.")))
