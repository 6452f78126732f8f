"""Emails in doubt: the policy `resend` sends them again; for `ask` they are taken, asked about, and decided.

`resolver` does the asking. With the policy `hold` nothing happens here: evidence or a person decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.quarantine import Quarantine, is_of_a_row

RESENT_AT_ONCE: Final = 1000
ASKED_AT_ONCE: Final = 20
ASK_AGAIN_MAX_S: Final = 3600.0

# The grace is longer than the guard, so no process can still be about to write the first dot.
_RESEND: Final = """
WITH chosen AS ({chosen}
), held AS (
    UPDATE outbox.delivery d SET due_at = 'infinity' FROM chosen c WHERE d.email = c.email AND d.send_before <= now()
), resent AS (
    UPDATE outbox.delivery d SET state = 'pending', relay = NULL, doubted_at = NULL
      FROM chosen c WHERE d.email = c.email AND (d.send_before IS NULL OR d.send_before > now())
    RETURNING d.email, d.attempt, d.marked_at
)
INSERT INTO outbox.attempt (email, attempt, verdict, reply, marked_at)
SELECT email, attempt, 'resolved', 'in_doubt = "resend": sent again', marked_at FROM resent
"""
_IN_DOUBT: Final = """
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND doubted_at IS NOT NULL AND due_at <= now()"""
_ONE: Final = f"{_IN_DOUBT} AND email = $1 FOR UPDATE SKIP LOCKED"
# $1 how many, or the email in the statements for one; $2 emails that are left out.
IN_DOUBT: Final = f"{_IN_DOUBT} AND email <> ALL ($2::bigint[]) ORDER BY due_at, email LIMIT $1"
RESEND: Final = _RESEND.format(chosen=f"{IN_DOUBT} FOR UPDATE SKIP LOCKED")
RESEND_ONE: Final = _RESEND.format(chosen=_ONE)


async def resend_doubtful(connection: Connection, quarantine: Quarantine) -> int:
    """Make deliveries pending whose doubt has lasted for its grace; return how many. The bytes are the same ones.

    What is too late to send stays in doubt, for a person: pending, it would expire as if it had never been sent.
    """
    try:
        done = [await connection.execute(RESEND, RESENT_AT_ONCE, quarantine.left_out)]
    except Exception as error:
        if not is_of_a_row(error):
            raise
        rows = await connection.fetch(IN_DOUBT, RESENT_AT_ONCE, quarantine.left_out)
        done = await quarantine.sift(
            connection, [row["email"] for row in rows], lambda email: connection.execute(RESEND_ONE, email)
        )
    return sum(int(tag.rpartition(" ")[2]) for tag in done)


@dataclass(frozen=True, slots=True)
class Doubt:
    """Email that the server may or may not have accepted, as a resolver gets it."""

    key: str
    message_id: str
    sender: str
    recipient: str
    attempt: int
    marked_at: datetime
    """Time at which the final dot was about to be written."""
    email: int
    asked: int
    """Number of times that it was asked about before."""


# Moving `due_at` on is what keeps two relays from asking about one email; a relay that dies while it asks delays it so
# long.
_TAKE_DOUBTS: Final = """
WITH chosen AS ({chosen}
), taken AS (
    UPDATE outbox.delivery d SET due_at = now() + $2 * interval '1 second' FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt, d.marked_at
)
SELECT e.key, e.message_id, e.sender, e.recipient, t.attempt, t.marked_at, t.email,
       (SELECT count(*) FROM outbox.attempt a
         WHERE a.email = t.email AND a.attempt = t.attempt AND a.verdict = 'asked')::int
  FROM taken t JOIN outbox.email e ON e.id = t.email
"""
TAKE_DOUBTS: Final = _TAKE_DOUBTS.format(
    chosen=f"{_IN_DOUBT} AND email <> ALL ($3::bigint[]) ORDER BY due_at, email LIMIT $1 FOR UPDATE SKIP LOCKED"
)
TAKE_DOUBT: Final = _TAKE_DOUBTS.format(chosen=_ONE)


async def take_doubts(connection: Connection, *, lease_s: float, quarantine: Quarantine) -> list[Doubt]:
    """Return the next few emails to ask about, due longest first; no other relay asks about them for `lease_s`."""
    try:
        async with connection.transaction():  # rolls back if a row cannot be decoded
            rows = await connection.fetch(TAKE_DOUBTS, ASKED_AT_ONCE, lease_s, quarantine.left_out)
            return [Doubt(*row) for row in rows]
    except Exception as error:
        if not is_of_a_row(error):
            raise
    emails = [row["email"] for row in await connection.fetch(IN_DOUBT, ASKED_AT_ONCE, quarantine.left_out)]
    found = await quarantine.sift(connection, emails, lambda email: connection.fetch(TAKE_DOUBT, email, lease_s))
    return [Doubt(*row) for rows in found for row in rows]


# A late 250 or a person may have decided meanwhile: then it is not in doubt any more, and the answer is dropped.
# By the key: after a failover the id may be another email's.
ANSWER: Final = """
WITH answers AS (
    SELECT m.id AS email, a.* FROM unnest($1::text[], $2::integer[], $3::text[], $4::float8[], $5::text[])
        AS a (key, attempt, state, delay_s, reply) JOIN outbox.email m ON m.key = a.key
), decided AS (
    UPDATE outbox.delivery d
       SET state = a.state,
           relay = CASE WHEN a.state = 'pending' THEN NULL ELSE d.relay END,
           due_at = CASE WHEN a.state = 'sent' THEN d.due_at
                         ELSE coalesce(now() + a.delay_s * interval '1 second', 'infinity') END,
           settled_at = CASE WHEN a.state = 'sent' THEN now() END,
           doubted_at = CASE WHEN a.state = 'in_doubt' THEN d.doubted_at END
      FROM answers a
     WHERE d.email = a.email AND d.attempt = a.attempt AND d.state = 'in_doubt'  -- by the primary key: see TICK
    RETURNING d.email, d.attempt, d.relay, d.marked_at, a.state, a.reply
)
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
SELECT email, attempt, relay, CASE WHEN state = 'in_doubt' THEN 'asked' ELSE 'resolved' END, reply, marked_at
  FROM decided
"""


STATEMENTS: Final = (RESEND, RESEND_ONE, IN_DOUBT, TAKE_DOUBTS, TAKE_DOUBT, ANSWER)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of a resolver about a doubt; `reply` is the answer in words, or the reason why there is none."""

    doubt: Doubt
    accepted: bool | None
    reply: str


async def write_answers(
    connection: Connection,
    answers: Sequence[Answer],
    *,
    grace_s: float,
    asks_max: int,
    quarantine: Quarantine,
) -> int:
    """Settle the doubts that were answered; ask again about the others, twice as late each time, and at last hold them.

    Return how many deliveries that changed. An answer to what is not in doubt any more is dropped.
    """

    def delay_s(answer: Answer) -> float | None:
        if answer.accepted is False:
            return 0.0
        asked = answer.doubt.asked + 1
        return None if asked >= asks_max else min(grace_s * 2.0**asked, max(ASK_AGAIN_MAX_S, grace_s))

    states = {True: DeliveryState.SENT, False: DeliveryState.PENDING, None: DeliveryState.IN_DOUBT}

    async def write(some: Sequence[Answer]) -> int:
        done = await connection.execute(
            ANSWER,
            [a.doubt.key for a in some],
            [a.doubt.attempt for a in some],
            [states[a.accepted] for a in some],
            [delay_s(a) for a in some],
            [storable(a.reply)[:500] for a in some],
        )
        return int(done.rpartition(" ")[2])

    try:
        return await write(answers)
    except Exception as error:
        if not is_of_a_row(error):
            raise
    of = {a.doubt.email: a for a in answers}
    return sum(await quarantine.sift(connection, of, lambda email: write([of[email]])))
