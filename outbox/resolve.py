"""What a person decides about a delivery that no machine may decide: in doubt, or dead."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

from outbox.database import CHANNEL


class Decision(StrEnum):
    """It arrived; send it (again); or let it be."""

    SENT = "sent"
    RESEND = "resend"
    DISCARD = "discard"


# A relay that brings late news of the same attempt wins over neither of these: its fence matches a row in doubt, or
# one that is pending and not marked again, and then only a 250 does.
RESOLVE: Final = """
WITH chosen AS (
    SELECT d.email, d.attempt, d.relay, d.marked_at, m.key FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
     WHERE m.key = ANY ($1::text[])
       AND (d.state = 'in_doubt' OR (d.state = 'dead' AND $2::text <> 'sent'))
     ORDER BY d.email FOR UPDATE OF d
), decided AS (
    UPDATE outbox.delivery d
       SET state = CASE $2::text WHEN 'sent' THEN 'sent' WHEN 'resend' THEN 'pending' ELSE 'dead' END,
           settled_at = CASE WHEN $2::text <> 'resend' THEN now() END,
           doubted_at = NULL,
           orphaned = CASE WHEN $2::text = 'resend' THEN 0 ELSE d.orphaned END,
           due_at = now(),
           withdrawn = CASE WHEN $2::text = 'resend' AND d.state = 'dead' THEN d.attempt ELSE d.withdrawn END,
           relay = CASE WHEN $2::text = 'resend' THEN NULL ELSE d.relay END
      FROM chosen c WHERE d.email = c.email
    RETURNING c.email, c.attempt, c.relay, c.marked_at, c.key
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, 'resolved', 'a person decided: ' || $2::text, marked_at FROM decided
)
SELECT key FROM decided
"""


async def resolve(connection: Any, keys: Sequence[str], decision: Decision) -> list[str]:
    """Decide about the deliveries of these keys; gives the keys that were in doubt or dead and now are decided.

    What is dead cannot be declared sent. A dead letter that is sent again has all its tries before it.
    """
    async with connection.transaction(isolation="read_committed"):
        rows = await connection.fetch(RESOLVE, list(keys), decision.value)
        if decision is Decision.RESEND and rows:
            await connection.execute(f"SELECT pg_notify('{CHANNEL}', '')")
    return [row["key"] for row in rows]
