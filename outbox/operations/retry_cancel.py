"""Decisions about emails that are not in doubt: retry, and cancel. Who decided, when and why is kept.

Both go through any number of emails in batches of one commit each, since a relay that is about to mark one of them
waits for its row. `resolve` decides about emails in doubt, and discards dead letters.
"""

import asyncio
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final

import asyncpg

from outbox import suggestions
from outbox.database.connection import CHANNEL, Connection
from outbox.database.pause_list import resumption
from outbox.database.values import storable
from outbox.errors import DatabaseUnavailableError
from outbox.mail.delivery_state import DeliveryState
from outbox.mail.removed_message import LOST, PRUNED, REMOVED
from outbox.operations.resolve import DISCARDED
from outbox.operations.suppression_list import remedy
from outbox.operations.wording import no_message_label

BATCH_MAX: Final = 1000
# Below deadlock_timeout (1 s): if a batch and a relay's tick ever wait for each other it is the batch that gives way.
LOCK_TIMEOUT: Final = "SET LOCAL lock_timeout = '500ms'"
LOCK_TRIES_MAX: Final = 20
GIVE_WAY_S: Final = 0.1  # between two tries: for the relays whose rows it had


class Act(StrEnum):
    """Decision: RETRY sends the email as soon as possible, CANCEL never."""

    RETRY = "retry"
    CANCEL = "cancel"

    @property
    def past(self) -> str:
        """Return the participle: retried, cancelled."""
        return {"retry": "retried", "cancel": "cancelled"}[self.value]


_DEAD_MESSAGES: Final = ", ".join(f"'\\x{bare.hex()}'::bytea" for bare in REMOVED)
_SUPPRESSED: Final = """outbox.suppressed(m.recipient, (
    SELECT e.report FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition WHERE r.id = m.report))"""
_WAITS: Final = "(d.state = 'pending' AND d.relay IS NULL AND d.paused IS NULL AND d.due_at > now())"

# What may be done at all, to an email that is named.
POSSIBLE: Final = {
    Act.RETRY: f"(d.state IN ('dead', 'cancelled', 'expired') OR {_WAITS})",
    Act.CANCEL: "d.state = 'pending'",
}

# What a filter selects: a discarded dead letter is retried only by its key, a cancelled email only if its state is
# asked for.
SWEEPING: Final = {
    Act.RETRY: f"{POSSIBLE[Act.RETRY]} AND NOT {DISCARDED} AND m.message NOT IN ({_DEAD_MESSAGES})"
    f" AND {_SUPPRESSED} IS NULL",
    Act.CANCEL: POSSIBLE[Act.CANCEL],
}
RETRIED_BY_DEFAULT: Final = (DeliveryState.DEAD, DeliveryState.EXPIRED, DeliveryState.PENDING)

# As in `resolve`: what is decided is what was seen, and what changed by the time its lock is ours is left. With all
# tries before it, unless it only waits for the next. What it is the suspect of stays, too, unless it was settled.
RETRY: Final = f"""
WITH seen AS MATERIALIZED (
    SELECT d.email, d.attempt, d.state, d.settled_at FROM outbox.delivery d
     WHERE d.email = ANY ($1::bigint[]) AND {POSSIBLE[Act.RETRY]}
), chosen AS (
    SELECT d.email FROM outbox.delivery d
      JOIN seen s ON s.email = d.email AND s.state = d.state AND s.attempt = d.attempt
                 AND s.settled_at IS NOT DISTINCT FROM d.settled_at
      JOIN outbox.email m ON m.id = d.email AND m.message NOT IN ({_DEAD_MESSAGES})
     WHERE (d.relay IS NULL OR d.settled_at IS NOT NULL) AND {_SUPPRESSED} IS NULL
     ORDER BY d.email FOR UPDATE OF d FOR SHARE OF m
), changed AS (
    UPDATE outbox.delivery d
       SET state = 'pending', settled_at = NULL, due_at = now(), relay = NULL, paused = NULL,
           send_before = CASE WHEN d.send_before <= now() THEN NULL ELSE d.send_before END,
           withdrawn = CASE WHEN d.state = 'pending' THEN d.withdrawn ELSE d.attempt END,
           orphaned = CASE WHEN d.state = 'pending' THEN d.orphaned ELSE 0 END
      FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt
)"""

# An email is cancelled even if a relay has claimed it: when the relay tries to mark it, the row is no longer pending,
# and the relay drops the connection before the final dot.
CANCEL: Final = f"""
WITH chosen AS (
    SELECT d.email FROM outbox.delivery d
     WHERE d.email = ANY ($1::bigint[]) AND {POSSIBLE[Act.CANCEL]} ORDER BY d.email FOR UPDATE
), changed AS (
    UPDATE outbox.delivery d
       SET state = 'cancelled', settled_at = now(), relay = NULL, paused = NULL,
           due_at = CASE WHEN d.paused IS NULL THEN d.due_at ELSE now() END
      FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt
)"""

_TRAIL: Final = """, trail AS (
    INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, attempt, $2, $3 FROM changed
)
SELECT email FROM changed ORDER BY email
"""

OPEN_OPERATION: Final = """
INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ($1, $2, $3, $4, 0) RETURNING id
"""
COUNT_OPERATION: Final = "UPDATE outbox.operation SET emails = emails + $2 WHERE id = $1"


async def operate(
    connection: Connection,
    act: Act,
    emails: Sequence[int],
    *,
    who: str,
    why: str,
    target: str,
    progress: Callable[[int], None] = lambda _: None,
) -> list[int]:
    """Retry or cancel those of these emails for which that is possible; return them.

    The operation is written first; each batch is one commit, with the trail of its emails and their number added to the
    operation. Whatever ends it early, what is done is kept and counted, and the rest is as it was.

    Raises:
        DatabaseUnavailableError: others held the rows of a batch for too long.

    """
    words = (who, act.value, target, why)
    operation = await connection.fetchval(OPEN_OPERATION, *map(storable, words))
    reply = storable(f"{who} {act.past} it" + (f", because {why}" if why.strip() else ""))
    done: list[int] = []
    for begin in range(0, len(emails), BATCH_MAX):
        try:
            done += await _change(connection, act, emails[begin : begin + BATCH_MAX], reply, operation)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            raise DatabaseUnavailableError(
                f"Others hold some of these emails for too long; {len(done):,} were {act.past} before, "
                f"run `outbox {act}` again for the rest."
            ) from error
        progress(len(done))
    return done


async def _change(connection: Connection, act: Act, emails: Sequence[int], reply: str, operation: int) -> list[int]:
    """Change one batch in one commit; wait for rows that others hold, up to `LOCK_TRIES_MAX` times."""
    statement = (RETRY if act is Act.RETRY else CANCEL) + _TRAIL
    tries = 0
    while True:
        tries += 1
        try:
            async with connection.transaction(isolation="read_committed"):
                await connection.execute(LOCK_TIMEOUT)
                changed = [row["email"] for row in await connection.fetch(statement, emails, act.past, reply)]
                await connection.execute(COUNT_OPERATION, operation, len(changed))
                if changed and act is Act.RETRY:
                    await connection.execute(f"SELECT pg_notify('{CHANNEL}', '')")
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if tries == LOCK_TRIES_MAX:
                raise
            await asyncio.sleep(GIVE_WAY_S)
        else:
            return changed


STANDING: Final = f"""
SELECT m.key, d.state, d.relay, d.paused, d.due_at <= now() AS due, m.message = $2::bytea AS lost,
       m.message = $3::bytea AS pruned, m.recipient, {_SUPPRESSED} AS suppressed,
       (SELECT e.report FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition
         WHERE r.id = m.report) AS report,
       (SELECT left(a.reply, 2000) FROM outbox.attempt a WHERE a.email = m.id AND a.verdict = 'cancelled'
         ORDER BY a.settled_at DESC LIMIT 1) AS cancelled
  FROM outbox.email m LEFT JOIN outbox.delivery d ON d.email = m.id
 WHERE m.key = ANY ($1::text[])
"""


async def explain(connection: Connection, act: Act, keys: Sequence[str]) -> list[str]:
    """Return a sentence for each of these keys, which were left: why, and what can be done instead."""
    possible = [key for key in keys if storable(key) == key]
    rows = {row["key"]: row for row in await connection.fetch(STANDING, possible, LOST, PRUNED)}
    return [_why_not(act, key, rows.get(key)) for key in keys]


def _why_not(act: Act, key: str, row: Any) -> str:
    if row is None:
        return f"{key} is no email's key; `outbox list --to ADDRESS` finds it."
    said = (_why_not_retried if act is Act.RETRY else _why_not_cancelled)(row, key)
    return f"{key} {said or 'changed at this moment; look at it with `{_show(key)}` and decide again'}."


def _show(key: str) -> str:
    return suggestions.command("show", keys=[key])


def _resolve(key: str, decision: str) -> str:
    return suggestions.command("resolve", keys=[key], after=[decision])


def _why_not_retried(row: Any, key: str) -> str | None:
    pending = "is due already; the next free relay sends it (`outbox status` says whether one is alive)"
    if row["paused"]:
        pending = f"waits since {row['paused']} is paused; `{resumption(row['paused'])}` lets it go"
    elif row["relay"]:
        pending = f"is with relay {row['relay']} already; nothing was changed"
    why_not = {
        DeliveryState.SENT: "is sent; nothing was changed, since what arrived is not sent again",
        DeliveryState.SENDING: f"is being sent at this moment; `{_show(key)}` says what comes of it",
        DeliveryState.IN_DOUBT: "is in doubt: the server may have it already; "
        f"`{_resolve(key, '--resend')}` sends it at the risk of a second copy",
    }
    if row["paused"] or row["relay"] or row["due"]:
        why_not[DeliveryState.PENDING] = pending
    gone = f"cannot be sent: {no_message_label(is_lost=row['lost'])}"
    listed = None
    if row["suppressed"]:
        mend = remedy(row["recipient"], row["suppressed"], row["report"])
        listed = f"would not be sent, since {row['suppressed'].rstrip('.')}; `{mend}` takes it off"
    return why_not.get(row["state"]) or (gone if row["lost"] or row["pruned"] else listed)


def _why_not_cancelled(row: Any, key: str) -> str | None:
    let_be = f"`{_resolve(key, '--discard')}` lets it be"
    why_not = {
        DeliveryState.SENT: "is sent, and cannot be called back",
        DeliveryState.SENDING: "is being sent at this moment, and cannot be cancelled; "
        f"`{_show(key)}` says what comes of it",
        DeliveryState.IN_DOUBT: f"is in doubt: the server may have it already; {let_be}",
        DeliveryState.DEAD: f"is dead, so it is not sent anyway; {let_be}",
        DeliveryState.EXPIRED: "has expired, so it is not sent anyway",
        DeliveryState.CANCELLED: f"is cancelled already ({row['cancelled'] or 'it is not known by whom'})",
    }
    return why_not.get(row["state"])
