"""Emails that wait after a try, counted by their reply: `55 deferred: 451 4.3.5 Server configuration error`.

The walk is bounded: of each route it looks at the emails that are due first and at those that are due last, at most
`LOOKED_AT_MAX` of both. A smaller outbox is counted whole.
"""

from dataclasses import dataclass
from typing import Final

from outbox.database.connection import Connection
from outbox.database.lanes import LANES
from outbox.relay.recent_replies import sentence_of

LOOKED_AT_MAX: Final = 5_000
GROUPS_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class Deferral:
    """Emails whose last try got the same reply, but for what differs from one recipient to the next."""

    count: int
    reply: str
    """One of the replies."""

    @property
    def sentence(self) -> str:
        """The count and the reply."""
        return f"{self.count:,} deferred: {self.reply}"


# $1 is LOOKED_AT_MAX.
DEFERRED: Final = f"""
WITH RECURSIVE {LANES}
SELECT a.reply, count(*) AS n
  FROM lane l
 CROSS JOIN LATERAL (
    (SELECT email, attempt FROM outbox.delivery
      WHERE settled_at IS NULL AND route = l.route AND priority = l.priority AND due_at < 'infinity'
        AND state = 'pending' ORDER BY due_at LIMIT $1)
    UNION
    (SELECT email, attempt FROM outbox.delivery
      WHERE settled_at IS NULL AND route = l.route AND priority = l.priority AND due_at < 'infinity'
        AND state = 'pending' ORDER BY due_at DESC LIMIT $1)
 ) d
 CROSS JOIN LATERAL (SELECT verdict, left(reply, 300) AS reply FROM outbox.attempt
                      WHERE email = d.email ORDER BY settled_at DESC, attempt DESC LIMIT 1) a
 WHERE d.attempt > 0 AND a.verdict IN ('deferred', 'withdrawn')
 GROUP BY a.reply ORDER BY n DESC, a.reply LIMIT 1000
"""


async def read_deferrals(connection: Connection) -> list[Deferral]:
    """Return the replies that emails wait after, like replies together, the most frequent first."""
    counts: dict[str, int] = {}
    replies: dict[str, str] = {}
    for row in await connection.fetch(DEFERRED, LOOKED_AT_MAX):
        sentence = sentence_of(row["reply"])
        counts[sentence] = counts.get(sentence, 0) + row["n"]
        replies.setdefault(sentence, row["reply"])
    return [Deferral(counts[one], replies[one]) for one in sorted(counts, key=lambda one: -counts[one])]
