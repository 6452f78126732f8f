"""Emails of a paused report are set aside, and taken up when the pause is over.

A pause is a row (`database.pause_list`). Each tick reads the rows that there are, normally none, so a relay obeys from
its next tick on. While the fleet is paused no relay claims. While a report is paused its emails are claimed as usual
and set aside at once: due at infinity, with the report's name in `paused`, so that they delay no others. Any relay
takes up what is set aside under a pause that is over; so a pause that ends while a relay sets emails aside leaves
nothing behind.
"""

from collections.abc import Sequence
from typing import Final

from outbox.database.connection import Connection
from outbox.relay.quarantine import Quarantine, is_of_a_row

TAKEN_UP_AT_ONCE: Final = 1000

# Only what is still this relay's unmarked claim. What belongs to no report is held back with the fleet only.
SET_ASIDE: Final = """
UPDATE outbox.delivery d
   SET paused = e.report, due_at = 'infinity', relay = NULL
  FROM outbox.email m
  JOIN outbox.report r ON r.id = m.report
  JOIN outbox.edition e ON e.id = r.edition
  JOIN outbox.pause p ON p.report = e.report
 WHERE d.email = ANY ($1::bigint[]) AND d.relay = $2 AND d.state = 'pending' AND m.id = d.email
RETURNING d.email
"""


async def set_aside(
    connection: Connection, relay: int, emails: Sequence[int], quarantine: Quarantine
) -> frozenset[int]:
    """Set aside those of a relay's unmarked claims that belong to a paused report; return them."""
    if not emails:
        return frozenset()
    rows = await quarantine.all_or_each(connection, emails, lambda some: connection.fetch(SET_ASIDE, some, relay))
    return frozenset(row["email"] for row in rows)


# The names under which something is set aside, each found by one step in the index, however much lies under it.
_NAMES: Final = """
names AS (
    (SELECT paused FROM outbox.delivery WHERE settled_at IS NULL AND paused IS NOT NULL ORDER BY paused LIMIT 1)
    UNION ALL
    SELECT (SELECT d.paused FROM outbox.delivery d
             WHERE d.settled_at IS NULL AND d.paused IS NOT NULL AND d.paused > n.paused ORDER BY d.paused LIMIT 1)
      FROM names n WHERE n.paused IS NOT NULL
), ended AS (
    SELECT paused FROM names n
     WHERE paused IS NOT NULL AND NOT EXISTS (SELECT FROM outbox.pause p WHERE p.report = n.paused)
)"""

# $1 how many, $2 emails that are left out.
_SET_ASIDE_BEFORE: Final = """
    SELECT d.email FROM ended n
     CROSS JOIN LATERAL (SELECT email FROM outbox.delivery
                          WHERE settled_at IS NULL AND paused = n.paused AND state = 'pending'
                            AND email <> ALL ($2::bigint[])
                          LIMIT $1 {lock}) d
     LIMIT $1"""
TAKE_UP: Final = f"""
WITH RECURSIVE {_NAMES}, chosen AS ({_SET_ASIDE_BEFORE.format(lock="FOR UPDATE SKIP LOCKED")}
)
UPDATE outbox.delivery d SET paused = NULL, due_at = now() FROM chosen c WHERE d.email = c.email
"""
TO_TAKE_UP: Final = f"""
WITH RECURSIVE {_NAMES}
{_SET_ASIDE_BEFORE.format(lock="")}
"""
TAKE_UP_ONE: Final = """
UPDATE outbox.delivery SET paused = NULL, due_at = now()
 WHERE email = $1 AND state = 'pending' AND settled_at IS NULL AND paused IS NOT NULL
"""


async def take_up(connection: Connection, quarantine: Quarantine) -> int:
    """Make due what is set aside under pauses that are over; return how many, at most `TAKEN_UP_AT_ONCE`."""
    try:
        done = [await connection.execute(TAKE_UP, TAKEN_UP_AT_ONCE, quarantine.left_out)]
    except Exception as error:
        if not is_of_a_row(error):
            raise
        rows = await connection.fetch(TO_TAKE_UP, TAKEN_UP_AT_ONCE, quarantine.left_out)
        done = await quarantine.sift(
            connection, [row["email"] for row in rows], lambda email: connection.execute(TAKE_UP_ONE, email)
        )
    return sum(int(tag.rpartition(" ")[2]) for tag in done)


# What is not set aside is due some day; what is set aside is not by itself.
HELD: Final = f"""
WITH RECURSIVE {_NAMES}
SELECT EXISTS (SELECT FROM outbox.pause WHERE report = '')
       OR (NOT EXISTS (SELECT FROM outbox.delivery WHERE settled_at IS NULL AND route = $1 AND priority IN (0, 1)
                          AND due_at < 'infinity' AND state IN ('pending', 'sending'))
           AND NOT EXISTS (SELECT FROM ended))
"""


async def is_held(connection: Connection, *, route: str = "") -> bool:
    """Return True if nothing of the route is left to send but what a pause holds back."""
    return bool(await connection.fetchval(HELD, route))


STATEMENTS: Final = (SET_ASIDE, TAKE_UP, TO_TAKE_UP, TAKE_UP_ONE, HELD)
