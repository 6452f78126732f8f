"""The user's queries on the driver's connection: prepared once, run, and their errors told apart.

An error of the query fails for every recipient and is raised as `QueryError`; one of the values of a single call is a
`RowError`. A value that the driver cannot decode, such as a date after the year 9999, belongs to its row: the query is
run again with all columns as text, and the error names column and value.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from outbox.database.connection import Connection, is_lost
from outbox.database.locks import is_lock_timeout
from outbox.generate.source import QueryError, RowError, Rows, UnreadableError
from outbox.reports.query_parameters import Query, apart, objection, parse

PREPARED_MAX: Final = 16
VALUE_MAX: Final = 80  # characters of a value in a message

# A statement that was prepared before a migration, or that a query of the user's deallocated (DISCARD ALL).
STALE: Final = (
    asyncpg.InvalidCachedStatementError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.exceptions.OutdatedSchemaCacheError,
)

# Classes of SQLSTATE (PostgreSQL docs, appendix A): of an error that another transaction caused, of errors that a
# statement can have because it was prepared before a migration, and of those that do not depend on the query when it is
# prepared.
PASSING: Final = ("40",)
MAY_BE_STALE: Final = ("0A", "26", "42", "XX")
NOT_OF_THE_QUERY: Final = ("25", "40", "53", "55", "57", "58", "XX")

TYPE_NAME: Final = "SELECT pg_catalog.format_type($1::pg_catalog.oid, NULL)"
# Reads values again from their text, to find the one that cannot be decoded.
AGAIN: Final = "SELECT v::{type} FROM pg_catalog.unnest($1::pg_catalog.text[]) AS n (v)"


class StaleStatementError(Exception):
    """A statement that was prepared earlier is no longer valid, or met a deadlock; a new transaction may do better."""


@dataclass(slots=True)
class UserQueries:
    """Prepared queries of one session."""

    driver: Connection
    prepared: dict[str, "Prepared"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Register what the driver decodes wrongly."""
        install_intervals(self.driver)

    async def rows(
        self, query: Query, values: Sequence[Any], *, keep: bool = True, portion: "Portion | None" = None
    ) -> Rows:
        """Return all rows. Without `keep` the statement is prepared for this call only.

        `portion` says which rows of which query a FETCH returns, so that they can be read again.

        Raises:
            StaleStatementError: run it again in a new transaction.
            QueryError: the query is wrong as such.
            RowError: it failed on these values, or one of its rows cannot be decoded.

        """
        prepared = self.prepared.get(query.text)
        is_new = prepared is None
        if prepared is None:
            prepared = Prepared.of(await self._prepare(query))
            if keep:
                if len(self.prepared) >= PREPARED_MAX:
                    self.prepared.clear()
                self.prepared[query.text] = prepared
        try:
            records = await prepared.statement.fetch(*values)
        except Exception as error:
            if self._ends_session(error):
                raise
            self.prepared.pop(query.text, None)
            if isinstance(error, STALE) or _is_in(error, PASSING) or (not is_new and _is_in(error, MAY_BE_STALE)):
                raise StaleStatementError from error
            raise await self._explained(portion or Portion(query, values), prepared, error) from error
        return [dict(zip(prepared.columns, record, strict=True)) for record in records]

    async def texts(self, portion: "Portion") -> "Texts":
        """Return the rows with every value as Postgres writes it."""
        query, values = portion.query, portion.values
        if portion.count:
            declared = Query(f"DECLARE outbox_again NO SCROLL CURSOR FOR {query.text}", query.names)
            await (await self._prepare(declared)).fetch(*values)
            await self.driver.execute(f"MOVE FORWARD {portion.start} IN outbox_again")
            query, values = Query(f"FETCH FORWARD {portion.count} FROM outbox_again"), []
        with plain_text(self.driver, await self._prepare(query)):
            statement = await self.driver.prepare(query.text)
            columns = [Column(one.name, one.type.oid) for one in statement.get_attributes()]
            records = await statement.fetch(*values)
        return Texts(columns, [tuple(record) for record in records])

    async def plain_timestamps(self, sql: str) -> Sequence[str]:
        """Return the bounds that a query compares with a timestamp without time zone, also where it casts them.

        Postgres reads such a column in the session's time zone then, which is right for columns written in it only.
        """
        query = apart(sql)
        try:
            statement = await self.driver.prepare(query.text)
        except asyncpg.PostgresError as error:  # as GROUP BY of an expression that was one before
            if self._ends_session(error):
                raise
            return []
        types = [parameter.name for parameter in statement.get_parameters()]
        found = [name for name, kind in zip(query.names, types, strict=True) if kind == "timestamp"]
        return list(dict.fromkeys(found))

    async def _prepare(self, query: Query) -> "PreparedStatement[Any]":
        try:
            return await self.driver.prepare(query.text)
        except asyncpg.PostgresError as error:
            if self._ends_session(error) or (error.sqlstate or "XX").startswith(NOT_OF_THE_QUERY):
                raise
            raise QueryError(_said(query, error)) from error
        except Exception as error:
            if self._ends_session(error):
                raise
            raise QueryError(
                f"the driver does not know a type of its columns ({said(error)}); cast it to text"
            ) from error

    def _ends_session(self, error: Exception) -> bool:
        """Return True for an error that is not about the statement: the session is over, or it waited for a lock."""
        if self.driver.is_closed() or is_lock_timeout(error):
            return True
        if isinstance(error, asyncpg.PostgresError):
            return is_lost(error)
        if isinstance(error, asyncpg.exceptions.UnsupportedClientFeatureError):
            return False
        # "cannot switch to state …": a statement met the server's farewell.
        farewell = isinstance(error, asyncpg.InternalClientError) and "another operation" in str(error)
        return farewell or isinstance(error, (asyncpg.InterfaceError, OSError, TimeoutError))

    async def _explained(self, portion: "Portion", prepared: "Prepared", error: Exception) -> QueryError | RowError:
        query = portion.query
        parameter = _parameter_of(query, prepared, error)
        if parameter is not None:
            return QueryError(parameter)
        if isinstance(error, asyncpg.PostgresError):
            kind = QueryError if (error.sqlstate or "").startswith("42") else RowError
            return kind(_said(query, error))
        return UnreadableError(await self._unreadable(portion, error))

    async def _unreadable(self, portion: "Portion", error: Exception) -> str:
        """Return which column of which row has a value that the driver cannot decode.

        The query may not give the same rows again, or be refused now: then the value stays without its name.
        """
        try:
            return await self.describe(await self.texts(portion), error)
        except Exception as second:
            if self._ends_session(second):
                raise
            return unnamed(error)

    async def describe(self, found: "Texts", error: Exception) -> str:
        """Return the sentence about the first value of these rows that the driver cannot decode."""
        cells: dict[int, list[Cell]] = {}
        bad: list[tuple[Cell, str]] = []
        for row, values in enumerate(found.rows):
            for at, value in enumerate(values):
                if value is not None:
                    cells.setdefault(found.columns[at].type_oid, []).append(Cell(row, at, value))
        unsure: list[Cell] = []
        for oid, of_type in cells.items():
            name = str(await self.driver.fetchval(TYPE_NAME, oid))
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
            async with self.driver.transaction():
                statement = await self.driver.prepare(AGAIN.format(type=type_name))
                await statement.fetch([cell.text for cell in cells])
        except asyncpg.PostgresError as error:
            if self._ends_session(error):
                raise
            raise UnknownInputError from error
        except Exception as error:
            if self._ends_session(error):
                raise
            return True
        return False


class UnknownInputError(Exception):
    """Postgres cannot read values of a type from their text, such as those of an anonymous record."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared statement with the names of its columns and of its parameters' types.

    They are looked up at once: later the driver may know some of the types no more (`plain_text`).
    """

    statement: "PreparedStatement[Any]"
    columns: Sequence[str]
    parameters: Sequence[str]

    @classmethod
    def of(cls, statement: "PreparedStatement[Any]") -> "Prepared":
        """Return the statement with these names."""
        columns = [column.name for column in statement.get_attributes()]
        return cls(statement, columns, [parameter.name for parameter in statement.get_parameters()])


@dataclass(frozen=True, slots=True)
class Portion:
    """Rows of a query: all of them, or `count` rows after the first `start`."""

    query: Query
    values: Sequence[Any]
    start: int = 0
    count: int = 0


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


def bind(query: Query, parameters: Mapping[str, Any]) -> list[Any]:
    """Return the values of a query's parameters, in its order.

    Raises:
        QueryError: it uses a parameter that does not exist, or not here.

    """
    wrong = objection(query, parameters)
    if wrong is not None:
        raise QueryError(wrong)
    return query.values(parameters)


def query_of(statement: str) -> Query:
    """Return the parsed query; see `parameters.parse`."""
    return parse(statement)


def said(error: BaseException) -> str:
    """Return an error as words on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def unnamed(error: Exception, what: str = "a row has a value") -> str:
    """Return the sentence about a value that could not be found again."""
    return (
        f"{what} that Python cannot represent ({type(error).__name__}: {said(error)}); "
        "correct the value, or let the query return it as text"
    )


def _is_in(error: Exception, classes: tuple[str, ...]) -> bool:
    """Return True for an error of Postgres in one of these classes of SQLSTATE."""
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(classes)


_POSITION: Final = re.compile(r"\$(\d+)")
_ARGUMENT: Final = re.compile(r"invalid input for query argument \$(\d+)")
_OPERATOR: Final = re.compile(r"operator does not exist: (.+?) (\S+) (.+?)$")


def _said(query: Query, error: asyncpg.PostgresError) -> str:
    """Return what Postgres said, with the fix where it is known."""
    words = _named(query, said(error))
    fix = _fix_of(str(error).partition("\n")[0], query)
    return f"{words}; {fix}" if fix else words


def _named(query: Query, words: str) -> str:
    """Return the words with `:name` in place of `$1`."""

    def name(found: re.Match[str]) -> str:
        number = int(found[1])
        return f":{query.names[number - 1]}" if 0 < number <= len(query.names) else found[0]

    return _POSITION.sub(name, words)


def _fix_of(message: str, query: Query) -> str:
    found = _OPERATOR.match(message)
    if found is None:
        return ""
    left, _, right = found.groups()
    if "text[]" in (left, right) and "keys" in query.names:
        element = _type_word(left if right == "text[]" else right)
        array = ":keys" if element in ("text", "character varying") else f"cast(:keys as {element}[])"
        return f":keys is an array: write = any({array}) in place of in (:keys)"
    if "text" in (left, right):
        other = _type_word(left if right == "text" else right)
        if "keys" in query.names:
            return f"keys are text: compare with any(cast(:keys as {other}[]))"
        if "key" in query.names:
            return f"the key is text: compare with cast(:key as {other})"
    return ""


def _type_word(type_name: str) -> str:
    return "int" if type_name == "integer" else type_name


def _parameter_of(query: Query, prepared: Prepared, error: Exception) -> str | None:
    """Return why a parameter does not fit the type that the query asks of it; None for another error.

    It is the same for every recipient: the keys and the period are always text, so this is one of the bounds.
    """
    found = _ARGUMENT.match(str(error))
    if found is None:
        return None
    number = int(found[1])
    name, wanted = query.names[number - 1], prepared.parameters[number - 1]
    if wanted == "timestamp":
        return (
            f"it compares :{name} with a timestamp without time zone; say in which time zone the column is written: "
            f"(col at time zone 'UTC') >= :{name}, or, which can use an index on col, "
            f"col >= :{name}::timestamptz at time zone 'UTC'"
        )
    return f"it uses :{name} as {wanted}, but it is a timestamp with time zone; cast it: :{name}::timestamptz"
