"""Claims of suppressed addresses are cancelled.

A relay looks at the suppression list with each claim (`claims`), and cancels a listed email before a connection gets
it. So all that is pending is caught, reports and an application's own emails alike. `generate` cancels from the start.
An email that a relay had claimed before its address was listed may still be sent: that is seconds, and never more than
it holds.
"""

from collections.abc import Sequence
from typing import Final

from outbox.database.connection import Connection
from outbox.relay.quarantine import Quarantine

# The report is looked up here only, since most claims are not of a listed address.
CANCEL_LISTED: Final = """
WITH listed AS (
    SELECT m.id AS email, outbox.suppressed(m.recipient, e.report) AS why
      FROM unnest($1::bigint[]) AS n (email)
      JOIN outbox.email m ON m.id = n.email
      LEFT JOIN outbox.report r ON r.id = m.report
      LEFT JOIN outbox.edition e ON e.id = r.edition
), cancelled AS (
    UPDATE outbox.delivery d SET state = 'cancelled', settled_at = now(), relay = NULL, paused = NULL
      FROM listed l WHERE d.email = l.email AND d.relay = $2 AND d.state = 'pending' AND l.why IS NOT NULL
    RETURNING d.email, d.attempt, l.why
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)
    SELECT email, attempt, $2, 'suppressed', why FROM cancelled
)
SELECT email FROM cancelled
"""
STATEMENTS: Final = (CANCEL_LISTED,)


async def cancel_listed(
    connection: Connection, relay: int, emails: Sequence[int], quarantine: Quarantine
) -> frozenset[int]:
    """Cancel those of a relay's unmarked claims that are suppressed, with the reason in their trails; return them."""
    rows = await quarantine.all_or_each(connection, emails, lambda some: connection.fetch(CANCEL_LISTED, some, relay))
    return frozenset(row["email"] for row in rows)
