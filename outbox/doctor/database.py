"""Checks of Postgres: it can keep outbox's promises, and this role may do what generate and relay do.

Everything is asked on a session like a relay's, and nothing is written. The `judge` functions judge figures and are
pure.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.opening import connect, ignored_parameters, lease_settings
from outbox.database.refusal import explain_refusal
from outbox.database.schema import require_current
from outbox.doctor.access import look_at_connect, look_at_locks, look_at_path
from outbox.doctor.finding import Finding, Grade, not_checked, note, ok, problem, problem_of
from outbox.doctor.rights import look_at_rights
from outbox.errors import OutboxError, SchemaError
from outbox.relay.lock_proof import prove_locks
from outbox.settings import Settings

VERSION_MIN: Final = 14
SKEW_OK_S: Final = 2.0
SKEW_MAX_S: Final = 60.0
CLOCK_LOOKS: Final = 5
FREE_MIN: Final = 3  # a relay, and the two sessions of its self-test
FREE_FEW: Final = 10
WAITING_MAX: Final = 10_000  # waiting messages that are looked at for the largest

CHECKS: Final = (
    "database.version", "database.encoding", "database.session", "database.lease", "database.schema",
    "database.rights", "database.path", "database.connect", "database.locks", "database.clock",
    "database.connections", "database.durability", "database.replication",
)  # fmt: skip


@dataclass(slots=True)
class Database:
    """Findings about the database, and what the other checks need to know.

    `trouble` is why nothing can be asked here; `is_ours` says that outbox's tables are there and may be used.
    """

    findings: list[Finding] = field(default_factory=list)
    trouble: str = ""
    is_ours: bool = False
    largest_bytes: int = 0

    def leave(self, why: str) -> "Database":
        """Make no more checks; those that were not made say why."""
        self.trouble = why
        seen = {finding.check for finding in self.findings}
        self.findings += not_checked([check for check in CHECKS if check not in seen], why)
        return self


async def examine_database(settings: Settings) -> Database:
    """Return all findings about the database; never raises for what is wrong with it."""
    url = settings.database_url
    assert url is not None
    found = Database()
    try:
        connection = await connect(url, application="outbox doctor")
    except (OutboxError, asyncpg.PostgresError) as error:
        found.findings.append(_refused("database", error))
        return found.leave("the database cannot be reached")
    try:
        # From what the server says at the start: behind a pooler a query may reach another server each time.
        version, reported = connection.get_server_version(), connection.get_settings()
        found.findings += [
            ok("database", f"Postgres answers at {url.redacted}"),
            judge_version(version.major, getattr(reported, "server_version", "")),
            judge_encoding(getattr(reported, "server_encoding", "UTF8")),
            *(note("database.parameters", f"outbox {one}", "take it out") for one in ignored_parameters(url)),
        ]
    finally:
        connection.terminate()
    if version.major < VERSION_MIN:
        return found.leave("Postgres is too old")
    try:
        await prove_locks(url, lease_s=settings.lease_s)
        connection = await connect(url, application="outbox doctor", settings=_lease(settings))
    except (OutboxError, asyncpg.PostgresError, *LOST_SESSION) as error:
        found.findings.append(_refused("database.session", explain_refusal(url, error)))
        return found.leave("a relay could not hold a session here")
    found.findings.append(ok("database.session", "sessions are our own and locks exclude, as PostgreSQL's do"))
    try:
        await _examine_session(found, connection, settings)
    finally:
        connection.terminate()
    return found


def _refused(check: str, error: Exception) -> Finding:
    if isinstance(error, OutboxError):
        return problem_of(check, error)
    return problem(check, f"Postgres refuses ({error})", "correct database_url, or what its role may do")


def _lease(settings: Settings) -> dict[str, str]:
    return lease_settings(settings.lease_s, statements_too=True)


async def _examine_session(found: Database, connection: Connection, settings: Settings) -> None:
    schema = await _looked("database.schema", lambda: _look_at_schema(connection))
    looks: Mapping[str, Callable[[], Awaitable[Finding]]] = {
        "database.lease": lambda: _look_at_lease(connection, settings),
        "database.rights": lambda: look_at_rights(connection),
        "database.path": lambda: look_at_path(connection),
        "database.connect": lambda: look_at_connect(connection),
        "database.locks": lambda: look_at_locks(connection),
        "database.clock": lambda: _look_at_clock(connection),
        "database.connections": lambda: _look_at_connections(connection),
        "database.durability": lambda: _look_at_durability(connection),
        "database.replication": lambda: _look_at_replication(connection),
    }
    found.findings.append(schema)
    found.findings += [await _looked(check, look) for check, look in looks.items()]
    lame = {finding.check for finding in found.findings if finding.grade is not Grade.OK}
    found.is_ours = not lame & {"database.schema", "database.rights"}
    if found.is_ours:
        with suppress(asyncpg.InsufficientPrivilegeError):  # most groups may not read messages
            found.largest_bytes = await connection.fetchval(LARGEST, WAITING_MAX)


async def _looked(check: str, look: Callable[[], Awaitable[Finding]]) -> Finding:
    """Return the finding of a check, also if Postgres refuses it."""
    try:
        return await look()
    except asyncpg.InsufficientPrivilegeError as error:
        return not_checked([check], f"this role may not ({error}); see database.rights")[0]
    except (asyncpg.PostgresError, *LOST_SESSION) as error:
        return problem(check, f"Postgres refuses to say ({str(error) or type(error).__name__})", "see its log")


def judge_version(major: int, full: str) -> Finding:
    """Judge the version: a lease needs `idle_session_timeout`, which came with PostgreSQL 14."""
    if major < VERSION_MIN:
        return problem("database.version", f"this is PostgreSQL {full}", f"upgrade it to {VERSION_MIN} or later")
    return ok("database.version", f"PostgreSQL {full}")


def judge_encoding(encoding: str) -> Finding:
    """Judge the encoding: every name and every SMTP reply must be storable."""
    if encoding != "UTF8":
        fix = "make another with: create database … encoding 'UTF8' template template0"
        return problem("database.encoding", f"the database's encoding is {encoding}", fix)
    return ok("database.encoding", "UTF8")


async def _look_at_schema(connection: Connection) -> Finding:
    try:
        await require_current(connection)
    except SchemaError as error:
        return problem_of("database.schema", error)
    version, compatible = await connection.fetchrow(
        "SELECT version, compatible FROM outbox.schema_version ORDER BY version DESC LIMIT 1"
    )
    return ok("database.schema", f"version {version}, for programs of version {compatible} and later")


LEASE_IN_FORCE: Final = "SELECT name, setting FROM pg_settings WHERE name = ANY ($1::text[])"


async def _look_at_lease(connection: Connection, settings: Settings) -> Finding:
    asked = _lease(settings)
    in_force: dict[str, str] = dict(await connection.fetch(LEASE_IN_FORCE, list(asked)))
    socket = await connection.fetchval("SELECT inet_server_addr()") is None
    return judge_lease(asked, in_force, lease_s=settings.lease_s, socket=socket)


def judge_lease(asked: Mapping[str, str], in_force: Mapping[str, str], *, lease_s: float, socket: bool) -> Finding:
    """Judge whether the settings of the lease are in force. A Unix socket has no keepalives and needs none."""
    wrong = {name: in_force.get(name, "unknown") for name, value in asked.items() if in_force.get(name) != value}
    network = {name: wrong.pop(name) for name in list(wrong) if name.startswith("tcp_")}
    if wrong:
        listed = ", ".join(f"{name} is {value} (asked: {asked[name]})" for name, value in wrong.items())
        return problem(
            "database.lease", listed, "take the pooler or proxy out of database_url that keeps settings back"
        )
    found = f"a relay that is stopped is taken over after {lease_s:g} s"
    if socket:
        return ok("database.lease", f"{found}; through a Unix socket, so no network can be lost")
    if network:
        listed = ", ".join(f"{name} is {value}" for name, value in network.items())
        return note("database.lease", f"{found}, a host that is lost later than after 6 s: {listed} in this server")
    return ok("database.lease", f"{found}, a host that is lost after about 6 s")


async def _look_at_clock(connection: Connection) -> Finding:
    """Measure the difference of the clocks with the quickest of a few round trips, exact to half of it."""
    best = None
    for _ in range(CLOCK_LOOKS):
        began_s = time.monotonic()
        there = await connection.fetchval("SELECT clock_timestamp()")
        trip_s = time.monotonic() - began_s
        ahead_s = there.timestamp() - (time.time() - trip_s / 2)
        if best is None or trip_s < best[1]:
            best = (ahead_s, trip_s)
    assert best is not None
    return judge_clock(best[0], bound_s=best[1] / 2)


def judge_clock(ahead_s: float, *, bound_s: float) -> Finding:
    """Judge by how much the database's clock is ahead of this host's, known to within `bound_s`."""
    if abs(ahead_s) <= SKEW_OK_S + bound_s:
        return ok("database.clock", f"this host's clock and the database's agree ({ahead_s:+.3f} s ± {bound_s:.3f} s)")
    where = "ahead of" if ahead_s > 0 else "behind"
    found = (
        f"the database's clock is {abs(ahead_s):.0f} s {where} this host's: cron goes by this one, periods "
        "and the Date of emails by the database's"
    )
    fix = "let time synchronisation (NTP) set both"
    if abs(ahead_s) <= SKEW_MAX_S:
        return note("database.clock", found, fix)
    return problem("database.clock", found, fix)


CONNECTIONS: Final = """
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
         - coalesce(current_setting('reserved_connections', true), '0')::int,
       (SELECT sum(numbackends)::int FROM pg_stat_database),
       (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user),
       (SELECT count(*)::int FROM pg_stat_activity WHERE usename = current_user)
"""


async def _look_at_connections(connection: Connection) -> Finding:
    most, taken, role_most, role_taken = await connection.fetchrow(CONNECTIONS)
    if role_most is not None and role_most >= 0 and role_most - role_taken < most - taken:
        return judge_connections(role_most, role_taken, "the role's connection limit")
    return judge_connections(most, taken, "max_connections")


def judge_connections(most: int, taken: int, limit: str) -> Finding:
    """Judge whether connections are left for a relay and a generate per server. The doctor's own is one of `taken`."""
    free = most - taken + 1
    found = f"{free} of {most} connections are free ({limit})"
    if free >= FREE_FEW:
        return ok("database.connections", found)
    fix = "raise it: each server needs one for the relay of each route, two more as that starts, and one per generate"
    if free >= FREE_MIN:
        return note("database.connections", found, fix)
    return problem("database.connections", found, fix)


async def _look_at_durability(connection: Connection) -> Finding:
    off = [name for name in ("fsync", "full_page_writes") if await connection.fetchval(f"SHOW {name}") == "off"]
    if off:
        return problem(
            "database.durability",
            f"{' and '.join(off)} off: after a power cut marks are gone, and emails are sent twice",
            "set both to on in postgresql.conf",
        )
    return ok("database.durability", "a commit is on the disk when it is answered")


REPLICATION: Final = """
SELECT current_setting('synchronous_standby_names') <> '', count(*)::int, count(sync_state)::int,
       count(*) FILTER (WHERE sync_state IN ('sync', 'quorum') AND state = 'streaming')::int
  FROM pg_stat_replication
"""


async def _look_at_replication(connection: Connection) -> Finding:
    wanted, standbys, visible, synchronous = await connection.fetchrow(REPLICATION)
    return judge_replication(wanted=wanted, standbys=standbys, visible=visible, synchronous=synchronous)


def judge_replication(*, wanted: bool, standbys: int, visible: int, synchronous: int) -> Finding:
    """Judge what a failover may cost. `visible` counts the standbys whose state this role may see (pg_monitor: all)."""
    check = "database.replication"
    if wanted and not standbys:
        return problem(
            check,
            "synchronous_standby_names asks for a standby and none is connected, so every commit waits",
            "start the standby, or take it out of synchronous_standby_names",
        )
    if wanted and visible and not synchronous:
        return problem(
            check,
            f"synchronous_standby_names asks for a standby, and of {standbys} connected none is synchronous",
            "correct the name in synchronous_standby_names, or the standby's application_name",
        )
    if wanted:
        unknown = "" if visible else " (this role may not see whether it keeps up)"
        return ok(check, f"synchronous: a mark is on primary and standby before its email is sent{unknown}")
    if standbys:
        return note(
            check,
            f"{standbys} standby, asynchronous: a failover may lose the last commits; relays that live say their "
            "verdicts again, those of a relay that dies with the primary are lost, and their emails sent twice",
            "set synchronous_standby_names if that must not be",
        )
    return note(
        check,
        "no standby: if the server is lost, what it was to send and had sent is known only from its last backup",
        "run a standby with synchronous_standby_names set if that must not be",
    )


LARGEST: Final = """
SELECT coalesce(max(octet_length(m.message)), 0)
  FROM (SELECT email FROM outbox.delivery WHERE settled_at IS NULL ORDER BY route, priority, due_at, email LIMIT $1) d
  JOIN outbox.email m ON m.id = d.email
"""
