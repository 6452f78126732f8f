"""Prepared queries of the user's, and which rows of them one call returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from outbox.database.connection import Connection
from outbox.generate.query_errors import QueryError, describe, describe_refusal, ends_session
from outbox.reports.query_parameters import Query

# Classes of SQLSTATE (PostgreSQL docs, appendix A) that do not depend on the query when it is prepared.
NOT_OF_THE_QUERY: Final = ("25", "40", "53", "55", "57", "58", "XX")


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


async def prepare(driver: Connection, query: Query) -> "PreparedStatement[Any]":
    """Return the query, prepared for this session.

    Raises:
        QueryError: the query is wrong as such.

    """
    try:
        return await driver.prepare(query.text)
    except asyncpg.PostgresError as error:
        if ends_session(driver, error) or (error.sqlstate or "XX").startswith(NOT_OF_THE_QUERY):
            raise
        raise QueryError(describe_refusal(query, error)) from error
    except Exception as error:
        if ends_session(driver, error):
            raise
        raise QueryError(
            f"the driver does not know a type of its columns ({describe(error)}); cast it to text"
        ) from error
