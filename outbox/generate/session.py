"""Generate's Postgres session: it holds the bucket locks, reads the user's queries and writes the batches.

An audit reads through the same session, inside one snapshot that nothing can be written in.

A pulse keeps it alive while reports are computed. A process that is stopped loses it after `lease_s`, and its buckets
with it. A network that goes silent ends it on this side, too: no statement is waited for without limit, and no run
hangs forever. Every wait for a lock is bounded, and its error names the session that holds the lock.

Two kinds of statements run in it. Ours have the trusted search path of `database.connect`. The user's queries have the
path that the role itself has, within their transaction; whatever they change of the session's settings is undone before
the next statement of ours.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from outbox.database.connection import LOST_SESSION, TRUSTED_PATH, Connection, is_lost
from outbox.database.engine import engine_on
from outbox.database.lock_wait import BlockerWatch, LockWaitError, holders
from outbox.database.locks import is_lock_timeout
from outbox.database.opening import CONNECT_TIMEOUT_S, connect, lease_settings
from outbox.database.plans import BY_INDEX
from outbox.database.pooler import say_pooler
from outbox.database.refusal import original_of, reason_of, shows_shared_session
from outbox.database.schema import require_current
from outbox.errors import ConfigurationError, DatabaseUnavailableError, OutboxError, UnsafeDatabaseError
from outbox.generate.source import RowError, Rows
from outbox.generate.user_query import Portion, StaleStatementError, UserQueries, bind, query_of
from outbox.reports.query_parameters import Query
from outbox.reports.timezones import alternatives
from outbox.settings import Settings
from outbox.settings.urls import DatabaseUrl

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

SILENT_LEASES_MAX: Final = 3
LOCK_LEASES_MAX: Final = 1.5  # a stopped server loses its session, and the locks with it, after one lease
LOOKS_MAX: Final = 2
STALE_TRIES_MAX: Final = 3
TRIES_MAX: Final = 5
RETRY_MAX_S: Final = 0.5

_T = TypeVar("_T")

# A backend that waits for its client between two messages of one query counts as active.
AT_WORK: Final = """
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE pid = $1 AND (state = 'active' AND wait_event IS DISTINCT FROM 'ClientRead'
                                    OR state = 'disabled'))
"""


# LZ4 where the server has it: pages and mails are compressed as they are stored, and with pglz that is half of what a
# report costs Postgres (PostgreSQL docs, 20.11.1, default_toast_compression).
SET_UP: Final = """
SELECT pg_backend_pid() AS backend,
       EXISTS (SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)) AS has_lz4
"""

# Every name is qualified and nothing is cast or compared, so that no path can substitute another function.
AS_USER: Final = """
SELECT pg_catalog.set_config('search_path', $1, true), pg_catalog.set_config('lock_timeout', $2, true)
"""
KEEP: Final = "SELECT pg_catalog.set_config('{name}', '{value}', false)"


class GenerateSession:
    """One connection that belongs to no pool. `lock` keeps the pulse out of other statements' way."""

    connection: "AsyncConnection"

    def __init__(self, driver: Connection, settings: Settings) -> None:
        assert settings.database_url is not None
        self.lock = asyncio.Lock()
        self.lost: str | None = None
        self._driver = driver
        self._queries = UserQueries(driver)
        self._url: DatabaseUrl = settings.database_url
        self._lease_s = settings.lease_s
        self._lock_s = LOCK_LEASES_MAX * settings.lease_s
        self._query_lock_s = settings.generate_wait_s
        self._backend = 0
        self._kept: dict[str, str] = {}
        """Statements that set the session's own settings, by name."""
        self._may_be_changed = False
        self._blockers: BlockerWatch | None = None

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
        driver = await connect(url, application=application, settings=lease, timeout_s=timeout_s, keep_plans=True)
        opened.append(driver)
        session = cls(driver, settings)
        try:
            async with AsyncExitStack() as stack:
                async with session.limit():  # SQLAlchemy has questions of its own
                    session.connection = await stack.enter_async_context(database.connect())
                    if fits:
                        await require_current(driver)
                    session._backend, has_lz4 = await driver.fetchrow(SET_UP)
                    if has_lz4:
                        await session._keep("default_toast_compression", "lz4")
                    await session._keep("lock_timeout", _in_ms(session._lock_s))
                if fits:
                    await session._after_failover(settings.failover_grace_s)
                pulse = asyncio.get_running_loop().create_task(session._beat(lease_s / 3))
                try:
                    yield session
                finally:
                    pulse.cancel()
                    await asyncio.gather(pulse, return_exceptions=True)
        except (SQLAlchemyError, asyncpg.PostgresError, *LOST_SESSION) as error:
            cause = original_of(error)
            if shows_shared_session(cause):
                raise UnsafeDatabaseError(say_pooler(url, reason_of(cause))) from error
            if is_lost(error):
                raise DatabaseUnavailableError(
                    f"The session with Postgres at {url.redacted} was lost ({session.lost or said_by(error)}); "
                    "run the command again when it is back."
                ) from error
            raise
        finally:
            driver.terminate()

    async def _after_failover(self, grace_s: float) -> None:
        """Wait at the barrier: the relays may know of emails, sent on another server, that are lost here."""
        from outbox.database import failover_barrier

        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            async with self.limit():
                holds = await failover_barrier.holds_generate(self._driver)
            if not holds:
                return
            await asyncio.sleep(failover_barrier.BARRIER_LOOK_S)

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

    async def _keep(self, name: str, value: str) -> None:
        statement = KEEP.format(name=name, value=value.replace("'", "''"))
        await self._driver.execute(statement)
        self._kept[name] = statement

    async def keep(self, name: str, value: str) -> None:
        """Set a setting for the rest of the session; the user's queries see it, but cannot change it for later ones."""
        async with self.ours():
            await self._keep(name, value)

    async def use_timezone(self, name: str) -> None:
        """Let days begin and end in this civil time in the user's queries, too.

        Postgres may lack the name, and know the zone by another one: by its current one, or on an old system by the
        former one.

        Raises:
            ConfigurationError: it knows none of them.

        """
        async with self.ours():
            for known in alternatives(name):
                try:
                    async with self._driver.transaction():  # a savepoint: a name that is not known aborts nothing
                        await self._keep("TimeZone", known)
                except asyncpg.InvalidParameterValueError:
                    continue
                return
        raise ConfigurationError(
            f'timezone: Postgres does not know "{name}", by any of its names; update the time zones of the database '
            "server (package tzdata), or write another one."
        )

    @asynccontextmanager
    async def waiting_at_most(self, lock_s: float) -> AsyncIterator[None]:
        """Limit how long outbox's own statements within the block wait for a lock."""
        usual_s = self._lock_s
        await self._wait_at_most(lock_s)
        try:
            yield
        finally:
            await self._wait_at_most(usual_s)

    async def _wait_at_most(self, lock_s: float) -> None:
        await self.keep("lock_timeout", _in_ms(lock_s))
        self._lock_s = lock_s

    async def holders(self, namespace: int, numbers: Sequence[int], may: str) -> dict[int, str]:
        """Return what `lock_wait.holders` does."""
        async with self.ours():
            return await holders(self._driver, namespace, numbers, may)

    async def _restore(self) -> None:
        """Undo what a user's query may have set for the session: path, role, or any other setting.

        It is one simple query. RESET ALL restores the settings with which the session began.
        """
        settings = ["RESET ALL", "RESET ROLE", self._driver.setup.rstrip("; "), *self._kept.values()]
        await self._driver.execute("; ".join(settings))
        self._may_be_changed = False

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Lose the session after a few leases: what is short and has no answer by then met a cut network."""
        limit_s = SILENT_LEASES_MAX * self._lease_s
        silence = asyncio.get_running_loop().call_later(limit_s, self._lose_silent, limit_s)
        try:
            yield
        finally:
            silence.cancel()

    def _lose_silent(self, limit_s: float) -> None:
        holder = self._blockers.seen if self._blockers is not None else ""
        locked = f"; {holder} held a lock that it waited for" if holder else ""
        self.lose(f"Postgres did not answer within {limit_s:g} s{locked}")

    @asynccontextmanager
    async def ours(self) -> AsyncIterator["AsyncConnection"]:
        """The connection, for statements of ours, all of which are short.

        Raises:
            LockWaitError: one waited for a lock for too long.

        """
        async with self.lock, self.limit():
            if self._may_be_changed:
                await self._restore()
            async with self._naming_blockers("waited", self._lock_s):
                yield self.connection

    async def retried(self, work: "Callable[[AsyncConnection], Awaitable[_T]]") -> _T:
        """Run transactions of ours, and run them again after a deadlock with another session's.

        An upgrade of the schema, or a tool that the user runs, may lock our tables in another order. The transaction
        that Postgres ends has written nothing (PostgreSQL docs, 13.3.4).

        Raises:
            LockWaitError: as `ours`.

        """
        for left in reversed(range(TRIES_MAX)):
            try:
                async with self.ours() as connection:
                    return await work(connection)
            except SQLAlchemyError as error:
                if left == 0 or not is_caused_by(error, asyncpg.DeadlockDetectedError):
                    raise
            await asyncio.sleep(random.uniform(0, RETRY_MAX_S))  # noqa: S311 - jitter, not a secret
        raise AssertionError

    @asynccontextmanager
    async def theirs(self, lock_s: float) -> AsyncIterator["AsyncConnection"]:
        """The connection, for a query of the user's: it may take any time while its backend is at work."""
        async with self.lock:
            watch = asyncio.get_running_loop().create_task(self._watch())
            try:
                async with self._naming_blockers("a query waited", lock_s):
                    yield self.connection
            finally:
                watch.cancel()

    @asynccontextmanager
    async def _naming_blockers(self, what: str, lock_s: float) -> AsyncIterator[None]:
        look_s = lock_s / 4
        async with BlockerWatch(self._url, self._backend, first_s=look_s, every_s=look_s) as blockers:
            self._blockers = blockers
            try:
                yield
            except (SQLAlchemyError, asyncpg.LockNotAvailableError) as error:
                if is_lock_timeout(error):
                    raise LockWaitError(
                        f"{what} {lock_s:g} s for a lock that {blockers.holder} holds; let it end, or end it with "
                        "pg_terminate_backend, and run this again"
                    ) from error
                raise
            finally:
                self._blockers = None

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

        async def fetched(connection: "AsyncConnection") -> Sequence[Any]:
            async with self._transaction():
                if by_index:
                    await connection.execute(text(BY_INDEX))
                result = await connection.execute(statement, parameters)
                return result.all() if result.returns_rows else []

        return await self.retried(fetched)

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """All rows of a user's query, in a transaction of its own, with the role's own search path (`source.Reader`).

        Raises:
            QueryError: the query is wrong as such.
            RowError: it failed on these values.
            LockWaitError: it waited for a lock for too long.

        """
        return await self._rows(statement, parameters, self._driver.user_search_path)

    async def _rows(self, statement: str, parameters: Mapping[str, Any], path: str | None) -> Rows:
        """Return all rows, with that search path, or the trusted one if it is None."""
        query = query_of(statement)
        return await self._run(query, bind(query, parameters), path)

    async def _run(
        self,
        query: Query,
        values: Sequence[Any],
        path: str | None,
        *,
        keep: bool = True,
        portion: Portion | None = None,
    ) -> Rows:
        """Run a query in a transaction of its own; once more if a migration changed what was prepared for it."""
        for _ in range(STALE_TRIES_MAX - 1):
            with suppress(StaleStatementError):
                return await self._run_once(query, values, path, keep, portion)
        try:
            return await self._run_once(query, values, path, keep, portion)
        except StaleStatementError as error:
            cause = original_of(error.__cause__ or error)
            if shows_shared_session(cause):
                raise cause from None
            raise RowError(said_by(cause)) from error

    async def _run_once(
        self, query: Query, values: Sequence[Any], path: str | None, keep: bool, portion: Portion | None
    ) -> Rows:
        lock_s = self._lock_s if path is None else self._query_lock_s
        async with self.theirs(lock_s) as connection:
            if path is None and self._may_be_changed:
                await self._restore()
            try:
                async with self._transaction():
                    self._may_be_changed = self._may_be_changed or path is not None
                    # SQLAlchemy begins the transaction with this statement; the driver runs the next ones in it.
                    await connection.exec_driver_sql(AS_USER, (path or TRUSTED_PATH, _in_ms(lock_s)))
                    with self._as_user(path):
                        return await self._queries.rows(query, values, keep=keep, portion=portion)
            except (SQLAlchemyError, asyncpg.PostgresError) as error:
                if is_lost(error) or is_lock_timeout(error):
                    raise
                raise RowError(said_by(error)) from error

    async def plain_timestamps(self, statement: str) -> Sequence[str]:
        """Return what `UserQueries.plain_timestamps` does, with the role's own search path."""
        path = self._driver.user_search_path
        async with self.theirs(self._query_lock_s) as connection, self._transaction():
            self._may_be_changed = True
            await connection.exec_driver_sql(AS_USER, (path, _in_ms(self._query_lock_s)))
            with self._as_user(path):
                return await self._queries.plain_timestamps(statement)

    @contextmanager
    def _as_user(self, path: str | None) -> Iterator[None]:
        """Mark a query of the user's for the driver; one of ours has no path."""
        if path is None:
            yield
            return
        with self._driver.user_query(path):
            yield

    async def stream(self, statement: str, parameters: Mapping[str, Any], portion: int) -> AsyncIterator[Rows]:
        """The rows of a user's query, at most `portion` at a time (`source.Reader`).

        A cursor WITH HOLD keeps the result in the server: no transaction is open while reports are computed, and
        memory holds a portion (PostgreSQL docs, DECLARE).
        """
        async for rows in self._stream(statement, parameters, portion, self._driver.user_search_path):
            yield rows

    async def _stream(
        self, statement: str, parameters: Mapping[str, Any], portion: int, path: str | None
    ) -> AsyncIterator[Rows]:
        query = query_of(statement)
        values = bind(query, parameters)
        declared = Query(f"DECLARE outbox_rows NO SCROLL CURSOR WITH HOLD FOR {query.text}", query.names)
        await self._run(declared, values, path, keep=False)
        fetch, start = Query(f"FETCH FORWARD {portion} FROM outbox_rows"), 0
        while rows := await self._run(fetch, [], path, keep=False, portion=Portion(query, values, start, portion)):
            yield rows
            if len(rows) < portion:
                break
            start += portion
        await self._run(Query("CLOSE outbox_rows"), [], path, keep=False)

    @property
    def trusted(self) -> "TrustedReader":
        """Return a reader for outbox's own queries, such as the digest's, which keep the trusted path."""
        return TrustedReader(self)


@dataclass(frozen=True, slots=True)
class TrustedReader:
    """Reader of outbox's own queries, without a time limit (`source.Reader`)."""

    session: GenerateSession

    @property
    def trusted(self) -> "TrustedReader":
        """Return this reader."""
        return self

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """Return rows as `GenerateSession.rows` does."""
        return await self.session._rows(statement, parameters, None)  # noqa: SLF001

    def stream(self, statement: str, parameters: Mapping[str, Any], portion: int) -> AsyncIterator[Rows]:
        """Yield rows as `GenerateSession.stream` does."""
        return self.session._stream(statement, parameters, portion, None)  # noqa: SLF001


def _in_ms(seconds: float) -> str:
    return str(int(seconds * 1000))


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
