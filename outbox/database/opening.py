"""Opening of connections: hosts and logins are tried, settings are put in force, refusals get one sentence.

`connect` opens one that belongs to no pool: asyncpg's pool releases advisory locks, others leak them.
"""

import asyncio
import os
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.dialing import Dial, NoHostError, PinnedLoop
from outbox.database.pooler import BARE_TIMEOUT_S, require_lease, say_pooler, shares_sessions
from outbox.database.refusal import (
    AT_ROLE,
    SHARED_STATEMENTS,
    DatabaseLoginError,
    DatabaseRefusedError,
    Kind,
    explain_refusal,
    explain_refusals,
    reason_of,
    refusal_of,
    shows_shared_session,
)
from outbox.errors import UnsafeDatabaseError
from outbox.log import Events
from outbox.settings.postgres_hosts import Host, Plan, plan_of
from outbox.settings.postgres_local import require_user, resolve
from outbox.settings.postgres_parameters import warn_unknown
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.database")

CONNECT_TIMEOUT_S: Final = 10.0
LOCK_TIMEOUT_S: Final = 10.0


def lease_settings(lease_s: float, *, statements_too: bool) -> dict[str, str]:
    """Return settings that end a session soon after its client is gone, silent or cut off; any role may ask for these.

    `idle_session_timeout` ends a stopped process's session (its kernel still answers keepalives), the keepalives
    a lost host's, `tcp_user_timeout` one with data under way (PostgreSQL docs, 20.3.2 and 20.11). With
    `statements_too` no statement may outlast the lease either.
    """
    lease_ms = str(int(lease_s * 1000))
    short = {"statement_timeout": lease_ms, "lock_timeout": str(int(lease_s * 500))} if statements_too else {}
    return {
        **short,
        "default_transaction_isolation": "read committed",  # what was waited for must be seen afterwards
        "idle_session_timeout": lease_ms,
        "idle_in_transaction_session_timeout": lease_ms,
        "tcp_keepalives_idle": "3",
        "tcp_keepalives_interval": "1",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "5000",
        "synchronous_commit": "on",
    }


async def connect(
    url: DatabaseUrl,
    *,
    application: str,
    settings: dict[str, str] | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    keep_plans: bool = False,
) -> Connection:
    """Open a connection that belongs to no pool.

    Its search path is `TRUSTED_PATH`, and it waits for a lock for `LOCK_TIMEOUT_S` unless `settings` says otherwise.
    All hosts and addresses of the URL are asked within `timeout_s`.

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
        if (wanted_ms := settings.get("idle_session_timeout")) is not None:
            bare = _Opener(url, {}, BARE_TIMEOUT_S)
            await require_lease(url, connection, wanted_ms, timeout_s=timeout_s, opening=bare.open)
        lock_timeout = settings.get("lock_timeout", str(int(LOCK_TIMEOUT_S * 1000)))
        keep_plans = keep_plans or "plan_cache_mode" in settings
        await connection.set_up(lock_timeout=lock_timeout, keep_plans=keep_plans, timeout_s=timeout_s)
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
            return await _Opener(tried, settings, timeout_s).open()
        except DatabaseLoginError as error:
            if login is None:
                raise
            # Another task may have read the files meanwhile.
            if login.renew() is None and login.current == tried:
                raise DatabaseLoginError(f"{error} {login.problem}".rstrip()) from error
            log.info("database_login_renewed", "Postgres refuses the login; its file has another one, which is tried")
            tried = login.current


class _Ignored:
    """Parameters of this process's database URLs that are ignored. Each is logged once."""

    def __init__(self) -> None:
        self._unknown: set[str] = set()
        self._warned: set[str] = set()

    def is_unknown(self, name: str) -> bool:
        """Return True if a server has refused this parameter."""
        return name in self._unknown

    def note_unknown(self, name: str) -> None:
        """Note that a server does not know a parameter."""
        self._unknown.add(name)
        self.warn(warn_unknown(name))

    def warn(self, *sentences: str) -> None:
        """Log each sentence once in the life of the process."""
        for sentence in sentences:
            if sentence not in self._warned:
                self._warned.add(sentence)
                log.warning("database_parameter_ignored", "outbox {reason}", reason=sentence)


_ignored = _Ignored()


def ignored_parameters(url: DatabaseUrl) -> list[str]:
    """Return a sentence for each parameter of the URL that is ignored.

    Those that a server does not know are among them after `connect`.
    """
    parameters = plan_of(url.dsn).parameters
    unknown = [warn_unknown(name) for name in parameters.given if _ignored.is_unknown(name)]
    return [*parameters.warnings, *unknown]


@dataclass(frozen=True, slots=True)
class _Opener:
    """Opener of sessions with the first server of a URL that accepts one."""

    url: DatabaseUrl
    settings: dict[str, str]
    timeout_s: float

    async def open(self) -> Connection:
        """Open a session.

        Raises:
            DatabaseUnavailableError, UnsafeDatabaseError: as `connect`.

        """
        plan, given = self._plan()
        _ignored.warn(*plan.parameters.warnings)

        async def opening(host: Host | None, address: str, attrs: str | None) -> Connection:
            loop = PinnedLoop(asyncio.get_running_loop(), address) if address else None
            server = {} if host is None else {"host": host.name, "port": host.port}
            options = {**server, "loop": loop, "timeout": self.timeout_s, "target_session_attrs": attrs}
            return await self._connect_knowing(plan, given, options)

        try:
            if plan.hosts:
                dial = Dial(plan, opening, discard=_abandon, is_definite=_refuses_login, timeout_s=self.timeout_s)
                connection = await dial.run()
            else:
                connection = await opening(None, "", plan.target_session_attrs)
        except NoHostError as error:
            raise await self._explained(error) from error
        except Exception as error:
            raise explain_refusal(self.url, error) from error
        _watch_peer(connection)
        return connection

    def _plan(self) -> tuple[Plan, Mapping[str, str]]:
        """Return the hosts of the URL, and its parameters together with those of the environment."""
        try:
            plan = plan_of(self.url.dsn)
            has_tcp = not plan.hosts or not all(host.is_socket for host in plan.hosts)
            given = resolve(plan.parameters.given, has_tcp=has_tcp)
            require_user(plan.users)
        except ValueError as error:  # of the environment: the URL was checked when it was read
            raise DatabaseRefusedError(f"database_url: {error}.") from None
        return plan, given

    async def _connect_knowing(self, plan: Plan, given: Mapping[str, str], options: dict[str, Any]) -> Connection:
        """Connect with the parameters that the server knows: one that it refuses is left out from then on."""
        while True:
            known = {name: value for name, value in given.items() if not _ignored.is_unknown(name)}
            try:
                return await self._connect(plan.dsn_of(known), options)
            except asyncpg.UndefinedObjectError as error:
                # A setting that the server does not know. If the URL has it, it is another tool's, or misspelt.
                name = _unrecognized(error, known)
                if not name or name in self.settings:
                    raise
                _ignored.note_unknown(name)

    async def _connect(self, dsn: str, options: dict[str, Any]) -> Connection:
        opened = await asyncpg.connect(
            dsn,
            **options,
            max_cached_statement_lifetime=0,  # what is prepared stays so: see `Connection.plan`
            server_settings=self.settings,
            connection_class=Connection,
        )
        assert isinstance(opened, Connection)
        return opened

    async def _explained(self, error: NoHostError) -> Exception:
        """Return the error for a URL none of whose hosts gives a session."""
        refusing = [failed for _, failed in error.failures if _refuses_settings(failed)]
        if refusing and await shares_sessions(_Opener(self.url, {}, BARE_TIMEOUT_S).open):
            fact = f"it also refuses a setting of our sessions: {reason_of(refusing[0])}"
            return UnsafeDatabaseError(say_pooler(self.url, fact))
        return explain_refusals(self.url, error.failures)


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


# What the server is asked to do about us (`lease_settings`), done about the server: a host that is gone, or a
# network that is cut, is noticed within seconds (tcp(7)), also while a long query of a user's runs.
_PEER_WATCH: Final = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}


def _watch_peer(connection: Connection) -> None:
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
