"""Search for the value that the driver cannot decode, such as a date after the year 9999.

The rows are read again with every value as text, and each type's values are decoded by halves until one is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.generate.column_types import plain_text
from outbox.generate.prepared_query import Portion, prepare
from outbox.generate.query_errors import describe, ends_session
from outbox.reports.query_parameters import Query

VALUE_MAX: Final = 80  # characters of a value in a message

TYPE_NAME: Final = "SELECT pg_catalog.format_type($1::pg_catalog.oid, NULL)"
# Reads values again from their text, to find the one that cannot be decoded.
AGAIN: Final = "SELECT v::{type} FROM pg_catalog.unnest($1::pg_catalog.text[]) AS n (v)"


class UnknownInputError(Exception):
    """Postgres cannot read values of a type from their text, such as those of an anonymous record."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a query."""

    name: str
    type_oid: int


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A value as text, with the numbers of its row and column."""

    row: int
    column: int
    text: str


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows with every value as text."""

    columns: Sequence[Column]
    rows: Sequence[tuple[str | None, ...]]

    def sentence(self, cell: Cell, type_name: str) -> str:
        """Return which value cannot be decoded, with the key of its row if there is one."""
        column = self.columns[cell.column].name
        keys = [value for one, value in zip(self.columns, self.rows[cell.row], strict=True) if one.name == "key"]
        whose = f" in the row of key {keys[0]}" if keys and column != "key" else ""
        return (
            f"column {column} has the value {_short(cell.text)}{whose}, which Python cannot represent as {type_name}; "
            "correct the value, or let the query return it as text"
        )

    def named(self, cells: Sequence[Cell]) -> str:
        """Return the subject of a sentence about one of these values."""
        names = sorted({self.columns[cell.column].name for cell in cells})
        if not names:
            return "a row has a value"
        value = f"the value {_short(cells[0].text)}" if len(cells) == 1 else "a value"
        return f"column {' or '.join(names)} has {value}"


def _short(value: str) -> str:
    return value if len(value) <= VALUE_MAX else f"{value[:VALUE_MAX]}…"


class UnreadableValues:
    """Search on one connection, in the transaction of the query that failed."""

    def __init__(self, driver: Connection) -> None:
        self._driver = driver

    async def explain(self, portion: Portion, error: Exception) -> str:
        """Return which column of which row has a value that the driver cannot decode.

        The query may not give the same rows again, or be refused now: then the value stays without its name.
        """
        try:
            return await self._describe(await self._texts(portion), error)
        except Exception as second:
            if ends_session(self._driver, second):
                raise
            return unnamed(error)

    async def _texts(self, portion: Portion) -> Texts:
        """Return the rows with every value as Postgres writes it."""
        query, values = portion.query, portion.values
        if portion.count:
            declared = Query(f"DECLARE outbox_again NO SCROLL CURSOR FOR {query.text}", query.names)
            await (await prepare(self._driver, declared)).fetch(*values)
            await self._driver.execute(f"MOVE FORWARD {portion.start} IN outbox_again")
            query, values = Query(f"FETCH FORWARD {portion.count} FROM outbox_again"), []
        with plain_text(self._driver, await prepare(self._driver, query)):
            statement = await self._driver.prepare(query.text)
            columns = [Column(one.name, one.type.oid) for one in statement.get_attributes()]
            records = await statement.fetch(*values)
        return Texts(columns, [tuple(record) for record in records])

    async def _describe(self, found: "Texts", error: Exception) -> str:
        """Return the sentence about the first value of these rows that the driver cannot decode."""
        cells: dict[int, list[Cell]] = {}
        bad: list[tuple[Cell, str]] = []
        for row, values in enumerate(found.rows):
            for at, value in enumerate(values):
                if value is not None:
                    cells.setdefault(found.columns[at].type_oid, []).append(Cell(row, at, value))
        unsure: list[Cell] = []
        for oid, of_type in cells.items():
            name = str(await self._driver.fetchval(TYPE_NAME, oid))
            try:
                cell = await self._first_bad(name, of_type)
            except UnknownInputError:
                unsure += of_type
            else:
                bad += [] if cell is None else [(cell, name)]
        if bad:
            return found.sentence(*min(bad))
        return unnamed(error, found.named(unsure))

    async def _first_bad(self, type_name: str, cells: Sequence["Cell"]) -> "Cell | None":
        """Return the first of these values of a type that the driver cannot decode."""
        if not await self._fails(type_name, cells):
            return None
        while len(cells) > 1:
            half = cells[: len(cells) // 2]
            cells = half if await self._fails(type_name, half) else cells[len(half) :]
        return cells[0]

    async def _fails(self, type_name: str, cells: Sequence["Cell"]) -> bool:
        """Return True if the driver cannot decode one of these values of a type."""
        try:
            async with self._driver.transaction():
                statement = await self._driver.prepare(AGAIN.format(type=type_name))
                await statement.fetch([cell.text for cell in cells])
        except asyncpg.PostgresError as error:
            if ends_session(self._driver, error):
                raise
            raise UnknownInputError from error
        except Exception as error:
            if ends_session(self._driver, error):
                raise
            return True
        return False


def unnamed(error: Exception, what: str = "a row has a value") -> str:
    """Return the sentence about a value that could not be found again."""
    return (
        f"{what} that Python cannot represent ({type(error).__name__}: {describe(error)}); "
        "correct the value, or let the query return it as text"
    )
