"""Query plans that do not depend on statistics.

A table that was empty a minute ago has statistics that say so: without these settings it would be read whole for every
batch, by a plan that the session then keeps.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from outbox.database.connection import Connection

# Plans that look up rows by index, in its order, whatever the statistics say. A bitmap scan gives no order, so that a
# claim would read and sort the whole backlog. BY_INDEX sets this for a transaction.
NOT_BY_INDEX: Final = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin")
BY_INDEX: Final = "SELECT " + ", ".join(f"set_config('{method}', 'off', true)" for method in NOT_BY_INDEX)
# The same for a statement that joins arrays of a batch to each other: these have no index, so they are hashed.
BATCH_BY_INDEX: Final = BY_INDEX + ", set_config('enable_hashjoin', 'on', true)"

_AS_BEFORE: Final = "SELECT " + ", ".join(f"set_config('{method}', 'on', true)" for method in NOT_BY_INDEX)


@asynccontextmanager
async def by_index(connection: Connection) -> AsyncIterator[None]:
    """Plan the block's statements by index; statements after it in the same transaction are planned as usual."""
    async with connection.transaction():
        await connection.execute(BY_INDEX)
        yield
        await connection.execute(_AS_BEFORE)


# Joins to each report `r` its digest item `i`, the email `m` (its own, or that of the digest that took it up) and the
# email's delivery `d`. Each `OFFSET 0` keeps its subquery from being joined as a whole: the planner can then only look
# it up for one row at a time, by the index of its WHERE. Without statistics it may join all emails to all reports in a
# nested loop over a materialized scan, which is quadratic.
EMAIL_OF_REPORT: Final = """
  LEFT JOIN LATERAL (SELECT report, digest FROM outbox.digest_item WHERE report = r.id OFFSET 0) i ON true
  LEFT JOIN LATERAL (SELECT id FROM outbox.email WHERE report = coalesce(i.digest, r.id) OFFSET 0) m ON true
  LEFT JOIN LATERAL (SELECT email, state FROM outbox.delivery WHERE email = m.id OFFSET 0) d ON true
"""
