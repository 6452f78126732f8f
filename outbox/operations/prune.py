"""Pruning: old message bodies, attempts and pages are removed; the rows under the unique keys stay for ever.

So an old edition that is generated again is found made, and sends nothing. Unsettled emails are never touched.

Pruning frees space for new rows; the files do not get smaller. The space is free after a VACUUM, which autovacuum runs
once a fifth of a table has changed; `VACUUM outbox.email, outbox.report, outbox.attempt` does it at once. Some 300
bytes are left of an email and its page, besides the indexes. Tables that are filled by inserts have no free space on
their pages, so hardly any of these updates is heap-only: a row moves, once in its life, to where a VACUUM freed space.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.driver import Record
from outbox.database.lock_wait import MAY_PRUNE, BlockerWatch, holders
from outbox.database.locks import PRUNE_LOCK
from outbox.database.opening import connect, lease_settings
from outbox.database.schema import require_current
from outbox.errors import ConfigurationError, DatabaseUnavailableError, OutboxError
from outbox.log import Events
from outbox.mail.removed_message import PRUNED, REMOVED
from outbox.relay.lease_connection import PLANS
from outbox.settings import duration_s
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.prune")

BATCH_MAX: Final = 1000
KEEP_MIN: Final = timedelta(days=1)
KEEP_MAX: Final = timedelta(days=36_500)  # within what Postgres and Python can subtract from now
LOCK_TIMEOUT_S: Final = 0.5  # below deadlock_timeout: if two ever wait for each other it is we who give way
STATEMENT_TIMEOUT_S: Final = 30.0
SILENCE_S: Final = 2 * STATEMENT_TIMEOUT_S
LEASE_S: Final = 90.0  # longer than a pause; the lock of a process that is stopped is free after it
BOUNDS: Final = {
    **PLANS,
    **lease_settings(LEASE_S, statements_too=False),
    "lock_timeout": str(int(LOCK_TIMEOUT_S * 1000)),
    "statement_timeout": str(int(STATEMENT_TIMEOUT_S * 1000)),
}


def keep_of(text: str) -> timedelta:
    """Return the time from `KEEP_MIN` to `KEEP_MAX` that a text such as `400d`, `52w` or `48h` stands for.

    Raises:
        ConfigurationError: it is not such a text, or out of bounds.

    """
    seconds = duration_s(text)
    if not seconds:
        raise ConfigurationError(f"--keep: {text!r} is no stretch of time; write one such as 400d, 52w or 48h.")
    if seconds < KEEP_MIN.total_seconds():
        raise ConfigurationError(f"--keep: {text} is too short; keep at least 1d.")
    if seconds > KEEP_MAX.total_seconds():
        raise ConfigurationError(f"--keep: {text} is too long; keep at most {KEEP_MAX.days}d.")
    return timedelta(seconds=seconds)


@dataclass(slots=True)
class Pruned:
    """Number of rows from before a moment that were pruned, or would be. `unsettled` ones stay as they are for now.

    `share` is the part of the time up to `before` that is done, from 0 to 1, in the table `walking`.
    """

    before: datetime
    emails: int = 0
    attempts: int = 0
    pages: int = 0
    unsettled: int = 0
    walking: str = field(default="email", repr=False)
    share: float = field(default=0.0, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the counts, and the moment as ISO 8601 in UTC."""
        return {
            "before": self.before,
            "emails": self.emails,
            "attempts": self.attempts,
            "pages": self.pages,
            "unsettled": self.unsettled,
        }


# A page of emails by id: ids grow with time, more or less, and an index on created_at would cost every new email.
# Without a delivery an email is not settled: one may still come.
EMAILS: Final = """
page AS MATERIALIZED (
    SELECT m.id, m.created_at, m.created_at < $3 AS old, m.message = ANY ($4::bytea[]) AS bare,
           d.state, d.attempt, m.created_at < $3 AND d.settled_at IS NOT NULL AS ripe
      FROM outbox.email m LEFT JOIN outbox.delivery d ON d.email = m.id
     WHERE m.id > $1 ORDER BY m.id LIMIT $2
)"""

# Of what was sent the whole trail goes. Of what was not, its last try stays: why, and what a person decided, without
# which `outbox status` would ask for a decision again.
TRAIL: Final = "w.goes AND a.email = w.id AND (w.state = 'sent' OR a.attempt < w.attempt)"

WALKED: Final = """
       max(id) AS last, bool_or(old) AS old, min(created_at) AS first_at, max(created_at) FILTER (WHERE old) AS last_at,
       count(*) FILTER (WHERE old AND NOT goes) AS stay, bool_and(goes) AS whole FROM walked
"""

# The watermark ends below the first row that stays, whether open, locked or young: a later run must see that again,
# as long as this run has left nothing behind before ($5). It goes back to one that came behind it: see OVERLAP.
NOTED: Final = """
noted AS (
    INSERT INTO outbox.pruned AS n (what, up_to)
    SELECT '{what}', coalesce(min(id) FILTER (WHERE NOT goes) - 1, max(id)) FROM walked HAVING $5 AND count(*) > 0
    ON CONFLICT (what) DO UPDATE
       SET up_to = CASE WHEN (SELECT bool_and(goes) FROM walked) THEN greatest(n.up_to, excluded.up_to)
                        ELSE excluded.up_to END, at = now()
)"""

# `sent` is for ever, so its delivery is not locked. A dead letter may be sent again by a person at this very moment
# (`resolve`), who locks the delivery and then the email, as we do: one of the two has it, and the other sees that.
# What is locked already is passed over, and is a later run's.
PRUNE_EMAILS: Final = f"""
WITH {EMAILS}, held AS MATERIALIZED (
    SELECT d.email FROM page p JOIN outbox.delivery d ON d.email = p.id
     WHERE p.ripe AND p.state <> 'sent' AND d.settled_at IS NOT NULL
     ORDER BY d.email FOR UPDATE OF d SKIP LOCKED
), walked AS MATERIALIZED (
    SELECT *, ripe AND (state = 'sent' OR id IN (SELECT email FROM held)) AS goes FROM page
), bared AS (
    UPDATE outbox.email m SET message = $6::bytea FROM walked w WHERE w.goes AND NOT w.bare AND m.id = w.id RETURNING 1
), trail AS (
    DELETE FROM outbox.attempt a USING walked w WHERE {TRAIL} RETURNING 1
), {NOTED.format(what="email")}
SELECT (SELECT count(*) FROM bared) AS bared, (SELECT count(*) FROM trail) AS attempts, {WALKED}
"""

LOOK_AT_EMAILS: Final = f"""
WITH {EMAILS}, walked AS MATERIALIZED (SELECT *, ripe AS goes FROM page)
SELECT count(*) FILTER (WHERE goes AND NOT bare) AS bared,
       (SELECT count(*) FROM walked w JOIN outbox.attempt a ON {TRAIL}) AS attempts, {WALKED}
"""

# A page goes once no mail that links to it can be sent any more: emails are walked first, and no body comes back. In a
# LATERAL with a LIMIT, since a NOT EXISTS may be planned as a hash of all emails, once per batch. What is collected is
# linked to by its digest's mail, and stays while it waits for one.
REPORTS: Final = """
walked AS MATERIALIZED (
    SELECT r.id, r.created_at, r.created_at < $3 AS old, r.html = '' AS bare,
           r.created_at < $3 AND NOT coalesce(item.waits, false) AND linked.id IS NULL AS goes
      FROM (SELECT id, created_at, html FROM outbox.report WHERE id > $1 ORDER BY id LIMIT $2) r
      LEFT JOIN LATERAL (SELECT i.digest, i.digest IS NULL AS waits FROM outbox.digest_item i
                          WHERE i.report = r.id AND r.created_at < $3 LIMIT 1) item ON true
      LEFT JOIN LATERAL (SELECT m.id FROM outbox.email m
                          WHERE m.report = coalesce(item.digest, r.id) AND r.created_at < $3 AND {sendable}
                          LIMIT 1) linked ON true
)"""

PRUNE_REPORTS: Final = f"""
WITH {REPORTS.format(sendable="m.message <> ALL ($4::bytea[])")}, bared AS (
    UPDATE outbox.report r SET html = $6::text FROM walked w WHERE w.goes AND NOT w.bare AND r.id = w.id RETURNING 1
), {NOTED.format(what="report")}
SELECT (SELECT count(*) FROM bared) AS bared, 0 AS attempts, {WALKED}
"""

_SENDABLE: Final = """
m.message <> ALL ($4::bytea[]) AND NOT (m.created_at < $3 AND EXISTS (
    SELECT FROM outbox.delivery d WHERE d.email = m.id AND d.settled_at IS NOT NULL OFFSET 0))"""
LOOK_AT_REPORTS: Final = f"""
WITH {REPORTS.format(sendable=_SENDABLE)}
SELECT count(*) FILTER (WHERE goes AND NOT bare) AS bared, 0 AS attempts, {WALKED}
"""

# A row with a smaller id than others may come after them: from a transaction that was open longer, or under an id that
# generate reserved before it built the mail. To be missed for good it would have to come later than `keep` after its
# neighbours, at least a day, and more than OVERLAP rows behind the watermark.
OVERLAP: Final = 10_000
UP_TO: Final = "SELECT up_to FROM outbox.pruned WHERE what = $1"

Progress = Callable[[Pruned], None]


async def prune(
    url: DatabaseUrl,
    keep: timedelta,
    *,
    dry_run: bool = False,
    batch_max: int = BATCH_MAX,
    stop: asyncio.Event | None = None,
    progress: Progress = lambda _: None,
) -> Pruned:
    """Remove what was created longer than `keep` ago, by the database's clock; ends early, after a batch, on `stop`.

    A batch is one statement and one commit, followed by a pause as long as it took. Whatever ends it, a later run goes
    on from there. A walk ends with the first batch that is all young: what is old behind that, since ids and times are
    not in quite one order, is a later run's.

    Raises:
        OutboxError: another prune runs in this database.
        DatabaseUnavailableError: no connection, it was lost, or others held what a batch needs for too long.
        UnsafeDatabaseError, SchemaError: as in `connect` and `require_current`.

    """
    async with _session(url, alone=not dry_run) as connection:
        pruned = Pruned(await connection.fetchval("SELECT now() - $1::interval", keep))
        walk = _Walk(url, connection, pruned, batch_max, stop or asyncio.Event(), progress)
        if dry_run:
            await walk.over("email", LOOK_AT_EMAILS, LOOK_AT_EMAILS)
            await walk.over("report", LOOK_AT_REPORTS, LOOK_AT_REPORTS)
        else:
            await walk.over("email", PRUNE_EMAILS, LOOK_AT_EMAILS, PRUNED)
            await walk.over("report", PRUNE_REPORTS, LOOK_AT_REPORTS, "")
    return pruned


@dataclass(slots=True)
class _Walk:
    """Walks over a table from its watermark on, in batches."""

    url: DatabaseUrl
    connection: Connection
    pruned: Pruned
    batch_max: int
    stop: asyncio.Event
    progress: Progress

    async def over(self, table: str, statement: str, look: str, remains: bytes | str | None = None) -> None:
        """Prune the table, or without `remains` only look; returns when the rest is young, or on `stop`.

        A row from before a CHECK that it breaks cannot be changed, and stays as it is: the rows of its batch are pruned
        one by one, and `look` says where the next one begins.
        """
        last, whole = max((await self.connection.fetchval(UP_TO, table) or 0) - OVERLAP, 0), True
        first_at: datetime | None = None
        rows_max = self.batch_max
        while not self.stop.is_set():
            began_at = time.monotonic()
            more = () if remains is None else (whole, remains)
            try:
                row: Record | dict[str, Any] = await self._batch(
                    statement, last, rows_max, self.pruned.before, REMOVED, *more
                )
            except asyncpg.IntegrityConstraintViolationError as error:
                if rows_max > 1:
                    rows_max = 1
                    continue
                found = await self._batch(look, last, 1, self.pruned.before, REMOVED)
                log.warning(
                    "row_kept", "{table} {id} stays as it is: {reason}", table=table, id=found["last"], reason=error
                )
                row = {**found, "bared": 0, "attempts": 0, "stay": 1, "whole": True}
                rows_max = self.batch_max
            if not row["old"]:
                return
            last, whole, first_at = row["last"], whole and row["whole"], first_at or row["first_at"]
            self._count(table, row, first_at)
            await self._rest(time.monotonic() - began_at)

    async def _batch(self, statement: str, *values: object) -> Record:
        """Run a batch; after a lock timeout run it once more, to find out who holds the lock."""
        try:
            with self.connection.end_if_silent(SILENCE_S):
                return await self.connection.fetchrow(statement, *values)
        except asyncpg.LockNotAvailableError:
            look_s, pid = LOCK_TIMEOUT_S / 5, await self.connection.fetchval("SELECT pg_backend_pid()")
        async with BlockerWatch(self.url, pid, first_s=look_s, every_s=look_s) as watch:
            try:
                with self.connection.end_if_silent(SILENCE_S):
                    return await self.connection.fetchrow(statement, *values)
            except asyncpg.LockNotAvailableError as error:
                raise DatabaseUnavailableError(_unfinished(f"{watch.holder} holds a lock: {error}")) from error

    def _count(self, table: str, row: Record | dict[str, Any], first_at: datetime) -> None:
        self.pruned.walking = table
        self.pruned.share = (row["last_at"] - first_at) / (self.pruned.before - first_at)
        if table == "report":
            self.pruned.pages += row["bared"]
        else:
            self.pruned.emails += row["bared"]
            self.pruned.attempts += row["attempts"]
            self.pruned.unsettled += row["stay"]
        self.progress(self.pruned)

    async def _rest(self, pause_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self.stop.wait()


def _unfinished(reason: object) -> str:
    return f"Postgres did not finish a batch ({reason}); run `outbox prune` again, it goes on from there."


async def _exclude_others(connection: Connection) -> None:
    """Take the lock of pruning, or ignore it if it is held by roles that may not prune.

    Two prunes at once would do some work twice, but no harm.
    """
    for _ in range(2):  # it may be released between the two queries
        if await connection.fetchval("SELECT pg_try_advisory_lock($1, 0)", PRUNE_LOCK):
            return
        if await holders(connection, PRUNE_LOCK, [0], MAY_PRUNE):
            raise OutboxError("Another `outbox prune` runs in this database; let it finish, one at a time is enough.")


@asynccontextmanager
async def _session(url: DatabaseUrl, *, alone: bool) -> AsyncIterator[Connection]:
    """A session whose statements are short; `alone` holds the lock that only one prune of a database has."""
    connection = await connect(url, application="outbox prune", settings=BOUNDS)
    try:
        with connection.end_if_silent(SILENCE_S):
            await require_current(connection)
        if alone:
            await _exclude_others(connection)
        yield connection
        # Said, since the server may see a closed connection only after the next prune asks for the lock.
        await connection.execute("SELECT pg_advisory_unlock_all()")
    except (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
        raise DatabaseUnavailableError(_unfinished(error)) from error
    except LOST_SESSION as error:
        raise DatabaseUnavailableError(
            f"The session with Postgres at {url.redacted} was lost ({str(error) or type(error).__name__}); "
            "run `outbox prune` again when it is back, it goes on from there."
        ) from error
    finally:
        connection.terminate()
