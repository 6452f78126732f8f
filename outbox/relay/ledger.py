"""What a relay writes on the way of every email: claim, mark, settle, release, expire, sweep, as SQL and functions.

`session` registers the relay; `doubt`, `failover` and `breaker` have what is written in doubt and in trouble.

Each function takes the connection of a live relay session; who calls when is `relay`'s business, what a verdict
means is `verdict`'s. One tick is one statement, so one snapshot, one commit and one round trip, whatever number of
deliveries it moves: commits are what costs.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from outbox.database.connection import Connection
from outbox.database.locks import HOLDS_ITS_LOCK, RELAY_LOCKS
from outbox.database.values import storable
from outbox.mail.verp import email_of
from outbox.relay.quarantine import STATEMENTS as QUARANTINE_STATEMENTS
from outbox.relay.quarantine import Quarantine, is_of_a_row
from outbox.relay.rate_limit import FOUND, found_of
from outbox.relay.throttle import Found
from outbox.settings import MESSAGE_BYTES_MAX
from outbox.smtp.outgoing import Claim
from outbox.smtp.verdict import Outcome

# A delivery that so many relays died with is a suspect: a relay holds one of them at a time, so that a guilty one
# falls with nobody but itself. After QUARANTINE_AFTER deaths in all it is quarantined:
# dead, until a person sends it again. The 3 stands in TICK, JUDGE and the index `delivery_suspect` too.
SUSPECT_AFTER: Final = 3
QUARANTINE_AFTER: Final = 6

# A larger message is claimed without its bytes and fetched separately (`fetch_messages`): if a relay dies of it, the
# claim is committed by then, so the death counts. Only such messages count for the budget. TICK repeats the number.
SMALL_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Settlement:
    """An outcome on its way to the database, under the fence (relay, attempt) of the try that made it.

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
        """What identifies the try for ever: attempts of an email are never reused."""
        return self.email, self.attempt


@dataclass(frozen=True, slots=True)
class RoutePause:
    """The fleet's pause of a route: why, and for how long nobody but a probe may connect (0: a probe is due).

    `logins` is how many times in a row the server refused the login.
    """

    reason: str
    wait_s: float
    logins: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """What one commit made true, whether the fleet's route is paused, and what people hold back.

    `reached` is when the latest claim was due, if there was as much as asked for: what is due next begins there;
    `urgent_reached` is where the next look for urgent ones may begin.
    """

    settled: frozenset[tuple[int, int]]
    marked: dict[int, int]
    expired: frozenset[int]
    claims: list[Claim]
    pause: RoutePause | None
    reached: datetime | None
    held: frozenset[str] = frozenset()
    """Which reports are paused by people; '' is the fleet."""
    urgent_reached: datetime | None = None
    listed: frozenset[int] = frozenset()
    """Which claims are of an address that is on the suppression list, for their report or for another."""
    unfit: dict[int, str] = field(default_factory=dict)
    """Claimed emails that cannot be sent and must be quarantined, with the reasons."""
    bytes_wanted: int = 0
    """Size of the first email that was due and did not fit into the budget; 0 if all did."""
    quarantined: frozenset[int] = frozenset()
    """Of which emails the mark could not be written."""
    locked: frozenset[int] = frozenset()
    """Of which emails neither mark nor verdict was written, since another session has locked their rows."""
    epoch: int | None = None
    """The epoch of the failover's barrier (`barrier`)."""
    is_open: bool = True
    """False if nothing could be marked or claimed, since the barrier stands or its epoch is a new one."""
    found: Found | None = None
    """Rate that the mail server takes, as far as it is known."""


LOOK_FOR_ALL_S: Final = 1.0  # what is due behind the frontier waits for so long, at most


@dataclass(slots=True)
class Frontier:
    """Where a relay's next claim begins in a lane, while there is more due than it asks for.

    Now and then, and once less than asked for comes back, it looks for all that is due: what came free behind the
    frontier, or was passed over since another relay was claiming it, waits for so long.
    """

    reached: datetime | None = None
    all_at: float = 0.0

    def since(self, now: float) -> datetime | None:
        """What to claim since: None is all that is due. `now` is the caller's monotonic clock, in seconds."""
        return None if now >= self.all_at else self.reached

    def note(self, reached: datetime | None, since: datetime | None, now: float) -> None:
        """Move on after a tick that had room, was asked to claim `since`, and reached that far."""
        self.reached = reached
        if since is None:
            self.all_at = now + LOOK_FOR_ALL_S


ORDINARY_SHARE: Final = 0.25  # of what is claimed, while urgent ones and others wait


@dataclass(slots=True)
class Turns:
    """Urgent emails come first, but of four that are claimed one is another's, so that none is starved by a stream.

    With room for less than four at a time the rest is `owed` its place until it adds up to one.
    """

    owed: float = 0.0

    def urgent_of(self, room: int) -> int:
        """How many of so many claims urgent ones may have at most."""
        return room - min(int(self.owed + ORDINARY_SHARE * room), room)

    def note(self, claims: Sequence[Claim], room: int, urgent_max: int) -> bool:
        """Count a claim; whether its room was left over to nobody although more urgent ones may wait."""
        urgent = sum(claim.urgent for claim in claims if not claim.suspect)
        ordinary = sum(not claim.urgent for claim in claims if not claim.suspect)
        both_wait = urgent >= urgent_max and ordinary >= room - urgent
        self.owed = max(self.owed + ORDINARY_SHARE * room - ordinary, 0.0) if both_wait else 0.0
        return urgent_max < room and urgent >= urgent_max and not both_wait


# The lanes in which anything is open, each found by one step in the index, however much waits in it.
LANES: Final = """
lane AS (
    (SELECT route, priority FROM outbox.delivery WHERE settled_at IS NULL ORDER BY route, priority LIMIT 1)
    UNION ALL
    SELECT n.route, n.priority FROM lane l CROSS JOIN LATERAL (
        SELECT route, priority FROM outbox.delivery d
         WHERE d.settled_at IS NULL AND (d.route, d.priority) > (l.route, l.priority)
         ORDER BY d.route, d.priority LIMIT 1) n
)"""


# The parts see one snapshot and touch different rows: a settled row is sending (or in doubt), a marked one is
# pending and ours, a claimed one pending and nobody's. Where a row is two of these, the first in the order of the
# SELECT at the end wins.
#
# settle: the fence is (relay, attempt). A 250 also settles a row that was put back to pending in the meantime
#   (doubt resolved as "send again" while the reply was under way), as long as nobody has marked it again.
#   So does a row that expired or was cancelled in the meantime: it was accepted, whatever the hour or the person said.
#   And so does one that is in doubt under another relay: after a failover a try of the same number may be another's.
#   Such a row may count all its attempts as withdrawn (a dead letter that a person sends again has all its tries
#   before it), and an attempt that was accepted is none of those.
#   Open rows are named by their states, here and in mark and RELEASE: `settled_at IS NULL` would let the planner walk
#   the whole backlog by the index of open rows, once per verdict, while statistics say that hardly any row is open.
# mark: only rows that are still this relay's claim; the caller may write the dot only for those that come back as
#   marked. What is too late by now expires instead.
# claim: SKIP LOCKED passes over rows that another relay is claiming at this moment. When it has just committed,
#   the recheck after the row lock sees its relay and passes too (PostgreSQL docs, 13.2.1).
#   It begins at $14, where the last one ended: before lie the entries of what was settled, which stay in the index
#   until vacuum may take them, and a claim that begins with them costs more with each message, the more the longer
#   any snapshot is held. The caller says now and then that it wants all, for what came free or was passed over.
#   Urgent ones are a lane of their own and are looked for first, from $16 on: a second before the last look that found
#   them all, since a transaction that takes a while commits emails that are due since it began. They get $17 places at
#   most, and what they leave goes to the others.
#   'x' is a claim whose address is on the suppression list, for whichever report: one look at its key, in a form that
#   the planner cannot turn into reading the whole list. `suppression` finds out for which.
# 't' has the tokens of all claims, each of which begins with its email's id: one call for all of them costs a few
#   microseconds an email, one call for each five times as much.
#   Claims are chosen by size before any byte of a message is read: octet_length of a value that is stored out of line
#   reads only its header. Large messages are taken while their sum is at most $18; small ones may overtake them. A
#   message of more than $19 bytes is claimed without its text, to be quarantined. $20 are emails that are left out.
# gate: emails are marked and claimed only if the barrier of `outbox.failover` is lifted and its epoch is $21, the
#   latest that this relay knows. Null takes any. Otherwise a relay that has just come from another server may know that
#   they were sent there.
# The lock of a row alone would not make a claim: this session's advisory lock on $9 does, since only rows whose
#   relay has lost its lock are ever taken from it.
#
# _CLAIM claims the part of `chosen` that fits the budget. The sum runs over the rows in the order in which they come;
# another order would take other emails first, and lose none.
_CLAIM: Final = """sized AS (
    SELECT c.email, c.due_at, e.key, e.sender, e.recipient, e.message_id, e.message, e.traceparent, s.bytes,
           coalesce(sum(s.bytes) FILTER (WHERE s.bytes > 65536 AND s.bytes <= {limit})
                        OVER (ROWS UNBOUNDED PRECEDING), 0) AS so_far
      FROM chosen c LEFT JOIN outbox.email e ON e.id = c.email
     CROSS JOIN LATERAL (SELECT octet_length(e.message)::bigint + octet_length(e.sender) + octet_length(e.recipient)
                                + octet_length(e.message_id) + octet_length(e.key)
                                + coalesce(octet_length(e.traceparent), 0) AS bytes) s
), weighed AS (
    SELECT *, bytes IS NULL OR bytes <= 65536 OR bytes > {limit} OR so_far <= {budget} AS fits FROM sized
), claimed AS (
    UPDATE outbox.delivery d SET relay = {relay} FROM weighed c WHERE d.email = c.email AND c.fits
    RETURNING d.email, d.attempt, d.withdrawn, d.orphaned, d.priority, c.key, c.sender, c.recipient, c.message_id,
              c.message, c.traceparent, c.bytes
)"""
_CLAIMS: Final = """
SELECT CASE WHEN bytes > {limit} THEN 'c'
            WHEN (SELECT 1 FROM outbox.suppression s WHERE s.address = lower(c.recipient COLLATE "C") LIMIT 1) = 1
            THEN 'x' ELSE 'c' END AS part,
       email, attempt, withdrawn, orphaned, CASE WHEN bytes > {limit} THEN left(key, 200) ELSE key END AS key,
       CASE WHEN bytes <= {limit} THEN sender END AS sender, CASE WHEN bytes <= {limit} THEN recipient END AS recipient,
       CASE WHEN bytes <= {limit} THEN message_id END AS message_id,
       CASE WHEN bytes <= 65536 THEN message END AS message, NULL::float8 AS wait_s, NULL::timestamptz AS reached,
       CASE WHEN bytes <= {limit} THEN traceparent END AS traceparent, priority, bytes
  FROM claimed c"""
_TOKENS: Final = """\
SELECT 't', NULL, NULL, NULL, NULL, string_agg(t.token, ' '), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
  FROM outbox.bounce_tokens(ARRAY(SELECT email FROM claimed)) t WHERE EXISTS (SELECT FROM claimed) HAVING count(*) > 0
"""
_TICK_NUMBERS: Final = {"relay": "$9", "budget": "$18::bigint", "limit": "$19::bigint"}

_GATE: Final = """gate AS (
    SELECT epoch, {known} IS NULL OR epoch IS NULL OR (epoch = {known} AND lifted_at IS NOT NULL) AS is_open
      FROM (SELECT max(epoch) AS epoch, max(lifted_at) AS lifted_at FROM outbox.failover WHERE one) AS barrier
)"""

TICK: Final = f"""
WITH {_GATE.format(known="$21::bigint")}, news AS (
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
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND orphaned < 3
       AND email <> ALL ($20::bigint[]) AND route = $15 AND priority = 1
       AND due_at >= coalesce($16::timestamptz, '-infinity') AND due_at <= now()
       AND (send_before IS NULL OR send_before > now())
     ORDER BY due_at, email
     LIMIT CASE WHEN (SELECT is_open FROM gate) THEN $17 ELSE 0 END
       FOR UPDATE SKIP LOCKED
), due AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND orphaned < 3
       AND email <> ALL ($20::bigint[]) AND route = $15 AND priority = 0
       AND due_at >= coalesce($14::timestamptz, '-infinity') AND due_at <= now()
       AND (send_before IS NULL OR send_before > now())
     ORDER BY due_at, email
     LIMIT CASE WHEN (SELECT is_open FROM gate) THEN $11 - (SELECT count(*) FROM urgent) ELSE 0 END
       FOR UPDATE SKIP LOCKED
), suspect AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND orphaned >= 3
       AND email <> ALL ($20::bigint[]) AND route = $15
       AND (send_before IS NULL OR send_before > now())
     ORDER BY due_at, email
     LIMIT CASE WHEN (SELECT is_open FROM gate) THEN $12 ELSE 0 END
       FOR UPDATE SKIP LOCKED
), chosen AS (
    SELECT email, due_at FROM suspect UNION ALL SELECT email, due_at FROM urgent UNION ALL SELECT email, due_at FROM due
), {_CLAIM.format_map(_TICK_NUMBERS)}, left_over AS (
    SELECT due_at, bytes FROM weighed WHERE NOT fits
)
SELECT 's' AS part, email, attempt, NULL::integer AS withdrawn, NULL::integer AS orphaned, NULL AS key, NULL AS sender,
       NULL AS recipient, NULL AS message_id, NULL::bytea AS message, NULL::float8 AS wait_s,
       NULL::timestamptz AS reached, NULL AS traceparent, NULL::smallint AS priority, NULL::bigint AS bytes FROM settled
UNION ALL
SELECT CASE WHEN late THEN 'e' ELSE 'm' END, email, attempt, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
       NULL, NULL FROM marked
UNION ALL
{_CLAIMS.format_map(_TICK_NUMBERS)}
UNION ALL
SELECT 'r', NULL, logins, NULL, NULL, reason, NULL, NULL, NULL, NULL,
       greatest(extract(epoch FROM greatest(least(retry_at, now() + interval '1 hour'), now()) - now()), 0)::float8,
       NULL, NULL, NULL, NULL FROM outbox.route WHERE name = $13
UNION ALL
SELECT 'd', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
       greatest(coalesce(least(max(due_at), (SELECT min(due_at) FROM left_over)), $14), '1970-01-01 UTC'), NULL, NULL,
       NULL
  FROM due HAVING count(*) = $11 - (SELECT count(*) FROM urgent)
UNION ALL
SELECT 'u', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
       greatest(least(CASE WHEN count(*) < $17 THEN now() - interval '1 second' ELSE coalesce(max(due_at), $16) END,
                      (SELECT min(due_at) FROM left_over)), '1970-01-01 UTC'), NULL, NULL, NULL
  FROM urgent
UNION ALL
SELECT 'b', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, min(bytes)
  FROM left_over HAVING count(*) > 0
UNION ALL
SELECT 'f', NULL, NULL, NULL, NULL, row_to_json(f)::text, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
  FROM (SELECT {FOUND} FROM outbox.pace WHERE route = $13 AND found_rate IS NOT NULL) AS f
UNION ALL
SELECT 'p', NULL, NULL, NULL, NULL, report, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM outbox.pause
UNION ALL
SELECT 'g', epoch, is_open::integer, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM gate
UNION ALL
{_TOKENS}"""


async def tick(
    connection: Connection,
    relay: int,
    *,
    settlements: Sequence[Settlement] = (),
    marks: Iterable[int] = (),
    room: int = 0,
    suspects: int = 0,
    route: str = "",
    server: str = "",
    since: datetime | None = None,
    urgent_since: datetime | None = None,
    urgent_max: int | None = None,
    budget: int | None = None,
    bytes_max: int = MESSAGE_BYTES_MAX,
    left_out: Sequence[int] = (),
    epoch: int | None = None,
) -> Tick:
    """Settle, mark and claim in one commit; return what came true, and what the fleet knows of `server`, by that name.

    A settlement or mark that is not in the answer changed nothing: its fence no longer matched. At most `room`
    deliveries of the route, and `suspects` more, are claimed: urgent ones first, of those due since `urgent_since` at
    most `urgent_max` (as many as there is room for), then others due since `since`; within each those due longest
    first. Large messages are claimed while they fit into `budget` bytes (None: `bytes_max`) and are not fetched yet.
    Nothing is marked or claimed unless the barrier of `epoch` is lifted and the latest one (None: in any case).
    If this raises an error of Postgres, nothing was committed; after any other error nothing is known of the commit.
    """
    rows = await connection.fetch(
        TICK,
        [s.email for s in settlements],
        [s.attempt for s in settlements],
        [s.relay for s in settlements],
        [s.marked for s in settlements],
        [s.outcome.state for s in settlements],
        [s.outcome.delay_s for s in settlements],
        [s.outcome.verdict for s in settlements],
        [storable(s.outcome.reply) for s in settlements],
        relay,
        list(marks),
        room,
        suspects,
        server,
        since,
        route,
        urgent_since,
        room if urgent_max is None else urgent_max,
        bytes_max if budget is None else budget,
        bytes_max,
        left_out,
        epoch,
    )
    gate = next(r for r in rows if r["part"] == "g")
    pauses = [RoutePause(r["key"], r["wait_s"], r["attempt"]) for r in rows if r["part"] == "r"]
    claims, unfit = claims_of(rows, relay, bytes_max)
    return Tick(
        settled=frozenset((r["email"], r["attempt"]) for r in rows if r["part"] == "s"),
        marked={r["email"]: r["attempt"] for r in rows if r["part"] == "m"},
        expired=frozenset(r["email"] for r in rows if r["part"] == "e"),
        claims=claims,
        pause=pauses[0] if pauses else None,
        reached=next((r["reached"] for r in rows if r["part"] == "d"), None),
        held=frozenset(r["key"] for r in rows if r["part"] == "p"),
        urgent_reached=next((r["reached"] for r in rows if r["part"] == "u"), None),
        listed=frozenset(r["email"] for r in rows if r["part"] == "x" and r["email"] not in unfit),
        unfit=unfit,
        bytes_wanted=next((r["bytes"] for r in rows if r["part"] == "b"), 0),
        epoch=gate["email"],
        is_open=bool(gate["attempt"]),
        found=next((found_of(json.loads(r["key"])) for r in rows if r["part"] == "f"), None),
    )


MESSAGE_LIMIT: Final = "SELECT outbox.message_bytes_max()"
TOO_MANY_BYTES: Final = "it has {bytes} bytes, and a relay takes at most {bytes_max} (message_bytes_max)"
INCOMPLETE: Final = "its row in outbox.email is missing, or has a null where none is expected"


def claims_of(rows: Sequence[Any], relay: int, bytes_max: int) -> tuple[list[Claim], dict[int, str]]:
    """Return the claims among the rows, and the claimed emails that cannot be sent, with the reasons."""
    tokens = {email_of(token): token for r in rows if r["part"] == "t" for token in r["key"].split()}
    claims: list[Claim] = []
    unfit: dict[int, str] = {}
    for r in rows:
        if r["part"] not in ("c", "x"):
            continue
        size = r["bytes"]
        if size is None:  # a null in any column makes the sum null
            unfit[r["email"]] = INCOMPLETE
        elif size > bytes_max:
            unfit[r["email"]] = TOO_MANY_BYTES.format(bytes=size, bytes_max=bytes_max)
        else:
            claims.append(
                Claim(
                    relay,
                    r["email"],
                    r["key"],
                    r["attempt"],
                    r["withdrawn"],
                    r["sender"],
                    r["recipient"],
                    r["message_id"],
                    r["message"] or b"",
                    suspect=r["orphaned"] >= SUSPECT_AFTER,
                    urgent=r["priority"] > 0,
                    traceparent=r["traceparent"],
                    size=size,
                    fetched=size <= SMALL_BYTES,
                    token=tokens.get(r["email"], ""),
                )
            )
    return claims, unfit


FETCH_MESSAGES: Final = "SELECT id, message FROM outbox.email WHERE id = ANY ($1::bigint[])"


async def fetch_messages(connection: Connection, claims: Sequence[Claim]) -> None:
    """Fetch the bytes of large messages that are claimed."""
    of = {claim.email: claim for claim in claims}
    for row in await connection.fetch(FETCH_MESSAGES, list(of)):
        of[row["id"]].message = row["message"]
        of[row["id"]].fetched = True


# Which of these rows another session has locked at this moment. $1 emails.
LOCKED: Final = """
WITH free AS (SELECT email FROM outbox.delivery WHERE email = ANY ($1::bigint[]) FOR UPDATE SKIP LOCKED)
SELECT email FROM outbox.delivery WHERE email = ANY ($1::bigint[]) AND email NOT IN (SELECT email FROM free)
"""


async def locked(connection: Connection, emails: Sequence[int]) -> frozenset[int]:
    """Return which emails' rows another session has locked; waits for none of them."""
    return frozenset(row["email"] for row in await connection.fetch(LOCKED, emails)) if emails else frozenset()


# What a tick would claim now, as ids only, which can always be read. $1 route, $2 room, $3 suspects, $4 left out.
CANDIDATES: Final = """
(SELECT email FROM outbox.delivery
  WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND orphaned >= 3
    AND route = $1 AND email <> ALL ($4::bigint[]) AND (send_before IS NULL OR send_before > now())
  ORDER BY due_at, email LIMIT $3)
UNION ALL
(SELECT email FROM outbox.delivery
  WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND orphaned < 3
    AND route = $1 AND priority = 1 AND email <> ALL ($4::bigint[]) AND (send_before IS NULL OR send_before > now())
  ORDER BY due_at, email LIMIT $2)
UNION ALL
(SELECT email FROM outbox.delivery
  WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND orphaned < 3
    AND route = $1 AND priority = 0 AND email <> ALL ($4::bigint[]) AND (send_before IS NULL OR send_before > now())
  ORDER BY due_at, email LIMIT $2)
"""
# $1 email, $2 relay, $3 budget, $4 limit, $5 epoch.
CLAIM_ONE: Final = f"""
WITH {_GATE.format(known="$5::bigint")}, chosen AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE email = $1 AND state = 'pending' AND settled_at IS NULL AND relay IS NULL AND (SELECT is_open FROM gate)
       FOR UPDATE SKIP LOCKED
), {_CLAIM.format(relay="$2", budget="$3::bigint", limit="$4::bigint")}
{_CLAIMS.format(limit="$4::bigint")}
UNION ALL
{_TOKENS}"""


async def candidates(
    connection: Connection, route: str, *, room: int, suspects: int, left_out: Sequence[int]
) -> list[int]:
    """Return which emails a tick would claim: suspects, then urgent ones, then others, each due longest first."""
    return [row["email"] for row in await connection.fetch(CANDIDATES, route, room, suspects, left_out)][:room]


async def claim_one(
    connection: Connection, relay: int, email: int, *, budget: int, bytes_max: int, epoch: int | None = None
) -> tuple[list[Claim], dict[int, str], bool]:
    """Claim one email, if it is free; return the result of `claims_of`, and whether its address may be suppressed."""
    rows = await connection.fetch(CLAIM_ONE, email, relay, budget, bytes_max, epoch)
    return *claims_of(rows, relay, bytes_max), any(row["part"] == "x" for row in rows)


# By the narrow index of what has a last moment, in its order. What a relay holds expires at its mark instead.
_LATE: Final = """
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND send_before <= now() AND state = 'pending' AND relay IS NULL"""
_EXPIRE: Final = """
WITH late AS ({late}
), expired AS (
    UPDATE outbox.delivery d
       SET state = 'expired', settled_at = now(), paused = NULL,
           due_at = CASE WHEN paused IS NULL THEN due_at ELSE now() END
      FROM late l WHERE d.email = l.email
    RETURNING d.email, d.attempt
)
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)
SELECT email, attempt, $2, 'expired', 'send_before was over before it was sent' FROM expired
"""
# $1 how many, $2 relay, $3 left out; $1 is the email where it is one.
LATE: Final = f"{_LATE} AND email <> ALL ($2::bigint[]) ORDER BY send_before LIMIT $1"
EXPIRE: Final = _EXPIRE.format(
    late=f"{_LATE} AND email <> ALL ($3::bigint[]) ORDER BY send_before LIMIT $1 FOR UPDATE SKIP LOCKED"
)
EXPIRE_ONE: Final = _EXPIRE.format(late=f"{_LATE} AND email = $1 FOR UPDATE SKIP LOCKED")
EXPIRED_AT_ONCE: Final = 1000


async def expire(connection: Connection, relay: int, quarantine: Quarantine | None = None) -> int:
    """End what is pending, nobody's, and too late to send; return how many, at most `EXPIRED_AT_ONCE`."""
    quarantine = quarantine or Quarantine((relay,))
    try:
        return _count(await connection.execute(EXPIRE, EXPIRED_AT_ONCE, relay, quarantine.left_out))
    except Exception as error:
        if not is_of_a_row(error):
            raise
    late = [row["email"] for row in await connection.fetch(LATE, EXPIRED_AT_ONCE, quarantine.left_out)]
    done = await quarantine.sift(connection, late, lambda email: connection.execute(EXPIRE_ONE, email, relay))
    return sum(map(_count, done))


def _count(tag: str) -> int:
    """Return how many rows a statement wrote, from its command tag."""
    return int(tag.rpartition(" ")[2])


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
    after_s: float = 0.0,
    quarantine: Quarantine | None = None,
) -> None:
    """Give unmarked claims back, so that any relay may take them: at once, or a little later than what is due now."""
    if not emails:
        return
    quarantine = quarantine or Quarantine((relay,))
    try:
        await connection.execute(RELEASE, emails, relay, after_s)
    except Exception as error:
        if not is_of_a_row(error):
            raise
        await quarantine.sift(connection, emails, lambda email: connection.execute(RELEASE, [email], relay, after_s))


# A session that began before Postgres did was lost with it, and no fault of what it held.
OTHERS: Final = """
SELECT id, started_at >= pg_postmaster_start_time() AS died, route, instance, sent FROM outbox.relay
 WHERE ended_at IS NULL AND id <> $1
"""

# The dead among relays that the caller has seen in an earlier statement. This is safe because
# - a relay commits its row with its lock held: a session that sees the row and then reads pg_locks finds the lock,
#   unless the relay's session has ended. pg_locks shows the present, whatever the snapshot, so the order of the two
#   matters;
# - a session takes its lock once, keeps it to its end, and its last commit is decided before the lock is released. So a
#   relay that is found dead stays dead, and a later statement reads everything that it ever wrote. The row lock keeps
#   two sweepers from judging one relay: the later one skips it, or finds it ended. Only a sweeper locks
# the row of a dead relay, and no role without rights on it can. The advisory lock cannot do this, since any role may
# hold it. $1 is RELAY_LOCKS.
DEAD: Final = f"""
SELECT r.id FROM outbox.relay r
 WHERE r.id = ANY ($2::integer[]) AND r.ended_at IS NULL AND NOT EXISTS ({HOLDS_ITS_LOCK})
   FOR UPDATE OF r SKIP LOCKED
"""

# Programs of an earlier version exclude each other by the advisory lock alone. It is taken if it is free, so that they
# skip the relays that are judged here. From an unfiltered unnest of chosen ids: in a WHERE beside other conditions the
# planner may evaluate the lock for rows that are then not wanted, or twice for one (PostgreSQL docs, 13.3.5).
TAKE_LOCKS: Final = "SELECT id, pg_try_advisory_xact_lock($1, id) AS free FROM unnest($2::integer[]) AS id"

# $3 is 1 where the relays died, 0 where they merely ended; what they died with is a suspect in the end. A suspect waits
# before its next try, twice as long each time: the deaths of one bad minute, which have another cause, do not add up.
# A row that another session has locked is passed over: who may lock one row could otherwise stop every relay that
# judges it. Its relay is not ended before a later sweep has judged it.
_JUDGE: Final = """
WITH held AS (
    SELECT email FROM outbox.delivery WHERE {held} FOR UPDATE SKIP LOCKED
), freed AS (
    UPDATE outbox.delivery d
       SET relay = NULL, orphaned = orphaned + $3,
           due_at = CASE WHEN $3 = 1 AND orphaned + $3 >= 3
                         THEN now() + 2 ^ least(orphaned + $3 - 3, 10) * interval '1 second' ELSE due_at END,
           state = CASE WHEN $3 = 1 AND orphaned + $3 >= $4 THEN 'dead' ELSE 'pending' END,
           attempt = attempt + ($3 = 1 AND orphaned + $3 >= $4)::int,
           settled_at = CASE WHEN $3 = 1 AND orphaned + $3 >= $4 THEN now() END
      FROM held h WHERE d.email = h.email AND d.state = 'pending'
    RETURNING d.email, attempt, state, orphaned
), doubted AS (
    UPDATE outbox.delivery d
       SET state = 'in_doubt', doubted_at = now(), orphaned = orphaned + $3,
           due_at = CASE WHEN orphaned + $3 >= $4 THEN 'infinity'
                         ELSE coalesce(now() + $2 * interval '1 second', 'infinity') END
      FROM held h WHERE d.email = h.email AND d.state = 'sending'
    RETURNING d.email, attempt, relay, marked_at
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, 'in_doubt', 'relay ' || relay || ' ended between its mark and its settle', marked_at
      FROM doubted
    UNION ALL
    SELECT email, attempt, NULL, 'quarantined', orphaned || ' relays died while they held it', NULL
      FROM freed WHERE state = 'dead'
)
SELECT (SELECT count(*) FROM freed) AS freed, (SELECT count(*) FROM doubted) AS doubted,
       (SELECT count(*) FROM outbox.delivery WHERE {held}) - (SELECT count(*) FROM held) AS locked
"""
_HELD: Final = "relay = ANY ($1::integer[]) AND settled_at IS NULL AND state IN ('pending', 'sending')"
# $5 are emails that are left out; the email where it is one.
JUDGE: Final = _JUDGE.format(held=f"{_HELD} AND email <> ALL ($5::bigint[])")
JUDGE_ONE: Final = _JUDGE.format(held=f"{_HELD} AND email = $5::bigint")
HELD_BY: Final = f"SELECT email FROM outbox.delivery WHERE {_HELD}"
END_RELAYS: Final = "UPDATE outbox.relay SET ended_at = now() WHERE id = ANY ($1::integer[])"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What dead relays left behind: how many claims were let go of (free or quarantined), how many are in doubt.

    `alive` is how many others live, and `beside` how many of these serve the same route; `instances` are theirs.
    `sent` is how many emails those of the same route have sent.
    """

    dead: list[int]
    freed: int = 0
    doubted: int = 0
    alive: int = 0
    beside: int = 0
    instances: frozenset[str] = frozenset()
    sent: int = 0


async def sweep(
    connection: Connection,
    relay: int,
    *,
    doubt_s: float | None,
    route: str = "",
    quarantine: Quarantine | None = None,
) -> Sweep:
    """Judge every other relay that is dead, whatever route it served: its unmarked claims become free, its marked
    deliveries in doubt. `route` is the caller's.

    All in the transaction that holds the lock of the dead one's row, so two sweepers never judge the same relay.
    """
    rows = await connection.fetch(OTHERS, relay)
    others = {r["id"]: r["died"] for r in rows}
    if not others:
        return Sweep([])
    async with connection.transaction():
        dead = [r["id"] for r in await connection.fetch(DEAD, RELAY_LOCKS, list(others))]
        beside = [r["sent"] for r in rows if r["route"] == route and r["id"] not in dead]
        instances = frozenset(r["instance"] for r in rows if r["instance"] and r["id"] not in dead)
        if not dead:
            return Sweep([], alive=len(others), beside=len(beside), instances=instances, sent=sum(beside))
        await connection.fetch(TAKE_LOCKS, RELAY_LOCKS, dead)
        freed = doubted = 0
        for died in (True, False):
            some = [one for one in dead if others[one] is died]
            if some:
                more_freed, more_doubted = await judge(
                    connection, some, doubt_s=doubt_s, died=died, quarantine=quarantine
                )
                freed, doubted = freed + more_freed, doubted + more_doubted
    return Sweep(dead, freed, doubted, len(others) - len(dead), len(beside), instances, sum(beside))


# $1 the last session, $2 its timeline, $3 the instance, $4 the present session.
FORMER: Final = """
SELECT r.id FROM outbox.relay r
 WHERE r.ended_at IS NULL AND r.id <> $4 AND (r.id = $1 AND r.timeline = $2 OR r.instance = $3)
"""


async def judge_former(
    connection: Connection,
    relay: int,
    timeline: int,
    *,
    doubt_s: float | None,
    quarantine: Quarantine | None = None,
    instance: str | None = None,
    present: int = 0,
) -> tuple[int, int]:
    """End this process's own last session, which did not die with its claims; return what `judge` returns.

    On a new timeline its id may be another relay's, which lives and holds its lock. Back on an old server there may be
    one more of this `instance`, from before; `present` is the session that it has now.
    """
    async with connection.transaction():
        rows = await connection.fetch(FORMER, relay, timeline, instance, present)
        dead = [r["id"] for r in await connection.fetch(DEAD, RELAY_LOCKS, [r["id"] for r in rows])]
        if not dead:
            return 0, 0
        await connection.fetch(TAKE_LOCKS, RELAY_LOCKS, dead)
        return await judge(connection, dead, doubt_s=doubt_s, died=False, quarantine=quarantine)


async def judge(
    connection: Connection,
    relays: Sequence[int],
    *,
    doubt_s: float | None,
    died: bool,
    quarantine: Quarantine | None = None,
) -> tuple[int, int]:
    """End relays whose rows `DEAD` has locked; return how many claims were released and how many are in doubt.

    What cannot be judged is quarantined, or logged: it never keeps the rest from being sent. Relays of which another
    session has locked an email are not ended yet.
    """
    quarantine = quarantine or Quarantine()
    how = (relays, doubt_s, int(died), QUARANTINE_AFTER)
    async with connection.transaction():
        try:
            async with connection.transaction():
                rows = [await connection.fetchrow(JUDGE, *how, quarantine.left_out)]
        except Exception as error:
            if not is_of_a_row(error):
                raise
            held = [row["email"] for row in await connection.fetch(HELD_BY, relays)]
            rows = await quarantine.sift(
                connection, held, lambda email: connection.fetchrow(JUDGE_ONE, *how, email), relays=relays
            )
        if not any(row["locked"] for row in rows):
            await connection.execute(END_RELAYS, relays)
    return sum(row["freed"] for row in rows), sum(row["doubted"] for row in rows)


# By the index of open rows alone, so settled rows are not read. Only a pause sets a pending row's date to infinity;
# one without a pause was written by hand and is never due.
EMPTY: Final = """
SELECT NOT EXISTS (SELECT FROM outbox.delivery WHERE settled_at IS NULL AND state IN ('pending', 'sending')
                      AND route = $2 AND priority IN (0, 1)
                      AND due_at <= coalesce(now() + $1::float8 * interval '1 second', 'infinity')
                      AND (state = 'sending' OR due_at < 'infinity' OR paused IS NOT NULL)
                      AND email <> ALL ($3::bigint[]))
"""


async def is_empty(
    connection: Connection, *, route: str = "", within_s: float | None = None, left_out: Sequence[int] = ()
) -> bool:
    """Return True if nothing of the route is pending or being sent by any relay, nor will be due within that time.

    What is in doubt or dead waits for a person, and so does what is pending without a date, or left out.
    """
    return bool(await connection.fetchval(EMPTY, within_s, route, left_out))


# Held by relays that never existed, or have ended, or by this one, $2, which does not have them in flight. Such rows
# were written by hand: a relay is ended together with all that it holds.
STRANDED: Final = """
SELECT relay, email FROM outbox.delivery d
 WHERE settled_at IS NULL AND state IN ('pending', 'sending') AND relay IS NOT NULL
   AND route = $1 AND priority IN (0, 1) AND due_at <= 'infinity' AND email <> ALL ($3::bigint[])
   AND (relay = $2 OR NOT EXISTS (SELECT FROM outbox.relay r WHERE r.id = d.relay AND r.ended_at IS NULL))
 LIMIT 1000
"""
# Of these ids those whose lock is held by nobody who could be a relay. The row of a relay that lives may be missing, so
# its backend is not known. $1 is RELAY_LOCKS.
NOT_LIVING: Final = """
SELECT n.id FROM unnest($2::integer[]) AS n (id)
 WHERE NOT EXISTS (
    SELECT FROM pg_locks l
     WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ExclusiveLock'
       AND l.classid::bigint = $1 AND l.objid::bigint = n.id AND l.objsubid = 2
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND has_any_column_privilege((SELECT a.usesysid FROM pg_stat_get_activity(l.pid) AS a), 'outbox.relay',
                                    'INSERT'))
"""
# What no relay ever takes: $2 emails of each kind at most.
NEVER_TAKEN: Final = """
SELECT email, 'its due_at is infinity, and no pause holds it back' AS why FROM (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND route = $1 AND priority IN (0, 1) AND due_at = 'infinity'
       AND state = 'pending' AND paused IS NULL LIMIT $2) AS undated
UNION ALL
SELECT email, 'its priority is neither 0 nor 1' FROM (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND route = $1 AND (priority < 0 OR priority > 1) AND due_at <= 'infinity'
       AND state IN ('pending', 'sending') LIMIT $2) AS misplaced
"""
NEVER_TAKEN_SHOWN: Final = 10


async def judge_stranded(
    connection: Connection,
    relay: int,
    in_hand: Collection[int],
    *,
    doubt_s: float | None,
    route: str = "",
    quarantine: Quarantine | None = None,
) -> tuple[int, int]:
    """Judge what is held by relays that are not in the table of relays, or have ended, or by the caller, which does not
    have it `in_hand`; return what `judge` returns.

    Another relay whose backend holds its lock is passed over, though the table says that it has ended.
    """
    quarantine = quarantine or Quarantine((relay,))
    rows = await connection.fetch(STRANDED, route, relay, [*quarantine.left_out, *in_hand])
    mine = [row["email"] for row in rows if row["relay"] == relay]
    others = list({row["relay"] for row in rows} - {relay})
    how = ([relay], doubt_s, 0, QUARANTINE_AFTER)
    async with connection.transaction():
        found = await quarantine.sift(connection, mine, lambda email: connection.fetchrow(JUDGE_ONE, *how, email))
        freed, doubted = sum(row["freed"] for row in found), sum(row["doubted"] for row in found)
        dead = [row["id"] for row in await connection.fetch(NOT_LIVING, RELAY_LOCKS, others)]
        if dead:
            await connection.fetch(TAKE_LOCKS, RELAY_LOCKS, dead)
            more = await judge(connection, dead, doubt_s=doubt_s, died=False, quarantine=quarantine)
            freed, doubted = freed + more[0], doubted + more[1]
    return freed, doubted


async def never_taken(connection: Connection, *, route: str = "") -> dict[int, str]:
    """Return some emails of each kind that wait on a route although no relay ever takes them, and why."""
    return {row["email"]: row["why"] for row in await connection.fetch(NEVER_TAKEN, route, NEVER_TAKEN_SHOWN)}


# How often each email was withdrawn since the server said so, by its rate or to everybody. $1 emails.
PUT_OFF: Final = """
SELECT email, count(*) AS times FROM outbox.attempt
 WHERE email = ANY ($1::bigint[]) AND verdict = 'withdrawn' AND reply ~ '^(redirected to [^ ]+: )?[45][0-9][0-9] '
 GROUP BY email
"""


async def count_put_off(connection: Connection, emails: Sequence[int]) -> dict[int, int]:
    """Return how often each of these emails was withdrawn by a reply of the server, where it was."""
    return {row["email"]: row["times"] for row in await connection.fetch(PUT_OFF, emails)}


STANDING: Final = """
SELECT n.email, d.state, d.attempt
  FROM unnest($1::bigint[]) AS n (email) LEFT JOIN outbox.delivery d ON d.email = n.email
"""


async def standing(connection: Connection, emails: Sequence[int]) -> dict[int, tuple[str | None, int | None]]:
    """State and attempt of deliveries, for telling why a settlement changed nothing."""
    return {r["email"]: (r["state"], r["attempt"]) for r in await connection.fetch(STANDING, emails)}


def contradicts(settlement: Settlement, state: str | None, attempt: int | None) -> bool:
    """Whether a settlement that changed nothing says otherwise than the delivery as it stands: that must be told.

    It does not where it is already so, where its mark never was, where the email was cancelled before its mark, and
    where it only says that nothing is known, or that nothing was sent, of what is not sent.
    """
    verdict = settlement.outcome.verdict
    already_so = state == settlement.outcome.state and attempt == settlement.attempt
    never_marked = verdict == "withdrawn" and attempt is not None and attempt < settlement.attempt
    nothing_new = verdict == "in_doubt" or (verdict == "withdrawn" and state != "sent")
    let_be = state == "cancelled" and not settlement.marked
    return not (already_so or never_marked or nothing_new or let_be)


NOTE: Final = "UPDATE outbox.relay SET trouble = $2, stale = $3, sent = $4, last_reply = $5 WHERE id = $1"


@dataclass(frozen=True, slots=True)
class Note:
    """What a relay's row says of it: what keeps it from its work, how many of its verdicts came too late, how many
    emails servers have taken from this session, and what it heard last.
    """

    trouble: str | None = None
    stale: int = 0
    sent: int = 0
    last_reply: str | None = None


async def write_note(connection: Connection, relay: int, note: Note) -> None:
    """Say it in the relay's row, for `outbox status` and `outbox watch`."""
    trouble, heard = (text and storable(text) for text in (note.trouble, note.last_reply))
    await connection.execute(NOTE, relay, trouble, note.stale, note.sent, heard)


STATEMENTS: Final = (
    *(TICK, LOCKED, FETCH_MESSAGES, EXPIRE, RELEASE, OTHERS, DEAD, TAKE_LOCKS, JUDGE, END_RELAYS, FORMER, EMPTY),
    *(STANDING, NOTE, MESSAGE_LIMIT, STRANDED, NEVER_TAKEN, CANDIDATES, CLAIM_ONE, LATE, EXPIRE_ONE, JUDGE_ONE),
    *(HELD_BY, NOT_LIVING, PUT_OFF),
    *QUARANTINE_STATEMENTS,
)
