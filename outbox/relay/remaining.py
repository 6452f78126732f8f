"""Emails that remain to be sent on a route, for a relay that runs until the outbox is empty."""

from collections.abc import Sequence
from typing import Final

from outbox.database.connection import Connection

# By the index of open rows alone, so settled rows are not read. Only a pause sets a pending row's date to infinity;
# one without a pause was written by hand and is never due.
EMPTY: Final = """
SELECT NOT EXISTS (SELECT FROM outbox.delivery WHERE settled_at IS NULL AND state IN ('pending', 'sending')
                      AND route = $2 AND priority IN (0, 1)
                      AND due_at <= coalesce(now() + $1::float8 * interval '1 second', 'infinity')
                      AND (state = 'sending' OR due_at < 'infinity' OR paused IS NOT NULL)
                      AND email <> ALL ($3::bigint[]))
"""


async def is_empty(
    connection: Connection, *, route: str = "", within_s: float | None = None, left_out: Sequence[int] = ()
) -> bool:
    """Return True if nothing of the route is pending or being sent by any relay, nor will be due within that time.

    What is in doubt or dead waits for a person, and so does what is pending without a date, or left out.
    """
    return bool(await connection.fetchval(EMPTY, within_s, route, left_out))


# Emails that no relay ever takes: $2 emails of each kind at most.
NEVER_TAKEN: Final = """
SELECT email, 'its due_at is infinity, and no pause holds it back' AS why FROM (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND route = $1 AND priority IN (0, 1) AND due_at = 'infinity'
       AND state = 'pending' AND paused IS NULL LIMIT $2) AS undated
UNION ALL
SELECT email, 'its priority is neither 0 nor 1' FROM (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND route = $1 AND (priority < 0 OR priority > 1) AND due_at <= 'infinity'
       AND state IN ('pending', 'sending') LIMIT $2) AS misplaced
"""
NEVER_TAKEN_SHOWN: Final = 10


async def never_taken(connection: Connection, *, route: str = "") -> dict[int, str]:
    """Return some emails of each kind that wait on a route although no relay ever takes them, and why."""
    return {row["email"]: row["why"] for row in await connection.fetch(NEVER_TAKEN, route, NEVER_TAKEN_SHOWN)}


STATEMENTS: Final = (EMPTY, NEVER_TAKEN)
