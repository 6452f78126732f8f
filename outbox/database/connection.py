"""Connections to Postgres: how they are opened and made safe, which errors mean that one is lost, our advisory locks.

Knows nothing of reports or mail.
"""

import asyncio
import hashlib
import os
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, assert_never

import asyncpg

from outbox.database.dialing import Dial, NoHostError, PinnedLoop
from outbox.database.refusal import (
    AT_ROLE,
    ITSELF,
    SESSION_MODE,
    SHARED_STATEMENTS,
    UNVERIFIED,
    Kind,
    Refusal,
    reason_of,
    refusal_of,
    shows_shared_session,
)
from outbox.errors import DatabaseUnavailableError, OutboxError, UnsafeDatabaseError
from outbox.log import Events
from outbox.reports.period import INFINITY, MINUS_INFINITY
from outbox.settings.postgres_hosts import Host, plan_of
from outbox.settings.postgres_local import require_user, resolve
from outbox.settings.postgres_parameters import warn_unknown
from outbox.settings.urls import DatabaseUrl

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

log = Events("outbox.database")

# Advisory locks live in one space per database, shared with everybody who uses it, whatever the schema
# (PostgreSQL docs, 13.3.5). The two-integer form with the first drawn from our name keeps out of others' way.
NAMESPACE_MASK: Final = 0x7FFFFFFF


def lock_namespace(name: str) -> int:
    """The first integer of our advisory locks of one kind, stable across versions; 0 < n < 2³¹."""
    return int.from_bytes(hashlib.sha256(f"outbox:{name}".encode()).digest()[:4], "big") & NAMESPACE_MASK


RELAY_LOCKS: Final = lock_namespace("relay")
BUCKET_LOCKS: Final = lock_namespace("bucket")
EDITION_LOCKS: Final = lock_namespace("edition")
INIT_LOCK: Final = lock_namespace("init")
SELFTEST_LOCKS: Final = lock_namespace("selftest")
PRUNE_LOCK: Final = lock_namespace("prune")

# The lock of relay `r`, granted to the very backend that registered it; $1 is RELAY_LOCKS. Any role that connects can
# take any advisory lock, also one of ours, so the same lock held by another backend, or in share mode, says nothing of
# the relay. A backend that got the process id of a dead relay's does not count either, unless its role could have
# registered a relay.
HOLDS_ITS_LOCK: Final = """
SELECT FROM pg_locks l
 WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ExclusiveLock' AND l.pid = r.backend_pid
   AND l.classid::bigint = $1 AND l.objid::bigint = r.id AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND has_any_column_privilege((SELECT a.usesysid FROM pg_stat_get_activity(l.pid) AS a), r.tableoid, 'INSERT')
"""

# The relays that live, from the locks, not from memory. $1 is RELAY_LOCKS.
ALIVE: Final = f"FROM outbox.relay r WHERE r.ended_at IS NULL AND EXISTS ({HOLDS_ITS_LOCK})"

CHANNEL: Final = "outbox"
CONNECT_TIMEOUT_S: Final = 10.0

# What means "this session is over" or "it never began"; everything else is a fault of the statement.
LOST_SESSION = (
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # "cannot switch to state …": a statement met the server's farewell
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # terminated, shut down, idle for too long
    asyncpg.IdleSessionTimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    ConnectionError,
    TimeoutError,
    OSError,
)


# Plans that look up rows by index, in its order, whatever the statistics say. A table that was empty a minute ago would
# be read whole for every batch, by a plan that the session then keeps; a bitmap scan gives no order, so that a claim
# would read and sort the whole backlog. BY_INDEX says it for a transaction.
NOT_BY_INDEX: Final = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin")

# Joins to each report `r` its digest item `i`, the email `m` (its own, or that of the digest that took it up) and the
# email's delivery `d`. Each `OFFSET 0` keeps its subquery from being joined as a whole: the planner can then only look
# it up for one row at a time, by the index of its WHERE. Without statistics it may join all emails to all reports in a
# nested loop over a materialized scan, which is quadratic.
EMAIL_OF_REPORT: Final = """
  LEFT JOIN LATERAL (SELECT report, digest FROM outbox.digest_item WHERE report = r.id OFFSET 0) i ON true
  LEFT JOIN LATERAL (SELECT id FROM outbox.email WHERE report = coalesce(i.digest, r.id) OFFSET 0) m ON true
  LEFT JOIN LATERAL (SELECT email, state FROM outbox.delivery WHERE email = m.id OFFSET 0) d ON true
"""
BY_INDEX: Final = "SELECT " + ", ".join(f"set_config('{way}', 'off', true)" for way in NOT_BY_INDEX)
# The same for a statement that joins arrays of a batch to each other: these have no index, so they are hashed.
BATCH_BY_INDEX: Final = BY_INDEX + ", set_config('enable_hashjoin', 'on', true)"


def is_ended(error: BaseException, connection: Any) -> bool:
    """Whether the error is asyncpg's stumbling over a connection that we ended between two steps of a statement."""
    return isinstance(error, AttributeError) and connection.is_closed()


def storable(text: str) -> str:
    """The text without what Postgres cannot hold: NUL, and surrogates that stand alone."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def lease_settings(lease_s: float, *, statements_too: bool) -> dict[str, str]:
    """What makes a session end soon after its client is gone, silent or cut off; any role may ask for these.

    `idle_session_timeout` ends a stopped process's session (its kernel still answers keepalives), the keepalives
    a lost host's, `tcp_user_timeout` one with data under way (PostgreSQL docs, 20.3.2 and 20.11). With
    `statements_too` no statement may outlast the lease either.
    """
    lease_ms = str(int(lease_s * 1000))
    short = {"statement_timeout": lease_ms, "lock_timeout": str(int(lease_s * 500))} if statements_too else {}
    return {
        **short,
        "default_transaction_isolation": "read committed",  # what was waited for must be seen afterwards
        "jit": "off",
        "idle_session_timeout": lease_ms,
        "idle_in_transaction_session_timeout": lease_ms,
        "tcp_keepalives_idle": "3",
        "tcp_keepalives_interval": "1",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "5000",
        "synchronous_commit": "on",
    }


# With any other path, a foreign object in one of its schemas can be called instead of the intended one, for example a
# function `unnest(integer[])` that matches better than `unnest(anyarray)`, and then runs with the rights of this
# session (PostgreSQL docs, 5.10.6 and 10.3). `pg_temp` comes last: temporary objects are this session's own, but
# without the entry they would be searched first.
TRUSTED_PATH: Final = "pg_catalog, pg_temp"
LOCK_TIMEOUT_S: Final = 10.0
INIT_WAIT_MAX_S: Final = 600.0

# `infinity` and `-infinity` are decoded to these bounds and encoded from them, other times out of range to one
# microsecond inside. All of them survive a conversion to any time zone, since offsets are below 24 hours.
_MICROSECOND: Final = timedelta(microseconds=1)
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL counts microseconds from here, as a signed 64-bit integer
_LATEST: Final = INFINITY - _MICROSECOND
_EARLIEST: Final = MINUS_INFINITY + _MICROSECOND
_LATEST_US: Final = (_LATEST - _EPOCH) // _MICROSECOND
_EARLIEST_US: Final = (_EARLIEST - _EPOCH) // _MICROSECOND
_INFINITY_US: Final = 2**63 - 1
_MINUS_INFINITY_US: Final = -(2**63)
_TIMESTAMPTZ: Final = 1184  # its fixed OID (pg_type.dat)


# Qualified throughout, since it runs with the path that it asks for.
OWN_PATH: Final = "SELECT pg_catalog.current_setting('search_path'), pg_catalog.pg_backend_pid()"


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """Connection with a trusted search path and bounded waits for locks, also after a pool has reset it."""

    user_search_path: str = '"$user", public'
    clamps_timestamps: bool = True
    local_path: str | None = None
    """Search path of the open transaction, if it is not the trusted one."""
    settle: str = ""
    """Statements that set up the session: the search path, `lock_timeout` and `plan_cache_mode`."""
    is_pooled: bool = False
    """True behind a pooler: the backend is not the one that the connection was opened with."""

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as asyncpg has it
        """Close in order. A pooler in transaction mode reuses the backend as it is, so settings are reset first."""
        if self.is_pooled and not self.is_closed():
            with suppress(asyncpg.PostgresError, *LOST_SESSION):
                await self.execute("RESET search_path; RESET lock_timeout; RESET plan_cache_mode", timeout=timeout)
        await super().close(timeout=timeout)

    def get_reset_query(self) -> str:
        """Return what a pool runs on a returned connection: `RESET ALL` alone would restore the role's own path."""
        return f"{super().get_reset_query()}\n{self.settle}"

    async def _introspect_types(self, typeoids: Any, timeout: float | None) -> Any:  # noqa: ASYNC109 - asyncpg's
        """Look up types with the trusted path, even while a user's query is prepared under another one.

        asyncpg's own query names functions and operators without their schema.
        """
        if self.local_path is None:
            return await super()._introspect_types(typeoids, timeout)
        await self.execute(f"SET LOCAL search_path = {TRUSTED_PATH}", timeout=timeout)
        found = await super()._introspect_types(typeoids, timeout)
        path = self.local_path.replace("'", "''")
        await self.execute(f"SELECT pg_catalog.set_config('search_path', '{path}', true)", timeout=timeout)
        return found

    def install_timestamps(self) -> None:
        """Decode timestamps that Python cannot represent (BC, after 9999, infinite) to the nearest one that it can.

        Without this asyncpg raises OverflowError for the whole result, and returns naive datetimes for the infinities.
        Registered by OID, since `set_type_codec` is for types that it looks up.
        """
        self._protocol.get_settings().add_python_codec(
            _TIMESTAMPTZ,
            "timestamptz",
            "pg_catalog",
            [],
            "scalar",
            _encode_timestamp,
            self._decode_timestamp,
            "tuple",
        )

    def _decode_timestamp(self, value: tuple[int]) -> datetime:
        (microseconds,) = value
        if _EARLIEST_US <= microseconds <= _LATEST_US:
            return _EPOCH + timedelta(microseconds=microseconds)
        if not self.clamps_timestamps:
            return _decode_as_asyncpg(microseconds)
        if microseconds > 0:
            return INFINITY if microseconds == _INFINITY_US else _LATEST
        return MINUS_INFINITY if microseconds == _MINUS_INFINITY_US else _EARLIEST


def _decode_as_asyncpg(microseconds: int) -> datetime:
    """Decode a timestamp near or out of Python's range as asyncpg does: naive infinities, OverflowError."""
    if microseconds == _INFINITY_US:
        return datetime.max  # noqa: DTZ901
    if microseconds == _MINUS_INFINITY_US:
        return datetime.min  # noqa: DTZ901
    return _EPOCH + timedelta(microseconds=microseconds)


def _encode_timestamp(at: object) -> tuple[int]:
    if not isinstance(at, datetime):
        if not isinstance(at, date):
            raise TypeError(f"expected a datetime.date or datetime.datetime instance, got {type(at).__name__!r}")
        at = datetime(at.year, at.month, at.day).astimezone()
    if at in (INFINITY, datetime.max):  # noqa: DTZ901 - asyncpg's own value of infinity
        return (_INFINITY_US,)
    if at in (MINUS_INFINITY, datetime.min):  # noqa: DTZ901
        return (_MINUS_INFINITY_US,)
    return ((at.astimezone(UTC) - _EPOCH) // _MICROSECOND,)


def user_search_path(connection: Any) -> str:
    """Return the search path that this role has by default, as `SET search_path = …` takes it.

    The user's own queries run with it: `SET LOCAL` it in their transaction and nowhere else.
    """
    path: str = connection.user_search_path
    return path


@contextmanager
def plain_timestamps(connection: Any) -> Iterator[None]:
    """Decode timestamps as asyncpg itself does within the block, for the user's own queries."""
    ours: Connection = getattr(connection, "_con", connection)  # a pool's connection is a proxy
    before, ours.clamps_timestamps = ours.clamps_timestamps, False
    try:
        yield
    finally:
        ours.clamps_timestamps = before


async def connect(
    url: DatabaseUrl,
    *,
    application: str,
    settings: dict[str, str] | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    clamp_timestamps: bool = True,
    keep_plans: bool = False,
) -> Connection:
    """Open a connection of our own that belongs to no pool: asyncpg's pool releases advisory locks, others leak them.

    Its search path is `TRUSTED_PATH`, and it waits for a lock for `LOCK_TIMEOUT_S` unless `settings` says otherwise.
    `clamp_timestamps` decodes timestamps out of Python's range to its bounds instead of raising. All hosts and
    addresses of the URL are asked within `timeout_s`.

    Statements with parameters are planned for each execution. A plan that a long session made for empty tables reads
    whole tables in nested loops once these are large, and Postgres keeps it until the next ANALYZE. `keep_plans` is for
    sessions whose statements say how they are planned (`BY_INDEX`); `plan_cache_mode` in `settings` wins.

    Raises:
        DatabaseUnavailableError: one sentence that says whether it does not answer, or does not let us in.
        UnsafeDatabaseError: the session settings that were asked for are refused or not in force.

    """
    settings = settings or {}
    connection = await _open_renewing(url, {"application_name": application, **settings}, timeout_s)
    try:
        if "idle_session_timeout" in settings:
            await _require_lease(url, connection, settings["idle_session_timeout"], timeout_s)
        connection.clamps_timestamps = clamp_timestamps
        connection.install_timestamps()
        # A pooler refuses settings in the startup message that it does not know: these are set afterwards.
        path, backend = await connection.fetchrow(OWN_PATH, timeout=timeout_s)
        connection.user_search_path, connection.is_pooled = path, backend != connection.get_server_pid()
        lock_timeout = settings.get("lock_timeout", str(int(LOCK_TIMEOUT_S * 1000)))
        connection.settle = f"SET search_path = {TRUSTED_PATH}; SET lock_timeout = '{lock_timeout}';"
        if not (keep_plans or "plan_cache_mode" in settings):
            connection.settle += " SET plan_cache_mode = 'force_custom_plan';"
        await connection.execute(connection.settle, timeout=timeout_s)
    except SHARED_STATEMENTS as error:
        connection.terminate()
        raise UnsafeDatabaseError(say_pooler(url, reason_of(error))) from error
    except LOST_SESSION as error:
        connection.terminate()
        if shows_shared_session(error):
            raise UnsafeDatabaseError(say_pooler(url, reason_of(error))) from error
        raise explain_refusal(url, error) from error
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _open_renewing(url: DatabaseUrl, settings: dict[str, str], timeout_s: float) -> Connection:
    """Open a session. If the login is refused and came from a file, the file is read again."""
    login = url.login
    tried = login.current if login is not None else url
    while True:
        try:
            return await _open(tried, settings, timeout_s)
        except DatabaseLoginError as error:
            if login is None:
                raise
            # Another task may have read the files meanwhile.
            if login.renew() is None and login.current == tried:
                raise DatabaseLoginError(f"{error} {login.problem}".rstrip()) from error
            log.info("database_login_renewed", "Postgres refuses the login; its file has another one, which is tried")
            tried = login.current


async def _open(url: DatabaseUrl, settings: dict[str, str], timeout_s: float) -> Connection:
    """Open a session with the first server of the URL that accepts it.

    Raises:
        DatabaseUnavailableError, UnsafeDatabaseError: as `connect`.

    """
    try:
        plan = plan_of(url.dsn)
        given = resolve(plan.parameters.given, has_tcp=not plan.hosts or not all(host.is_socket for host in plan.hosts))
        require_user(plan.users)
    except ValueError as error:  # of the environment: the URL was checked when it was read
        raise DatabaseRefusedError(f"database_url: {error}.") from None
    _warn(*plan.parameters.warnings)

    async def opening(host: Host | None, address: str, attrs: str | None) -> Connection:
        loop = PinnedLoop(asyncio.get_running_loop(), address) if address else None
        place = {} if host is None else {"host": host.name, "port": host.port}
        options = {**place, "loop": loop, "timeout": timeout_s, "target_session_attrs": attrs}
        while True:
            known = {name: value for name, value in given.items() if name not in _unknown}
            try:
                return await _connect(plan.dsn_of(known), settings, options)
            except asyncpg.UndefinedObjectError as error:
                # A setting that the server does not know. If the URL has it, it is another tool's, or misspelt.
                name = _unrecognized(error, known)
                if not name or name in settings:
                    raise
                _unknown.add(name)
                _warn(warn_unknown(name))

    try:
        if plan.hosts:
            dial = Dial(plan, opening, discard=_abandon, is_definite=_refuses_login, timeout_s=timeout_s)
            connection = await dial.run()
        else:
            connection = await opening(None, "", plan.target_session_attrs)
    except NoHostError as error:
        failures = error.failures
        if any(_refuses_settings(failed) for _, failed in failures) and await _shares_sessions(url):
            (said,) = {reason_of(failed) for _, failed in failures if _refuses_settings(failed)} or {""}
            raise UnsafeDatabaseError(say_pooler(url, f"it also refuses a setting of our sessions: {said}")) from error
        raise explain_refusals(url, failures) from error
    except Exception as error:
        raise explain_refusal(url, error) from error
    _watch_peer(connection)
    return connection


async def _connect(dsn: str, settings: dict[str, str], options: dict[str, Any]) -> Connection:
    opened = await asyncpg.connect(
        dsn,
        **options,
        max_cached_statement_lifetime=0,  # what is prepared stays so: see `Session.open`
        server_settings=settings,
        connection_class=Connection,
    )
    assert isinstance(opened, Connection)
    return opened


_unknown: set[str] = set()
"""Parameters of this process's database URLs that a server did not know."""
_warned: set[str] = set()


def _warn(*sentences: str) -> None:
    """Log each sentence once in the life of the process."""
    for sentence in sentences:
        if sentence not in _warned:
            _warned.add(sentence)
            log.warning("database_parameter_ignored", "outbox {reason}", reason=sentence)


def ignored_parameters(url: DatabaseUrl) -> list[str]:
    """Return a sentence for each parameter of the URL that is ignored.

    Those that a server does not know are among them after `connect`.
    """
    parameters = plan_of(url.dsn).parameters
    return [*parameters.warnings, *(warn_unknown(name) for name in parameters.given if name in _unknown)]


def _unrecognized(error: Exception, names: Iterable[str]) -> str:
    """Return which of these settings the server does not know. Its sentence may be in any language (lc_messages)."""
    quoted = re.findall(r"[\"'«»„“”]([^\"'«»„“”]+)[\"'«»„“”]", str(error))
    return next((name for name in names if name in quoted), "")


def _abandon(connection: Connection) -> None:
    """End a session that another server won. Its server learns of it by the end of the connection."""
    connection.terminate()


def _refuses_login(error: Exception) -> bool:
    refusal = refusal_of(error)
    return refusal is not None and refusal.kind is Kind.LOGIN


def _refuses_settings(error: Exception) -> bool:
    refusal = refusal_of(error)
    return refusal is not None and refusal.fix is AT_ROLE


BARE_TIMEOUT_S: Final = 15.0
BARE_ROUNDS: Final = 12
BARE_ROUND_MAX_S: Final = 0.03
BARE_TRIES: Final = 4
BARE_PAUSE_S: Final = 0.5


async def _shares_sessions(url: DatabaseUrl) -> bool:
    """Return True if two connections are served by one server process: a pooler in transaction or statement mode.

    A pooler in session mode gives each connection a process of its own, or lets the second one wait. A server that is
    busy may refuse a connection, so a failed look is repeated.
    """
    try:
        async with asyncio.timeout(BARE_TIMEOUT_S):
            for _ in range(BARE_TRIES):
                try:
                    return await _shares_now(url)
                except (OutboxError, asyncpg.PostgresError, *LOST_SESSION):
                    await asyncio.sleep(BARE_PAUSE_S)
    except TimeoutError:
        pass  # a second connection that waits for the first is that of a pooler in session mode
    return False


async def _shares_now(url: DatabaseUrl) -> bool:
    opened: list[Connection] = []
    seen: list[set[str]] = [set(), set()]
    try:
        for _ in seen:
            opened.append(await _open(url, {}, BARE_TIMEOUT_S))  # noqa: PERF401 - closed even if the second fails
        for _ in range(BARE_ROUNDS):
            for connection, processes in zip(opened, seen, strict=True):
                processes.add(await _server_process(connection))
            if seen[0] & seen[1] or len(seen[0]) > 1:
                return True
            # Two looks in step, of one process or of two, would always find each other's servers taken.
            await asyncio.sleep(random.uniform(0, BARE_ROUND_MAX_S))  # noqa: S311 - no secret
    finally:
        for connection in opened:
            connection.terminate()
    return False


async def _server_process(connection: Connection) -> str:
    """Return the process id of the backend that answers, asked in a simple query, which passes any pooler."""
    try:
        await connection.execute("DO $$ BEGIN RAISE EXCEPTION '%', pg_catalog.pg_backend_pid(); END $$")
    except asyncpg.RaiseError as error:
        return str(error)
    raise AssertionError


def describe_session(row: Any) -> str:
    """Return pid, role and application of a session as text; pid 0 is a prepared transaction."""
    if not row["pid"]:
        return "a prepared transaction (see pg_prepared_xacts)"
    application = f", application {row['application']}" if row["application"] else ""
    return f"pid {row['pid']} (role {row['role']}{application})"


def explain_lock(doing: str, blockers: str) -> DatabaseUnavailableError:
    """Return the error for a lock that was not obtained in time (SQLSTATE 55P03)."""
    holder = blockers or "a session that has ended meanwhile"
    return DatabaseUnavailableError(
        f"{doing} waited too long for a lock that another session holds: {holder}; "
        "let it end, or end it with pg_terminate_backend(pid), and run this again."
    )


def is_lock_timeout(error: BaseException | None) -> bool:
    """Return True if an error, or one that SQLAlchemy wrapped in it, is a `lock_timeout`."""
    while error is not None:
        if isinstance(error, asyncpg.LockNotAvailableError):
            return True
        error = getattr(error, "orig", None) or error.__cause__
    return False


# The holders of the lock, and whether their roles may create or upgrade the schema, as the role of `outbox init` may.
INIT_HOLDERS: Final = """
SELECT l.pid, a.usesysid::regrole::text AS role, a.application_name AS application,
       coalesce(has_database_privilege(a.usesysid, l.database, 'CREATE')
                OR (SELECT pg_has_role(a.usesysid, nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'outbox'),
                false) AS may_init
  FROM pg_locks l CROSS JOIN LATERAL pg_stat_get_activity(l.pid) AS a
 WHERE l.locktype = 'advisory' AND l.granted AND l.classid::bigint = $1 AND l.objid = 0 AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 ORDER BY may_init, l.pid
"""


async def take_init_lock(connection: Any) -> None:
    """Take the lock under which one server at a time changes the schema, until the end of the transaction.

    Servers queue for it, each for as long as the others take, but at most for `INIT_WAIT_MAX_S`. A role that may not
    change the schema can hold it, too, since it is an advisory lock: such a holder is waited for only once.

    Raises:
        DatabaseUnavailableError: it is not free in time; the error names pid and role of the holder.

    """
    end = time.monotonic() + INIT_WAIT_MAX_S
    while True:
        try:
            async with connection.transaction():  # a savepoint: a wait that fails does not abort the transaction
                await connection.execute("SELECT pg_advisory_xact_lock($1, 0)", INIT_LOCK)
        except asyncpg.LockNotAvailableError as error:
            holders = await connection.fetch(INIT_HOLDERS, INIT_LOCK)
            outsiders = [row for row in holders if not row["may_init"]]
            if outsiders or time.monotonic() > end:
                found = ", ".join(describe_session(row) for row in outsiders or holders)
                raise explain_lock("Changing the schema", found) from error
        else:
            return


# What the server is asked to do about us (`lease_settings`), done about the server: a host that is gone, or a
# network that is cut, is noticed within seconds (tcp(7)), also while a long query of a user's runs.
_PEER_WATCH: Final = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}


def _watch_peer(connection: Any) -> None:
    """Let our kernel probe the server; options that this platform lacks are left out.

    asyncpg gives no other way to its socket, and uvloop only the descriptor: a copy of it is the same socket.
    """
    found = connection._transport.get_extra_info("socket")  # noqa: SLF001
    if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PEER_WATCH.items():
            if (option := getattr(socket, name, None)) is not None:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)


async def _require_lease(url: DatabaseUrl, connection: Any, wanted_ms: str, timeout_s: float) -> None:
    """Return if the session is the lease that was asked for. In one simple query, which passes any pooler.

    It runs before the search path is set, so every name in it is qualified.
    """
    try:
        await connection.execute(
            "DO $$ DECLARE found pg_catalog.text := (SELECT s.setting FROM pg_catalog.pg_settings s"
            " WHERE s.name OPERATOR(pg_catalog.=) 'idle_session_timeout'::pg_catalog.text);"
            f" BEGIN IF found OPERATOR(pg_catalog.<>) '{int(wanted_ms)}'::pg_catalog.text"
            " THEN RAISE EXCEPTION '% ms', found; END IF; END $$",
            timeout=timeout_s,
        )
    except asyncpg.RaiseError as error:
        fact = f"idle_session_timeout is {error} although {wanted_ms} ms were asked for"
        connection.terminate()
        if await _shares_sessions(url):
            raise UnsafeDatabaseError(say_pooler(url, fact)) from error
        raise UnsafeDatabaseError(
            f"The pooler at {url.redacted} keeps sessions apart, but drops their settings ({fact}); {ITSELF}, "
            "or set them at the role, as docs/scale.md shows."
        ) from error


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what SQLAlchemy wrapped in it, means that the session is over."""
    while error is not None:
        if isinstance(error, asyncpg.QueryCanceledError):  # statement_timeout: the statement ended, not the session
            return False
        if isinstance(error, (*LOST_SESSION, DatabaseUnavailableError)) and not isinstance(error, DatabaseRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain_refusal(url: DatabaseUrl, error: Exception) -> Exception:
    """Return an error that says in one sentence why there is no session; return other errors unchanged."""
    refusal = refusal_of(error)
    return error if refusal is None else _explained(url, refusal)


def explain_refusals(url: DatabaseUrl, failures: Sequence[tuple[str, Exception]]) -> Exception:
    """Return one error for all servers that were asked; a refused login weighs more than a server that is silent."""
    if len(failures) == 1:
        return explain_refusal(url, failures[0][1])
    refusals = [(label, refusal_of(error), error) for label, error in failures]
    for _, refusal, error in refusals:
        if refusal is None:
            return error
    found = [(label, refusal, error) for label, refusal, error in refusals if refusal is not None]
    worst = min((refusal for _, refusal, _ in found), key=lambda one: list(Kind).index(one.kind))
    reasons = "; ".join(
        f"{label}: {reason_of(error) if refusal.is_silent else refusal.says}" for label, refusal, error in found
    )
    verb = "does not answer" if all(refusal.is_silent for _, refusal, _ in found) else "gives no session"
    return _explained(url, replace(worst, says=f"{verb} ({reasons})"))


def _explained(url: DatabaseUrl, refusal: Refusal) -> Exception:
    if refusal.fix is UNVERIFIED and "channel_binding=require" in url.dsn:
        why = "it is verified for channel_binding=require, since asyncpg has no channel binding"
        refusal = replace(refusal, says=f"{refusal.says}; {why}")
    if refusal.is_silent and "sslnegotiation=direct" in url.dsn:
        fix = f"{refusal.fix}; sslnegotiation=direct needs PostgreSQL 17 or later with TLS"
        refusal = replace(refusal, fix=fix)
    match refusal.kind:
        case Kind.LOGIN:
            error: type[Exception] = DatabaseLoginError
        case Kind.REFUSED:
            error = DatabaseRefusedError
        case Kind.UNSAFE:
            return UnsafeDatabaseError(f"The pooler at {url.redacted} {refusal.says}; {refusal.fix}.")
        case Kind.AWAY:
            error = DatabaseUnavailableError
        case _:
            assert_never(refusal.kind)
    return error(f"Postgres at {url.redacted} {refusal.says}; {refusal.fix}.")


def say_pooler(url: DatabaseUrl, fact: str) -> str:
    """Return the sentence about a pooler that shares sessions among its clients, as `fact` shows."""
    mode = "statement" if "statement pooling" in fact else "transaction"
    return (
        f"The pooler at {url.redacted} is in {mode} mode ({fact}), so sessions and advisory locks are shared "
        f"among its clients; {SESSION_MODE}."
    )


class DatabaseRefusedError(DatabaseUnavailableError):
    """Postgres answers and says no: waiting does not help, a person must correct something."""


class DatabaseLoginError(DatabaseRefusedError):
    """Postgres refuses user or password: a person must correct them, or a file with newer ones is read."""


def engine(url: DatabaseUrl, *, application: str) -> "AsyncEngine":
    """A SQLAlchemy engine for one connection: closed, it ends its session; lost, it is not replaced."""
    return _engine_once(url, lambda: connect(url, application=application))


def engine_on(url: DatabaseUrl, connection: Callable[[], Any]) -> "AsyncEngine":
    """The same on a connection that is there by the time it is asked for."""

    async def there() -> Any:
        return connection()

    return _engine_once(url, there)


def _engine_once(url: DatabaseUrl, opening: Callable[[], Awaitable[Any]]) -> "AsyncEngine":
    """An engine that connects once.

    Left to itself SQLAlchemy opens a new connection in the place of a lost one at its next use, and with it a session
    that holds none of the locks which the code believes to hold.
    """
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    opened: list[Any] = []

    async def once() -> Any:
        if opened:
            raise DatabaseUnavailableError(f"The session with Postgres at {url.redacted} was lost; run this again.")
        opened.append(await opening())
        return opened[0]

    return create_async_engine("postgresql+asyncpg://", async_creator=once, poolclass=NullPool)


# Not pg_control_checkpoint(): it shows the old timeline until the first checkpoint after the promotion.
TIMELINE: Final = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint"
TIMELINE_ELSEWHERE: Final = "SELECT timeline_id::bigint FROM pg_control_checkpoint()"


async def timeline_of(connection: Any) -> int:
    """The WAL timeline that this session writes on, from 1; 0 where the server does not tell."""
    for query in (TIMELINE, TIMELINE_ELSEWHERE):
        try:
            return int(await connection.fetchval(query))
        except (asyncpg.FeatureNotSupportedError, asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError):
            continue  # a managed service that keeps its WAL to itself
    return 0
