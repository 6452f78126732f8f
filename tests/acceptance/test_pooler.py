"""Behind PgBouncer: what cannot keep the promise is refused in one sentence; generate works in session mode."""

import asyncio
import signal
from contextlib import AsyncExitStack

import asyncpg
import pytest

from bench.harness.pgbouncer import PGBOUNCER, pooler
from outbox.database.locks import ALIVE, RELAY_LOCKS
from outbox.database.opening import lease_settings
from tests.support.fleet import until

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")

SSL_REQUEST = 80877103  # PostgreSQL docs, 55.2.10
_asked = []


async def asked_at_the_start(fleet):
    """The names of the settings that sessions of ours ask for when they begin, as a server hears them."""
    if _asked:
        return _asked

    async def hear(reader, writer):
        body = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") - 4)
        if int.from_bytes(body[:4], "big") == SSL_REQUEST:
            writer.write(b"N")
            body = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") - 4)
        heard.update(word.decode() for word in body[4:].rstrip(b"\0").split(b"\0")[::2])
        writer.close()

    for command in ("relay", "generate"):
        heard = set()
        async with await asyncio.start_server(hear, "127.0.0.1", 0) as server:
            fleet.database = f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
            process = await fleet.start(command)
            # Who looks beside a relay may connect before it, and asks for less.
            await until(lambda heard=heard: "idle_session_timeout" in heard, f"{command} connects")
            await process.kill()
        _asked.extend(heard - {"user", "database", "application_name", "client_encoding"})
    return _asked


@pytest.fixture
async def pooled(fleet):
    """Put a PgBouncer between the fleet and its database; gives a function that starts it."""
    async with AsyncExitStack() as stack:

        async def start(mode, *, ignore, sessions=5):
            direct, ignored = fleet.database, await asked_at_the_start(fleet) if ignore else ()
            fleet.database = await stack.enter_async_context(
                pooler(direct, mode=mode, sessions=sessions, ignored=ignored)
            )
            return fleet

        yield start
        await fleet.stop_all()


POOLED = [
    pytest.param("transaction", False, id="settings refused"),
    pytest.param("transaction", True, id="settings ignored"),
    pytest.param("statement", True, id="statement mode"),
]


@pytest.mark.parametrize("mode, ignore", POOLED)
async def test_a_relay_refuses_to_start_behind_a_pooler_in_transaction_mode(pooled, mode, ignore):
    fleet = await pooled(mode, ignore=ignore)
    await fleet.put_emails(3)
    ended = await fleet.run("relay", "--until-empty", deadline_s=30)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    sentence = ended.err.splitlines()[-1]
    assert sentence.startswith("outbox: "), ended.err
    assert "pooler" in sentence
    assert "give database_url the address of Postgres itself" in sentence
    assert fleet.sink.messages == 0
    assert await fleet.states() == {"pending": 3}
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.relay WHERE ended_at IS NULL") == 0


async def test_a_relay_refuses_a_pooler_in_session_mode_that_drops_its_settings(pooled):
    """PgBouncer 1.18 keeps sessions apart in this mode, so locks would hold; but a stopped relay would keep them."""
    fleet = await pooled("session", ignore=True)
    await fleet.put_emails(1)
    ended = await fleet.run("relay", "--until-empty", deadline_s=30)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "idle_session_timeout is 0 ms" in ended.err.splitlines()[-1]
    assert await fleet.states() == {"pending": 1}


@pytest.mark.parametrize("mode, ignore", POOLED)
async def test_generate_behind_a_pooler_ends_and_makes_no_report_twice(pooled, mode, ignore):
    """Bucket locks taken through a pooler may outlive their run: the next ones must say so, not wait for ever."""
    fleet = await pooled(mode, ignore=ignore)
    await fleet.hire(30)
    crons = [await fleet.start("generate") for _ in range(3)]
    for cron in crons:
        ended = await cron.ended(30)
        assert "Traceback" not in ended.err
        assert ended.code == 0 or "pooler" in ended.err.splitlines()[-1], ended
    reports, emails = [
        await fleet.connection.fetchval(f"SELECT count(*) FROM outbox.{table}") for table in ("report", "email")
    ]
    assert reports == emails
    assert reports in (0, 30)


async def test_generate_behind_a_pooler_in_session_mode_works_with_the_lease_as_the_roles_own(pooled):
    """As docs/scale.md says: what PgBouncer keeps back from a session, the role brings along."""
    fleet = await pooled("session", ignore=True, sessions=2)
    await fleet.hire(30)
    name = await fleet.connection.fetchval("SELECT current_database()")
    for setting, value in lease_settings(10, statements_too=False).items():
        await fleet.connection.execute(f"ALTER ROLE postgres IN DATABASE {name} SET {setting} = '{value}'")
    crons = [await fleet.start("generate") for _ in range(6)]
    assert [(await cron.ended(60)).code for cron in crons] == [0] * 6
    assert await fleet.connection.fetchval("SELECT count(DISTINCT recipient_key) FROM outbox.report") == 30
    assert await fleet.states() == {"pending": 30}
    assert await fleet.connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_status_behind_a_pooler_works_or_says_why_not(pooled):
    fleet = await pooled("transaction", ignore=True)
    ended = await fleet.run("status")
    assert "Traceback" not in ended.err
    assert ended.code == 0 or "pooler" in ended.sentences[0]


async def test_other_clients_of_a_pooler_in_transaction_mode_find_its_sessions_as_they_were(pooled):
    fleet = await pooled("transaction", ignore=True, sessions=1)
    client = await asyncpg.connect(fleet.database, statement_cache_size=0)
    before = [await client.fetchval(f"SHOW {name}") for name in ("search_path", "lock_timeout")]
    assert (await fleet.run("status")).code == 0
    assert [await client.fetchval(f"SHOW {name}") for name in ("search_path", "lock_timeout")] == before
    await client.close()


async def lease_at_the_role(fleet, lease_s=10):
    """As docs/scale.md says for a relay."""
    name = await fleet.connection.fetchval("SELECT current_database()")
    for setting, value in lease_settings(lease_s, statements_too=True).items():
        await fleet.connection.execute(f"ALTER ROLE postgres IN DATABASE {name} SET {setting} = '{value}'")


async def held(fleet):
    return await fleet.connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")


async def test_a_relay_behind_a_pooler_in_session_mode_works_with_the_lease_as_the_roles_own(pooled):
    """A stopped relay's session ends after the lease, a killed one's at once, and another relay takes over."""
    fleet = await pooled("session", ignore=True, sessions=10)
    await lease_at_the_role(fleet)
    await fleet.put_emails(20)
    first = await fleet.relay()
    assert await fleet.settled(40) == {"sent": 20}
    first.send(signal.SIGSTOP)
    second = await fleet.relay()
    await until(lambda: alive(fleet, 1), "the stopped relay's session has ended", deadline_s=40)
    await fleet.put_emails(20, first=21)
    assert await fleet.settled(40) == {"sent": 40}  # and it has written so, else they would be in doubt
    await second.kill()
    await until(lambda: alive(fleet, 0), "the killed relay's session has ended")
    first.send(signal.SIGCONT)
    await fleet.put_emails(20, first=41)
    await until(lambda: fleet.sink.messages == 60, "the first relay sends again", deadline_s=40)
    assert fleet.twice == {}
    assert await fleet.settled() == {"sent": 60}


async def alive(fleet, count):
    return await fleet.connection.fetchval(f"SELECT count(*) {ALIVE}", RELAY_LOCKS) == count


async def test_a_pooler_in_session_mode_that_refuses_settings_is_not_called_one_in_transaction_mode(pooled):
    fleet = await pooled("session", ignore=False)
    for command in ("relay", "generate"):
        ended = await fleet.run(command, deadline_s=30)
        assert ended.code == 1
        said = ended.sentences[-1]
        assert "transaction mode" not in said
        assert "unsupported startup parameter" in said
        assert "ignore_startup_parameters" in said
        assert "set them at the role, as docs/scale.md shows" in said


async def test_a_pooler_in_session_mode_that_drops_settings_is_not_called_one_in_transaction_mode(pooled):
    fleet = await pooled("session", ignore=True)
    ended = await fleet.run("relay", deadline_s=30)
    assert ended.code == 1
    assert "transaction mode" not in ended.sentences[-1]
    assert "set them at the role, as docs/scale.md shows" in ended.sentences[-1]


@pytest.mark.parametrize("role_has_lease", [True, False])
@pytest.mark.parametrize("mode, ignore", POOLED)
@pytest.mark.parametrize("command", ["relay", "generate", "status", "doctor"])
async def test_a_pooler_in_transaction_mode_is_called_one(pooled, mode, ignore, command, role_has_lease):
    fleet = await pooled(mode, ignore=ignore)
    await fleet.hire(3)
    if role_has_lease:
        await lease_at_the_role(fleet)
    for number in range(3):  # sessions are shared among these
        ended = await fleet.run(command, deadline_s=40)
        if number and ("Connection refused" in ended.err + ended.out or await has_ended(fleet.database)):
            break  # a request to cancel can end PgBouncer 1.18 ("FATAL … bad client state: 0")
        assert "Traceback" not in ended.err + ended.out
        if ended.code == 0:
            assert command in {"status", "generate"}
            continue
        said = " ".join((ended.out if command == "doctor" else ended.sentences[-1]).split())
        kind = "statement" if "statement pooling" in said else "transaction"
        assert f"{kind} mode" in said, said
        assert "pool_mode = session" in said


async def has_ended(database):
    """Whether the pooler is gone: then a command that it served until now cannot tell its mode."""
    try:
        await (await asyncpg.connect(database, statement_cache_size=0)).close()
    except ConnectionRefusedError:
        return True
    return False
