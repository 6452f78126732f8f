"""Tick: settle, mark and claim in one statement, so in one commit and one round trip.

Commits are what costs, so a tick is one commit, whatever number of deliveries it moves. A `TickRequest` is what to do;
a `TickResult` is what was done, and the state of the route in the whole fleet. `isolate` does the same in parts if a
row makes the statement fail.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.relay.claims import CLAIM, CLAIMED, GATE, NO_CLAIM, SMALL_BYTES, TOKENS, claimed_of
from outbox.relay.found_rate import Found
from outbox.relay.quarantine import SUSPECT, UNSUSPECTED
from outbox.relay.rate_limit import FOUND, found_of
from outbox.relay.settlement import Settlement
from outbox.settings import MESSAGE_BYTES_MAX
from outbox.smtp.outgoing import OutgoingEmail


class TickRequest(NamedTuple):
    """Work of a tick: settlements, marks and claims. By default there is none, and only the state of the route is read.

    Urgent emails are claimed first, then others, within each those due longest first.
    """

    route: str = ""
    """Name of the route in the settings: only its emails are claimed."""
    server: str = ""
    """Name of the mail server, under which the fleet shares its pause and rate."""
    settlements: Sequence[Settlement] = ()
    marks: Collection[int] = ()
    """Emails that are about to be sent."""
    claims_max: int = 0
    """Largest number of emails to claim, without suspects."""
    suspects_max: int = 0
    """Largest number of suspects to claim."""
    since: datetime | None = None
    """Others than urgent emails are claimed if they are due since then; None: all."""
    urgent_since: datetime | None = None
    """The same for urgent emails."""
    urgent_max: int | None = None
    """Largest number of urgent emails among those claimed; None: as many as fit into `claims_max`."""
    budget: int | None = None
    """Bytes of large messages to claim; None: `bytes_max`. They are not fetched yet (`message_fetch`)."""
    bytes_max: int = MESSAGE_BYTES_MAX
    """Largest email, in bytes; what is larger is claimed to be quarantined."""
    left_out: Sequence[int] = ()
    """Emails that are not claimed."""
    epoch: int | None = None
    """Epoch of the failover barrier: nothing is marked or claimed unless it is the latest, and lifted. None: any."""

    def parameters(self, relay: int) -> tuple[Any, ...]:
        """Return the parameters of `TICK`, in their order."""
        settlements = self.settlements
        outcomes = [s.outcome for s in settlements]
        return (
            [s.email for s in settlements],
            [s.attempt for s in settlements],
            [s.relay for s in settlements],
            [s.marked for s in settlements],
            [o.state for o in outcomes],
            [o.delay_s for o in outcomes],
            [o.verdict for o in outcomes],
            [storable(o.reply) for o in outcomes],
            relay,
            list(self.marks),
            self.claims_max,
            self.suspects_max,
            self.server,
            self.since,
            self.route,
            self.urgent_since,
            self.claims_max if self.urgent_max is None else self.urgent_max,
            self.bytes_max if self.budget is None else self.budget,
            self.bytes_max,
            self.left_out,
            self.epoch,
        )


@dataclass(frozen=True, slots=True)
class RoutePause:
    """Pause of a route in the whole fleet: no relay connects for `wait_s`, except for a probe (0: a probe is due).

    `logins` is how many times in a row the server refused the login.
    """

    reason: str
    wait_s: float
    logins: int = 0


@dataclass(frozen=True, slots=True)
class TickResult:
    """Result of one commit, and the state of the route in the whole fleet.

    A settlement or mark that is not in it changed nothing: its fence no longer matched.
    """

    settled: frozenset[tuple[int, int]]
    """Tries whose verdicts were written: email and attempt."""
    marked: dict[int, int]
    """Attempts of the emails that may be sent now."""
    expired: frozenset[int]
    """Emails that were to be marked and are too late to send."""
    claims: list[OutgoingEmail]
    pause: RoutePause | None
    reached: datetime | None
    """Time since which the latest claim was due, if as many as asked for were claimed: the next claim begins there."""
    held: frozenset[str] = frozenset()
    """Reports that are paused by people; '' is the fleet."""
    urgent_reached: datetime | None = None
    """Time at which the next claim of urgent emails begins."""
    listed: frozenset[int] = frozenset()
    """Claimed emails whose address is on the suppression list, for their report or for another."""
    unfit: dict[int, str] = field(default_factory=dict)
    """Claimed emails that cannot be sent and must be quarantined, with the reasons."""
    bytes_wanted: int = 0
    """Size of the first email that was due and did not fit into the budget; 0 if all did."""
    quarantined: frozenset[int] = frozenset()
    """Emails whose mark could not be written."""
    locked: frozenset[int] = frozenset()
    """Emails of which neither mark nor verdict was written, since another session has locked their rows."""
    epoch: int | None = None
    """The latest epoch of the failover barrier."""
    is_open: bool = True
    """False if nothing could be marked or claimed, since the barrier stands or its epoch is a new one."""
    found: Found | None = None
    """Rate that the mail server takes, as far as it is known."""


# The parts see one snapshot and touch different rows: a settled row is sending (or in doubt), a marked one is pending
# and ours, a claimed one pending and free. If a row is two of these, the first in the order of the SELECT at the end
# wins.
#
# $1 to $8 are the settlements, a column each, $9 is the relay, $10 the marks.
#
# settle: the fence is (relay, attempt). A 250 also settles a row that was put back to pending in the meantime
#   (doubt resolved as "send again" while the reply was under way), as long as no relay has marked it again.
#   So does a row that expired or was cancelled in the meantime: it was accepted, whatever the time and the person.
#   And so does one that is in doubt under another relay: after a failover a try of the same number may be another's.
#   Such a row may count all its attempts as withdrawn (a dead letter that a person sends again has all its tries
#   before it), and an attempt that was accepted is none of those.
#   Open rows are named by their states, here and in mark and RELEASE: `settled_at IS NULL` would let the planner walk
#   the whole backlog by the index of open rows, once per verdict, while statistics say that hardly any row is open.
# mark: only rows that are still this relay's claim; the caller may write the dot only for those that come back as
#   marked. What is too late by now expires instead.
# claim: SKIP LOCKED passes over rows that another relay is claiming at this moment. When it has just committed,
#   the recheck after the row lock sees its relay and passes too (PostgreSQL docs, 13.2.1).
#   The lock of a row alone would not make a claim: this session's advisory lock on $9 does, since only rows whose
#   relay has lost its lock are ever taken from it.
#   $15 is the route, $20 are emails that are left out, $11 is how many are claimed at most, $12 the same for suspects.
#   Messages of more than 65536 bytes are claimed up to the budget $18, and quarantined if they have more than $19
#   (`claims`).
#   It begins at $14, where the last one ended: before lie the entries of what was settled, which stay in the index
#   until vacuum may take them, and a claim that begins with them costs more with each message, the more the longer
#   any snapshot is held. The caller says now and then that it wants all, for what came free or was passed over.
#   Urgent ones are a lane of their own and are looked for first, from $16 on: a second before the last look that found
#   them all, since a transaction that takes a while commits emails that are due since it began. At most $17 of them are
#   claimed, and what they leave goes to the others.
# pause, rate: the state of the server named $13, as the fleet shares it.
# barrier: $21 is the latest epoch that this relay knows.
_NUMBERS: Final = {"small": SMALL_BYTES, "relay": "$9", "budget": "$18::bigint", "limit": "$19::bigint"}
TICK: Final = f"""
WITH {GATE.format(known="$21::bigint")}, news AS (
    SELECT * FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::boolean[],
                         $5::text[], $6::float8[], $7::text[], $8::text[])
        AS n (email, attempt, relay, marked, state, delay_s, verdict, reply)
), settled AS (
    UPDATE outbox.delivery d
       SET state = n.state,
           attempt = n.attempt,
           withdrawn = CASE WHEN n.verdict = 'withdrawn' THEN d.withdrawn + 1
                            ELSE least(d.withdrawn, n.attempt - 1) END,
           due_at = CASE WHEN n.state IN ('pending', 'in_doubt')
                         THEN coalesce(now() + n.delay_s * interval '1 second', 'infinity') ELSE d.due_at END,
           relay = CASE WHEN n.state = 'pending' THEN NULL ELSE n.relay END,
           settled_at = CASE WHEN n.state IN ('sent', 'dead') THEN now() END,
           doubted_at = CASE WHEN n.state = 'in_doubt' THEN now() END,
           paused = NULL,
           orphaned = CASE WHEN n.verdict IN ('accepted', 'deferred', 'refused') THEN 0 ELSE d.orphaned END
      FROM news n
     WHERE d.email = n.email
       AND d.state IN ('pending', 'sending', 'in_doubt', 'expired', 'cancelled')
       AND ((n.marked AND d.attempt = n.attempt AND d.relay = n.relay AND d.state IN ('sending', 'in_doubt')
             AND d.state <> n.state)
            OR (n.marked AND d.attempt = n.attempt AND n.state = 'sent'
                AND d.state IN ('pending', 'expired', 'cancelled', 'in_doubt'))
            OR (NOT n.marked AND d.attempt = n.attempt - 1 AND d.relay = n.relay AND d.state = 'pending'))
    RETURNING d.email, d.attempt, n.relay, n.verdict, n.reply, CASE WHEN n.marked THEN d.marked_at END AS marked_at
), marked AS (
    UPDATE outbox.delivery
       SET state = CASE WHEN send_before <= now() THEN 'expired' ELSE 'sending' END,
           attempt = CASE WHEN send_before <= now() THEN attempt ELSE attempt + 1 END,
           marked_at = CASE WHEN send_before <= now() THEN marked_at ELSE now() END,
           settled_at = CASE WHEN send_before <= now() THEN now() END,
           relay = CASE WHEN send_before <= now() THEN NULL ELSE relay END
     WHERE (SELECT is_open FROM gate) AND email = ANY ($10::bigint[]) AND relay = $9 AND state = 'pending'
    RETURNING email, attempt, state = 'expired' AS late
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, verdict, reply, marked_at FROM settled
    UNION ALL
    SELECT email, attempt, $9, 'expired', 'send_before was over before it was sent', NULL FROM marked WHERE late
), urgent AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND {UNSUSPECTED}
       AND email <> ALL ($20::bigint[]) AND route = $15 AND priority = 1
       AND due_at >= coalesce($16::timestamptz, '-infinity') AND due_at <= now()
       AND (send_before IS NULL OR send_before > now())
     ORDER BY due_at, email
     LIMIT CASE WHEN (SELECT is_open FROM gate) THEN $17 ELSE 0 END
       FOR UPDATE SKIP LOCKED
), due AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND {UNSUSPECTED}
       AND email <> ALL ($20::bigint[]) AND route = $15 AND priority = 0
       AND due_at >= coalesce($14::timestamptz, '-infinity') AND due_at <= now()
       AND (send_before IS NULL OR send_before > now())
     ORDER BY due_at, email
     LIMIT CASE WHEN (SELECT is_open FROM gate) THEN $11 - (SELECT count(*) FROM urgent) ELSE 0 END
       FOR UPDATE SKIP LOCKED
), suspect AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND {SUSPECT}
       AND email <> ALL ($20::bigint[]) AND route = $15
       AND (send_before IS NULL OR send_before > now())
     ORDER BY due_at, email
     LIMIT CASE WHEN (SELECT is_open FROM gate) THEN $12 ELSE 0 END
       FOR UPDATE SKIP LOCKED
), chosen AS (
    SELECT email, due_at FROM suspect UNION ALL SELECT email, due_at FROM urgent UNION ALL SELECT email, due_at FROM due
), {CLAIM.format_map(_NUMBERS)}, left_over AS (
    SELECT due_at, bytes FROM weighed WHERE NOT fits
)
SELECT (SELECT array_agg(ARRAY[email, attempt]) FROM settled) AS settled,
       (SELECT array_agg(ARRAY[email, attempt]) FROM marked WHERE NOT late) AS marked,
       (SELECT array_agg(email) FROM marked WHERE late) AS expired,
       (SELECT ROW(reason,
                   greatest(extract(epoch FROM greatest(least(retry_at, now() + interval '1 hour'), now()) - now()),
                            0)::float8,
                   logins)
          FROM outbox.route WHERE name = $13) AS pause,
       (SELECT row_to_json(f)::text
          FROM (SELECT {FOUND} FROM outbox.pace WHERE route = $13 AND found_rate IS NOT NULL) AS f) AS rate,
       (SELECT array_agg(report) FROM outbox.pause) AS held,
       epoch, is_open,
       (SELECT greatest(coalesce(least(max(due_at), (SELECT min(due_at) FROM left_over)), $14), '1970-01-01 UTC')
          FROM due HAVING count(*) = $11 - (SELECT count(*) FROM urgent)) AS reached,
       (SELECT greatest(least(CASE WHEN count(*) < $17 THEN now() - interval '1 second'
                                   ELSE coalesce(max(due_at), $16) END,
                              (SELECT min(due_at) FROM left_over)), '1970-01-01 UTC')
          FROM urgent) AS urgent_reached,
       (SELECT min(bytes) FROM left_over) AS bytes_wanted,
       {TOKENS} AS tokens,
       {NO_CLAIM}
  FROM gate
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
       {CLAIMED.format_map(_NUMBERS)}
  FROM claimed c
"""


async def tick(connection: Connection, relay: int, request: TickRequest) -> TickResult:
    """Settle, mark and claim in one commit; return what was done.

    If this raises an error of Postgres, nothing was committed; after any other error the commit is unknown.
    """
    facts, *claim_rows = await connection.fetch(TICK, *request.parameters(relay))
    claimed = claimed_of(claim_rows, facts["tokens"], relay, request.bytes_max)
    return TickResult(
        settled=frozenset(map(tuple, facts["settled"] or ())),
        marked=dict(facts["marked"] or ()),
        expired=frozenset(facts["expired"] or ()),
        claims=claimed.claims,
        pause=RoutePause(*facts["pause"]) if facts["pause"] is not None else None,
        reached=facts["reached"],
        held=frozenset(facts["held"] or ()),
        urgent_reached=facts["urgent_reached"],
        listed=claimed.listed,
        unfit=claimed.unfit,
        bytes_wanted=facts["bytes_wanted"] or 0,
        epoch=facts["epoch"],
        is_open=facts["is_open"],
        found=found_of(json.loads(facts["rate"])) if facts["rate"] is not None else None,
    )


STATEMENTS: Final = (TICK,)
