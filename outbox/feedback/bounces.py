"""Bounces and complaints that came back: each is verified (`bounce_proof`) and recorded once.

A bounce whose proof recipients of other copies share is written to the trail and suppresses no address.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from outbox.database.connection import Connection
from outbox.database.suppression_entry import Reason
from outbox.database.values import storable
from outbox.feedback.bounce_proof import Proof, Sent, prove
from outbox.feedback.dsn import parse_bounce
from outbox.feedback.notice import Bounce, Finding, Kind


class Outcome(StrEnum):
    """Result of reading one message."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINED = "complained"
    AGAIN = "again"
    OTHER = "other"
    UNBELIEVED = "unbelieved"
    UNREADABLE = "unreadable"
    SET_ASIDE = "set_aside"
    STAYS = "stays"
    BUSY = "busy"

    @property
    def is_problem(self) -> bool:
        """Return True if a person should look at it."""
        return self in (Outcome.UNBELIEVED, Outcome.UNREADABLE, Outcome.SET_ASIDE, Outcome.STAYS)


@dataclass(frozen=True, slots=True)
class Read:
    """Result of one message, and a sentence about it."""

    outcome: Outcome
    sentence: str


# One statement, so one commit: a bounce is written completely or not at all, and only once. $8: others cannot have
# written it; $9: it counts towards `bounces_max`.
RECORD: Final = """
WITH new AS (
    INSERT INTO outbox.bounce (email, message, kind, status, proves, counts) VALUES ($1, $2, $3, $4, $8, $9)
    ON CONFLICT (email, message) DO NOTHING RETURNING email
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, verdict, reply)
    SELECT n.email, coalesce(d.attempt, 0), 'bounced', $5
      FROM new n LEFT JOIN outbox.delivery d ON d.email = n.email
), listed AS (
    INSERT INTO outbox.suppression (address, reason, who, why, email)
    SELECT lower(m.recipient COLLATE "C"), $6, 'outbox bounce', $7, m.id
      FROM new n JOIN outbox.email m ON m.id = n.email WHERE $6::text IS NOT NULL
    ON CONFLICT (address, report) DO NOTHING RETURNING address
)
SELECT EXISTS (SELECT FROM new) AS is_new, EXISTS (SELECT FROM listed) AS is_listed
"""

# $1 an address, $2 seconds, $3 bounces_max, $4 the reason of the last bounce. The address goes onto the list if so many
# different emails to it failed. `lower` without a collation is what the index on recipients has, and the aggregate
# keeps the plan at one look-up for each email, whatever the statistics say. The statement runs after the commit of the
# bounce, so of two processes that record one each, the later counts both.
LIST_COUNTED: Final = """
WITH counted AS (
    SELECT count(*) AS emails, max(m.id) AS email FROM outbox.email m
     WHERE lower(m.recipient) = lower($1::text) AND lower(m.recipient COLLATE "C") = lower($1::text COLLATE "C")
       AND (SELECT bool_or(b.counts) FROM outbox.bounce b
             WHERE b.email = m.id AND b.at > now() - $2 * interval '1 second')
), listed AS (
    INSERT INTO outbox.suppression (address, reason, who, why, email)
    SELECT lower($1::text COLLATE "C"), $5, 'outbox bounce',
           emails || CASE WHEN emails = 1 THEN ' email' ELSE ' emails' END || ' bounced ' || $4::text, email
      FROM counted WHERE emails >= $3::integer
    ON CONFLICT (address, report) DO NOTHING RETURNING address
)
SELECT emails FROM counted WHERE EXISTS (SELECT FROM listed)
"""

STATEMENTS: Final = (RECORD, LIST_COUNTED)
SETTLE: Final = "SELECT outbox.settle_bounced($1)"
SETTLE_ALL: Final = "SELECT outbox.settle_bounced()"

_WORDS: Final = {
    Kind.HARD: "bounced for good",
    Kind.SOFT: "bounced, perhaps for now",
    Kind.COMPLAINED: "its reader complained",
}
_REASONS: Final = {Kind.HARD: Reason.BOUNCED, Kind.COMPLAINED: Reason.COMPLAINED}


@dataclass(frozen=True, slots=True)
class Policy:
    """Effect of bounces on the suppression list.

    Without `suppressing` the list does not change. `bounces_max` different emails to an address that failed within
    `within_s` put it onto the list, although none of the bounces says that it does not exist; None is never.
    """

    suppressing: bool = True
    bounces_max: int | None = None
    within_s: float = 0.0
    within: str = ""


async def read(connection: Connection, raw: bytes, *, name: str, policy: Policy = Policy()) -> Read:
    """Read one message and record what it proves."""
    try:
        bounce = parse_bounce(raw)
    except ValueError as error:
        return Read(Outcome.UNREADABLE, f"{name}: {error}; nothing was changed.")
    return await record(connection, bounce, name=name, policy=policy)


async def settle_doubts(connection: Connection) -> int:
    """Settle as sent what came into doubt after its bounce was read; return how many emails that were.

    A server may send a bounce before the relay gives up waiting for its reply.
    """
    return int(await connection.fetchval(SETTLE_ALL))


async def record(connection: Connection, bounce: Bounce | None, *, name: str, policy: Policy) -> Read:
    """Record what a bounce proves; None is a message that is no bounce. `name` is the subject of the sentence.

    Each statement is idempotent and commits by itself, so after a kill in between the message is read again.
    """
    if bounce is None:
        return Read(Outcome.OTHER, f"{name}: it is neither a bounce nor a complaint; nothing was changed.")
    proof = await prove(connection, bounce)
    if proof is None:
        return Read(
            Outcome.UNBELIEVED,
            f"{name}: it cannot be verified, since it has neither a valid token nor the unpredictable Message-ID of an "
            "email that outbox sent to its recipient; nothing was changed.",
        )
    return await _record_proved(connection, proof, bounce, policy)


async def _record_proved(connection: Connection, proof: Proof, bounce: Bounce, policy: Policy) -> Read:
    sent = proof.email
    found = bounce.about(sent.recipient)
    reason = storable(found.reason) or "it gives no reason"
    suppressing = policy.suppressing and not proof.shared
    suppression = _REASONS.get(found.kind) if suppressing else None
    counts = suppressing and found.counts
    is_new, is_listed = await connection.fetchrow(
        RECORD,
        sent.id,
        bounce.identity,
        found.kind.value,
        found.status,
        f"{_WORDS[found.kind]}: {reason}",
        suppression and suppression.value,
        reason,
        not proof.shared,
        counts,
    )
    bounced = await _list_counted(connection, sent, reason, policy) if counts else None
    is_settled = await connection.fetchval(SETTLE, sent.id) > 0
    if not (is_new or is_settled or bounced):
        return Read(Outcome.AGAIN, f"{sent.key}: this bounce was read before; nothing was changed.")
    follows = _consequence(proof, found, policy, is_listed=is_listed, bounced=bounced)
    if is_settled:
        follows += "; the email was in doubt and is sent now, since the bounce proves that a server accepted it"
    return Read(Outcome(found.kind.value), f"{sent.key}: {_WORDS[found.kind]} ({reason}); {follows}.")


def _consequence(proof: Proof, found: Finding, policy: Policy, *, is_listed: bool, bounced: int | None) -> str:
    """Return what follows for the recipient, as a clause."""
    recipient = proof.email.recipient
    if is_listed:
        return f"{recipient} gets no more email"
    if bounced is not None:
        return f"{recipient} gets no more email, since {_emails(bounced)} to it bounced within {policy.within}"
    if proof.shared and found.kind in _REASONS:
        return f"{recipient} is still written to, since others who got a copy could say this; see outbox suppress"
    if policy.suppressing and found.kind in _REASONS:
        return f"{recipient} is on the suppression list already"
    return f"{recipient} is still written to"


def _emails(count: int) -> str:
    return f"{count:,} email{'' if count == 1 else 's'}"


async def _list_counted(connection: Connection, sent: Sent, reason: str, policy: Policy) -> int | None:
    """Suppress the recipient if too many emails to it failed; return how many did, None if it is not suppressed."""
    if policy.bounces_max is None:
        return None
    emails: int | None = await connection.fetchval(
        LIST_COUNTED,
        sent.recipient,
        policy.within_s,
        policy.bounces_max,
        f"within {policy.within}, the last one with {reason}",
        Reason.BOUNCED.value,
    )
    return emails
