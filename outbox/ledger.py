"""The relay's only writes: claim, mark, settle and sweep, as SQL and as the functions that run them.

Each function takes the connection of a live relay session; who calls when is `relay`'s business, what a verdict
means is `verdict`'s. One tick is one statement, so one snapshot, one commit and one round trip, whatever number of
deliveries it moves: commits are what costs (0.04 of them per message at full load).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from outbox.database import RELAY_LOCKS
from outbox.verdict import Outcome


@dataclass(slots=True, eq=False)
class Claim:
    """A delivery that a relay holds, with all that sending it needs. It lives as long as the relay's session."""

    relay: int
    email: int
    key: str
    attempt: int
    withdrawn: int
    sender: str
    recipient: str
    message: bytes
    marked: bool = False
    cuts: int = 0


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
    def fence(self) -> tuple[int, int]:
        """What identifies the try for ever: attempts of an email are never reused."""
        return self.email, self.attempt


@dataclass(frozen=True, slots=True)
class Tick:
    """What one commit made true."""

    settled: frozenset[tuple[int, int]]
    marked: dict[int, int]
    claims: list[Claim]


# The parts see one snapshot and touch different rows: a settled row is sending (or in doubt), a marked one is
# pending and ours, a claimed one pending and nobody's.
#
# settle: the fence is (relay, attempt). A 250 also settles a row that was put back to pending in the meantime
#   (doubt resolved as "send again" while the reply was under way), as long as nobody has marked it again.
# mark: only rows that are still this relay's claim; the caller may write the dot only for those that come back.
# claim: SKIP LOCKED passes over rows that another relay is claiming at this moment. When it has just committed,
#   the recheck after the row lock sees its relay and passes too (PostgreSQL docs, 13.2.1).
# The lock of a row alone would not make a claim: this session's advisory lock on $9 does, since only rows whose
#   relay has lost its lock are ever taken from it.
TICK: Final = """
WITH news AS (
    SELECT * FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::boolean[],
                         $5::text[], $6::float8[], $7::text[], $8::text[])
        AS n (email, attempt, relay, marked, state, delay_s, verdict, reply)
), settled AS (
    UPDATE outbox.delivery d
       SET state = n.state,
           attempt = n.attempt,
           withdrawn = d.withdrawn + (n.verdict = 'withdrawn')::int,
           due_at = CASE WHEN n.state IN ('pending', 'in_doubt')
                         THEN coalesce(now() + n.delay_s * interval '1 second', 'infinity') ELSE d.due_at END,
           relay = CASE WHEN n.state = 'pending' THEN NULL ELSE n.relay END,
           settled_at = CASE WHEN n.state IN ('sent', 'dead') THEN now() END
      FROM news n
     WHERE d.email = n.email
       AND d.settled_at IS NULL
       AND ((n.marked AND d.attempt = n.attempt AND d.relay = n.relay AND d.state IN ('sending', 'in_doubt')
             AND d.state <> n.state)
            OR (n.marked AND d.attempt = n.attempt AND n.state = 'sent' AND d.state = 'pending')
            OR (NOT n.marked AND d.attempt = n.attempt - 1 AND d.relay = n.relay AND d.state = 'pending'))
    RETURNING d.email, d.attempt, n.relay, n.verdict, n.reply, CASE WHEN n.marked THEN d.marked_at END AS marked_at
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, verdict, reply, marked_at FROM settled
), marked AS (
    UPDATE outbox.delivery
       SET state = 'sending', attempt = attempt + 1, marked_at = now()
     WHERE email = ANY ($10::bigint[]) AND relay = $9 AND state = 'pending' AND settled_at IS NULL
    RETURNING email, attempt
), due AS (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now()
     ORDER BY due_at, email
     LIMIT $11
       FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE outbox.delivery d SET relay = $9 FROM due WHERE d.email = due.email
    RETURNING d.email, d.attempt, d.withdrawn
)
SELECT 's' AS part, email, attempt, NULL::integer AS withdrawn, NULL AS key, NULL AS sender, NULL AS recipient,
       NULL::bytea AS message FROM settled
UNION ALL
SELECT 'm', email, attempt, NULL, NULL, NULL, NULL, NULL FROM marked
UNION ALL
SELECT 'c', c.email, c.attempt, c.withdrawn, e.key, e.sender, e.recipient, e.message
  FROM claimed c JOIN outbox.email e ON e.id = c.email
"""


async def tick(
    connection: Any,
    relay: int,
    *,
    settlements: Sequence[Settlement] = (),
    marks: Iterable[int] = (),
    room: int = 0,
) -> Tick:
    """Settle, mark and claim in one commit; gives what came true.

    A settlement or mark that is not in the answer changed nothing: its fence no longer matched. At most `room`
    deliveries are claimed, the ones due longest first. If this raises, nothing is known of the commit.
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
        [s.outcome.reply.replace("\0", "") for s in settlements],
        relay,
        list(marks),
        room,
    )
    return Tick(
        settled=frozenset((r["email"], r["attempt"]) for r in rows if r["part"] == "s"),
        marked={r["email"]: r["attempt"] for r in rows if r["part"] == "m"},
        claims=[
            Claim(
                relay,
                r["email"],
                r["key"],
                r["attempt"],
                r["withdrawn"],
                r["sender"],
                r["recipient"],
                r["message"],
            )
            for r in rows
            if r["part"] == "c"
        ],
    )


RELEASE: Final = """
UPDATE outbox.delivery SET relay = NULL
 WHERE email = ANY ($1::bigint[]) AND relay = $2 AND state = 'pending' AND settled_at IS NULL
"""


async def release(connection: Any, relay: int, emails: Sequence[int]) -> None:
    """Give unmarked claims back, so that any relay may take them at once."""
    await connection.execute(RELEASE, emails, relay)


SUSPECTS: Final = "SELECT id FROM outbox.relay WHERE ended_at IS NULL AND id <> $1"

# Locked from an unfiltered unnest of chosen ids: in a WHERE beside other conditions the planner may evaluate the
# lock for rows that are then not wanted, or twice for one (PostgreSQL docs, 13.3.5).
TAKE_LOCKS: Final = "SELECT id, pg_try_advisory_xact_lock($1, id) AS free FROM unnest($2::integer[]) AS id"

JUDGE: Final = """
WITH freed AS (
    UPDATE outbox.delivery SET relay = NULL
     WHERE relay = ANY ($1::integer[]) AND settled_at IS NULL AND state = 'pending'
    RETURNING email
), doubted AS (
    UPDATE outbox.delivery SET state = 'in_doubt', due_at = coalesce(now() + $2 * interval '1 second', 'infinity')
     WHERE relay = ANY ($1::integer[]) AND settled_at IS NULL AND state = 'sending'
    RETURNING email, attempt, relay, marked_at
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, 'in_doubt', 'relay ' || relay || ' ended between its mark and its settle', marked_at
      FROM doubted
), ended AS (
    UPDATE outbox.relay SET ended_at = now() WHERE id = ANY ($1::integer[])
)
SELECT (SELECT count(*) FROM freed) AS freed, (SELECT count(*) FROM doubted) AS doubted
"""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What dead relays left behind: whom, how many claims became free, how many deliveries are in doubt."""

    dead: list[int]
    freed: int = 0
    doubted: int = 0
    alive: int = 0


async def sweep(connection: Any, relay: int, *, doubt_s: float | None) -> Sweep:
    """Judge every other relay whose lock is free: unmarked claims become free, marked deliveries in doubt.

    All in the transaction that holds the dead one's lock, so two sweepers never judge the same relay, and a relay
    that lives holds its lock and is passed over.
    """
    suspects = [r["id"] for r in await connection.fetch(SUSPECTS, relay)]
    if not suspects:
        return Sweep([])
    async with connection.transaction():
        locks = await connection.fetch(TAKE_LOCKS, RELAY_LOCKS, suspects)
        dead = [r["id"] for r in locks if r["free"]]
        if not dead:
            return Sweep([], alive=len(suspects))
        freed, doubted = await judge(connection, dead, doubt_s=doubt_s)
    return Sweep(dead, freed, doubted, len(suspects) - len(dead))


async def judge(connection: Any, relays: Sequence[int], *, doubt_s: float | None) -> tuple[int, int]:
    """End relays whose locks the caller holds; gives how many claims became free and how many are in doubt."""
    row = await connection.fetchrow(JUDGE, relays, doubt_s)
    return row["freed"], row["doubted"]


# The policy `resend`: doubt that has lasted for its grace is sent again with the same bytes. The grace is longer than
# the guard, so no process can still be about to write the first dot.
RESEND: Final = """
WITH chosen AS (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND state = 'in_doubt' AND due_at <= now()
     ORDER BY due_at LIMIT 1000 FOR UPDATE SKIP LOCKED
), resent AS (
    UPDATE outbox.delivery d SET state = 'pending', relay = NULL FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt, d.marked_at
)
INSERT INTO outbox.attempt (email, attempt, verdict, reply, marked_at)
SELECT email, attempt, 'resolved', 'in_doubt = "resend": sent again', marked_at FROM resent
"""


async def resend_doubtful(connection: Any) -> int:
    """Make doubtful deliveries pending whose grace is over; gives how many."""
    return int((await connection.execute(RESEND)).rpartition(" ")[2])


# A row in doubt has due_at 'infinity' or a later moment, so the first open rows in due order tell.
EMPTY: Final = """
SELECT NOT EXISTS (SELECT FROM outbox.delivery WHERE settled_at IS NULL AND state IN ('pending', 'sending'))
"""


async def is_empty(connection: Any) -> bool:
    """Whether nothing is pending or being sent, by anybody. What is in doubt or dead waits for a person."""
    return bool(await connection.fetchval(EMPTY))


STANDING: Final = """
SELECT n.email, d.state, d.attempt
  FROM unnest($1::bigint[]) AS n (email) LEFT JOIN outbox.delivery d ON d.email = n.email
"""


async def standing(connection: Any, emails: Sequence[int]) -> dict[int, tuple[str | None, int | None]]:
    """State and attempt of deliveries, for telling why a settlement changed nothing."""
    return {r["email"]: (r["state"], r["attempt"]) for r in await connection.fetch(STANDING, emails)}
