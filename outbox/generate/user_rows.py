"""Reader of the user's queries on generate's session, as the sources use it (`source.Reader`)."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from outbox.database.connection import is_lost
from outbox.database.locks import is_lock_timeout
from outbox.database.refusal import original_of, shows_shared_session
from outbox.generate.prepared_query import Portion
from outbox.generate.query_errors import RowError, StaleStatementError, message_of
from outbox.generate.source import Rows
from outbox.generate.user_query import UserQueries, bind
from outbox.reports.query_parameters import Query, parse

if TYPE_CHECKING:
    from outbox.generate.session import GenerateSession

STALE_TRIES_MAX: Final = 3


class UserRows:
    """Reader that runs each query in a transaction of its own, with the search path `path`.

    The path is the role's own for queries of the user's, and None for queries of outbox that may take any time, such as
    the digest's: they have the trusted path.
    """

    def __init__(self, session: "GenerateSession", queries: UserQueries, path: str | None) -> None:
        self._session = session
        self._queries = queries
        self._path = path

    @property
    def trusted(self) -> "UserRows":
        """Return a reader for outbox's own queries, which no schema on the user's search path can change."""
        return UserRows(self._session, self._queries, None)

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """Return all rows of a query.

        Raises:
            QueryError: the query is wrong as such.
            RowError: it failed on these values.
            LockWaitError: it waited for a lock for too long.

        """
        query = parse(statement)
        return await self._run(query, bind(query, parameters))

    async def stream(self, statement: str, parameters: Mapping[str, Any], portion: int) -> AsyncIterator[Rows]:
        """Yield the rows of a query, at most `portion` at a time.

        A cursor WITH HOLD keeps the result in the server: no transaction is open while reports are computed, and
        memory holds a portion (PostgreSQL docs, DECLARE).
        """
        query = parse(statement)
        values = bind(query, parameters)
        declared = Query(f"DECLARE outbox_rows NO SCROLL CURSOR WITH HOLD FOR {query.text}", query.names)
        await self._run(declared, values, keep=False)
        fetch, start = Query(f"FETCH FORWARD {portion} FROM outbox_rows"), 0
        while rows := await self._run(fetch, [], keep=False, portion=Portion(query, values, start, portion)):
            yield rows
            if len(rows) < portion:
                break
            start += portion
        await self._run(Query("CLOSE outbox_rows"), [], keep=False)

    async def plain_timestamps(self, statement: str) -> Sequence[str]:
        """Return what `UserQueries.plain_timestamps` does."""
        async with self._session.user_query(self._path), self._session.user_transaction(self._path):
            return await self._queries.plain_timestamps(statement)

    async def _run(
        self, query: Query, values: Sequence[Any], *, keep: bool = True, portion: Portion | None = None
    ) -> Rows:
        """Run a query in a transaction of its own; once more if a migration changed what was prepared for it."""
        for _ in range(STALE_TRIES_MAX - 1):
            with suppress(StaleStatementError):
                return await self._run_once(query, values, portion, keep=keep)
        try:
            return await self._run_once(query, values, portion, keep=keep)
        except StaleStatementError as error:
            cause = original_of(error.__cause__ or error)
            if shows_shared_session(cause):
                raise cause from None
            raise RowError(message_of(cause)) from error

    async def _run_once(self, query: Query, values: Sequence[Any], portion: Portion | None, *, keep: bool) -> Rows:
        async with self._session.user_query(self._path):
            try:
                async with self._session.user_transaction(self._path):
                    return await self._queries.rows(query, values, keep=keep, portion=portion)
            except (SQLAlchemyError, asyncpg.PostgresError) as error:
                if is_lost(error) or is_lock_timeout(error):
                    raise
                raise RowError(message_of(error)) from error
