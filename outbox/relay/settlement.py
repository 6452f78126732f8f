"""Settlements: outcomes of tries on their way to the database, and why one changed nothing there."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from outbox.database.connection import Connection
from outbox.mail.delivery_state import DeliveryState
from outbox.smtp.verdict import Outcome


class Settlement(NamedTuple):
    """Outcome of a try on its way to the database, under the fence (relay, attempt) of the try that made it.

    `marked` says which side of the mark the try ended on: a refusal before it counts as attempt + 1.
    """

    relay: int
    email: int
    key: str
    attempt: int
    marked: bool
    outcome: Outcome

    @property
    def identity(self) -> tuple[int, int]:
        """Return the email and attempt, which identify the try for ever: attempts are never reused."""
        return self.email, self.attempt


def contradicts(settlement: Settlement, state: str | None, attempt: int | None) -> bool:
    """Return True if a settlement that changed nothing contradicts the delivery as it stands, which is worth an alarm.

    It does not if the delivery is as it says, if its mark was never committed, if the email was cancelled before its
    mark, and if it only means that nothing is known, or that nothing was sent, of an email that is not sent.
    """
    verdict = settlement.outcome.verdict
    already_so = state == settlement.outcome.state and attempt == settlement.attempt
    never_marked = verdict == "withdrawn" and attempt is not None and attempt < settlement.attempt
    nothing_new = verdict == "in_doubt" or (verdict == "withdrawn" and state != DeliveryState.SENT)
    cancelled_first = state == DeliveryState.CANCELLED and not settlement.marked
    return not (already_so or never_marked or nothing_new or cancelled_first)


STANDING: Final = """
SELECT n.email, d.state, d.attempt
  FROM unnest($1::bigint[]) AS n (email) LEFT JOIN outbox.delivery d ON d.email = n.email
"""


async def states_of(connection: Connection, emails: Sequence[int]) -> dict[int, tuple[str | None, int | None]]:
    """Return state and attempt of each delivery; None for an email that is gone."""
    return {r["email"]: (r["state"], r["attempt"]) for r in await connection.fetch(STANDING, emails)}


# $1 emails. A withdrawal by a reply is about the rate, or the server deferred everything.
WITHDRAWN_BY_REPLY: Final = """
SELECT email, count(*) AS times FROM outbox.attempt
 WHERE email = ANY ($1::bigint[]) AND verdict = 'withdrawn' AND reply ~ '^(redirected to [^ ]+: )?[45][0-9][0-9] '
 GROUP BY email
"""


async def count_withdrawn_by_reply(connection: Connection, emails: Sequence[int]) -> dict[int, int]:
    """Return how often each email was withdrawn because of a reply of the server; without those that never were."""
    return {row["email"]: row["times"] for row in await connection.fetch(WITHDRAWN_BY_REPLY, emails)}


STATEMENTS: Final = (STANDING, WITHDRAWN_BY_REPLY)
