"""Decisions about deliveries in doubt and dead letters, which only a person may take. Who, when and why is kept."""

import shlex
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

from outbox.database.connection import CHANNEL, Connection
from outbox.database.values import storable
from outbox.mail.delivery_state import DeliveryState
from outbox.mail.removed_message import LOST, PRUNED, REMOVED
from outbox.operations.email_filter import Chosen
from outbox.operations.operator import whoami
from outbox.operations.wording import no_message_label, state_label

DECIDABLE: Final = (DeliveryState.IN_DOUBT, DeliveryState.DEAD)


class Decision(StrEnum):
    """Decision: it arrived (SENT), send it again (RESEND), or do not send it (DISCARD)."""

    SENT = "sent"
    RESEND = "resend"
    DISCARD = "discard"


# A dead letter about which a person has decided already. Decisions about many leave it; it has to be named. With the
# state inside, its negation is an anti-join, whose cost does not hide a bad plan for the rest of a statement.
DISCARDED: Final = """EXISTS (
    SELECT FROM outbox.delivery x WHERE x.email = d.email AND x.state = 'dead'
       AND NOT EXISTS (SELECT FROM outbox.failure f WHERE f.email = x.email))"""

UNDECIDED: Final = f"NOT {DISCARDED}"

# What is decided is what a person could see: a row that has changed by the time its lock is ours was decided meanwhile
# (by another person, the policy or late news), and is left. `seen` is the statement's snapshot, which the recheck
# after the lock does not renew (PostgreSQL docs, 13.2.1). Locks are taken in the order of ids, so that two people with
# common keys wait for each other instead of deadlocking. What is discarded already is not discarded twice.
#
# A relay that brings late news of the same attempt wins over neither of these: its fence matches a row in doubt, or
# one that is pending and not marked again, and then only a 250 does.
RESOLVE: Final = f"""
WITH seen AS MATERIALIZED (
    SELECT d.email, d.attempt, d.state, d.settled_at, m.key
      FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
     WHERE m.key = ANY ($1::text[])
       AND d.state = ANY ($6::text[])
       AND (d.state = 'in_doubt' OR (d.state = 'dead' AND $2::text <> 'sent'))
       AND NOT ($2::text = 'discard' AND {DISCARDED})
), chosen AS (
    SELECT d.email, d.attempt, d.relay, d.marked_at, s.key
      FROM outbox.delivery d
      JOIN seen s ON s.email = d.email AND s.state = d.state AND s.attempt = d.attempt
                 AND s.settled_at IS NOT DISTINCT FROM d.settled_at
      JOIN outbox.email m ON m.id = d.email AND NOT ($2::text = 'resend' AND m.message = ANY ($7::bytea[]))
     ORDER BY d.email FOR UPDATE OF d FOR SHARE OF m
), decided AS (
    UPDATE outbox.delivery d
       SET state = CASE $2::text WHEN 'sent' THEN 'sent' WHEN 'resend' THEN 'pending' ELSE 'dead' END,
           settled_at = CASE WHEN $2::text <> 'resend' THEN now() END,
           doubted_at = NULL,
           orphaned = CASE WHEN $2::text = 'resend' THEN 0 ELSE d.orphaned END,
           due_at = now(),
           paused = NULL,
           send_before = CASE WHEN $2::text = 'resend' AND d.send_before <= now() THEN NULL ELSE d.send_before END,
           withdrawn = CASE WHEN $2::text = 'resend' AND d.state = 'dead' THEN d.attempt ELSE d.withdrawn END,
           relay = CASE WHEN $2::text = 'resend' THEN NULL ELSE d.relay END
      FROM chosen c WHERE d.email = c.email
    RETURNING c.email, c.attempt, c.relay, c.marked_at, c.key
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, 'resolved',
           $3::text || ' decided: ' || $2::text || CASE WHEN $4::text <> '' THEN ', because ' || $4::text ELSE '' END,
           marked_at
      FROM decided
), operation AS (
    INSERT INTO outbox.operation (who, what, target, why, emails)
    SELECT $3::text, 'resolve ' || $2::text, $5::text, $4::text, count(*) FROM decided
)
SELECT key FROM decided
"""


async def resolve(
    connection: Connection,
    keys: Sequence[str],
    decision: Decision,
    *,
    why: str = "",
    who: str | None = None,
    target: str | None = None,
    states: Sequence[str] = DECIDABLE,
) -> list[str]:
    """Decide about the deliveries of these keys; return the keys that were in doubt or dead and now are decided.

    What is dead cannot be declared sent. A dead letter that is sent again has all its tries before it. The operation,
    the trail of each email and the change are one commit. Of two people who decide at once one has each email.
    """
    operator = storable(whoami() if who is None else who)
    named = storable(shlex.join(dict.fromkeys(keys)) if target is None else target)
    async with connection.transaction(isolation="read_committed"):
        rows = await connection.fetch(
            RESOLVE, _possible(keys), decision.value, operator, storable(why), named, list(states), REMOVED
        )
        if decision is Decision.RESEND and rows:
            await connection.execute(f"SELECT pg_notify('{CHANNEL}', '')")
    return [row["key"] for row in rows]


def _possible(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if storable(key) == key]


OF_KEYS: Final = """
SELECT m.key, m.recipient, d.state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE m.key = ANY ($1::text[]) AND (d.state = 'in_doubt' OR (d.state = 'dead' AND $2::text <> 'sent'))
 ORDER BY d.email
"""


async def of_keys(connection: Connection, keys: Sequence[str], decision: Decision) -> list[Chosen]:
    """Return the deliveries of these keys that a decision would touch."""
    return [Chosen(*row) for row in await connection.fetch(OF_KEYS, _possible(keys), decision.value)]


STANDING: Final = """
SELECT m.key, d.state,
       (SELECT left(a.reply, 2000) FROM outbox.attempt a
         WHERE a.email = m.id AND a.attempt = d.attempt AND a.verdict = 'resolved'
           AND (d.state <> 'dead' OR a.settled_at >= d.settled_at)
         ORDER BY a.settled_at DESC LIMIT 1) AS decided,
       m.message = $2::bytea AS lost, m.message = $3::bytea AS pruned
  FROM outbox.email m LEFT JOIN outbox.delivery d ON d.email = m.id
 WHERE m.key = ANY ($1::text[])
"""


async def explain(connection: Connection, keys: Sequence[str], decision: Decision) -> dict[str, str]:
    """Return a sentence for each of these keys that says why nothing was decided about it."""
    rows = {row["key"]: row for row in await connection.fetch(STANDING, _possible(keys), LOST, PRUNED)}
    return {key: _why_not(key, rows.get(key), decision) for key in keys}


def _why_not(key: str, row: Any, decision: Decision) -> str:
    if row is None:
        return f"{key} is no email's key; take one that `outbox status` shows."
    if row["state"] == DeliveryState.DEAD and decision is Decision.SENT:
        return f"{key} is dead: the server refused it, so it cannot be declared sent; use `outbox retry`, or --discard."
    is_gone = row["lost"] or (row["pruned"] and row["state"] in DECIDABLE)
    if is_gone and decision is Decision.RESEND:
        return f"{key} cannot be sent: {no_message_label(is_lost=row['lost'])}."
    state = state_label(row["state"] or "without a delivery")
    if row["state"] in DECIDABLE and not row["decided"]:
        return f"{key} changed at this moment and is {state} now; look at `outbox status` and decide again."
    decided = f" ({row['decided']})" if row["decided"] else ""
    return f"{key} is {state}{decided}; nothing was changed, since only what is in doubt or dead can be decided."
