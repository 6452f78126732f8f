"""The newest of the emails that a person asked for, each with its state and its last reply (`outbox list`)."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from outbox.database.connection import Connection
from outbox.mail.delivery_state import DeliveryState
from outbox.operations.email_columns import DUE_AT, last_reply
from outbox.operations.email_filter import Selection, query_of

COUNTED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Listed:
    """Email in a list: its state, and the last reply.

    `due_at` is null if it is not due by itself; `paused` is the report under whose pause it was set aside.
    """

    key: str
    to: str
    report: str | None
    period: str | None
    state: DeliveryState
    attempts: int
    relay: int | None
    paused: str | None
    created_at: datetime
    due_at: datetime | None
    marked_at: datetime | None
    settled_at: datetime | None
    doubted_at: datetime | None
    said: str
    route: str
    """Route that it takes; '' is the usual one."""
    urgent: bool
    needs_person: bool
    """In doubt, or failed and undecided; other than for `attention`, of any age."""

    @property
    def since(self) -> datetime:
        """Return when it got its state; for a pending email, when it was made."""
        marked_at = self.marked_at if self.state == DeliveryState.SENDING else None
        return self.settled_at or self.doubted_at or marked_at or self.created_at


@dataclass(frozen=True, slots=True)
class Listing:
    """The newest emails that fit; there are `more` beside these, or at least so many."""

    emails: list[Listed]
    more: int
    at_least: bool

    def as_json(self) -> dict[str, Any]:
        """Return it for scripts; times as ISO 8601 in UTC."""
        return {"emails": [asdict(one) for one in self.emails], "more": self.more, "more_is_at_least": self.at_least}


LIST: Final = f"""
WITH found AS MATERIALIZED (SELECT d.email FROM {{text}} ORDER BY d.email DESC LIMIT {{most}})
SELECT m.key, m.recipient, e.report, e.period, d.state, d.attempt, d.relay, d.paused, m.created_at,
       {DUE_AT} AS due_at,
       d.marked_at, d.settled_at, d.doubted_at,
       coalesce({last_reply("d.email")}, '') AS said,
       d.route, d.priority > 0 AS urgent,
       d.state = 'in_doubt'
       OR EXISTS (SELECT FROM outbox.undecided_failure u WHERE u.email = d.email OFFSET 0) AS needs_person,
       (SELECT count(*) FROM found) AS total
  FROM (SELECT email FROM found ORDER BY email DESC LIMIT {{limit}}) f
  JOIN outbox.delivery d ON d.email = f.email JOIN outbox.email m ON m.id = f.email
  LEFT JOIN outbox.report r ON r.id = m.report LEFT JOIN outbox.edition e ON e.id = r.edition
 ORDER BY f.email DESC
"""


async def list_emails(connection: Connection, selection: Selection, *, limit: int) -> Listing:
    """Return the newest emails that fit, at most `limit`; how many more there are is counted up to `COUNTED_MAX`.

    Raises:
        ConfigurationError: there is no such edition.

    """
    query = await query_of(connection, selection)
    text, most = query.text, query.bind(limit + COUNTED_MAX)
    rows = await connection.fetch(LIST.format(text=text, most=most, limit=query.bind(limit)), *query.values)
    more = rows[0]["total"] - len(rows) if rows else 0
    return Listing([Listed(*list(row)[:-1]) for row in rows], more, more == COUNTED_MAX)
