"""A relay's Postgres session: its identity, its pulse and its only way to write.

One session, one advisory lock, one row in `outbox.relay`. While the lock is held the relay lives; the server ends
the session of a client that is silent for `lease_s`, so the session is a lease. A lost session never comes back:
the next one is a new identity.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Self

import asyncpg

from outbox import __version__
from outbox.database import failover_barrier as barrier
from outbox.database import failover_rules
from outbox.database.connection import CHANNEL, Connection
from outbox.database.failover_rules import Row, ServerId, Standing
from outbox.database.locks import HOLDS_ITS_LOCK, RELAY_LOCKS, SELFTEST_LOCKS
from outbox.database.opening import CONNECT_TIMEOUT_S, connect, lease_settings
from outbox.database.plans import NOT_BY_INDEX
from outbox.database.pooler import say_pooler
from outbox.database.refusal import reason_of, shows_shared_session
from outbox.database.schema import require_current
from outbox.database.timeline import timeline_of
from outbox.errors import DatabaseUnavailableError, UnsafeDatabaseError
from outbox.settings.urls import DatabaseUrl

CLOSE_TIMEOUT_S: Final = 2.0


def boot_clock_s() -> float:
    """Seconds since boot, also while the machine slept: a paused relay must notice the pause."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


@dataclass(slots=True, eq=False)
class Session:
    """A live relay identity. `lost` is why it ended, or None while it is not known to have."""

    connection: Connection
    relay: int
    timeline: int = 0
    started_at: datetime | None = None
    lost: str | None = None
    on_lost: Callable[[], None] = lambda: None
    barrier: Row = field(default_factory=Row)
    """Barrier at the time when the session began."""
    met: frozenset[str] = frozenset()
    """The other relays that had registered on this server before, and not ended."""
    planned_for: int = 0
    """Largest id of an email at the time when the statements were last planned, as far as it is known."""

    @classmethod
    async def open(
        cls,
        url: DatabaseUrl,
        *,
        lease_s: float,
        wake: Callable[[], None],
        on_lost: Callable[[], None],
        former: "Session | None",
        route: str = "",
        statements: Sequence[str] = (),
        standing: Standing | None = None,
        hear: Callable[[str], None] | None = None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> Self:
        """Open a new identity that is proven to hold a real lock and listens.

        `former`, the last session of this relay, is ended first, and so are other sessions of its instance on this
        server. `standing` decides whether the relay raises the barrier (`barrier`). `hear` takes notifications with a
        payload, `wake` the others. `on_answer` is called after each statement that the open session answers.

        `statements` are what it will run while it holds the lock. They are prepared before: asyncpg prepares in two
        steps, and the server takes a client that stops between them for a busy one, whose session no idle timeout ends.

        Raises:
            DatabaseUnavailableError: no connection now.
            UnsafeDatabaseError: locks or settings do not hold here; do not relay.
            SchemaError: no schema, or another version's.

        """
        try:
            await prove_locks(url, lease_s=lease_s)
            connection = await _connect(url, lease_s)
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if not shows_shared_session(error):
                raise
            raise UnsafeDatabaseError(say_pooler(url, reason_of(error))) from error
        try:
            with connection.end_if_silent(lease_s) as silence:
                await require_current(connection)
                timeline = await timeline_of(connection)
                await _end_formers(connection, former, timeline, standing, within_s=lease_s / 2)
                started_at = await connection.fetchval("SELECT pg_postmaster_start_time()")
                for statement in statements:
                    await connection.plan(statement)
                    silence.restart()  # it answers
                # Listen first, look at the table afterwards: a notification in between is then not lost.
                await connection.add_listener(
                    CHANNEL, lambda *heard: hear(heard[3]) if hear is not None and heard[3] else wake()
                )
                row, met = Row(), frozenset[str]()

                async def meet(relay: int) -> None:
                    nonlocal row, met
                    if standing is not None:
                        row, met = await _meet_barrier(connection, relay, (timeline, started_at), former, standing)

                instance = standing.instance if standing is not None else None
                relay = await _register(connection, timeline, route, instance=instance, meet=meet)
            session = cls(connection, relay, timeline, started_at, on_lost=on_lost, barrier=row, met=met)
            connection.add_termination_listener(lambda _: session.lose("Postgres ended the session"))
            connection.add_log_listener(session._hear)
            connection.add_query_logger(lambda done: None if done.exception else on_answer())
        except BaseException:
            connection.terminate()
            raise
        return session

    @property
    def server(self) -> ServerId:
        """Which Postgres this is: another timeline or another start may mean that it forgot something."""
        return self.timeline, self.started_at

    def lose(self, reason: str) -> None:
        """Treat the session as gone from now on, whatever the server thinks. Idempotent."""
        if self.lost is None:
            self.lost = reason
            self.connection.terminate()
            self.on_lost()

    async def plan_for(self, emails: Sequence[int]) -> None:
        """Have the statements planned anew if the emails' ids say that the tables are twice as large as they were.

        A plan that was made for empty tables reads whole indexes in nested loops, and Postgres keeps it until the next
        ANALYZE, which may be a minute away or never come.
        """
        largest = max(emails, default=0)
        if largest > 2 * self.planned_for + PLANNED_ANEW_FROM and self.lost is None:
            self.planned_for = largest
            await self.connection.execute("DISCARD PLANS")

    def _hear(self, _connection: Connection, message: Any) -> None:
        # "canceling wait for synchronous replication": the commit is on this server only and may vanish in a
        # failover. No warning is harmless to a mark, so each one ends the session.
        if message.severity_en == "WARNING":  # `severity` is translated (lc_messages), this never is
            self.lose(f"Postgres warned: {message.message}")

    async def close(self) -> None:
        """End the session in order, and its lock with it."""
        if self.lost is not None:
            return
        self.lost = "closed"
        await _close_quietly(self.connection)  # if it does not come to that, a sweep of another relay ends it


PLANNED_ANEW_FROM: Final = 64  # an email's id; for fewer rows any plan is quick

# A relay that is stopped in the midst of a transaction holds up those who need its row: not for a lease.
IN_TRANSACTION_S: Final = 2.0

# The ledger's statements are few, short and known: each is planned once per session, by index, whatever the statistics
# say. Left to itself the planner plans a tick anew each time (0.8 ms), or hashes a whole table for it.
# Tables that have doubled are planned for again: see `Session.plan_for`.
PLANS: Final = {"plan_cache_mode": "force_generic_plan", **dict.fromkeys(NOT_BY_INDEX, "off")}


async def _connect(url: DatabaseUrl, lease_s: float) -> Connection:
    """A connection whose session is a lease."""
    settings = {**PLANS, **lease_settings(lease_s, statements_too=True)}
    settings["idle_in_transaction_session_timeout"] = str(int(1000 * min(lease_s, IN_TRANSACTION_S)))
    return await connect(url, application="outbox relay", settings=settings, timeout_s=min(lease_s, CONNECT_TIMEOUT_S))


REGISTER_TRIES: Final = 8

# Only the identity column gives out ids. To skip some, rows are inserted with them and rolled back.
REGISTER: Final = """
INSERT INTO outbox.relay (host, pid, backend_pid, version, timeline, route, instance)
SELECT $1, $2, pg_backend_pid(), $3, $4, $5, $6 FROM generate_series(1, $7::integer) RETURNING id
"""
TAKE_LOCK: Final = "SELECT pg_try_advisory_lock($1, $2)"
HELD: Final = """
SELECT objid::bigint AS id, l.pid, (SELECT a.usesysid::regrole::text FROM pg_stat_get_activity(l.pid) AS a) AS role
  FROM pg_locks l
 WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objsubid = 2
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def _register(
    connection: Connection,
    timeline: int,
    route: str = "",
    *,
    instance: str | None = None,
    meet: Callable[[int], Awaitable[None]] | None = None,
) -> int:
    """Return the new relay's id. Others see its row only with its lock held, since the lock precedes the commit.

    `meet` gets the id and runs in the same transaction.

    Any role may hold the lock of a future id. Such ids are skipped, however many there are.

    Raises:
        DatabaseUnavailableError: the locks of all ids that were tried are held; the error names a holder.

    """
    row = (socket.gethostname(), os.getpid(), __version__, timeline, route, instance)
    held: dict[int, Any] = {}
    relay = 0
    for _ in range(REGISTER_TRIES):
        transaction = connection.transaction()
        await transaction.start()
        relay = int(await connection.fetchval(REGISTER, *row, 1))
        if await connection.fetchval(TAKE_LOCK, RELAY_LOCKS, relay):
            if meet is not None:
                await meet(relay)
            await transaction.commit()
            return relay
        await transaction.rollback()
        held = {one["id"]: one for one in await connection.fetch(HELD, RELAY_LOCKS)}
        after = relay + 1
        while after in held:
            after += 1
        if passed := after - relay - 1:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(REGISTER, *row, passed)
            await transaction.rollback()
    holder = f"pid {held[relay]['pid']}, role {held[relay]['role']}" if relay in held else "a session that has ended"
    raise DatabaseUnavailableError(
        f"The advisory locks of the next relay ids are held ({len(held)} of them; {relay} by {holder}); "
        "end those sessions with pg_terminate_backend, and REVOKE CONNECT on the database from other roles."
    )


async def _meet_barrier(
    connection: Connection, relay: int, server: ServerId, former: Session | None, standing: Standing
) -> tuple[Row, frozenset[str]]:
    """Return the barrier, raised if this relay has a reason to, and the relays that it has met here.

    It runs in the transaction that registers the relay: who sees the relay sees the barrier.
    """
    last = former.relay if former is not None else None
    here = await barrier.look_around(connection, server, relay, standing, last=last)
    kind = failover_rules.reason_to_raise(here, standing, boot_clock_s())
    await connection.fetch(barrier.NOTIFY, CHANNEL, failover_rules.JOINED + standing.instance)
    if kind is None:
        return await barrier.read(connection), failover_rules.met_here(here)
    return await barrier.raise_barrier(connection, kind, here, standing, CHANNEL), failover_rules.met_here(here)


# $1 the last session, $2 its timeline: on another one its id may be another relay's. $3 the instance.
FORMERS: Final = """
SELECT id FROM outbox.relay WHERE id = $1 AND timeline = $2
UNION
SELECT id FROM outbox.relay WHERE ended_at IS NULL AND instance = $3
"""
EVICT: Final = f"""
SELECT pg_terminate_backend(a.pid) FROM outbox.relay r JOIN pg_stat_activity a ON a.pid = r.backend_pid
 WHERE r.id = ANY ($2::integer[]) AND a.application_name = 'outbox relay' AND a.backend_start <= r.started_at
   AND a.pid <> pg_backend_pid() AND a.usename = current_user AND EXISTS ({HOLDS_ITS_LOCK})
"""
HOLDS_STILL: Final = f"SELECT r.id FROM outbox.relay r WHERE r.id = ANY ($2::integer[]) AND EXISTS ({HOLDS_ITS_LOCK})"
ENDED_LOOK_S: Final = 0.02


async def _end_formers(
    connection: Connection, former: Session | None, timeline: int, standing: Standing | None, *, within_s: float
) -> None:
    """End this relay's earlier sessions in the server too, so that their last commits are decided.

    A session that the network lost may still run its statement, and so may a session of a server that was frozen: it is
    evicted, and waited for until its backend no longer holds its lock. To wait for the lock itself would be to wait for
    any session that holds it.

    Raises:
        DatabaseUnavailableError: one has not ended within `within_s`.

    """
    last = former.relay if former is not None and former.timeline == timeline else None
    instance = standing.instance if standing is not None else None
    if former is None and (standing is None or standing.server is None):
        return
    formers = [row["id"] for row in await connection.fetch(FORMERS, last, timeline, instance)]
    await connection.fetch(EVICT, RELAY_LOCKS, formers)
    holding: list[Any] = []
    try:
        async with asyncio.timeout(within_s):
            while holding := await connection.fetch(HOLDS_STILL, RELAY_LOCKS, formers):
                await asyncio.sleep(ENDED_LOOK_S)
    except TimeoutError as error:
        relays = ", ".join(str(row["id"]) for row in holding)
        raise DatabaseUnavailableError(
            f"The last session of this relay, {relays or last}, has not ended within {within_s:g} s; it is tried again."
        ) from error


async def prove_locks(url: DatabaseUrl, *, lease_s: float) -> None:
    """Return if advisory locks here exclude sessions and go with them, as PostgreSQL's do.

    Poolers in transaction mode share a session among clients, CockroachDB grants every lock to everybody, a standby
    grants its own, and RDS Proxy keeps settings out: each would let two relays send the same mail.

    Raises:
        UnsafeDatabaseError: one sentence with what was found and the mend.

    """
    key = int.from_bytes(os.urandom(4), "big") & 0x7FFFFFFF  # random: no session can hold its lock beforehand
    one = await _connect(url, lease_s)
    try:
        other = await _connect(url, lease_s)
        try:
            backend = await _prove_exclusion(url, one, other, key)
            await one.close(timeout=CLOSE_TIMEOUT_S)
            await _prove_release(url, other, key, backend)
        finally:
            await _close_quietly(other)
    finally:
        await _close_quietly(one)


async def _prove_exclusion(url: DatabaseUrl, one: Connection, other: Connection, key: int) -> int:
    """Return the backend that got the lock."""
    try_lock = "SELECT pg_try_advisory_lock($1, $2), pg_backend_pid()"
    if await one.fetchval("SELECT pg_is_in_recovery()"):
        raise UnsafeDatabaseError(
            f"Postgres at {url.redacted} is a standby (it is in recovery); give database_url the primary's address."
        )
    mine, pid = await one.fetchrow(try_lock, SELFTEST_LOCKS, key)
    theirs, other_pid = await other.fetchrow(try_lock, SELFTEST_LOCKS, key)
    pids = {await one.fetchval("SELECT pg_backend_pid()") for _ in range(3)} | {pid}
    if len(pids) > 1 or pid == other_pid:
        if await _is_pgpool(one):
            raise UnsafeDatabaseError(
                f"pgpool-II at {url.redacted} spreads the statements of one session over several servers; set "
                "load_balance_mode = off there, or give database_url the address of Postgres itself."
            )
        raise UnsafeDatabaseError(say_pooler(url, "the server process behind a connection changes"))
    if not mine or theirs:
        raise UnsafeDatabaseError(
            f"The database at {url.redacted} gives one advisory lock to two sessions at once (as CockroachDB does); "
            "outbox needs PostgreSQL itself."
        )
    return int(pid)


async def _is_pgpool(connection: Connection) -> bool:
    try:
        await connection.execute("SHOW pool_version")  # pgpool answers this itself
    except asyncpg.PostgresError:
        return False
    return True


# True if all holders are other roles. Any role can see the key in pg_locks once it is taken, and request its lock.
SELFTEST_TAKEN: Final = """
SELECT coalesce(bool_and(pid <> $3), false) FROM pg_locks
 WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objid::bigint = $2 AND objsubid = 2
"""


async def _prove_release(url: DatabaseUrl, other: Connection, key: int, backend: int) -> None:
    """Return once `other` gets the lock, or another role got it first, which also shows that `backend` lost it."""
    async with asyncio.timeout(CLOSE_TIMEOUT_S + 1):
        for _ in range(20):
            if await other.fetchval("SELECT pg_try_advisory_lock($1, $2)", SELFTEST_LOCKS, key):
                return
            await asyncio.sleep(0.05)
        if await other.fetchval(SELFTEST_TAKEN, SELFTEST_LOCKS, key, backend):
            return
    raise UnsafeDatabaseError(say_pooler(url, "a lock outlived the connection that took it"))


async def _close_quietly(connection: Connection) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await connection.close(timeout=CLOSE_TIMEOUT_S)
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        connection.terminate()
