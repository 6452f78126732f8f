"""Rotation of the key that signs bounce tokens. It never leaves Postgres; `schema.sql` describes the signature."""

from datetime import datetime
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.database.locks import take_init_lock
from outbox.errors import OutboxError

# As in `outbox.bounce_tokens`.
FORGET: Final = "DELETE FROM outbox.bounce_key WHERE retired_at <= now() - interval '30 days'"
RETIRE: Final = """
UPDATE outbox.bounce_key SET retired_at = now() WHERE retired_at IS NULL RETURNING id, now() + interval '30 days'
"""
# Numbers are reused after 999: a token of the former key with that number is not valid under the new one.
MAKE: Final = """
INSERT INTO outbox.bounce_key (id, secret)
VALUES ($1 % 999 + 1, sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid(), gen_random_uuid()), 'UTF8')))
"""


async def rotate(connection: Connection) -> datetime | None:
    """Make a new key that signs from the next claim on; return until when tokens of the former one are valid.

    None if there was no key. It is one commit, so relays always find a signing key. Safe on all servers at once, but
    each of them makes a key.

    Raises:
        OutboxError: this role is not the schema's owner, or 999 keys were made within 30 days.

    """
    try:
        async with connection.transaction(isolation="read_committed"):
            await take_init_lock(connection)
            await connection.execute(FORGET)
            former = await connection.fetchrow(RETIRE)
            await connection.execute(MAKE, former[0] if former is not None else 0)
    except asyncpg.InsufficientPrivilegeError as error:
        raise OutboxError(
            "Only the schema's owner may rotate the bounce key; run this with the role that ran `outbox init`."
        ) from error
    except asyncpg.UniqueViolationError as error:
        raise OutboxError(
            "999 bounce keys were made within 30 days, and all may still be needed; wait for a day."
        ) from error
    return former[1] if former is not None else None
