"""Recipients of an edition who have no report, and those to whom nothing is owed, as a run of generate sees them.

`generate` records with every complete look which recipients have no report and why (`write_unreached`), so that all
commands and pages can name them. For a recipient with a waiver, which a person writes (`operations.waive`), `generate`
makes no report and counts no failure, and the edition is complete without that recipient.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from sqlalchemy import ARRAY, Text, bindparam, text

from outbox.database.values import storable

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox.generate.session import GenerateSession

REASON_CHARACTERS_MAX: Final = 2000
KEY_CHARACTERS_MAX: Final = 600  # of a key that fails because it is too long: Postgres indexes at most 2,700 octets
WAIVED_REASON: Final = "it was waived when generate last ran"  # shown once the waiver is taken back

READ_WAIVED: Final = text("SELECT recipient_key FROM outbox.waiver WHERE edition = :edition")

# The edition's row is locked first, so that two servers that end their looks at once do not wait for each other's rows
# in turn. Of two looks the later one counts.
RECORD: Final = text("""
WITH held AS MATERIALIZED (
    SELECT id FROM outbox.edition WHERE id = :edition FOR NO KEY UPDATE
), look AS MATERIALIZED (
    SELECT h.id AS edition, n.key, n.reason FROM held h, unnest(:keys, :reasons) AS n (key, reason)
), reached AS (
    DELETE FROM outbox.unreached u USING held h
     WHERE u.edition = h.id AND NOT EXISTS (SELECT FROM look l WHERE l.key = u.recipient_key)
)
INSERT INTO outbox.unreached AS u (edition, recipient_key, reason)
SELECT edition, key, reason FROM look ORDER BY key
ON CONFLICT (edition, recipient_key) DO UPDATE SET reason = excluded.reason WHERE u.reason <> excluded.reason
""").bindparams(bindparam("keys", type_=ARRAY(Text)), bindparam("reasons", type_=ARRAY(Text)))


async def read_waived(session: "GenerateSession", edition: int) -> frozenset[str]:
    """Return the keys of the recipients to whom nothing is owed for this edition."""
    return frozenset(row.recipient_key for row in await session.fetch(READ_WAIVED, {"edition": edition}))


async def write_unreached(
    connection: "AsyncConnection", edition: int, failed: Mapping[str, str], waived: Iterable[str] = ()
) -> None:
    """Record the recipients without a report after a complete look: `failed` with the reasons by key, and `waived`.

    The transaction is the caller's: the one that writes `expected`, so that both are of the same look. Those of
    `waived` are recipients that the source names and that have no report. Completion counts a waiver only for a
    recipient that is recorded here.
    """
    reasons = dict.fromkeys(waived, WAIVED_REASON) | dict(failed)
    found = {storable(key)[:KEY_CHARACTERS_MAX]: storable(why)[:REASON_CHARACTERS_MAX] for key, why in reasons.items()}
    await connection.execute(RECORD, {"edition": edition, "keys": list(found), "reasons": list(found.values())})
