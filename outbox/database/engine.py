"""SQLAlchemy engines for one connection: when its session is lost, it is not replaced.

Left to itself SQLAlchemy opens a new connection in the place of a lost one at its next use, and with it a session that
holds none of the locks that the code relies on.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from outbox.database.connection import Connection
from outbox.database.opening import connect
from outbox.errors import DatabaseUnavailableError
from outbox.settings.urls import DatabaseUrl

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


def engine(url: DatabaseUrl, *, application: str) -> "AsyncEngine":
    """Return an engine that opens one connection. When the connection is closed, its session ends."""
    return _engine_once(url, lambda: connect(url, application=application))


def engine_on(url: DatabaseUrl, connection: Callable[[], Connection]) -> "AsyncEngine":
    """Return an engine on the connection that `connection` returns when the engine connects."""

    async def opened() -> Connection:
        return connection()

    return _engine_once(url, opened)


async def driver_of(connection: "AsyncConnection") -> Connection:
    """Return the connection of ours on which a connection of such an engine runs."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert isinstance(driver, Connection)
    return driver


def _engine_once(url: DatabaseUrl, opening: Callable[[], Awaitable[Connection]]) -> "AsyncEngine":
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    opened: list[Connection] = []

    async def once() -> Connection:
        if opened:
            raise DatabaseUnavailableError(f"The session with Postgres at {url.redacted} was lost; run this again.")
        opened.append(await opening())
        return opened[0]

    return create_async_engine("postgresql+asyncpg://", async_creator=once, poolclass=NullPool)
