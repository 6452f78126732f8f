"""The digest: a report over reports. One email per address and period names all reports that wait for it.

A report with `deliver = "digest"` is made like any other, and an item in `outbox.digest_item` stands where its email
would: open, until a digest takes it up. The digest itself is a report like any other, too, whose two queries are ours:
its recipients are the addresses that have open items, its rows are these items. It is committed together with the end
of its items, all of which must still be open then, so no item is named twice; what comes later stays open for the
next period's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, BigInteger, Text, bindparam, text

from outbox.settings import DIGEST

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox.generate.report_builder import CollectedReport

ITEMS_MAX: Final = 100  # in one email, so that mail clients do not clip it; the rest is the next period's

# Items that a digest may name: open, not of a paused report, and not deleted behind the link; nor where the
# address is on the suppression list, for the report or for the digest.
OPEN: Final = f"""
outbox.digest_item i
  JOIN outbox.report r ON r.id = i.report
  JOIN outbox.edition e ON e.id = r.edition
 WHERE i.digest IS NULL AND NOT EXISTS (SELECT FROM outbox.pause p WHERE p.report = e.report)
   AND outbox.suppressed(i.address, e.report) IS NULL AND outbox.suppressed(i.address, '{DIGEST}') IS NULL"""

# A recipient who has this edition's digest already is owed it, too, like one whose report is made.
RECIPIENTS: Final = f"""
WITH waiting AS (
    SELECT i.address, (array_agg(i.name ORDER BY i.report DESC) FILTER (WHERE i.name <> ''))[1] AS name
      FROM {OPEN} GROUP BY i.address
), told AS (
    SELECT r.recipient_key FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition
     WHERE e.report = '{DIGEST}' AND e.period = :period
)
SELECT coalesce(w.address, t.recipient_key) AS key, coalesce(w.address, t.recipient_key) AS email, w.name
  FROM waiting w FULL JOIN told t ON t.recipient_key = w.address
"""

# The open items of an address, oldest first; `waiting` counts all of them.
ITEMS: Final = f"""
SELECT n.key, found.*
  FROM unnest(:keys) AS n (key)
 CROSS JOIN LATERAL (
    SELECT r.id, e.report, r.title, e.period, i.link, r.created_at AS made_at, count(*) OVER () AS waiting
      FROM {OPEN} AND i.address = n.key ORDER BY r.id LIMIT {ITEMS_MAX}
 ) found
 ORDER BY found.id
"""

WAITING: Final = text(f"""
SELECT count(*)
  FROM outbox.digest_item i JOIN outbox.report r ON r.id = i.report JOIN outbox.edition e ON e.id = r.edition
 WHERE i.digest IS NULL
   AND outbox.suppressed(i.address, e.report) IS NULL AND outbox.suppressed(i.address, '{DIGEST}') IS NULL
""")


# As `write.ENQUEUE`, with an item for the email. A recipient with an email under this key, from a time before the
# report was collected, has been informed, or will be: the report adopts the email.
COLLECT: Final = text("""
WITH made AS (
    SELECT * FROM unnest(:recipient_keys, :tokens, :titles, :htmls, :keys, :addresses, :names, :links)
        AS m (recipient_key, token, title, html, key, address, name, link)
), report AS (
    INSERT INTO outbox.report (edition, recipient_key, token, title, html)
    SELECT CAST(:edition AS integer), recipient_key, token, title, html FROM made ORDER BY recipient_key
    ON CONFLICT (edition, recipient_key) DO NOTHING
    RETURNING id, recipient_key
), item AS (
    INSERT INTO outbox.digest_item (report, address, name, link)
    SELECT m.id, m.address, nullif(m.name, ''), m.link
      FROM (SELECT id, key, address, name, link FROM report JOIN made USING (recipient_key) OFFSET 0) m
     WHERE (SELECT e.id FROM outbox.email e WHERE e.key = m.key) IS NULL
    RETURNING report
)
SELECT r.id, r.recipient_key, i.report IS NOT NULL AS has_item FROM report r LEFT JOIN item i ON i.report = r.id
""").bindparams(
    *(
        bindparam(name, type_=ARRAY(Text))
        for name in ("recipient_keys", "tokens", "titles", "htmls", "keys", "addresses", "names", "links")
    )
)


async def collect(connection: "AsyncConnection", edition: int, reports: "Sequence[CollectedReport]") -> Sequence[Any]:
    """Write the reports with their items, in the caller's transaction; return the new ones, and which have an item."""
    made = await connection.execute(
        COLLECT,
        {
            "edition": edition,
            "recipient_keys": [r.recipient_key for r in reports],
            "tokens": [r.token for r in reports],
            "titles": [r.title for r in reports],
            "htmls": [r.html for r in reports],
            "keys": [r.key for r in reports],
            "addresses": [r.address for r in reports],
            "names": [r.name for r in reports],
            "links": [r.link for r in reports],
        },
    )
    return made.all()


# In the order of ids, so that two digests with common items wait for each other instead of deadlocking. The one that
# waited sees the row as the other left it: what was taken up meanwhile does not come back (PostgreSQL docs, 13.2.1).
# Written as `digest IS NULL`, the condition lets the planner read the index of all open items, once per batch.
HOLD: Final = text("""
SELECT i.report FROM outbox.digest_item i WHERE i.report = ANY (:items) AND coalesce(i.digest, 0) = 0
 ORDER BY i.report FOR UPDATE
""").bindparams(bindparam("items", type_=ARRAY(BigInteger)))


async def hold(connection: "AsyncConnection", items: Sequence[int]) -> frozenset[int]:
    """Lock the open ones of these items and return them; until the transaction ends no other one can take them up."""
    return frozenset((await connection.scalars(HOLD, {"items": items})).all())


# Only for items that `HOLD` has locked in the same transaction, so each of them is open.
TAKE_UP: Final = text("""
UPDATE outbox.digest_item i SET digest = n.digest FROM unnest(:items, :digests) AS n (item, digest)
 WHERE i.report = n.item
""").bindparams(bindparam("items", type_=ARRAY(BigInteger)), bindparam("digests", type_=ARRAY(BigInteger)))


async def take_up(connection: "AsyncConnection", items: Sequence[tuple[int, int]]) -> None:
    """End items that are held, each with the digest that names it."""
    await connection.execute(TAKE_UP, {"items": [item for item, _ in items], "digests": [by for _, by in items]})
