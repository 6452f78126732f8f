"""Pauses as a person begins and ends them: `outbox pause`, `outbox resume` and the board (relays: `relay.pauses`)."""

from typing import Final

from outbox.database.connection import CHANNEL, Connection
from outbox.database.pause_list import label
from outbox.database.values import storable

KNOWN: Final = """
SELECT EXISTS (SELECT FROM outbox.definition WHERE report = $1) OR EXISTS (SELECT FROM outbox.edition WHERE report = $1)
"""


async def is_known(connection: Connection, report: str) -> bool:
    """Return True if the fleet has ever generated a report of that name."""
    return storable(report) == report and bool(await connection.fetchval(KNOWN, report))


# The operation is recorded only for a new pause: one that is there already keeps its author.
BEGIN: Final = """
WITH begun AS (
    INSERT INTO outbox.pause (report, who, why) VALUES ($1, $2, $3) ON CONFLICT (report) DO NOTHING RETURNING 1
)
INSERT INTO outbox.operation (who, what, target, why, emails) SELECT $2, 'pause', $4, $3, 0 FROM begun
"""

END: Final = """
WITH ended AS (
    DELETE FROM outbox.pause WHERE report = $1 RETURNING 1
)
INSERT INTO outbox.operation (who, what, target, why, emails) SELECT $2, 'resume', $4, $3, $5::bigint FROM ended
"""


async def begin_pause(connection: Connection, report: str, *, who: str, why: str) -> bool:
    """Pause a report, or the fleet; return False, and change nothing, if it is paused already."""
    async with connection.transaction():
        done = await connection.execute(BEGIN, report, storable(who), storable(why), label(report))
        await connection.execute(f"NOTIFY {CHANNEL}")
    return bool(done.endswith(" 1"))


async def end_pause(connection: Connection, report: str, *, who: str, why: str, waiting: int = 0) -> bool:
    """Resume a report, or the fleet; return False if it is not paused. `waiting` is kept with the operation."""
    async with connection.transaction():
        done = await connection.execute(END, report, storable(who), storable(why), label(report), waiting)
        await connection.execute(f"NOTIFY {CHANNEL}")
    return bool(done.endswith(" 1"))
