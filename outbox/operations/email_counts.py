"""Counts of emails: those that wait, by the reason, and those that are settled, by their state."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from outbox.database.connection import Connection
from outbox.database.driver import Record


@dataclass(frozen=True, slots=True)
class Waiting:
    """Emails that are not settled, by the reason why they wait. `in_flight` is by relay, those being sent included."""

    due: int = 0
    oldest_due_at: datetime | None = None
    in_flight: Mapping[int, int] = field(default_factory=dict)
    postponed: int = 0
    next_at: datetime | None = None
    in_doubt: int = 0
    paused: Mapping[str, int] = field(default_factory=dict)


# One walk over what is open; what is settled is not read.
WAITING: Final = """
SELECT CASE WHEN state <> 'pending' THEN state WHEN paused IS NOT NULL THEN 'paused' WHEN relay IS NOT NULL THEN 'held'
            WHEN due_at > now() THEN 'postponed' ELSE 'due' END AS why,
       CASE WHEN state <> 'in_doubt' THEN relay END AS relay, paused, count(*) AS n,
       min(due_at) FILTER (WHERE due_at < 'infinity') AS first_at
  FROM outbox.delivery WHERE settled_at IS NULL GROUP BY 1, 2, 3
"""


async def read_waiting(connection: Connection) -> Waiting:
    """Count what is not settled."""
    return waiting_of(await connection.fetch(WAITING))


def waiting_of(rows: Iterable[Record]) -> Waiting:
    """Add up the rows of `WAITING`."""
    found: dict[str, int] = {}
    first_at: dict[str, datetime] = {}
    in_flight: dict[int, int] = {}
    paused: dict[str, int] = {}
    for row in rows:
        why, n = row["why"], row["n"]
        found[why] = found.get(why, 0) + n
        if row["first_at"] is not None:
            first_at[why] = row["first_at"]
        if row["relay"] is not None:
            in_flight[row["relay"]] = in_flight.get(row["relay"], 0) + n
        if why == "paused":
            paused[row["paused"]] = n
    return Waiting(
        due=found.get("due", 0),
        oldest_due_at=first_at.get("due"),
        in_flight=in_flight,
        postponed=found.get("postponed", 0),
        next_at=first_at.get("postponed"),
        in_doubt=found.get("in_doubt", 0),
        paused=paused,
    )


# Reads every delivery that there ever was.
SETTLED: Final = """
SELECT state, count(*) AS n FROM outbox.delivery WHERE settled_at IS NOT NULL GROUP BY state
"""

# $1 is among how many of the newest emails.
SETTLED_OF_NEWEST: Final = """
SELECT state, count(*) AS n FROM (SELECT state, settled_at FROM outbox.delivery ORDER BY email DESC LIMIT $1) d
 WHERE settled_at IS NOT NULL GROUP BY state
"""


async def read_settled(connection: Connection, *, newest: int | None = None) -> dict[str, int]:
    """Count what is settled by state, among so many of the newest emails or among all."""
    of = (SETTLED,) if newest is None else (SETTLED_OF_NEWEST, newest)
    return dict(await connection.fetch(*of))
