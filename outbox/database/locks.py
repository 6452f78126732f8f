"""Advisory locks of outbox: their namespaces, how their holders are recognised, and the lock of schema changes.

Advisory locks live in one space per database, shared by all its users, whatever the schema (PostgreSQL docs, 13.3.5).
The two-integer form with the first drawn from outbox's name keeps out of the way of others.
"""

import hashlib
import time
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.database.driver import Record
from outbox.errors import DatabaseUnavailableError

NAMESPACE_MASK: Final = 0x7FFFFFFF


def lock_namespace(name: str) -> int:
    """Return the first integer of the locks of one kind, stable across versions; 0 < n < 2³¹."""
    return int.from_bytes(hashlib.sha256(f"outbox:{name}".encode()).digest()[:4], "big") & NAMESPACE_MASK


RELAY_LOCKS: Final = lock_namespace("relay")
BUCKET_LOCKS: Final = lock_namespace("bucket")
EDITION_LOCKS: Final = lock_namespace("edition")
INIT_LOCK: Final = lock_namespace("init")
SELFTEST_LOCKS: Final = lock_namespace("selftest")
PRUNE_LOCK: Final = lock_namespace("prune")

# The lock of relay `r`, granted to the very backend that registered it; $1 is RELAY_LOCKS. Any role that connects can
# take any advisory lock, also one of ours, so the same lock held by another backend, or in share mode, says nothing of
# the relay. A backend that got the process id of a dead relay's does not count either, unless its role could have
# registered a relay.
HOLDS_ITS_LOCK: Final = """
SELECT FROM pg_locks l
 WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ExclusiveLock' AND l.pid = r.backend_pid
   AND l.classid::bigint = $1 AND l.objid::bigint = r.id AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND has_any_column_privilege((SELECT a.usesysid FROM pg_stat_get_activity(l.pid) AS a), r.tableoid, 'INSERT')
"""

# The relays that live, from the locks, not from memory. $1 is RELAY_LOCKS.
ALIVE: Final = f"FROM outbox.relay r WHERE r.ended_at IS NULL AND EXISTS ({HOLDS_ITS_LOCK})"

INIT_WAIT_MAX_S: Final = 600.0


def describe_session(row: Record) -> str:
    """Return pid, role and application of a session as text; pid 0 is a prepared transaction."""
    if not row["pid"]:
        return "a prepared transaction (see pg_prepared_xacts)"
    application = f", application {row['application']}" if row["application"] else ""
    return f"pid {row['pid']} (role {row['role']}{application})"


def explain_lock(doing: str, blockers: str) -> DatabaseUnavailableError:
    """Return the error for a lock that was not obtained in time (SQLSTATE 55P03)."""
    holder = blockers or "a session that has ended meanwhile"
    return DatabaseUnavailableError(
        f"{doing} waited too long for a lock that another session holds: {holder}; "
        "let it end, or end it with pg_terminate_backend(pid), and run this again."
    )


def is_lock_timeout(error: BaseException | None) -> bool:
    """Return True if an error, or one that SQLAlchemy wrapped in it, is a `lock_timeout`."""
    while error is not None:
        if isinstance(error, asyncpg.LockNotAvailableError):
            return True
        error = getattr(error, "orig", None) or error.__cause__
    return False


# The holders of the lock, and whether their roles may create or upgrade the schema, as the role of `outbox init` may.
INIT_HOLDERS: Final = """
SELECT l.pid, a.usesysid::regrole::text AS role, a.application_name AS application,
       coalesce(has_database_privilege(a.usesysid, l.database, 'CREATE')
                OR (SELECT pg_has_role(a.usesysid, nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'outbox'),
                false) AS may_init
  FROM pg_locks l CROSS JOIN LATERAL pg_stat_get_activity(l.pid) AS a
 WHERE l.locktype = 'advisory' AND l.granted AND l.classid::bigint = $1 AND l.objid = 0 AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 ORDER BY may_init, l.pid
"""


async def take_init_lock(connection: Connection) -> None:
    """Take the lock under which one server at a time changes the schema, until the end of the transaction.

    Servers queue for it, each for as long as the others take, but at most for `INIT_WAIT_MAX_S`. A role that may not
    change the schema can hold it, too, since it is an advisory lock: such a holder is waited for only once.

    Raises:
        DatabaseUnavailableError: it is not free in time; the error names pid and role of the holder.

    """
    end = time.monotonic() + INIT_WAIT_MAX_S
    while True:
        try:
            async with connection.transaction():  # a savepoint: a wait that fails does not abort the transaction
                await connection.execute("SELECT pg_advisory_xact_lock($1, 0)", INIT_LOCK)
        except asyncpg.LockNotAvailableError as error:
            holders = await connection.fetch(INIT_HOLDERS, INIT_LOCK)
            outsiders = [row for row in holders if not row["may_init"]]
            if outsiders or time.monotonic() > end:
                found = ", ".join(describe_session(row) for row in outsiders or holders)
                raise explain_lock("Changing the schema", found) from error
        else:
            return
