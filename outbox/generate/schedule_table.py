"""Table of schedules: one row per report, with the latest tick that the fleet has taken up and its outcome.

The connection is a short one of the scheduler's own.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

from outbox.database.connection import Connection
from outbox.database.lock_wait import lock_waits
from outbox.database.opening import connect
from outbox.database.values import storable
from outbox.generate.schedule_state import AHEAD_MAX
from outbox.settings import Settings

LOCK_MAX_S: Final = 5.0
SILENCE_MAX_S: Final = 10.0  # a Postgres that does not answer for so long is asked over a new connection
AGAIN_FIRST_S: Final = 60.0  # after a generate that failed; doubles up to
AGAIN_MAX_S: Final = 3600.0

# Relays race to take up a tick; all but the first find it taken up, and start it as well.
TAKE_UP: Final = """
INSERT INTO outbox.schedule AS s (report, tick_at) VALUES ($1, $2)
ON CONFLICT (report) DO UPDATE
   SET tick_at = excluded.tick_at, done_at = NULL, failures = 0, retry_at = now(), said = NULL
 WHERE s.tick_at < excluded.tick_at OR s.tick_at > now() + $3::interval
RETURNING s.tick_at
"""

# A new schedule starts with its next tick: $2 is the latest before.
FOLLOW: Final = """
INSERT INTO outbox.schedule (report, tick_at, done_at, since) VALUES ($1, $2, now(), now())
ON CONFLICT (report) DO NOTHING RETURNING report
"""

DONE: Final = """
UPDATE outbox.schedule SET done_at = now(), said = NULL WHERE report = $1 AND tick_at = $2 AND done_at IS NULL
"""

# Failures of several relays at once count as one: each has seen the same number before.
FAILED: Final = """
UPDATE outbox.schedule
   SET failures = failures + 1, said = $4,
       retry_at = now() + make_interval(secs => least($5::float8 * 2 ^ least(failures, 30), $6::float8))
 WHERE report = $1 AND tick_at = $2 AND done_at IS NULL AND failures = $3
"""


@asynccontextmanager
async def schedule_connection(settings: Settings) -> AsyncIterator[Connection]:
    """Open a short connection; one that falls silent is ended, since a cancel would wait for its answer.

    Raises:
        DatabaseUnavailableError: no connection, or others hold a row for longer than `LOCK_MAX_S`.

    """
    url = settings.database_url
    assert url is not None
    limits = {"statement_timeout": str(int(SILENCE_MAX_S * 1000)), "lock_timeout": str(int(LOCK_MAX_S * 1000))}
    connection = await connect(url, application="outbox schedule", settings=limits)
    try:
        with connection.end_if_silent(SILENCE_MAX_S):
            async with lock_waits(url, connection, "The schedule"):
                yield connection
            await connection.close(timeout=SILENCE_MAX_S)
    finally:
        if not connection.is_closed():
            connection.terminate()


async def follow(connection: Connection, report: str, latest_at: datetime) -> bool:
    """Begin to follow a new schedule after its tick at `latest_at`; False if another relay was first."""
    return await connection.fetchval(FOLLOW, report, latest_at) is not None


async def take_up(connection: Connection, report: str, tick_at: datetime) -> bool:
    """Make a tick the latest of its report; False if another relay has taken it up."""
    return await connection.fetchval(TAKE_UP, report, tick_at, AHEAD_MAX) is not None


async def record_outcome(
    connection: Connection, report: str, tick_at: datetime, *, failures: int, problem: str | None
) -> None:
    """Record that the edition of a tick is done, or the `problem` because of which it is not.

    `failures` is how many there were before.
    """
    if problem is None:
        await connection.execute(DONE, report, tick_at)
    else:
        await connection.execute(FAILED, report, tick_at, failures, storable(problem), AGAIN_FIRST_S, AGAIN_MAX_S)
