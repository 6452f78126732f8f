"""Claims in SQL: chosen deliveries become a relay's, as far as its memory allows, and are released.

`tick` claims many in one statement, `isolate` one at a time. Both choose deliveries (a CTE `chosen`), claim them with
`CLAIM`, and return them with `CLAIMED` and `TOKENS`, which `claimed_of` decodes. `claiming` decides how many are
claimed, and from where on.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from outbox.database.connection import Connection
from outbox.mail.verp import email_of
from outbox.relay.quarantine import SUSPECT_AFTER, Quarantine, is_of_a_row
from outbox.smtp.outgoing import OutgoingEmail

# A larger message is claimed without its bytes, which `message_fetch` fetches once the claim is committed: if a relay
# dies of it, the death counts. Only such messages count for the budget.
SMALL_BYTES: Final = 65536

TOO_MANY_BYTES: Final = "it has {bytes} bytes, and a relay takes at most {bytes_max} (message_bytes_max)"
INCOMPLETE: Final = "its row in outbox.email is missing, or has a null where none is expected"

# Emails are marked and claimed only if the failover barrier (`failover_barrier`) is lifted and its epoch is {known},
# the latest that this relay knows. Null takes any. Otherwise a relay that has just come from another server may know
# that they were sent there.
GATE: Final = """gate AS (
    SELECT epoch, {known} IS NULL OR epoch IS NULL OR (epoch = {known} AND lifted_at IS NOT NULL) AS is_open
      FROM (SELECT max(epoch) AS epoch, max(lifted_at) AS lifted_at FROM outbox.failover WHERE one) AS barrier
)"""

# The part of `chosen` that fits the budget becomes a claim. The sum runs over the rows in the order in which they come;
# another order would take other emails first, and lose none.
#
# Claims are chosen by size before any byte of a message is read: octet_length of a value that is stored out of line
# reads only its header. Large messages are taken while their sum is at most {budget}; small ones may overtake them. A
# message of more than {limit} bytes is claimed without its text, to be quarantined. {small} is SMALL_BYTES.
CLAIM: Final = """sized AS (
    SELECT c.email, c.due_at, e.key, e.sender, e.recipient, e.message_id, e.message, e.traceparent, s.bytes,
           coalesce(sum(s.bytes) FILTER (WHERE s.bytes > {small} AND s.bytes <= {limit})
                        OVER (ROWS UNBOUNDED PRECEDING), 0) AS so_far
      FROM chosen c LEFT JOIN outbox.email e ON e.id = c.email
     CROSS JOIN LATERAL (SELECT octet_length(e.message)::bigint + octet_length(e.sender) + octet_length(e.recipient)
                                + octet_length(e.message_id) + octet_length(e.key)
                                + coalesce(octet_length(e.traceparent), 0) AS bytes) s
), weighed AS (
    SELECT *, bytes IS NULL OR bytes <= {small} OR bytes > {limit} OR so_far <= {budget} AS fits FROM sized
), claimed AS (
    UPDATE outbox.delivery d SET relay = {relay} FROM weighed c WHERE d.email = c.email AND c.fits
    RETURNING d.email, d.attempt, d.withdrawn, d.orphaned, d.priority, c.key, c.sender, c.recipient, c.message_id,
              c.message, c.traceparent, c.bytes
)"""

# Columns of a claim, from `claimed c`. `listed` is true if the address is on the suppression list, for any report: one
# look at its key, in a form that the planner cannot turn into reading the whole list. `suppression` finds out for
# which report.
CLAIMED: Final = """\
email, attempt, withdrawn, orphaned, CASE WHEN bytes > {limit} THEN left(key, 200) ELSE key END AS key,
       CASE WHEN bytes <= {limit} THEN sender END AS sender, CASE WHEN bytes <= {limit} THEN recipient END AS recipient,
       CASE WHEN bytes <= {limit} THEN message_id END AS message_id,
       CASE WHEN bytes <= {small} THEN message END AS message,
       CASE WHEN bytes <= {limit} THEN traceparent END AS traceparent, priority, bytes,
       CASE WHEN bytes > {limit} THEN false
            ELSE (SELECT 1 FROM outbox.suppression s WHERE s.address = lower(c.recipient COLLATE "C") LIMIT 1) = 1
       END AS listed"""
NO_CLAIM: Final = """\
NULL::bigint AS email, NULL::integer AS attempt, NULL::integer AS withdrawn, NULL::integer AS orphaned,
       NULL AS key, NULL AS sender, NULL AS recipient, NULL AS message_id, NULL::bytea AS message, NULL AS traceparent,
       NULL::smallint AS priority, NULL::bigint AS bytes, NULL::boolean AS listed"""
# The bounce tokens of all claims, each of which begins with its email's id: one call for all of them costs a few
# microseconds an email, one call for each five times as much.
TOKENS: Final = """(SELECT string_agg(t.token, ' ') FROM outbox.bounce_tokens(ARRAY(SELECT email FROM claimed)) t
         WHERE EXISTS (SELECT FROM claimed))"""


@dataclass(frozen=True, slots=True)
class Claimed:
    """Deliveries that a statement claimed: those that can be sent, and those that must be quarantined."""

    claims: list[OutgoingEmail] = field(default_factory=list)
    unfit: dict[int, str] = field(default_factory=dict)
    """Emails that cannot be sent, with the reasons."""
    listed: frozenset[int] = frozenset()
    """Emails among `claims` whose address is on the suppression list, for their report or for another."""


def claimed_of(rows: Iterable[Any], tokens: str | None, relay: int, bytes_max: int) -> Claimed:
    """Return what a statement claimed for a relay: its rows have the columns `CLAIMED`, and `tokens` is `TOKENS`."""
    token_of = {email_of(token): token for token in tokens.split()} if tokens else {}
    claims: list[OutgoingEmail] = []
    unfit: dict[int, str] = {}
    listed: list[int] = []
    now = time.monotonic()
    for row in rows:
        email, size = row["email"], row["bytes"]
        if size is None:  # a null in any column makes the sum null
            unfit[email] = INCOMPLETE
        elif size > bytes_max:
            unfit[email] = TOO_MANY_BYTES.format(bytes=size, bytes_max=bytes_max)
        else:
            claims.append(_claim_of(row, relay, token_of.get(email, ""), now))
            if row["listed"]:
                listed.append(email)
    return Claimed(claims, unfit, frozenset(listed))


def _claim_of(row: Mapping[str, Any], relay: int, token: str, now: float) -> OutgoingEmail:
    """Return the claim in a row with the columns `CLAIMED`."""
    return OutgoingEmail(
        relay,
        row["email"],
        row["key"],
        row["attempt"],
        row["withdrawn"],
        row["sender"],
        row["recipient"],
        row["message_id"],
        row["message"] or b"",
        suspect=row["orphaned"] >= SUSPECT_AFTER,
        urgent=row["priority"] > 0,
        traceparent=row["traceparent"],
        size=row["bytes"],
        is_fetched=row["bytes"] <= SMALL_BYTES,
        token=token,
        claimed_at=now,
    )


# A row that another session has locked is passed over: `judge_stranded` finds it later.
RELEASE: Final = """
WITH free AS (
    SELECT email FROM outbox.delivery
     WHERE email = ANY ($1::bigint[]) AND relay = $2 AND state = 'pending' FOR UPDATE SKIP LOCKED
)
UPDATE outbox.delivery d
   SET relay = NULL, due_at = CASE WHEN $3::float8 > 0 THEN now() + $3 * interval '1 second' ELSE due_at END
  FROM free f WHERE d.email = f.email
"""


async def release(
    connection: Connection,
    relay: int,
    emails: Sequence[int],
    *,
    quarantine: Quarantine,
    after_s: float = 0.0,
) -> None:
    """Give unmarked claims back, so that any relay may take them: at once, or a little later than what is due now."""
    if not emails:
        return
    try:
        await connection.execute(RELEASE, emails, relay, after_s)
    except Exception as error:
        if not is_of_a_row(error):
            raise
        await quarantine.sift(connection, emails, lambda email: connection.execute(RELEASE, [email], relay, after_s))


STATEMENTS: Final = (RELEASE,)
