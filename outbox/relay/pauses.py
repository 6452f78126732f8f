"""Pauses: a report, or the whole fleet, is held back by a person, from `outbox pause` to `outbox resume`.

A pause is a row. Each tick reads the rows that there are, normally none, so a relay obeys from its next tick on. While
the fleet is paused no relay claims. While a report is paused its emails are claimed as usual and set aside at once: due
at infinity, with the report's name in `paused`, so that they delay no others. Any relay takes up what is set aside
under a pause that is over; so a pause that ends while a relay sets emails aside leaves nothing behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from outbox import suggestions
from outbox.database.connection import CHANNEL, Connection
from outbox.database.lanes import LANES
from outbox.database.values import storable
from outbox.relay.quarantine import Quarantine, is_of_a_row

FLEET: Final = ""
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
    connection: Connection, relay: int, emails: Sequence[int], quarantine: Quarantine | None = None
) -> frozenset[int]:
    """Set aside those of a relay's unmarked claims that belong to a paused report; return them."""
    if not emails:
        return frozenset()
    quarantine = quarantine or Quarantine((relay,))
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


async def take_up(connection: Connection, quarantine: Quarantine | None = None) -> int:
    """Make due what is set aside under pauses that are over; return how many, at most `TAKEN_UP_AT_ONCE`."""
    quarantine = quarantine or Quarantine()
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


@dataclass(frozen=True, slots=True)
class Pause:
    """Pause in force, and how many emails wait under it, set aside or not yet; `report` is '' for the fleet.

    `waiting` is counted up to `WAITING_MAX`.
    """

    report: str
    since: datetime
    who: str
    why: str
    waiting: int

    @property
    def target(self) -> str:
        """Return the name of what is paused, for people."""
        return label(self.report)

    @property
    def remedy(self) -> str:
        """Return the command that ends it."""
        return resumption(self.report)


def resumption(report: str) -> str:
    """Return the command that ends the pause of a report, or ('') of the fleet."""
    return suggestions.command("resume", keys=[report] if report else [])


def label(report: str) -> str:
    """Return the name of what a pause holds back, for people: a report, or ('') the fleet."""
    return report or "the fleet"


# What waits is counted to a bound, since the answer is needed fast. What is set aside is found by its index; what is
# not yet is at the front of what is due, where relays set it aside, so a look at some of that is enough.
PAUSES: Final = f"""
WITH RECURSIVE {LANES}
SELECT p.report, p.since, left(p.who, 500) AS who, left(p.why, 2000) AS why,
       CASE WHEN p.report = ''
            THEN (SELECT count(*) FROM (SELECT FROM lane l CROSS JOIN LATERAL (
                                            SELECT FROM outbox.delivery
                                             WHERE settled_at IS NULL AND route = l.route AND priority = l.priority
                                               AND due_at <= 'infinity' AND state = 'pending'
                                             LIMIT $1) d
                                         LIMIT $1) d)
            ELSE (SELECT count(*) FROM (SELECT FROM outbox.delivery
                                         WHERE settled_at IS NULL AND paused = p.report AND state = 'pending'
                                         LIMIT $1) d)
                 + (SELECT count(*) FROM lane l
                     CROSS JOIN LATERAL (SELECT email FROM outbox.delivery
                                          WHERE settled_at IS NULL AND route = l.route AND priority = l.priority
                                            AND due_at <= 'infinity' AND state = 'pending' AND paused IS NULL
                                          ORDER BY due_at, email LIMIT $2) d
                      JOIN outbox.email m ON m.id = d.email
                      JOIN outbox.report r ON r.id = m.report JOIN outbox.edition e ON e.id = r.edition
                     WHERE e.report = p.report)
       END
  FROM outbox.pause p ORDER BY p.report
"""
WAITING_MAX: Final = 100_000
LOOKED_AT_MAX: Final = 10_000


async def read_pauses(connection: Connection) -> list[Pause]:
    """Return all pauses in force, the fleet's first."""
    return [Pause(*row) for row in await connection.fetch(PAUSES, WAITING_MAX, LOOKED_AT_MAX)]


STATEMENTS: Final = (SET_ASIDE, TAKE_UP, TO_TAKE_UP, TAKE_UP_ONE, HELD, PAUSES)

KNOWN: Final = """
SELECT EXISTS (SELECT FROM outbox.definition WHERE report = $1) OR EXISTS (SELECT FROM outbox.edition WHERE report = $1)
"""


async def is_known(connection: Connection, report: str) -> bool:
    """Return True if the fleet has ever generated a report of that name."""
    return storable(report) == report and bool(await connection.fetchval(KNOWN, report))


# The operation is recorded only for a new pause: one that is there already keeps its author.
BEGIN: Final = """
WITH begun AS (
    INSERT INTO outbox.pause (report, who, why) VALUES ($1, $2, $3) ON CONFLICT (report) DO NOTHING RETURNING 1
)
INSERT INTO outbox.operation (who, what, target, why, emails) SELECT $2, 'pause', $4, $3, 0 FROM begun
"""

END: Final = """
WITH ended AS (
    DELETE FROM outbox.pause WHERE report = $1 RETURNING 1
)
INSERT INTO outbox.operation (who, what, target, why, emails) SELECT $2, 'resume', $4, $3, $5::bigint FROM ended
"""


async def begin_pause(connection: Connection, report: str, *, who: str, why: str) -> bool:
    """Pause a report, or the fleet; return False, and change nothing, if it is paused already."""
    async with connection.transaction():
        done = await connection.execute(BEGIN, report, storable(who), storable(why), label(report))
        await connection.execute(f"NOTIFY {CHANNEL}")
    return bool(done.endswith(" 1"))


async def end_pause(connection: Connection, report: str, *, who: str, why: str, waiting: int = 0) -> bool:
    """Resume a report, or the fleet; return False if it is not paused. `waiting` is kept with the operation."""
    async with connection.transaction():
        done = await connection.execute(END, report, storable(who), storable(why), label(report), waiting)
        await connection.execute(f"NOTIFY {CHANNEL}")
    return bool(done.endswith(" 1"))
