"""One session with Postgres: asyncpg's connection with types, and with its quirks handled in one place.

- Its search path is trusted, also after a pool has reset it (`TRUSTED_PATH`).
- A statement on a connection that was ended raises an error of `LOST_SESSION`, never AttributeError.
- `end_if_silent` ends it when the server does not answer.
- Timestamps that Python cannot represent are decoded to the nearest that it can (`values`).

`opening` opens connections. This module knows neither reports nor mail.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Final, Self

import asyncpg

from outbox.database.driver import DriverConnection
from outbox.database.refusal import DatabaseRefusedError
from outbox.database.values import TIMESTAMPTZ_OID, decode_timestamp, encode_timestamp
from outbox.errors import DatabaseUnavailableError

CHANNEL: Final = "outbox"
"""The channel (LISTEN, NOTIFY) that wakes relays."""

# With any other path, a foreign object in one of its schemas can be called instead of the intended one, for example a
# function `unnest(integer[])` that matches better than `unnest(anyarray)`, and then runs with the rights of this
# session (PostgreSQL docs, 5.10.6 and 10.3). `pg_temp` comes last: temporary objects are this session's own, but
# without the entry they would be searched first.
TRUSTED_PATH: Final = "pg_catalog, pg_temp"

# Qualified throughout, since it runs with the path that it asks for.
OWN_PATH: Final = "SELECT pg_catalog.current_setting('search_path'), pg_catalog.pg_backend_pid()"

UNDO_SET_UP: Final = "RESET search_path; RESET lock_timeout; RESET jit; RESET plan_cache_mode"

# Errors that mean "this session is over" or "it never began"; every other one is a problem of the statement.
LOST_SESSION: Final = (
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # "cannot switch to state …": a statement met the server's farewell
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # terminated, shut down, idle for too long
    asyncpg.IdleSessionTimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    ConnectionError,
    TimeoutError,
    OSError,
)


def is_lost(error: BaseException | None) -> bool:
    """Return True if an error, or what SQLAlchemy wrapped in it, means that the session is over."""
    while error is not None:
        if isinstance(error, asyncpg.QueryCanceledError):  # statement_timeout: the statement ended, not the session
            return False
        if isinstance(error, (*LOST_SESSION, DatabaseUnavailableError)) and not isinstance(error, DatabaseRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


class _EndedProtocol:
    """Stand-in for the protocol of a connection that was ended: each use of it raises an error of a lost session.

    asyncpg sets the protocol to None, so a statement that the end meets between two of its steps (prepare, execute,
    look up a type) would fail with an AttributeError.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def is_connected(self) -> bool:
        return False

    def abort(self) -> None:
        """Do nothing: the connection has ended already."""

    def __getattr__(self, name: str) -> Any:
        raise asyncpg.InterfaceError(self._reason)


class SilenceTimer:
    """Timer that ends a connection, unless the block ends or `restart` is called within `after_s`.

    A timeout around a statement would not do: asyncpg cancels the statement and waits for the server's answer to the
    cancel, and a transaction for that of its rollback. Only the end of the connection frees a caller from a network
    that has gone silent.
    """

    def __init__(self, connection: "Connection", after_s: float) -> None:
        self._connection = connection
        self._after_s = after_s
        self._reason = f"Postgres did not answer within {after_s:g} s"
        self._has_ended = False
        self._handle: asyncio.TimerHandle | None = None

    def restart(self) -> None:
        """Wait for the whole time again, since the server has answered."""
        self._cancel()
        self._handle = asyncio.get_running_loop().call_later(self._after_s, self._end)

    def _end(self) -> None:
        self._has_ended = True
        self._connection.end(self._reason)

    def _cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Stop the timer.

        Raises:
            TimeoutError: the block lost its connection because of this timer; asyncpg's own error names no reason.

        """
        self._cancel()
        if self._has_ended and isinstance(error, LOST_SESSION):
            raise TimeoutError(self._reason) from error


class Connection(DriverConnection):
    """Connection with a trusted search path and bounded waits for locks, also after a pool has reset it."""

    user_search_path: str = '"$user", public'
    """Search path that this role has by default, as `SET search_path = …` takes it.

    The user's own queries run with it: `SET LOCAL` it in their transaction and nowhere else.
    """
    setup: str = ""
    """Statements that set up the session: the search path, `lock_timeout` and `plan_cache_mode`."""
    is_pooled: bool = False
    """True behind a pooler: the backend is not the one that the connection was opened with."""
    _clamps_timestamps: bool = True
    _local_path: str | None = None
    """Search path of the open transaction, if it is not the trusted one."""
    _end_reason: str = "the connection was ended"

    async def set_up(self, *, lock_timeout: str, keep_plans: bool, timeout_s: float) -> None:
        """Put the settings of a new session in force, also for a pool that resets it, and install our codecs.

        They are set by a statement, since a pooler refuses settings in the startup message that it does not know. JIT
        is off: beside millions of emails the planner may expect to read many, and then compiles for seconds.
        """
        self.install_timestamps()
        self.user_search_path, backend = await self.fetchrow(OWN_PATH, timeout=timeout_s)
        self.is_pooled = backend != self.get_server_pid()
        self.setup = f"SET search_path = {TRUSTED_PATH}; SET lock_timeout = '{lock_timeout}'; SET jit = off;"
        if not keep_plans:
            self.setup += " SET plan_cache_mode = 'force_custom_plan';"
        await self.execute(self.setup, timeout=timeout_s)

    def end(self, reason: str) -> None:
        """End the session at once. A later statement, and the next step of one that runs, fails with the reason."""
        self._end_reason = reason
        self.terminate()

    def _abort(self) -> None:
        super()._abort()
        self._protocol = _EndedProtocol(self._end_reason)

    def end_if_silent(self, after_s: float) -> SilenceTimer:
        """Return a block that ends this connection, and raises TimeoutError, if it takes longer than `after_s`."""
        return SilenceTimer(self, after_s)

    @contextmanager
    def terminated_on_error(self) -> Iterator[None]:
        """Terminate this connection if the block raises, or is cancelled."""
        try:
            yield
        except BaseException:
            self.terminate()
            raise

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's
        """Close in order. A pooler in transaction mode reuses the backend as it is, so settings are reset first."""
        if self.is_pooled and not self.is_closed():
            with self.terminated_on_error(), suppress(asyncpg.PostgresError, *LOST_SESSION):
                await self.execute(UNDO_SET_UP, timeout=timeout)
        await super().close(timeout=timeout)

    def get_reset_query(self) -> str:
        """Return what a pool runs on a returned connection: `RESET ALL` alone would restore the role's own path."""
        return f"{super().get_reset_query()}\n{self.setup}"

    async def plan(self, statement: str) -> None:
        """Prepare a statement that `fetch` or `execute` will run, so that it then needs one step and not two."""
        await self._get_statement(statement, None)

    @contextmanager
    def user_query(self, path: str) -> Iterator[None]:
        """Run a query of the user's in the open transaction, whose search path was set to `path`.

        Types are still looked up with the trusted path, and timestamps are decoded as asyncpg does.
        """
        self._local_path = path
        try:
            with self.plain_timestamps():
                yield
        finally:
            self._local_path = None

    @contextmanager
    def plain_timestamps(self) -> Iterator[None]:
        """Decode timestamps as asyncpg itself does within the block."""
        before, self._clamps_timestamps = self._clamps_timestamps, False
        try:
            yield
        finally:
            self._clamps_timestamps = before

    async def _introspect_types(self, typeoids: Any, timeout: float | None) -> Any:  # noqa: ASYNC109 - asyncpg's
        """Look up types with the trusted path, even while a user's query is prepared under another one.

        asyncpg's own query names functions and operators without their schema.
        """
        if self._local_path is None:
            return await super()._introspect_types(typeoids, timeout)
        await self.execute(f"SET LOCAL search_path = {TRUSTED_PATH}", timeout=timeout)
        found = await super()._introspect_types(typeoids, timeout)
        path = self._local_path.replace("'", "''")
        await self.execute(f"SELECT pg_catalog.set_config('search_path', '{path}', true)", timeout=timeout)
        return found

    def set_codec(
        self,
        oid: int,
        name: str,
        encode: Callable[[Any], Any],
        decode: Callable[[Any], Any],
        *,
        format: str,  # noqa: A002 - asyncpg's word
        schema: str = "pg_catalog",
    ) -> None:
        """Set how values of a scalar type are encoded and decoded; `format` is "text", "binary" or "tuple".

        By OID: asyncpg's `set_type_codec` looks types up by name, with a query.
        """
        self._protocol.get_settings().add_python_codec(oid, name, schema, [], "scalar", encode, decode, format)

    def remove_codec(self, oid: int, name: str, schema: str) -> None:
        """Decode a type as asyncpg itself does again."""
        self._protocol.get_settings().remove_python_codec(oid, name, schema)

    def install_timestamps(self) -> None:
        """Decode timestamps that Python cannot represent (BC, after 9999, infinite) to the nearest one that it can."""
        self.set_codec(TIMESTAMPTZ_OID, "timestamptz", encode_timestamp, self._decode_timestamp, format="tuple")

    def _decode_timestamp(self, value: tuple[int]) -> datetime:
        return decode_timestamp(value[0], clamps=self._clamps_timestamps)
