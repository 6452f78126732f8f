"""Failover: a relay's recent verdicts are written again on another server, before any email is claimed there.

A standby that replicates asynchronously lacks the last commits of the primary that it replaces: an email that was sent
looks unsent there, or was never written. An old primary that is in charge again lacks all that was sent meanwhile. So
each relay asserts what it remembers (`verdict_history`) on each server that is not the one of its last session, under
the email's key, since ids may be given again there. `failover_barrier` makes the other relays wait for it.

With synchronous replication nothing is lost, and all of this finds everything as it was.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.log import Events
from outbox.mail.delivery_state import DeliveryState
from outbox.mail.removed_message import LOST
from outbox.relay.quarantine import is_of_a_row
from outbox.relay.verdict_history import RecentVerdict

ASSERTED_AT_ONCE: Final = 1000
PASSED_BY_MAX: Final = 100

log = Events("outbox.relay")


# A row that is settled stays as it is, unless it expired or was cancelled while the try was unknown. An acceptance
# counts whatever else is known: the row's attempt may be another server's, so that a later number says nothing. Doubt
# counts as well, unless the row's own trail has that doubt: then a person or the policy has decided since. What else
# has a later attempt stays as it is, and an equal attempt of another relay is that relay's: $13 is the instance that
# tells this. An email that is gone is put back under its key, so that `generate` cannot make it again.
REASSERT: Final = """
WITH news AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::integer[], $7::integer[],
                         $8::text[], $9::text[], $10::text[], $11::float8[])
        AS n (key, sender, recipient, message_id, message, relay, attempt, state, verdict, reply, delay_s)
), kept AS (
    SELECT e.id AS email, n.* FROM news n JOIN outbox.email e ON e.key = n.key
), restored AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    SELECT key, sender, recipient, message_id, message FROM news n
     WHERE n.state <> 'pending' AND NOT EXISTS (SELECT FROM kept k WHERE k.key = n.key)
     ORDER BY key
    ON CONFLICT (key) DO NOTHING
    RETURNING id, key
), delivered AS (
    INSERT INTO outbox.delivery (email, due_at, marked_at, settled_at, doubted_at, relay, attempt, state, route)
    SELECT r.id, CASE WHEN n.state = 'in_doubt' THEN coalesce(now() + n.delay_s * interval '1 second', 'infinity')
                      ELSE now() END,
           now(), CASE WHEN n.state <> 'in_doubt' THEN now() END, CASE WHEN n.state = 'in_doubt' THEN now() END,
           n.relay, n.attempt, n.state, $12
      FROM restored r JOIN news n ON n.key = r.key
    RETURNING email, attempt, marked_at
), asserted AS (
    UPDATE outbox.delivery d
       SET state = k.state,
           attempt = greatest(d.attempt, k.attempt),
           withdrawn = CASE WHEN k.verdict = 'withdrawn' THEN least(d.withdrawn + 1, greatest(d.attempt, k.attempt))
                            ELSE least(d.withdrawn, greatest(d.attempt, k.attempt) - 1) END,
           due_at = CASE WHEN k.state IN ('pending', 'in_doubt')
                         THEN coalesce(now() + k.delay_s * interval '1 second', 'infinity') ELSE d.due_at END,
           relay = CASE WHEN k.state = 'pending' THEN NULL ELSE k.relay END,
           marked_at = coalesce(d.marked_at, now()),
           settled_at = CASE WHEN k.state IN ('sent', 'dead') THEN now() END,
           doubted_at = CASE WHEN k.state = 'in_doubt' THEN now() END,
           paused = NULL
      FROM kept k
     WHERE d.email = k.email
       AND d.state IN ('pending', 'sending', 'in_doubt', 'expired', 'cancelled')  -- by the primary key: see TICK
       AND (k.state = 'sent'
            OR (k.state IN ('dead', 'in_doubt') AND d.attempt < k.attempt)
            OR (k.state = 'in_doubt' AND d.state = 'pending'
                AND (SELECT 1 FROM outbox.attempt a WHERE a.email = d.email AND a.attempt = k.attempt
                        AND a.relay = k.relay AND a.verdict = 'in_doubt' LIMIT 1) IS NULL)
            OR (d.attempt = k.attempt AND d.relay = k.relay
                AND (k.state IN ('dead', 'pending') AND d.state IN ('sending', 'in_doubt')
                     OR k.state = 'in_doubt' AND d.state = 'sending')
                AND (SELECT 1 FROM outbox.relay r WHERE r.id = d.relay AND r.instance <> $13 LIMIT 1) IS NULL))
    RETURNING d.email, d.attempt, d.marked_at
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT f.email, f.attempt, n.relay, n.verdict, n.reply || ' (told again after a failover)', f.marked_at
      FROM (SELECT * FROM delivered UNION ALL SELECT * FROM asserted) f
      JOIN (SELECT email, key FROM kept UNION ALL SELECT id, key FROM restored) e ON e.email = f.email
      JOIN news n ON n.key = e.key
)
SELECT key, email, email IN (SELECT email FROM asserted) AS changed, NULL::integer AS attempt FROM kept
UNION ALL
SELECT key, id, true, NULL FROM restored
UNION ALL
SELECT NULL, email, false, attempt FROM asserted
"""


@dataclass(frozen=True, slots=True)
class EmailThere:
    """Email as another server has it: its id there, and its attempt if the verdict changed its row."""

    email: int
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Reasserted:
    """Emails of reasserted verdicts as the server has them, by key, and the number of verdicts that were new to it."""

    emails: dict[str, EmailThere]
    changed: int


async def reassert_portion(
    connection: Connection, verdicts: Sequence[RecentVerdict], *, route: str = "", instance: str | None = None
) -> Reasserted:
    """Write verdicts that the database may lack, at most `ASSERTED_AT_ONCE`, in one statement.

    An email that has to be put back takes the relay's `route`. What has been settled meanwhile stays as it is; to write
    a verdict twice changes nothing.
    """
    rows = await connection.fetch(
        REASSERT,
        [v.key for v in verdicts],
        [v.sender for v in verdicts],
        [v.recipient for v in verdicts],
        [v.message_id for v in verdicts],
        [LOST if v.message is None else v.message for v in verdicts],
        [v.relay for v in verdicts],
        [v.attempt for v in verdicts],
        [v.outcome.state for v in verdicts],
        [v.outcome.verdict for v in verdicts],
        [storable(v.outcome.reply) for v in verdicts],
        [v.outcome.delay_s for v in verdicts],
        route,
        instance,
    )
    attempts = {row["email"]: row["attempt"] for row in rows if row["key"] is None}
    emails = {
        row["key"]: EmailThere(row["email"], attempts.get(row["email"])) for row in rows if row["key"] is not None
    }
    return Reasserted(emails, sum(row["changed"] for row in rows))


async def reassert(
    connection: Connection,
    verdicts: Sequence[RecentVerdict],
    patience: Callable[[], AbstractContextManager[None]],
    *,
    route: str = "",
    instance: str | None = None,
) -> Reasserted:
    """Write any number of verdicts that the database may lack, in portions, each within a `patience()` of its own.

    If a row of a portion cannot be written, each verdict is written separately, and one that fails again is logged.
    A verdict on an email that another session was writing at that moment is written again: it was not there to be read,
    and once it is committed it cannot be put back.
    """
    emails: dict[str, EmailThere] = {}
    changed = 0
    retries_left = PASSED_BY_MAX
    portions = [verdicts[begin : begin + ASSERTED_AT_ONCE] for begin in range(0, len(verdicts), ASSERTED_AT_ONCE)]
    for portion in portions:  # the list grows while it runs
        try:
            with patience():
                done = await reassert_portion(connection, portion, route=route, instance=instance)
        except Exception as error:
            if not is_of_a_row(error):
                raise
            if len(portion) > 1:
                portions += [[one] for one in portion]
            else:
                _log_unwritable(portion[0], error)
            continue
        emails.update(done.emails)
        changed += done.changed
        passed_by = [v for v in portion if v.key not in done.emails and v.outcome.state != DeliveryState.PENDING]
        if passed_by and retries_left > 0:
            retries_left -= 1
            portions.append(passed_by)
    return Reasserted(emails, changed)


def _log_unwritable(verdict: RecentVerdict, error: Exception) -> None:
    log.error(
        "verdict_untold",
        "{key}, attempt {attempt}: the verdict {verdict!r} cannot be written again: {reason}",
        key=verdict.key,
        attempt=verdict.attempt,
        verdict=verdict.outcome.verdict,
        reason=error,
    )


STATEMENTS: Final = (REASSERT,)
