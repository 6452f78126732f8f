"""Recognition of poolers: whether one shares server processes among its clients, and whether it drops settings.

A pooler in session mode gives each connection a process of its own, or lets the second one wait. One in transaction or
statement mode shares sessions and with them the advisory locks, so that two relays could send the same email.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.refusal import ITSELF, SESSION_MODE
from outbox.errors import OutboxError, UnsafeDatabaseError
from outbox.settings.urls import DatabaseUrl

Opening: TypeAlias = Callable[[], Awaitable[Connection]]
"""Function that opens a connection to the pooler, without settings of ours."""

BARE_TIMEOUT_S: Final = 15.0
BARE_ROUNDS: Final = 12
BARE_ROUND_MAX_S: Final = 0.03
BARE_TRIES: Final = 4
BARE_PAUSE_S: Final = 0.5


def say_pooler(url: DatabaseUrl, fact: str) -> str:
    """Return the sentence about a pooler that shares sessions among its clients, as `fact` shows."""
    mode = "statement" if "statement pooling" in fact else "transaction"
    return (
        f"The pooler at {url.redacted} is in {mode} mode ({fact}), so sessions and advisory locks are shared "
        f"among its clients; {SESSION_MODE}."
    )


async def require_lease(
    url: DatabaseUrl, connection: Connection, wanted_ms: str, *, timeout_s: float, opening: Opening
) -> None:
    """End the connection, and raise, unless `idle_session_timeout` is in force as it was asked for.

    In one simple query, which passes any pooler. It runs before the search path is set, so every name in it is
    qualified. `opening` opens a connection without settings, to find out which kind of pooler this is.

    Raises:
        UnsafeDatabaseError: a pooler has dropped the setting; the sentence says which kind of pooler, and the fix.

    """
    try:
        await connection.execute(
            "DO $$ DECLARE found pg_catalog.text := (SELECT s.setting FROM pg_catalog.pg_settings s"
            " WHERE s.name OPERATOR(pg_catalog.=) 'idle_session_timeout'::pg_catalog.text);"
            f" BEGIN IF found OPERATOR(pg_catalog.<>) '{int(wanted_ms)}'::pg_catalog.text"
            " THEN RAISE EXCEPTION '% ms', found; END IF; END $$",
            timeout=timeout_s,
        )
    except asyncpg.RaiseError as error:
        fact = f"idle_session_timeout is {error} although {wanted_ms} ms were asked for"
        connection.terminate()
        if await shares_sessions(opening):
            raise UnsafeDatabaseError(say_pooler(url, fact)) from error
        raise UnsafeDatabaseError(
            f"The pooler at {url.redacted} keeps sessions apart, but drops their settings ({fact}); {ITSELF}, "
            "or set them at the role, as docs/scale.md shows."
        ) from error


async def shares_sessions(opening: Opening) -> bool:
    """Return True if two connections are served by one server process: a pooler in transaction or statement mode.

    A server that is busy may refuse a connection, so a failed look is repeated. `opening` opens a connection without
    settings, which any pooler accepts, within `BARE_TIMEOUT_S`.
    """
    try:
        async with asyncio.timeout(BARE_TIMEOUT_S):
            for _ in range(BARE_TRIES):
                try:
                    return await _shares_now(opening)
                except (OutboxError, asyncpg.PostgresError, *LOST_SESSION):
                    await asyncio.sleep(BARE_PAUSE_S)
    except TimeoutError:
        pass  # a second connection that waits for the first is that of a pooler in session mode
    return False


async def _shares_now(opening: Opening) -> bool:
    opened: list[Connection] = []
    seen: list[set[str]] = [set(), set()]
    try:
        for _ in seen:
            opened.append(await opening())  # noqa: PERF401 - closed even if the second fails
        for _ in range(BARE_ROUNDS):
            for connection, processes in zip(opened, seen, strict=True):
                processes.add(await _server_process(connection))
            if seen[0] & seen[1] or len(seen[0]) > 1:
                return True
            # Two looks in step, of one process or of two, would always find each other's servers taken.
            await asyncio.sleep(random.uniform(0, BARE_ROUND_MAX_S))  # noqa: S311 - no secret
    finally:
        for connection in opened:
            connection.terminate()
    return False


async def _server_process(connection: Connection) -> str:
    """Return the process id of the backend that answers, asked in a simple query, which passes any pooler."""
    try:
        await connection.execute("DO $$ BEGIN RAISE EXCEPTION '%', pg_catalog.pg_backend_pid(); END $$")
    except asyncpg.RaiseError as error:
        return str(error)
    raise AssertionError
