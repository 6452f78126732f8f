"""Pool of Postgres connections for the pages: short statements on a few connections, which may all be lost.

asyncpg's pool and no SQLAlchemy engine: the modules that the board uses (`status`, `show`, `operate`) take an asyncpg
connection, and a page is one statement. Nothing here takes an advisory lock, and no statement or wait for a row's
lock lasts long enough for a relay to notice.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg

from outbox.database.connection import Connection, is_lost
from outbox.database.opening import connect
from outbox.database.schema import require_current
from outbox.errors import DatabaseUnavailableError
from outbox.settings.urls import DatabaseUrl

CONNECTIONS_MAX: Final = 8
ACQUIRE_MAX_S: Final = 3.0
CONNECT_MAX_S: Final = 3.0
STATEMENT_MAX_S: Final = 5.0
BOUNDS: Final = {
    "statement_timeout": str(int(STATEMENT_MAX_S * 1000)),
    "lock_timeout": "500",  # below deadlock_timeout: if two ever wait for each other it is we who give way
    "idle_in_transaction_session_timeout": "5000",
    "default_transaction_isolation": "read committed",
    "tcp_keepalives_idle": "3",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "5000",
}


class Store:
    """A pool that connects when it is asked for something: it can be made while Postgres is away.

    It opens itself, too, since an application that this one is mounted in may not run our lifespan.
    """

    def __init__(self, url: DatabaseUrl) -> None:
        self.url = url
        self._pool: Any = None
        self._opening = asyncio.Lock()

    async def _opened(self) -> Any:
        async with self._opening:
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    min_size=0,
                    max_size=CONNECTIONS_MAX,
                    max_inactive_connection_lifetime=60.0,
                    command_timeout=2 * STATEMENT_MAX_S,
                    connect=self._connect,
                )
            return self._pool

    async def _connect(self, *_: object, **__: object) -> Connection:
        return await connect(self.url, application="outbox web", settings=BOUNDS, timeout_s=CONNECT_MAX_S)

    async def close(self) -> None:
        """End all sessions; a later request opens new ones."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def check(self) -> None:
        """Return if the schema is one that this program may work on.

        Raises:
            SchemaError, DatabaseUnavailableError: as `require_current` and `connection`.
        """
        async with self.connection() as connection:
            await require_current(connection)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Yield a connection for one request.

        Raises:
            DatabaseUnavailableError: Postgres is away, has no place for us, or does not answer in time.
        """
        try:
            async with (await self._opened()).acquire(timeout=ACQUIRE_MAX_S) as held:
                yield held
        except (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError) as error:
            raise DatabaseUnavailableError(f"Postgres does not answer in time ({error}); try again later.") from error
        except DatabaseUnavailableError:
            raise
        except Exception as error:
            if is_lost(error):
                raise DatabaseUnavailableError(
                    f"Postgres at {self.url.redacted} does not answer ({str(error) or type(error).__name__})."
                ) from error
            raise
