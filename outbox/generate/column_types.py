"""Decoding of column types on one connection, where asyncpg's own does not fit the user's queries."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from outbox.database.connection import Connection

if TYPE_CHECKING:
    from asyncpg.prepared_stmt import PreparedStatement


@contextmanager
def plain_text(driver: Connection, statement: "PreparedStatement[Any]") -> Iterator[None]:
    """Decode the types of a statement's columns as text within the block, for statements that are prepared in it."""
    types = {(one.type.oid, one.type.name, one.type.schema) for one in statement.get_attributes()}
    try:
        for oid, name, schema in types:
            driver.set_codec(oid, name, str, str, format="text", schema=schema)
        yield
    finally:
        for oid, name, schema in types:
            driver.remove_codec(oid, name, schema)
        driver.install_timestamps()
        install_intervals(driver)
        install_json(driver)


_INTERVAL: Final = 1186  # its fixed OID (pg_type.dat)
_INFINITE_MONTHS: Final = (2**31 - 1, -(2**31))


def install_intervals(driver: Connection) -> None:
    """Decode intervals as asyncpg does, without its overflow: 178000000 years are 560,000 years there."""
    driver.set_codec(_INTERVAL, "interval", _encode_interval, _decode_interval, format="tuple")


_JSON: Final = 114  # fixed OIDs (pg_type.dat)
_JSONB: Final = 3802
_JSONB_VERSION: Final = b"\x01"


def install_json(driver: Connection) -> None:
    """Encode and decode JSON as SQLAlchemy sets it up for each connection (its `setup_asyncpg_jsonb_codec`)."""
    driver.set_codec(_JSON, "json", str.encode, json.loads, format="binary")
    driver.set_codec(
        _JSONB,
        "jsonb",
        lambda value: _JSONB_VERSION + value.encode(),
        lambda value: json.loads(value[len(_JSONB_VERSION) :]),
        format="binary",
    )


def _encode_interval(value: timedelta) -> tuple[int, int, int]:
    return 0, value.days, value.seconds * 1_000_000 + value.microseconds


def _decode_interval(value: tuple[int, int, int]) -> timedelta:
    months, days, microseconds = value
    if months in _INFINITE_MONTHS and days in _INFINITE_MONTHS:
        raise OverflowError("an infinite interval")
    years, months = (months // 12, months % 12) if months >= 0 else (-(-months // 12), -(-months % 12))
    return timedelta(days=days + 30 * months + 365 * years, microseconds=microseconds)
