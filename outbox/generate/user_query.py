"""The user's queries on the driver's connection: prepared once, run, and their errors told apart.

An error of the query fails for every recipient and is raised as `QueryError`; one of the values of a single call is a
`RowError`. A value that the driver cannot decode, such as a date after the year 9999, belongs to its row: the query is
run again with all columns as text, and the error names column and value (`unreadable`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import asyncpg

from outbox.database.connection import Connection
from outbox.generate.column_types import install_intervals
from outbox.generate.prepared_query import Portion, Prepared, prepare
from outbox.generate.query_errors import (
    QueryError,
    RowError,
    StaleStatementError,
    UnreadableError,
    describe_parameter,
    describe_refusal,
    ends_session,
    is_in,
)
from outbox.generate.source import Rows
from outbox.generate.unreadable import UnreadableValues
from outbox.reports.query_parameters import Query, apart, objection

PREPARED_MAX: Final = 16

# A statement that was prepared before a migration, or that a query of the user's deallocated (DISCARD ALL).
STALE: Final = (
    asyncpg.InvalidCachedStatementError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.exceptions.OutdatedSchemaCacheError,
)

# Classes of SQLSTATE (PostgreSQL docs, appendix A): of an error that another transaction caused, and of errors that a
# statement can have because it was prepared before a migration.
PASSING: Final = ("40",)
MAY_BE_STALE: Final = ("0A", "26", "42", "XX")


class UserQueries:
    """Prepared queries of one session."""

    def __init__(self, driver: Connection) -> None:
        self._driver = driver
        self._prepared: dict[str, Prepared] = {}
        install_intervals(driver)

    async def rows(
        self, query: Query, values: Sequence[Any], *, keep: bool = True, portion: Portion | None = None
    ) -> Rows:
        """Return all rows. Without `keep` the statement is prepared for this call only.

        `portion` says which rows of which query a FETCH returns, so that they can be read again.

        Raises:
            StaleStatementError: run it again in a new transaction.
            QueryError: the query is wrong as such.
            RowError: it failed on these values, or one of its rows cannot be decoded.

        """
        prepared = self._prepared.get(query.text)
        is_new = prepared is None
        if prepared is None:
            prepared = Prepared.of(await prepare(self._driver, query))
            if keep:
                if len(self._prepared) >= PREPARED_MAX:
                    self._prepared.clear()
                self._prepared[query.text] = prepared
        try:
            records = await prepared.statement.fetch(*values)
        except Exception as error:
            if ends_session(self._driver, error):
                raise
            self._prepared.pop(query.text, None)
            if isinstance(error, STALE) or is_in(error, PASSING) or (not is_new and is_in(error, MAY_BE_STALE)):
                raise StaleStatementError from error
            raise await self._explained(portion or Portion(query, values), prepared, error) from error
        return [dict(zip(prepared.columns, record, strict=True)) for record in records]

    async def plain_timestamps(self, sql: str) -> Sequence[str]:
        """Return the bounds that a query compares with a timestamp without time zone, also where it casts them.

        Postgres reads such a column in the session's time zone then, which is right for columns written in it only.
        """
        query = apart(sql)
        try:
            statement = await self._driver.prepare(query.text)
        except asyncpg.PostgresError as error:  # as GROUP BY of an expression that was one before
            if ends_session(self._driver, error):
                raise
            return []
        types = [parameter.name for parameter in statement.get_parameters()]
        found = [name for name, kind in zip(query.names, types, strict=True) if kind == "timestamp"]
        return list(dict.fromkeys(found))

    async def _explained(self, portion: Portion, prepared: Prepared, error: Exception) -> QueryError | RowError:
        query = portion.query
        parameter = describe_parameter(query, prepared.parameters, error)
        if parameter is not None:
            return QueryError(parameter)
        if isinstance(error, asyncpg.PostgresError):
            kind = QueryError if (error.sqlstate or "").startswith("42") else RowError
            return kind(describe_refusal(query, error))
        return UnreadableError(await UnreadableValues(self._driver).explain(portion, error))


def bind(query: Query, parameters: Mapping[str, Any]) -> list[Any]:
    """Return the values of a query's parameters, in its order.

    Raises:
        QueryError: it uses a parameter that does not exist, or not here.

    """
    wrong = objection(query, parameters)
    if wrong is not None:
        raise QueryError(wrong)
    return query.values(parameters)
