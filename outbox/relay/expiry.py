"""Expiry: emails that are too late to send, by their `send_before`, end before a relay claims them."""

from collections import Counter
from typing import Final

from outbox.database.connection import Connection
from outbox.log import Events
from outbox.relay.quarantine import Quarantine, is_of_a_row

log = Events("outbox.relay")

# By the narrow index of what has a last moment, in its order. What a relay holds expires at its mark instead.
_LATE: Final = """
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND send_before <= now() AND state = 'pending' AND relay IS NULL"""
_EXPIRE: Final = """
WITH late AS ({late}
), expired AS (
    UPDATE outbox.delivery d
       SET state = 'expired', settled_at = now(), paused = NULL,
           due_at = CASE WHEN paused IS NULL THEN due_at ELSE now() END
      FROM late l WHERE d.email = l.email
    RETURNING d.email, d.attempt
)
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)
SELECT email, attempt, $2, 'expired', 'send_before was over before it was sent' FROM expired
"""
# $1 how many, $2 relay, $3 left out; $1 is the email where it is one.
LATE: Final = f"{_LATE} AND email <> ALL ($2::bigint[]) ORDER BY send_before LIMIT $1"
EXPIRE: Final = _EXPIRE.format(
    late=f"{_LATE} AND email <> ALL ($3::bigint[]) ORDER BY send_before LIMIT $1 FOR UPDATE SKIP LOCKED"
)
EXPIRE_ONE: Final = _EXPIRE.format(late=f"{_LATE} AND email = $1 FOR UPDATE SKIP LOCKED")
EXPIRED_AT_ONCE: Final = 1000


async def expire(connection: Connection, relay: int, quarantine: Quarantine) -> int:
    """End what is pending, not claimed, and too late to send; return how many, at most `EXPIRED_AT_ONCE`."""
    try:
        return _count(await connection.execute(EXPIRE, EXPIRED_AT_ONCE, relay, quarantine.left_out))
    except Exception as error:
        if not is_of_a_row(error):
            raise
    late = [row["email"] for row in await connection.fetch(LATE, EXPIRED_AT_ONCE, quarantine.left_out)]
    done = await quarantine.sift(connection, late, lambda email: connection.execute(EXPIRE_ONE, email, relay))
    return sum(map(_count, done))


def count_expired(counts: Counter[str], emails: int) -> None:
    """Count and log emails that were too late to send."""
    if emails:
        counts["expired"] += emails
        log.warning("emails_expired", "{emails} emails were not sent: their send_before is over", emails=emails)


def _count(tag: str) -> int:
    """Return how many rows a statement wrote, from its command tag."""
    return int(tag.rpartition(" ")[2])


STATEMENTS: Final = (EXPIRE, LATE, EXPIRE_ONE)
