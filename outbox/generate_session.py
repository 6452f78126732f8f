"""Generate's Postgres session: it holds the bucket locks, reads the user's queries and writes the batches.

An audit reads through the same session, inside one snapshot that nothing can be written in.

A pulse keeps it alive while reports are computed. A process that is stopped loses it after `lease_s`, and its buckets
with it. A network that goes silent ends it on this side, too: no statement is waited for without limit, and no run
hangs for ever.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from sqlalchemy import ARRAY, Text, bindparam, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError, ProgrammingError, SQLAlchemyError

from outbox.address import DatabaseUrl
from outbox.database import (
    BY_INDEX,
    CONNECT_TIMEOUT_S,
    LOST_SESSION,
    TRUSTED_PATH,
    connect,
    engine_on,
    is_ended,
    is_lost,
    lease_settings,
    plain_timestamps,
    user_search_path,
)
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.schema import require_current
from outbox.settings import Settings
from outbox.source import QueryError, RowError, Rows

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

SILENT_LEASES_MAX: Final = 3  # others may hold a row or a key that a statement of ours waits for, for a lease at most
LOOKS_MAX: Final = 2

# A backend that waits for its client between two messages of one query counts as active.
AT_WORK: Final = """
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE pid = $1 AND (state = 'active' AND wait_event IS DISTINCT FROM 'ClientRead'
                                    OR state = 'disabled'))
"""


# LZ4 where the server has it: pages and mails are compressed as they are stored, and with pglz that is half of what a
# report costs Postgres (PostgreSQL docs, 20.11.1, default_toast_compression).
SET_UP: Final = """
SELECT pg_backend_pid()
  FROM (SELECT set_config(name, 'lz4', false) FROM pg_settings
         WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)) AS compression
 RIGHT JOIN (SELECT) AS session ON true
"""


class GenerateSession:
    """One connection that belongs to no pool. `lock` keeps the pulse out of other statements' way."""

    connection: "AsyncConnection"

    def __init__(self, driver: Any, url: DatabaseUrl, lease_s: float) -> None:
        self.lock = asyncio.Lock()
        self.lost: str | None = None
        self._driver = driver
        self._url = url
        self._lease_s = lease_s
        self._backend = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: Settings,
        *,
        application: str = "outbox generate",
        fits: bool = True,
        bounds: Mapping[str, str] | None = None,
    ) -> AsyncIterator["GenerateSession"]:
        """A new session, checked for its schema. It is closed whatever happens, which frees its locks.

        Without `fits` any database will do, for one that only looks; `bounds` are further settings of the session.

        Raises:
            DatabaseUnavailableError: no connection, or the session was lost inside the block.
            SchemaError: no schema, or another version's.

        """
        assert settings.database_url is not None
        url, lease_s = settings.database_url, settings.lease_s
        lease = {**lease_settings(lease_s, statements_too=False), **(bounds or {})}
        timeout_s = min(lease_s, CONNECT_TIMEOUT_S)
        opened: list[Any] = []
        database = engine_on(url, opened.pop)  # first, since it imports SQLAlchemy: a session would idle meanwhile
        driver = await connect(url, application=application, settings=lease, timeout_s=timeout_s)
        opened.append(driver)
        session = cls(driver, url, lease_s)
        try:
            async with AsyncExitStack() as stack:
                async with session.limit():  # SQLAlchemy has questions of its own
                    session.connection = await stack.enter_async_context(database.connect())
                    if fits:
                        await require_current(driver)
                    session._backend = await driver.fetchval(SET_UP)
                if fits:
                    await session._after_failover(settings.failover_grace_s)
                pulse = asyncio.get_running_loop().create_task(session._beat(lease_s / 3))
                try:
                    yield session
                finally:
                    pulse.cancel()
                    await asyncio.gather(pulse, return_exceptions=True)
        except (SQLAlchemyError, AttributeError, *LOST_SESSION) as error:
            if is_lost(error) or is_ended(error, driver):
                raise DatabaseUnavailableError(
                    f"The session with Postgres at {url.redacted} was lost ({session.lost or said_by(error)}); "
                    "run the command again when it is back."
                ) from error
            raise
        finally:
            driver.terminate()

    async def _after_failover(self, grace_s: float) -> None:
        """Wait until the relays have said what they sent: a report that a failover lost must not be mailed again."""
        from outbox.failover import BARRIER_LOOK_S, Barrier, timeline_of

        async with self.limit():
            timeline = await timeline_of(self._driver)
        barrier = Barrier(timeline, grace_s, up=timeline > 1)
        while barrier.up:
            async with self.limit():
                await barrier.look(self._driver, time.monotonic())
            if barrier.up:
                await asyncio.sleep(BARRIER_LOOK_S)

    def lose(self, reason: str) -> None:
        """Treat the session as gone: what waits for its answer, and whatever is asked of it later, raises."""
        if self.lost is None:
            self.lost = reason
            self._driver.terminate()

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self.fetch(text("SELECT 1"))

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[None]:
        """A block in which all reads see one state of the database, the user's queries too, and all writes are refused.

        PostgreSQL docs, 13.2.2 and SET TRANSACTION. Each read in it is a savepoint, so a query that fails ends nothing.
        """
        async with self.ours() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            transaction = await connection.begin()
        try:
            yield
        finally:
            async with self.ours():
                await transaction.rollback()  # there is nothing to commit

    def _transaction(self) -> "AsyncTransaction":
        return self.connection.begin_nested() if self.connection.in_transaction() else self.connection.begin()

    async def use_timezone(self, name: str) -> None:
        """From now on days begin and end in this civil time in the user's queries too."""
        await self.fetch(text("SELECT set_config('TimeZone', :zone, false)"), {"zone": name})

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Lose the session after a few leases: what is short and has no answer by then met a cut network."""
        limit_s = SILENT_LEASES_MAX * self._lease_s
        reason = f"Postgres did not answer within {limit_s:g} s"
        silence = asyncio.get_running_loop().call_later(limit_s, self.lose, reason)
        try:
            yield
        finally:
            silence.cancel()

    @asynccontextmanager
    async def ours(self) -> AsyncIterator["AsyncConnection"]:
        """The connection, for statements of ours, all of which are short."""
        async with self.lock, self.limit():
            yield self.connection

    @asynccontextmanager
    async def theirs(self) -> AsyncIterator["AsyncConnection"]:
        """The connection, for a query of the user's: it may take any time while its backend is at work."""
        async with self.lock:
            watch = asyncio.get_running_loop().create_task(self._watch())
            try:
                yield self.connection
            finally:
                watch.cancel()

    async def _watch(self) -> None:
        """Lose the session if its backend does nothing, although we wait for it: answer or question went astray.

        Two looks in a row, a lease apart, so that no answer that is just under way is taken for a lost one.
        """
        idle = 0
        while idle < LOOKS_MAX:
            await asyncio.sleep(self._lease_s)
            idle = 0 if await self._is_at_work() else idle + 1
        self.lose("a query has no answer, and Postgres does not work on it")

    async def _is_at_work(self) -> bool:
        """Whether the backend works, seen over another connection; true also where there is no room for one."""
        try:
            look = await connect(self._url, application="outbox generate looks", timeout_s=self._lease_s)
        except (OutboxError, *LOST_SESSION, asyncpg.PostgresError) as error:
            return isinstance(error.__cause__, asyncpg.TooManyConnectionsError)
        try:
            return bool(await look.fetchval(AT_WORK, self._backend, timeout=self._lease_s))
        except (*LOST_SESSION, asyncpg.PostgresError):
            return False
        finally:
            look.terminate()

    async def fetch(
        self, statement: "Executable", parameters: Mapping[str, Any] | None = None, *, by_index: bool = False
    ) -> Sequence[Any]:
        """All rows of a statement of ours, in a transaction of its own. `by_index` as `database.BY_INDEX`."""
        async with self.ours() as connection, self._transaction():
            if by_index:
                await connection.execute(text(BY_INDEX))
            result = await connection.execute(statement, parameters)
            return result.all() if result.returns_rows else []

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """All rows of a user's query, in a transaction of its own (`source.Reader`).

        Raises:
            QueryError: the query is wrong as such.
            RowError: it failed on these values.

        """
        async with self.theirs() as connection:
            try:
                query, values = _bound(statement, parameters)
                async with self._transaction():
                    path = user_search_path(self._driver)
                    await connection.exec_driver_sql(f"SET LOCAL search_path = {path}")
                    with plain_timestamps(self._driver):
                        result = await connection.execute(query, values)
                    # In a snapshot this is a savepoint, and a local setting lasts until the end of the transaction.
                    await connection.exec_driver_sql(f"SET LOCAL search_path = {TRUSTED_PATH}")
                    if not result.returns_rows:
                        return []
                    names = list(result.keys())
                    return [dict(zip(names, row, strict=True)) for row in result]
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


def is_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error, or what it and SQLAlchemy wrapped, is of that class of Postgres's."""
    while error is not None and not isinstance(error, kind):
        error = getattr(error, "orig", None) or error.__cause__
    return error is not None
