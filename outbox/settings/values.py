"""Types of single values: numbers, durations, rates, addresses, URLs, choices. Each table of settings is a `Table`."""

import re
from enum import StrEnum
from typing import Any, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from outbox.mail.mailbox import check_address
from outbox.settings.urls import DatabaseUrl, SmtpAddress

MESSAGE_BYTES_MAX: Final = 20 * 1024 * 1024
"""Largest message unless the settings say otherwise (`message_bytes_max`); `schema.sql` has the same default."""

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
REFERENCE: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`module:name`."""

_RATE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*/\s*(s|min|h)")
_RATE_MIN, _RATE_MAX = 1e-5, 1e6  # per second: one a day, and more than any server takes
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d|w)")
_UNITS_S: Final = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION_MAX_S: Final = 36_500 * 86_400  # within what Postgres can add to now

_Address = TypeVar("_Address", DatabaseUrl, SmtpAddress)


class Table(BaseModel):
    """Base of all tables of the settings: frozen, without unknown keys, and its errors do not show the input."""

    # Defaults are validated too: rules that look at two keys must hold for a key that is left out.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)


class WhenInDoubt(StrEnum):
    """Policy for an email that is in doubt: its server may or may not have accepted it."""

    HOLD = "hold"
    RESEND = "resend"
    ASK = "ask"


class LogFormat(StrEnum):
    """Format of a relay's log: sentences for people, or JSON for programs."""

    AUTO = "auto"  # human on a terminal, JSON elsewhere
    HUMAN = "human"
    JSON = "json"


class LogLevel(StrEnum):
    """Lowest level of the events that a relay logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def seconds(least: float, most: float) -> Any:
    """Return the constraints of a finite number of seconds."""
    return Field(ge=least, le=most, strict=True, allow_inf_nan=False)


def count(most: int) -> Any:
    """Return the constraints of a whole number from 1 on."""
    return Field(ge=1, le=most, strict=True)


def parsed(kind: type[_Address]) -> BeforeValidator:
    """Return the validator that reads a URL which is given as text."""
    return BeforeValidator(lambda value: kind.parse(value) if isinstance(value, str) else value)


def duration_s(text: str) -> float:
    """Return `48h`, `400d`, `2w`, `90min` or `30s` in seconds; 0 if the text is not a duration."""
    found = _DURATION.fullmatch(text.strip())
    return float(found[1]) * _UNITS_S[found[2]] if found else 0.0


def is_duration(text: str) -> bool:
    """Return True for a duration above zero that Postgres can add to a time."""
    return 0 < duration_s(text) <= _DURATION_MAX_S


def per_second(rate: str) -> float:
    """Return `14/s`, `600/min` or `5000/h` per second; 0 if the text is not a rate."""
    found = _RATE.fullmatch(rate.strip())
    return float(found[1]) / _UNITS_S[found[2]] if found else 0.0


def is_rate(text: str) -> bool:
    """Return True for a rate between one email a day and more than any server takes."""
    return _RATE_MIN <= per_second(text) <= _RATE_MAX


def address_of(text: str) -> str | None:
    """Return the address in the form that SMTP takes; None if it is not one, or its domain is not written in ASCII."""
    if not text.rpartition("@")[2].isascii():
        return None
    try:
        return check_address(text)
    except ValueError:
        return None


def is_ascii_address(text: str) -> bool:
    """Return True for an address in ASCII, which every server takes."""
    return text.isascii() and address_of(text) is not None


def shown(value: object) -> str:
    """Return the user's value for an error message, unless it may be a URL with a password, set for the wrong key."""
    if isinstance(value, str):
        return "this" if re.search("[:@]", value) or CONTROL.search(value) else f'"{value}"'
    return str(value)
