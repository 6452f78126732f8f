"""Generate's Postgres session: it holds the bucket locks, reads the user's queries and writes the batches.

An audit reads through the same session, inside one snapshot that nothing can be written in.

A pulse keeps it alive while reports are computed. A process that is stopped loses it after `lease_s`, and its buckets
with it. Every wait for an answer or for a lock is bounded (`wait_bounds`).

Two kinds of statements run in it. Ours have the trusted search path of `database.opening.connect`. The user's queries
(`user_rows`) have the path that the role itself has, within their transaction; whatever they change of the session's
settings is undone before the next statement of ours (`kept_settings`).
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from outbox.database.connection import LOST_SESSION, TRUSTED_PATH, Connection, is_lost
from outbox.database.engine import engine_on
from outbox.database.lock_wait import holders
from outbox.database.opening import CONNECT_TIMEOUT_S, connect, lease_settings
from outbox.database.plans import BY_INDEX
from outbox.database.pooler import say_pooler
from outbox.database.refusal import original_of, reason_of, shows_shared_session
from outbox.database.schema import require_current
from outbox.errors import ConfigurationError, DatabaseUnavailableError, UnsafeDatabaseError
from outbox.generate.kept_settings import KeptSettings
from outbox.generate.query_errors import is_caused_by, message_of
from outbox.generate.user_query import UserQueries
from outbox.generate.user_rows import UserRows
from outbox.generate.wait_bounds import WaitBounds
from outbox.reports.timezones import alternatives
from outbox.settings import Settings
from outbox.settings.urls import DatabaseUrl

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

LOCK_LEASES_MAX: Final = 1.5  # a stopped server loses its session, and the locks with it, after one lease
TRIES_MAX: Final = 5
RETRY_MAX_S: Final = 0.5

_T = TypeVar("_T")

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


class GenerateSession:
    """One connection that belongs to no pool. `queries` reads the user's queries through it."""

    def __init__(
        self,
        driver: Connection,
        connection: "AsyncConnection",
        settings: Settings,
        waits: WaitBounds,
        kept: KeptSettings,
    ) -> None:
        self.queries = UserRows(self, UserQueries(driver), driver.user_search_path)
        self._driver = driver
        self._connection = connection
        self._waits = waits
        self._kept = kept
        self._lock_s = _lock_s(settings)
        self._query_lock_s = settings.generate_wait_s
        self._busy = asyncio.Lock()
        """Keeps the pulse out of the way of other statements."""

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
        """Open a session, checked for its schema. It is closed whatever happens, which frees its locks.

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
        waits = WaitBounds(driver, url, lease_s)
        try:
            async with AsyncExitStack() as stack:
                async with waits.answer_soon():  # SQLAlchemy has questions of its own
                    connection = await stack.enter_async_context(database.connect())
                    kept = await _set_up(driver, waits, settings, fits=fits)
                session = cls(driver, connection, settings, waits, kept)
                if fits:
                    await session._after_failover(settings.failover_grace_s)
                async with session._pulse(lease_s / 3):
                    yield session
        except (SQLAlchemyError, asyncpg.PostgresError, *LOST_SESSION) as error:
            if (reason := _loss_of(error, url, waits)) is None:
                raise
            raise reason from error
        finally:
            driver.terminate()

    async def _after_failover(self, grace_s: float) -> None:
        """Wait at the barrier: the relays may know of emails, sent on another server, that are lost here."""
        from outbox.database import failover_barrier

        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            async with self._waits.answer_soon():
                holds = await failover_barrier.holds_generate(self._driver)
            if not holds:
                return
            await asyncio.sleep(failover_barrier.BARRIER_LOOK_S)

    @asynccontextmanager
    async def _pulse(self, every_s: float) -> AsyncIterator[None]:
        """Keep the session alive within the block."""
        pulse = asyncio.get_running_loop().create_task(self._beat(every_s))
        try:
            yield
        finally:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self.fetch(text("SELECT 1"))

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[None]:
        """Let all reads in the block see one state of the database, the user's queries too, and refuse all writes.

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
        return self._connection.begin_nested() if self._connection.in_transaction() else self._connection.begin()

    async def keep(self, name: str, value: str) -> None:
        """Set a setting for the rest of the session; the user's queries see it, but cannot change it for later ones."""
        async with self.ours():
            await self._kept.keep(name, value)

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
                        await self._kept.keep("TimeZone", known)
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

    @asynccontextmanager
    async def ours(self) -> AsyncIterator["AsyncConnection"]:
        """Give the connection to statements of ours, all of which are short.

        Raises:
            LockWaitError: one waited for a lock for too long.

        """
        async with self._busy, self._waits.answer_soon():
            await self._kept.restore()
            async with self._waits.naming_blockers("waited", self._lock_s):
                yield self._connection

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

    async def fetch(
        self, statement: "Executable", parameters: Mapping[str, Any] | None = None, *, by_index: bool = False
    ) -> Sequence[Any]:
        """Return all rows of a statement of ours, in a transaction of its own; `by_index` (`plans.BY_INDEX`)."""

        async def fetched(connection: "AsyncConnection") -> Sequence[Any]:
            async with self._transaction():
                if by_index:
                    await connection.execute(text(BY_INDEX))
                result = await connection.execute(statement, parameters)
                return result.all() if result.returns_rows else []

        return await self.retried(fetched)

    @asynccontextmanager
    async def user_query(self, path: str | None) -> AsyncIterator[None]:
        """Reserve the connection for a query of the user's: it may take any time while its backend is at work.

        `path` is None for a query of ours that may take any time, too.

        Raises:
            LockWaitError: it waited for a lock for too long.

        """
        async with (
            self._busy,
            self._waits.answer_while_at_work(),
            self._waits.naming_blockers("a query waited", self._user_lock_s(path)),
        ):
            if path is None:
                await self._kept.restore()
            yield

    @asynccontextmanager
    async def user_transaction(self, path: str | None) -> AsyncIterator[None]:
        """Run a query within `user_query` in a transaction with this search path, or the trusted one if it is None."""
        async with self._transaction():
            if path is not None:
                self._kept.note_user_query()
            # SQLAlchemy begins the transaction with this statement; the driver runs the next ones in it.
            values = (path or TRUSTED_PATH, _in_ms(self._user_lock_s(path)))
            await self._connection.exec_driver_sql(AS_USER, values)
            with self._as_user(path):
                yield

    def _user_lock_s(self, path: str | None) -> float:
        return self._lock_s if path is None else self._query_lock_s

    @contextmanager
    def _as_user(self, path: str | None) -> Iterator[None]:
        """Mark a query of the user's for the driver; one of ours has no path."""
        if path is None:
            yield
            return
        with self._driver.user_query(path):
            yield


async def _set_up(driver: Connection, waits: WaitBounds, settings: Settings, *, fits: bool) -> KeptSettings:
    """Check the schema if the database must fit, and set up the session; return its settings."""
    if fits:
        await require_current(driver)
    backend, has_lz4 = await driver.fetchrow(SET_UP)
    waits.identify(backend)
    kept = KeptSettings(driver)
    if has_lz4:
        await kept.keep("default_toast_compression", "lz4")
    await kept.keep("lock_timeout", _in_ms(_lock_s(settings)))
    return kept


def _loss_of(error: Exception, url: DatabaseUrl, waits: WaitBounds) -> Exception | None:
    """Return the error that explains to the user why the session was lost, or None if it was not."""
    cause = original_of(error)
    if shows_shared_session(cause):
        return UnsafeDatabaseError(say_pooler(url, reason_of(cause)))
    if is_lost(error):
        return DatabaseUnavailableError(
            f"The session with Postgres at {url.redacted} was lost ({waits.lost or message_of(error)}); "
            "run the command again when it is back."
        )
    return None


def _lock_s(settings: Settings) -> float:
    """Return how long statements of ours wait for a lock."""
    return LOCK_LEASES_MAX * settings.lease_s


def _in_ms(seconds: float) -> str:
    return str(int(seconds * 1000))
