"""Identity of the server that a session is connected to: another timeline means that commits may be missing there."""

from typing import Final

import asyncpg

from outbox.database.connection import Connection

# Not pg_control_checkpoint(): it shows the old timeline until the first checkpoint after the promotion.
TIMELINE: Final = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint"
TIMELINE_ELSEWHERE: Final = "SELECT timeline_id::bigint FROM pg_control_checkpoint()"


async def timeline_of(connection: Connection) -> int:
    """Return the WAL timeline that this session writes on, from 1; 0 where the server does not show it."""
    for query in (TIMELINE, TIMELINE_ELSEWHERE):
        try:
            return int(await connection.fetchval(query))
        except (asyncpg.FeatureNotSupportedError, asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError):
            continue  # a managed service that keeps its WAL to itself
    return 0
