"""Bounds on the waits of generate's session: for answers of Postgres, and for locks, whose holders are named.

A network that goes silent ends the session on this side, too: no statement is waited for without limit.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.lock_wait import BlockerWatch, LockWaitError
from outbox.database.locks import is_lock_timeout
from outbox.database.opening import connect
from outbox.errors import OutboxError
from outbox.settings.urls import DatabaseUrl

SILENT_LEASES_MAX: Final = 3
LOOKS_MAX: Final = 2

# A backend that waits for its client between two messages of one query counts as active.
AT_WORK: Final = """
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE pid = $1 AND (state = 'active' AND wait_event IS DISTINCT FROM 'ClientRead'
                                    OR state = 'disabled'))
"""


class WaitBounds:
    """Bounds on the waits of one session. A wait for an answer that lasts too long ends the session."""

    def __init__(self, driver: Connection, url: DatabaseUrl, lease_s: float) -> None:
        self.lost: str | None = None
        """Why the session was ended here."""
        self._driver = driver
        self._url = url
        self._lease_s = lease_s
        self._backend = 0
        self._blockers: BlockerWatch | None = None

    def identify(self, backend: int) -> None:
        """Set the process id by which other connections see the session."""
        self._backend = backend

    def _lose(self, reason: str) -> None:
        """End the session: what waits for its answer, and whatever is asked of it later, raises."""
        if self.lost is None:
            self.lost = reason
            self._driver.terminate()

    @asynccontextmanager
    async def answer_soon(self) -> AsyncIterator[None]:
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
        self._lose(f"Postgres did not answer within {limit_s:g} s{locked}")

    @asynccontextmanager
    async def answer_while_at_work(self) -> AsyncIterator[None]:
        """Allow any time while the backend is at work, for a query of the user's."""
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """Lose the session if its backend does nothing, although we wait for it: answer or question went astray.

        Two looks in a row, a lease apart, so that an answer that is just on its way is not taken for a lost one.
        """
        idle = 0
        while idle < LOOKS_MAX:
            await asyncio.sleep(self._lease_s)
            idle = 0 if await self._is_at_work() else idle + 1
        self._lose("a query has no answer, and Postgres does not work on it")

    async def _is_at_work(self) -> bool:
        """Return True if the backend works, seen over another connection, or if all connections are taken."""
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

    @asynccontextmanager
    async def naming_blockers(self, subject: str, lock_s: float) -> AsyncIterator[None]:
        """Name the sessions that hold a lock that is waited for within the block; `subject` begins the sentence.

        Raises:
            LockWaitError: `lock_timeout`, which is `lock_s`, ended a statement.

        """
        look_s = lock_s / 4
        async with BlockerWatch(self._url, self._backend, first_s=look_s, every_s=look_s) as blockers:
            self._blockers = blockers
            try:
                yield
            except (SQLAlchemyError, asyncpg.LockNotAvailableError) as error:
                if is_lock_timeout(error):
                    raise LockWaitError(
                        f"{subject} {lock_s:g} s for a lock that {blockers.holder} holds; let it end, or end it with "
                        "pg_terminate_backend, and run this again"
                    ) from error
                raise
            finally:
                self._blockers = None
