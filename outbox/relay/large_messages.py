"""Large messages: claimed without their bytes, which are fetched once the claim is committed."""

from collections.abc import Sequence
from typing import Final

from outbox.database.connection import Connection
from outbox.smtp.outgoing import OutgoingEmail

# A larger message is claimed without its bytes and fetched separately (`fetch_messages`): if a relay dies of it, the
# claim is committed by then, so the death counts. Only such messages count for the budget. `claims` repeats the number.
SMALL_BYTES: Final = 65536

MESSAGE_LIMIT: Final = "SELECT outbox.message_bytes_max()"


async def message_limit(connection: Connection) -> int:
    """Return the largest message that the database accepts, in bytes."""
    return int(await connection.fetchval(MESSAGE_LIMIT))


FETCH_MESSAGES: Final = "SELECT id, message FROM outbox.email WHERE id = ANY ($1::bigint[])"


async def fetch_messages(connection: Connection, claims: Sequence[OutgoingEmail]) -> list[OutgoingEmail]:
    """Return large claims with the bytes of their messages; without those whose rows are gone."""
    rows = await connection.fetch(FETCH_MESSAGES, [claim.email for claim in claims])
    messages = {row["id"]: row["message"] for row in rows}
    return [
        claim._replace(message=messages[claim.email], is_fetched=True) for claim in claims if claim.email in messages
    ]


STATEMENTS: Final = (FETCH_MESSAGES, MESSAGE_LIMIT)
