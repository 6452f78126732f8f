"""Suppression list: addresses that get no more email, of one report or at all, since when and why.

`outbox suppress` shows and changes it, the recipients themselves and bounces add to it, and relays obey
(`relay.suppression`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from outbox import suggestions
from outbox.database.connection import Connection
from outbox.database.plans import BY_INDEX
from outbox.database.suppression_entry import Entry
from outbox.database.values import storable


@dataclass(frozen=True, slots=True)
class Suppression:
    """Entry of the list. `report` is '' if it holds for all email; `key` is the email that it came of."""

    address: str
    report: str
    since: datetime
    reason: str
    who: str
    why: str
    key: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the entry for scripts."""
        return asdict(self)


LIST: Final = """
SELECT s.address, s.report, s.since, s.reason, left(s.who, 500) AS who, left(s.why, 2000) AS why, m.key
  FROM outbox.suppression s LEFT JOIN outbox.email m ON m.id = s.email
 ORDER BY s.since DESC, s.address, s.report LIMIT $1
"""
COUNT: Final = "SELECT count(*) FROM outbox.suppression"


async def read_list(connection: Connection, *, limit: int | None = None) -> tuple[list[Suppression], int]:
    """Return the newest entries, and how many more there are."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        found = [Suppression(*row) for row in await connection.fetch(LIST, limit)]
        return found, await connection.fetchval(COUNT) - len(found)


# The operation is recorded only for new entries: an entry that is there already keeps its author.
ADD: Final = """
WITH added AS (
    INSERT INTO outbox.suppression (address, report, reason, who, why)
    SELECT address, report, reason, $4, $5
      FROM unnest($1::text[], $2::text[], $3::text[]) AS n (address, report, reason)
     ORDER BY address, report
    ON CONFLICT (address, report) DO NOTHING RETURNING address, report
), noted AS (
    INSERT INTO outbox.operation (who, what, target, why, emails)
    SELECT $4, 'suppress', address || CASE WHEN report <> '' THEN ' --report ' || report ELSE '' END, $5, 0 FROM added
)
SELECT count(*) FROM added
"""


async def add(connection: Connection, entries: Sequence[Entry], *, who: str, why: str) -> int:
    """Add entries to the list; return how many are new."""
    columns = list(zip(*((one.address, one.report, one.reason.value) for one in entries), strict=True))
    return int(await connection.fetchval(ADD, *(columns or ([], [], [])), storable(who), storable(why)))


# What bounced before does not count towards `bounces_max` again, else the next bounce would bring the address back.
REMOVE: Final = """
WITH removed AS (
    DELETE FROM outbox.suppression WHERE address = $1 AND report = $2 RETURNING reason
), counted_no_more AS (
    UPDATE outbox.bounce SET counts = false
     WHERE email = ANY (ARRAY(SELECT m.id FROM outbox.email m WHERE lower(m.recipient) = lower($1)))
       AND counts AND EXISTS (SELECT FROM removed)
), noted AS (
    INSERT INTO outbox.operation (who, what, target, why, emails)
    SELECT $3, 'unsuppress', $1 || CASE WHEN $2 <> '' THEN ' --report ' || $2 ELSE '' END, $4, 0 FROM removed
)
SELECT count(*) FROM removed
"""


async def remove(connection: Connection, address: str, report: str, *, who: str, why: str) -> bool:
    """Remove an address from the list, for that report or for all; return False if it was not on it."""
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(BY_INDEX)
        return bool(await connection.fetchval(REMOVE, address, report, storable(who), storable(why)))


# How the reason that `outbox.suppressed` gives begins if one report is meant. A person's or server's words come later.
_OF_A_REPORT: Final = "its address is on the suppression list for "


def remedy(address: str, reason: str, report: str | None) -> str:
    """Return the command that removes an address whose email of that report was cancelled for this reason."""
    return removal(address, report if report and reason.startswith(_OF_A_REPORT) else "")


def removal(address: str, report: str) -> str:
    """Return the command that removes an address from the list, for that report or ('') for all."""
    after = [suggestions.option("--report", report)] if report else []
    return suggestions.command("suppress", "--remove", keys=[address], after=after)


OTHERS: Final = "SELECT report FROM outbox.suppression WHERE address = $1 ORDER BY report"


async def reports_of(connection: Connection, address: str) -> list[str]:
    """Return the reports for which an address is on the list; '' is for all."""
    return [row["report"] for row in await connection.fetch(OTHERS, address)]
