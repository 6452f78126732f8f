"""Waits for locks of other sessions, and which holders of an advisory lock count.

Each wait has a bound (`lock_timeout`). The error that ends it does not say who holds the lock, and afterwards Postgres
cannot tell. So `BlockerWatch` asks over a second connection while the wait goes on. `lock_waits` does so for a command.

Any role that may connect can take any advisory lock. A lock that is held by a role that could not do the protected work
itself does not count: `holders` leaves it out.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Self

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.locks import describe_session, explain_lock, is_lock_timeout
from outbox.database.opening import connect
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.settings.urls import DatabaseUrl

UNKNOWN: Final = "another session"
LOOK_EVERY_S: Final = 2.0
LOOK_MAX_S: Final = 3.0

BLOCKERS: Final = """
SELECT b.pid, a.usesysid::regrole::text AS role, a.application_name AS application
  FROM (SELECT DISTINCT unnest(pg_blocking_pids($1)) AS pid) AS b
  LEFT JOIN LATERAL pg_stat_get_activity(b.pid) AS a ON b.pid <> 0
 ORDER BY b.pid
"""


class LockWaitError(OutboxError):
    """A lock of another session was waited for until `lock_timeout` ended the wait; nothing was changed."""


class BlockerWatch:
    """Watch that finds out which sessions block the backend `pid`, for as long as the block runs.

    A statement that is answered before `first_s` opens no second connection. A connection that fails is replaced.
    """

    def __init__(self, url: DatabaseUrl, pid: int, *, first_s: float, every_s: float) -> None:
        self.seen = ""
        """The sessions that were seen last, as `pid 4711 (role app, application psql)`; empty if there were none."""
        self._url = url
        self._pid = pid
        self._first_s = first_s
        self._every_s = every_s
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def holder(self) -> str:
        """Return the sessions that were seen last, or a word for one that is not known."""
        return self.seen or UNKNOWN

    async def __aenter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(self._first_s, self._start)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            with suppress(OutboxError, *LOST_SESSION, asyncpg.PostgresError):
                await self._look()
            await asyncio.sleep(self._every_s)

    async def _look(self) -> None:
        """Ask again and again over one connection, until it fails."""
        look = await connect(self._url, application="outbox looks", timeout_s=LOOK_MAX_S)
        try:
            while True:
                rows = await look.fetch(BLOCKERS, self._pid, timeout=LOOK_MAX_S)
                self.seen = ", ".join(describe_session(row) for row in rows) or self.seen
                await asyncio.sleep(self._every_s)
        finally:
            look.terminate()


@asynccontextmanager
async def lock_waits(url: DatabaseUrl, connection: Connection, doing: str) -> AsyncIterator[None]:
    """Name the session that holds the lock when a statement of the block reaches its `lock_timeout`.

    Raises:
        DatabaseUnavailableError: a statement reached its `lock_timeout`; the error names pid and role of the holder.

    """
    pid = await connection.fetchval("SELECT pg_backend_pid()")
    # Most commands end before the first look, and need no second connection.
    async with BlockerWatch(url, pid, first_s=LOOK_EVERY_S, every_s=LOOK_EVERY_S) as watch:
        try:
            yield
        except Exception as error:
            if not is_lock_timeout(error):
                raise
            if isinstance(error, OutboxError):  # it already says what was done and what to do
                held = f" The lock is held by {watch.seen}." if watch.seen else ""
                raise DatabaseUnavailableError(f"{error}{held}") from error
            raise explain_lock(doing, watch.seen) from error


# pg_has_role with MEMBER: a role that may SET ROLE to one with the right counts as having it.
_HOLDERS: Final = """
SELECT l.objid::bigint AS number, l.pid, a.usename AS role, a.application_name AS application
  FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'advisory' AND l.granted AND l.classid::bigint = $1 AND l.objid::bigint = ANY ($2::bigint[])
   AND l.objsubid = 2 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND EXISTS (SELECT FROM pg_roles r WHERE pg_has_role(a.usesysid, r.oid, 'MEMBER') AND {may})
 ORDER BY l.pid
"""
MAY_GENERATE: Final = "has_any_column_privilege(r.oid, 'outbox.report', 'INSERT')"
MAY_PRUNE: Final = "has_any_column_privilege(r.oid, 'outbox.pruned', 'INSERT')"


async def holders(connection: Connection, namespace: int, numbers: Sequence[int], may: str) -> dict[int, str]:
    """Return the holders of these advisory locks, by number, as `pid 4711 (role app)`; only roles that satisfy `may`.

    A prepared transaction can hold one without a process. No session of outbox prepares any, so it is left out.
    """
    rows = await connection.fetch(_HOLDERS.format(may=may), namespace, list(numbers))
    return {row["number"]: describe_session(row) for row in rows}
