"""Conversion of values that Python and Postgres represent differently: text, and timestamps out of Python's range.

PostgreSQL's timestamps reach from 4713 BC to 294276, Python's from year 1 to 9999. `infinity` and `-infinity` are
decoded to the bounds of `outbox.reports.period` and encoded from them, other times out of range to one microsecond
inside. All of them survive a conversion to any time zone, since offsets are below 24 hours.
"""

from datetime import UTC, date, datetime, timedelta
from typing import Final

from outbox.reports.period import INFINITY, MINUS_INFINITY

TIMESTAMPTZ_OID: Final = 1184  # fixed (pg_type.dat)

_MICROSECOND: Final = timedelta(microseconds=1)
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL counts microseconds from here, as a signed 64-bit integer
_LATEST: Final = INFINITY - _MICROSECOND
_EARLIEST: Final = MINUS_INFINITY + _MICROSECOND
_LATEST_US: Final = (_LATEST - _EPOCH) // _MICROSECOND
_EARLIEST_US: Final = (_EARLIEST - _EPOCH) // _MICROSECOND
_INFINITY_US: Final = 2**63 - 1
_MINUS_INFINITY_US: Final = -(2**63)


def storable(text: str) -> str:
    """Return the text without what Postgres cannot hold: NUL, and surrogates that stand alone."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def decode_timestamp(microseconds: int, *, clamps: bool = True) -> datetime:
    """Return a timestamp; one that Python cannot represent becomes the nearest that it can.

    Without `clamps` the result is asyncpg's own: naive datetimes for the infinities, and OverflowError for a time out
    of range (asyncpg raises it for the whole result).
    """
    if _EARLIEST_US <= microseconds <= _LATEST_US:
        return _EPOCH + timedelta(microseconds=microseconds)
    if not clamps:
        return _decode_as_asyncpg(microseconds)
    if microseconds > 0:
        return INFINITY if microseconds == _INFINITY_US else _LATEST
    return MINUS_INFINITY if microseconds == _MINUS_INFINITY_US else _EARLIEST


def _decode_as_asyncpg(microseconds: int) -> datetime:
    if microseconds == _INFINITY_US:
        return datetime.max  # noqa: DTZ901
    if microseconds == _MINUS_INFINITY_US:
        return datetime.min  # noqa: DTZ901
    return _EPOCH + timedelta(microseconds=microseconds)


def encode_timestamp(at: object) -> tuple[int]:
    """Return a datetime or date as PostgreSQL counts it. As in asyncpg, naive times and dates are local.

    Raises:
        TypeError: it is neither; asyncpg turns this into a DataError that names the parameter.

    """
    if not isinstance(at, datetime):
        if not isinstance(at, date):
            raise TypeError(f"expected a datetime.date or datetime.datetime instance, got {type(at).__name__!r}")
        at = datetime(at.year, at.month, at.day).astimezone()
    if at in (INFINITY, datetime.max):  # noqa: DTZ901 - asyncpg's own value of infinity
        return (_INFINITY_US,)
    if at in (MINUS_INFINITY, datetime.min):  # noqa: DTZ901
        return (_MINUS_INFINITY_US,)
    return ((at.astimezone(UTC) - _EPOCH) // _MICROSECOND,)
