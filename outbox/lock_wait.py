"""Waits of generate and prune for locks of other sessions, and which holders of an advisory lock count.

Each wait has a bound (`lock_timeout`). The error that ends it does not say who holds the lock, and afterwards Postgres
cannot tell. So `BlockerWatch` asks over a second connection while the wait goes on. For the other commands
`database.lock_waits` does so.

Any role that may connect can take advisory locks, ours too. A lock that is held by a role which could not do the
protected work itself excludes nobody: `holders` leaves it out.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Self

from outbox.address import DatabaseUrl
from outbox.database import describe_blockers, describe_session
from outbox.errors import OutboxError

UNKNOWN: Final = "another session"


class LockWaitError(OutboxError):
    """A lock of another session was waited for until `lock_timeout` ended the wait; nothing was changed."""


class BlockerWatch:
    """Remembers who held the lock that a session waited for: within the block it looks again and again.

    A statement that is answered before `first_s` opens no second connection.
    """

    def __init__(self, url: DatabaseUrl, pid: int, *, first_s: float, every_s: float) -> None:
        self.seen = ""
        self._url = url
        self._pid = pid
        self._first_s = first_s
        self._every_s = every_s
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def holder(self) -> str:
        """Who was seen last, as `pid 4711 (role app)`."""
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
        self._task = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while True:
            self.seen = await describe_blockers(self._url, self._pid) or self.seen
            await asyncio.sleep(self._every_s)


# pg_has_role with MEMBER: who may SET ROLE to one that has the right may have it.
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


async def holders(connection: Any, namespace: int, numbers: Sequence[int], may: str) -> dict[int, str]:
    """Return who holds these advisory locks, by number, as `pid 4711 (role app)`; only roles that satisfy `may`.

    A prepared transaction can hold one, too, without a process: none of our sessions prepares any, so it is left out.
    """
    rows = await connection.fetch(_HOLDERS.format(may=may), namespace, list(numbers))
    return {row["number"]: describe_session(row) for row in rows}
