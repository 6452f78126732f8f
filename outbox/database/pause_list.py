"""Pauses in force: reports, or the whole fleet, that a person holds back, from `outbox pause` to `outbox resume`."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from outbox import suggestions
from outbox.database.connection import Connection
from outbox.database.lanes import LANES

FLEET: Final = ""  # the report of a pause that holds back all mail
WAITING_MAX: Final = 100_000
LOOKED_AT_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Pause:
    """Pause in force; `report` is '' for the fleet."""

    report: str
    since: datetime
    who: str
    why: str
    waiting: int = 0
    """Emails that wait under it, set aside or not yet, counted up to the `waiting_max` of its reader."""

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


# $1 waiting_max, $2 how many of what is due are looked at in each lane. What waits is counted to these bounds, since
# the answer is needed fast; with 0, no delivery is read but one for each lane. What is set aside is found by its index;
# what is not yet is at the front of what is due, where relays set it aside, so a look at some of that is enough.
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


async def read_pauses(connection: Connection, *, waiting_max: int = WAITING_MAX) -> list[Pause]:
    """Return all pauses in force, the fleet's first; with `waiting_max` 0 nothing that waits is counted."""
    looked_at_max = min(waiting_max, LOOKED_AT_MAX)
    return [Pause(*row) for row in await connection.fetch(PAUSES, waiting_max, looked_at_max)]


STATEMENTS: Final = (PAUSES,)
