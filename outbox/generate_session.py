"""Generate's Postgres session: it holds the bucket locks, reads the user's queries and writes the batches.

An audit reads through the same session, inside one snapshot that nothing can be written in.

A pulse keeps it alive while reports are computed. A process that is stopped loses it after `lease_s`, and its buckets
with it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, Text, bindparam, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError, ProgrammingError, SQLAlchemyError

from outbox.database import LOST_SESSION, engine, is_lost, lease_settings
from outbox.errors import DatabaseUnavailableError
from outbox.failover import timeline_of, wait_s
from outbox.schema import require_current
from outbox.settings import Settings
from outbox.source import QueryError, RowError, Rows

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

FAILOVER_LOOK_S: Final = 0.2


class GenerateSession:
    """One connection that belongs to no pool. `lock` keeps the pulse out of other statements' way."""

    def __init__(self, connection: "AsyncConnection") -> None:
        self.connection = connection
        self.lock = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: Settings, *, application: str = "outbox generate"
    ) -> AsyncIterator["GenerateSession"]:
        """A new session, checked for its schema. It is closed whatever happens, which frees its locks.

        Raises:
            DatabaseUnavailableError: no connection, or the session was lost inside the block.
            SchemaError: no schema, or another version's.

        """
        assert settings.database_url is not None
        lease = lease_settings(settings.lease_s, statements_too=False)
        database = engine(settings.database_url, application=application, settings=lease)
        try:
            async with database.connect() as connection:
                raw = await connection.get_raw_connection()
                await require_current(raw.driver_connection)
                session = cls(connection)
                await _after_failover(raw.driver_connection, settings.failover_grace_s)
                pulse = asyncio.get_running_loop().create_task(session._beat(settings.lease_s / 3))
                try:
                    yield session
                finally:
                    pulse.cancel()
                    await asyncio.gather(pulse, return_exceptions=True)
        except (SQLAlchemyError, *LOST_SESSION) as error:
            if is_lost(error):
                raise DatabaseUnavailableError(
                    f"The session with Postgres at {settings.database_url.redacted} was lost ({said_by(error)}); "
                    "run the command again when it is back."
                ) from error
            raise

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self.fetch(text("SELECT 1"))

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[None]:
        """A block in which all reads see one state of the database, the user's queries too, and all writes are refused.

        PostgreSQL docs, 13.2.2 and SET TRANSACTION. Each read in it is a savepoint, so a query that fails ends nothing.
        """
        await self.connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        async with self.lock:
            transaction = await self.connection.begin()
        try:
            yield
        finally:
            async with self.lock:
                await transaction.rollback()  # there is nothing to commit

    def _transaction(self) -> "AsyncTransaction":
        return self.connection.begin_nested() if self.connection.in_transaction() else self.connection.begin()

    async def use_timezone(self, name: str) -> None:
        """From now on days begin and end in this civil time in the user's queries too."""
        await self.fetch(text("SELECT set_config('TimeZone', :zone, false)"), {"zone": name})

    async def fetch(self, statement: "Executable", parameters: Mapping[str, Any] | None = None) -> Sequence[Any]:
        """All rows of a statement of ours, in a transaction of its own."""
        async with self.lock, self._transaction():
            result = await self.connection.execute(statement, parameters)
            return result.all() if result.returns_rows else []

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """All rows of a user's query, in a transaction of its own (`source.Reader`).

        Raises:
            QueryError: the query is wrong as such.
            RowError: it failed on these values.

        """
        async with self.lock:
            try:
                query, values = _bound(statement, parameters)
                async with self._transaction():
                    result = await self.connection.execute(query, values)
                    return [dict(row) for row in result.mappings()] if result.returns_rows else []
            except SQLAlchemyError as error:
                if is_lost(error):
                    raise
                raise _fault(error) from error

    async def stream(self, statement: str, parameters: Mapping[str, Any], portion: int) -> AsyncIterator[Rows]:
        """The rows of a user's query, at most `portion` at a time (`source.Reader`).

        A cursor WITH HOLD keeps the result in the server: no transaction is open while reports are computed, and
        memory holds a portion (PostgreSQL docs, DECLARE).
        """
        query = statement.strip().rstrip(";")
        await self.rows(f"DECLARE outbox_rows NO SCROLL CURSOR WITH HOLD FOR {query}", parameters)
        while rows := await self.rows(f"FETCH FORWARD {portion} FROM outbox_rows", {}):
            yield rows
            if len(rows) < portion:
                break
        await self.rows("CLOSE outbox_rows", {})


async def _after_failover(connection: Any, grace_s: float) -> None:
    """Wait until the relays have said what they sent: a report that a failover lost must not be mailed again."""
    timeline = await timeline_of(connection)
    end = time.monotonic() + grace_s  # with no relay at all nobody's clock begins to run
    while await wait_s(connection, timeline, grace_s=grace_s) > 0 and time.monotonic() < end:
        await asyncio.sleep(FAILOVER_LOOK_S)


def _bound(statement: str, parameters: Mapping[str, Any]) -> "tuple[Executable, dict[str, Any]]":
    """The statement with those of our parameters that it names; keys are text, so a query casts them itself."""
    query = text(statement)
    names = query.compile().params.keys()
    unknown = sorted(names - parameters.keys())
    if unknown:
        known = ", ".join(f":{name}" for name in parameters)
        raise QueryError(f"it uses :{unknown[0]}, but there are only {known}; write \\: for a colon of its own")
    used = {name: value for name, value in parameters.items() if name in names}
    types: dict[str, Any] = {"key": Text(), "keys": ARRAY(Text()), "period": Text()}
    return query.bindparams(*(bindparam(name, type_=types[name]) for name in used if name in types)), used


def _fault(error: SQLAlchemyError) -> QueryError | RowError:
    said = said_by(error)
    match error:
        case ProgrammingError() | InvalidRequestError() | ArgumentError():
            hint = (
                "; compare with cast(:key as int) if the column is a number"
                if "operator does not exist" in said
                else ""
            )
            return QueryError(said + hint)
        case _:
            return RowError(said)


def said_by(error: BaseException) -> str:
    """What Postgres said, without the statement and its parameters: they hold people's data."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return str(error.orig.__cause__ or error.orig).replace("\n", " ")
    return str(error).replace("\n", " ").split(" [SQL:", 1)[0]
