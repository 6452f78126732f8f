import asyncio
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import asyncpg
import pytest

from outbox.database.connection import CHANNEL, LOST_SESSION
from outbox.database.locks import RELAY_LOCKS
from outbox.errors import DatabaseUnavailableError, OutboxError, SchemaError, UnsafeDatabaseError
from outbox.relay import registration
from outbox.relay.lock_proof import prove_locks
from outbox.relay.quarantine import Quarantine
from outbox.relay.session import SessionEvents
from outbox.relay.statements import STATEMENTS
from outbox.relay.sweep import sweep
from outbox.relay.tick import TickRequest, tick
from outbox.sandbox.postgres import Server
from outbox.settings.urls import DatabaseUrl
from outbox.testing.postgres import FAST
from tests.support import sessions as relay_sessions
from tests.support.fleet import until

LEASE_S = 10.0
SOON_S = 5.0  # less than the lease, which would end the session anyhow


class Ear:
    """Hears what a session tells its relay."""

    def __init__(self):
        self.wakes = 0
        self.losses = 0
        self.events = SessionEvents(notified=self.wake, lost=self.on_lost)

    def wake(self):
        self.wakes += 1

    def on_lost(self):
        self.losses += 1


@pytest.fixture
async def opened(database):
    """Opens sessions in the test's database, and ends them."""
    sessions = []

    async def open_session(*, lease_s=LEASE_S, former=None, url=database):
        ear = Ear()
        session = await relay_sessions.open_session(url, lease_s=lease_s, events=ear.events, former=former)
        sessions.append(session)
        return session, ear

    yield open_session
    for session in sessions:
        session.connection.terminate()


async def holds_lock(connection, relay):
    modes = await connection.fetch(
        "SELECT mode FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1 AND objid = $2",
        RELAY_LOCKS,
        relay,
    )
    return [row["mode"] for row in modes] == ["ExclusiveLock"]


async def waits_for_a_lock(connection):
    """Whether a relay's session stands still before an advisory lock that somebody holds."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = $1"
    return await connection.fetchval(query, RELAY_LOCKS)


async def lives(connection, pid):
    return bool(await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid))


async def relays_connected(connection):
    return await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox relay'")


# ── a life ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_session_is_registered_and_holds_its_lock(connection, opened):
    session, _ = await opened()
    assert await holds_lock(connection, session.relay)
    registered = await connection.fetchrow("SELECT * FROM outbox.relay WHERE id = $1", session.relay)
    assert registered["backend_pid"] == session.connection.get_server_pid()
    assert registered["ended_at"] is None
    assert await until(lambda: relays_connected(connection), "it is connected") == 1, "and nothing else is left open"


async def test_all_that_a_relay_runs_is_prepared_before_it_holds_its_lock(connection, database, opened):
    """A client that is frozen between the two steps of preparing looks busy to the server, for ever."""
    ear = Ear()
    session = await relay_sessions.open_session(database, lease_s=LEASE_S, events=ear.events, statements=STATEMENTS)
    try:
        await tick(session.connection, session.relay, TickRequest(claims_max=1))
        await sweep(session.connection, session.relay, doubt_s=None, quarantine=session.quarantine)
        query = "SELECT statement, prepare_time FROM pg_prepared_statements"
        listed = await session.connection.fetch(query)
        prepared = {row["statement"]: row["prepare_time"] for row in listed}
        lock = "SELECT pg_try_advisory_lock($1, $2)"
        later = {statement for statement, at in prepared.items() if at > prepared[lock]}
        assert later == {query}
        assert set(STATEMENTS) <= set(prepared)
        assert len(listed) == len(prepared), "none is prepared a second time"
    finally:
        session.connection.terminate()


async def test_a_connection_that_is_ended_between_two_steps_of_a_statement_is_a_lost_one(opened, monkeypatch):
    """As by the limit on opening, or a relay's patience: asyncpg then stumbles over what it has just let go of."""
    prepare = asyncpg.Connection._get_statement

    async def prepare_and_end(self, query, *arguments, **options):
        statement = await prepare(self, query, *arguments, **options)
        if query == registration.REGISTER:
            self.terminate()
        return statement

    monkeypatch.setattr(asyncpg.Connection, "_get_statement", prepare_and_end)
    with pytest.raises(LOST_SESSION):
        await opened()


async def test_each_session_is_a_new_identity(connection, opened):
    relays = {(await opened())[0].relay for _ in range(3)}
    assert len(relays) == 3
    for relay in relays:
        assert await holds_lock(connection, relay)


async def test_a_relay_whose_lock_is_not_held_is_never_visible(connection, opened, monkeypatch):
    """Else a sweeper that looks in between would judge a relay that is just beginning to live."""
    first, _ = await opened()
    prepare, seen = asyncpg.Connection._get_statement, []

    async def look_and_prepare(self, query, *arguments, **options):
        if query == registration.TAKE_LOCK:
            seen.append(await connection.fetch("SELECT id FROM outbox.relay"))
        return await prepare(self, query, *arguments, **options)

    monkeypatch.setattr(asyncpg.Connection, "_get_statement", look_and_prepare)
    second, _ = await opened()
    assert [[row["id"] for row in rows] for rows in seen if rows][-1] == [first.relay]
    assert second.relay == first.relay + 1
    found = await sweep(connection, 0, doubt_s=None, quarantine=Quarantine())
    assert (found.dead, found.alive, found.beside) == ([], 2, 2)


async def test_the_session_is_a_lease(opened):
    session, _ = await opened(lease_s=7)
    shown = {
        name: await session.connection.fetchval("SELECT setting FROM pg_settings WHERE name = $1", name)
        for name in ("idle_session_timeout", "idle_in_transaction_session_timeout", "statement_timeout", "lock_timeout")
    }
    assert shown == {
        "idle_session_timeout": "7000",
        "idle_in_transaction_session_timeout": "2000",
        "statement_timeout": "7000",
        "lock_timeout": "3500",
    }


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_a_session_reads_what_is_committed_whatever_the_database_does_by_default(connection, opened, isolation):
    """Claims that skip locked rows, and sweeps that look after a lock, both need it."""
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    session, _ = await opened()
    assert await session.connection.fetchval("SHOW transaction_isolation") == "read committed"


async def test_a_relay_that_is_silent_for_its_lease_is_ended_by_the_server(connection, opened):
    session, ear = await opened(lease_s=0.3)
    await until(lambda: session.lost, "the session is lost")
    assert ear.losses == 1
    assert not await holds_lock(connection, session.relay)


async def test_a_transaction_that_is_left_open_is_ended_too(connection, opened):
    session, _ = await opened(lease_s=0.3)
    await session.connection.execute("BEGIN")
    await until(lambda: session.lost, "the session is lost")
    assert not await holds_lock(connection, session.relay)


async def test_a_statement_does_not_outlast_the_lease(opened):
    session, _ = await opened(lease_s=0.3)
    with pytest.raises(asyncpg.QueryCanceledError):
        await session.connection.execute("SELECT pg_sleep(30)")


async def test_a_notification_wakes_the_relay(connection, opened):
    _, ear = await opened()
    await connection.execute(f"SELECT pg_notify('{CHANNEL}', '')")
    await until(lambda: ear.wakes == 1, "it was woken")


# ── its loss ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_session_that_the_server_ends_is_lost_and_its_relay_told_once(connection, opened):
    session, ear = await opened()
    await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", session.connection.get_server_pid())
    await until(lambda: session.lost, "the session is lost")
    assert session.lost == "Postgres ended the session"
    session.lose("again")
    assert (ear.losses, session.lost) == (1, "Postgres ended the session")
    assert not await holds_lock(connection, session.relay)


async def test_a_warning_loses_the_session(connection, opened):
    """A commit may have warned that no standby has it."""
    session, ear = await opened()
    with suppress(*LOST_SESSION):  # the warning may come in a piece of its own, before the statement's end
        await session.connection.execute("DO $$ BEGIN RAISE WARNING 'x'; END $$")
    assert session.lost is not None, "known before the statement's caller goes on to the dot"
    assert "x" in session.lost
    assert ear.losses == 1
    await until(lambda: _not(holds_lock(connection, session.relay)), "its lock is free", SOON_S)


async def _not(fact):
    return not await fact


@pytest.mark.parametrize("level", ["NOTICE", "INFO"])
async def test_what_is_no_warning_does_not(opened, level):
    session, ear = await opened()
    await session.connection.execute(f"DO $$ BEGIN RAISE {level} 'x'; END $$")
    assert session.lost is None
    assert ear.losses == 0


async def test_a_warning_is_one_in_any_language_of_the_server(opened):
    """The field `S` is translated (lc_messages), `V` never is (PostgreSQL docs, Error and Notice Message Fields)."""
    session, ear = await opened()
    message = SimpleNamespace(severity="WARNUNG", severity_en="WARNING", message="Warten abgebrochen")
    session._hear(session.connection, message)
    assert session.lost is not None
    assert ear.losses == 1


async def test_losing_a_session_ends_it_in_the_server_too(connection, opened):
    session, _ = await opened()
    pid = session.connection.get_server_pid()
    session.lose("Postgres did not answer")
    await until(lambda: _not(lives(connection, pid)), "its backend is gone before its lease is", SOON_S)
    with pytest.raises(asyncpg.InterfaceError):
        await session.connection.fetchval("SELECT 1")


async def test_closing_frees_the_lock_and_is_no_loss(connection, opened):
    session, ear = await opened()
    await session.close()
    await until(lambda: _not(holds_lock(connection, session.relay)), "its lock is free", SOON_S)
    await session.close()
    assert (session.lost, ear.losses) == ("closed", 0)


async def test_closing_a_lost_session_is_harmless(opened):
    session, ear = await opened()
    session.lose("gone")
    await session.close()
    assert (session.lost, ear.losses) == ("gone", 1)


# ── its successor ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_former_session_that_still_lives_is_ended_first(connection, opened):
    first, ear = await opened()
    pid = first.connection.get_server_pid()
    second, _ = await opened(former=first)
    assert not await lives(connection, pid)
    assert not await holds_lock(connection, first.relay)
    assert await holds_lock(connection, second.relay)
    await until(lambda: ear.losses == 1, "the first knows")


async def test_a_former_session_is_ended_in_the_middle_of_its_statement(connection, opened):
    """The network lost it while a mark was under way: its commit must be decided before anybody goes on."""
    first, _ = await opened()
    pid = first.connection.get_server_pid()
    stuck = asyncio.create_task(first.connection.execute("SELECT pg_sleep(9)"))
    await until(
        lambda: connection.fetchval("SELECT state = 'active' FROM pg_stat_activity WHERE pid = $1", pid), "busy"
    )
    await opened(former=first)
    assert not await lives(connection, pid)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError)):
        await stuck


async def test_nobody_succeeds_a_former_session_while_its_backend_holds_its_lock(connection, opened):
    """It may still be committing; here it is one that its successor may not end."""
    first, _ = await opened()
    await first.connection.execute("SET application_name = 'not to be ended'")
    opening = asyncio.create_task(opened(former=first))
    asks = "SELECT count(*) FROM pg_stat_activity WHERE query = $1"
    await until(lambda: connection.fetchval(asks, registration.HOLDS_STILL), "the successor waits", SOON_S)
    assert await connection.fetchval("SELECT count(*) FROM outbox.relay") == 1
    first.connection.terminate()
    second, _ = await opening
    assert await holds_lock(connection, second.relay)


async def test_a_former_session_that_does_not_end_is_no_reason_to_hang(opened):
    first, _ = await opened()
    await first.connection.execute("SET application_name = 'not to be ended'")
    with pytest.raises(DatabaseUnavailableError, match=f"The last session of this relay, {first.relay}, has not ended"):
        await opened(lease_s=1, former=first)


async def test_a_former_session_that_is_gone_hinders_nothing(connection, opened):
    first, _ = await opened()
    await first.close()
    second, _ = await opened(former=first)
    assert await holds_lock(connection, second.relay)


async def test_nobody_elses_session_is_ended_though_it_has_the_same_backend_pid(connection, opened, database):
    """Process ids are reused, and after a failover they are another server's."""
    first, _ = await opened()
    await first.close()
    other = await asyncpg.connect(database)
    await connection.execute(
        "UPDATE outbox.relay SET backend_pid = $1, started_at = now() - interval '1 hour' WHERE id = $2",
        other.get_server_pid(),
        first.relay,
    )
    await opened(former=first)
    assert await other.fetchval("SELECT 1") == 1
    await other.close()


# ── where a relay must not live ──────────────────────────────────────────────────────────────────────────────

FAKES = {
    "one lock is given to two sessions": (
        "CREATE FUNCTION fake.pg_try_advisory_lock(int, int) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        "gives one advisory lock to two sessions",
    ),
    "no lock is given at all": (
        "CREATE FUNCTION fake.pg_try_advisory_lock(int, int) RETURNS boolean LANGUAGE sql AS 'SELECT false'",
        "advisory lock",
    ),
    "a lock outlives its session": (
        """CREATE TABLE fake.lock (a int, b int, UNIQUE (a, b));
        CREATE FUNCTION fake.pg_try_advisory_lock(int, int) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO fake.lock VALUES ($1, $2) ON CONFLICT DO NOTHING; RETURN found; END $$""",
        "outlived the connection",
    ),
    "the backend changes": (
        """CREATE SEQUENCE fake.pid;
        CREATE FUNCTION fake.pg_backend_pid() RETURNS int LANGUAGE sql AS $$ SELECT nextval('fake.pid')::int $$""",
        "process behind a connection changes",
    ),
    "two connections share a backend": (
        "CREATE FUNCTION fake.pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT 7'",
        "process behind a connection changes",
    ),
    "it is in recovery": (
        "CREATE FUNCTION fake.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        "standby",
    ),
}


@pytest.mark.parametrize("fake", FAKES)
async def test_a_database_whose_locks_do_not_hold_is_refused_with_its_reason(connection, opened, fake, monkeypatch):
    """Functions of a schema before pg_catalog take the place of Postgres' own; no database can put one there itself."""
    make, reason = FAKES[fake]
    await connection.execute(f"CREATE SCHEMA fake; {make}")
    monkeypatch.setattr("outbox.database.connection.TRUSTED_PATH", "fake, pg_catalog, pg_temp")
    with pytest.raises(UnsafeDatabaseError, match=reason):
        await opened()
    assert await connection.fetchval("SELECT count(*) FROM outbox.relay") == 0
    await until(lambda: _not(relays_connected(connection)), "no connection is left open", SOON_S)


async def test_a_schema_that_is_not_there_is_refused_and_no_connection_is_left_open(connection, opened):
    await connection.execute("DROP SCHEMA outbox CASCADE")
    with pytest.raises(SchemaError):
        await opened()
    await until(lambda: _not(relays_connected(connection)), "no connection is left open", SOON_S)


async def test_a_server_that_does_not_answer_is_unavailable_and_not_unsafe(opened):
    with pytest.raises(DatabaseUnavailableError, match="does not answer"):
        await opened(url="postgresql://postgres@/x?host=/tmp/nowhere")


@contextmanager
def standby_of(primary):
    """A second server that follows the first, made with the same binaries."""
    with tempfile.TemporaryDirectory(prefix="outbox-standby-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        standby = Server(Path(directory) / "base", settings={**FAST, "hot_standby": "on"}, port=5433, wait_s=30)
        try:
            copied = standby._run(
                *(standby._binaries / "pg_basebackup", "-D", standby.data, "-d", primary.url),
                *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
            )
            if copied.returncode:
                raise OutboxError(copied.stderr)
            standby.start()
            yield standby
        finally:
            standby.close()


async def test_a_real_standby_is_refused(postgres_server, database):
    name = urlsplit(database).path.removeprefix("/")
    with standby_of(postgres_server) as standby, pytest.raises(UnsafeDatabaseError, match=r"standby.*primary"):
        await prove_locks(DatabaseUrl.parse(standby.database_url(name)), lease_s=LEASE_S)
