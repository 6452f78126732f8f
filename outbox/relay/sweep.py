"""Sweep: judge what relays left. Their unmarked claims become free, and what they had marked is in doubt.

A relay is dead if its session no longer holds its advisory lock. `sweep` finds the dead ones among the others,
`judge_former` judges the last session of this process, and `judge_stranded` what relays hold that do not exist.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from outbox.database.connection import Connection
from outbox.database.locks import HOLDS_ITS_LOCK, RELAY_LOCKS
from outbox.relay.quarantine import QUARANTINE_AFTER, SUSPECT_AFTER, Quarantine, is_of_a_row

# A session that began before Postgres did was lost with it, which says nothing about what it held.
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
           due_at = CASE WHEN $3 = 1 AND orphaned + $3 >= {suspect}
                         THEN now() + 2 ^ least(orphaned + $3 - {suspect}, 10) * interval '1 second' ELSE due_at END,
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
JUDGE: Final = _JUDGE.format(held=f"{_HELD} AND email <> ALL ($5::bigint[])", suspect=SUSPECT_AFTER)
JUDGE_ONE: Final = _JUDGE.format(held=f"{_HELD} AND email = $5::bigint", suspect=SUSPECT_AFTER)
HELD_BY: Final = f"SELECT email FROM outbox.delivery WHERE {_HELD}"
END_RELAYS: Final = "UPDATE outbox.relay SET ended_at = now() WHERE id = ANY ($1::integer[])"


class Judged(NamedTuple):
    """Number of claims that were let go of (free or quarantined), and of deliveries that are in doubt."""

    freed: int
    doubted: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """Result of a sweep: the dead relays, what was judged of theirs, and what is known of the living ones."""

    dead: list[int]
    freed: int = 0
    """Number of claims that were let go of: free, or quarantined."""
    doubted: int = 0
    """Number of deliveries that are in doubt."""
    alive: int = 0
    """Number of other relays that live."""
    beside: int = 0
    """Number of these that serve the same route."""
    instances: frozenset[str] = frozenset()
    """Instances of the other relays that live."""
    sent: int = 0
    """Number of emails that living relays of the same route have sent."""


async def sweep(
    connection: Connection,
    relay: int,
    *,
    doubt_s: float | None,
    route: str = "",
    quarantine: Quarantine,
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
        judged = [
            await judge(connection, some, doubt_s=doubt_s, died=died, quarantine=quarantine)
            for died in (True, False)
            if (some := [one for one in dead if others[one] is died])
        ]
    freed, doubted = map(sum, zip(*judged, strict=True))
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
    quarantine: Quarantine,
    instance: str | None = None,
    present: int = 0,
) -> Judged:
    """End this process's own last session, which did not die with its claims.

    On a new timeline its id may be another relay's, which lives and holds its lock. Back on an old server there may be
    one more of this `instance`, from before; `present` is the session that it has now.
    """
    async with connection.transaction():
        rows = await connection.fetch(FORMER, relay, timeline, instance, present)
        dead = [r["id"] for r in await connection.fetch(DEAD, RELAY_LOCKS, [r["id"] for r in rows])]
        if not dead:
            return Judged(0, 0)
        await connection.fetch(TAKE_LOCKS, RELAY_LOCKS, dead)
        return await judge(connection, dead, doubt_s=doubt_s, died=False, quarantine=quarantine)


async def judge(
    connection: Connection,
    relays: Sequence[int],
    *,
    doubt_s: float | None,
    died: bool,
    quarantine: Quarantine,
) -> Judged:
    """End relays whose rows `DEAD` has locked, and judge what they held.

    What cannot be judged is quarantined, or logged: it never keeps the rest from being sent. Relays of which another
    session has locked an email are not ended yet.
    """
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
    return _sum_of(rows)


def _sum_of(rows: Sequence[Any]) -> Judged:
    return Judged(sum(row["freed"] for row in rows), sum(row["doubted"] for row in rows))


# Held by relays that never existed, or have ended, or by this one, $2, which does not have them in flight. Such rows
# were written by hand: a relay is ended together with all that it holds.
STRANDED: Final = """
SELECT relay, email FROM outbox.delivery d
 WHERE settled_at IS NULL AND state IN ('pending', 'sending') AND relay IS NOT NULL
   AND route = $1 AND priority IN (0, 1) AND due_at <= 'infinity' AND email <> ALL ($3::bigint[])
   AND (relay = $2 OR NOT EXISTS (SELECT FROM outbox.relay r WHERE r.id = d.relay AND r.ended_at IS NULL))
 LIMIT 1000
"""
# Of these ids those whose lock no session holds that could be a relay's. The row of a relay that lives may be missing,
# so its backend is not known. $1 is RELAY_LOCKS.
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


async def judge_stranded(
    connection: Connection,
    relay: int,
    in_flight: Collection[int],
    *,
    doubt_s: float | None,
    route: str = "",
    quarantine: Quarantine,
) -> Judged:
    """Judge what is held by relays that are not in the table of relays, or have ended, or by the caller, which does not
    have it `in_flight`.

    Another relay whose backend holds its lock is passed over, though the table says that it has ended.
    """
    rows = await connection.fetch(STRANDED, route, relay, [*quarantine.left_out, *in_flight])
    mine = [row["email"] for row in rows if row["relay"] == relay]
    others = list({row["relay"] for row in rows} - {relay})
    how = ([relay], doubt_s, 0, QUARANTINE_AFTER)
    async with connection.transaction():
        found = await quarantine.sift(connection, mine, lambda email: connection.fetchrow(JUDGE_ONE, *how, email))
        judged = _sum_of(found)
        dead = [row["id"] for row in await connection.fetch(NOT_LIVING, RELAY_LOCKS, others)]
        if dead:
            await connection.fetch(TAKE_LOCKS, RELAY_LOCKS, dead)
            more = await judge(connection, dead, doubt_s=doubt_s, died=False, quarantine=quarantine)
            judged = Judged(judged.freed + more.freed, judged.doubted + more.doubted)
    return judged


STATEMENTS: Final = (OTHERS, DEAD, TAKE_LOCKS, JUDGE, JUDGE_ONE, HELD_BY, END_RELAYS, FORMER, STRANDED, NOT_LIVING)
