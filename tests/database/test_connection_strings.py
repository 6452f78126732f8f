"""Connection strings of providers against real servers, with and without TLS."""

import logging
import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest
import trustme

from outbox.database import opening as module
from outbox.database.opening import connect, ignored_parameters
from outbox.database.refusal import DatabaseRefusedError
from outbox.errors import DatabaseUnavailableError
from outbox.sandbox.postgres import Server
from outbox.settings.urls import DatabaseUrl
from outbox.testing.postgres import FAST
from tests.support.fleet import free_port


@pytest.fixture(autouse=True)
def nothing_was_ignored():
    module._ignored = module._Ignored()


async def is_encrypted(url):
    connection = await connect(DatabaseUrl.parse(url), application="test")
    try:
        return await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    finally:
        await connection.close()


async def test_what_postgres_does_not_know_is_left_out_with_one_warning(database, caplog):
    url = DatabaseUrl.parse(f"{database}&schema=app&frobnicate=1&statment_timeout=5&statement_timeout=77777")
    for _ in range(2):
        connection = await connect(url, application="test")
        assert await connection.fetchval("SHOW statement_timeout") == "77777ms"
        await connection.close()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [sentence.split()[2] for sentence in said] == ["schema", "frobnicate", "statment_timeout"]
    assert [sentence.split()[1] for sentence in ignored_parameters(url)] == ["schema", "frobnicate", "statment_timeout"]


async def test_a_bad_value_of_a_setting_is_still_refused(database):
    with pytest.raises(DatabaseRefusedError, match="statement_timeout"):
        await connect(DatabaseUrl.parse(f"{database}&statement_timeout=soon"), application="test")


async def test_commands_warn_once_and_doctor_notes_it(fleet):
    fleet.database += "&pgbouncer=true&connection_limit=1"
    ended = await fleet.run("status")
    assert ended.code == 0
    assert len(ended.sentences) == 2
    assert "outbox ignores pgbouncer of database_url: it is a parameter of Prisma" in ended.err
    assert "note     database.parameters" in (await fleet.run("doctor")).out


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def system_postgres():
    found = max(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), default=None)
    if found is None:
        pytest.skip("no system Postgres with TLS (Debian: apt-get install postgresql)")
    return found


@pytest.fixture(scope="module")
def directory(authority):
    made = Path(tempfile.mkdtemp(prefix="outbox-tls-", dir="/tmp"))
    made.chmod(0o755)
    authority.cert_pem.write_to_path(made / "ca.pem")
    yield made
    shutil.rmtree(made)


def served(directory, binaries, **settings):
    port = free_port()
    base = Path(tempfile.mkdtemp(dir=directory))
    base.chmod(0o711)
    server = Server(base, settings={**FAST, "listen_addresses": "127.0.0.1", **settings}, port=port, wait_s=30)
    if binaries is not None:
        server._binaries = binaries
    return server, f"postgresql://postgres@127.0.0.1:{port}/postgres"


@pytest.fixture(scope="module")
def with_tls(directory, authority, system_postgres):
    certificate = authority.issue_cert("127.0.0.1")
    key, chain = directory / "key.pem", directory / "chain.pem"
    certificate.private_key_pem.write_to_path(key)
    certificate.cert_chain_pems[0].write_to_path(chain)
    key.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(key, pwd.getpwnam("postgres").pw_uid, -1)
    server, url = served(directory, system_postgres, ssl="on", ssl_cert_file=str(chain), ssl_key_file=str(key))
    try:
        server.start()
        yield url
    finally:
        server.close()


@pytest.fixture(scope="module")
def without_tls(directory):
    server, url = served(directory, None)
    try:
        server.start()
        yield url
    finally:
        server.close()


@pytest.mark.parametrize("query, encrypted", [
    ("", True), ("?sslmode=require", True), ("?sslmode=disable", False), ("?sslmode=no-verify", True),
    ("?ssl=true", True), ("?sslmode=require&channel_binding=prefer", True),
    ("?sslmode=verify-full&sslrootcert={ca}", True),
    ("?sslmode=require&channel_binding=require&sslrootcert={ca}", True),
])  # fmt: skip
async def test_tls_is_used_as_the_string_asks_for_it(with_tls, directory, query, encrypted):
    assert await is_encrypted(with_tls + query.format(ca=directory / "ca.pem")) is encrypted


async def test_the_systems_authorities_are_those_of_its_bundle(with_tls, directory, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(directory / "ca.pem"))
    for query in ("sslrootcert=system", "sslmode=require&channel_binding=require", "sslaccept=strict"):
        assert await is_encrypted(f"{with_tls}?{query}")


@pytest.mark.parametrize("query, words", [
    ("sslrootcert=system", "has a certificate that cannot be verified .*sslrootcert in database_url"),
    ("channel_binding=require", "verified for channel_binding=require, since asyncpg has no channel binding"),
])  # fmt: skip
async def test_a_certificate_that_cannot_be_verified_is_refused_with_the_fix(with_tls, query, words):
    with pytest.raises(DatabaseRefusedError, match=words):
        await is_encrypted(f"{with_tls}?{query}")


@pytest.mark.parametrize("query", [
    "sslmode=require", "sslmode=no-verify", "ssl=true", "sslrootcert=system", "channel_binding=require",
])  # fmt: skip
async def test_a_server_without_tls_is_named_as_such(without_tls, query):
    for url in (without_tls, without_tls.replace("127.0.0.1", "localhost")):
        with pytest.raises(DatabaseRefusedError, match=r"refuses TLS: it has none, or is no Postgres; .*turn TLS on"):
            await is_encrypted(f"{url}?{query}")


async def test_direct_tls_that_a_server_lacks_is_named(without_tls):
    with pytest.raises(DatabaseUnavailableError, match="sslnegotiation=direct needs PostgreSQL 17"):
        await is_encrypted(f"{without_tls}?sslmode=require&sslnegotiation=direct")


@pytest.mark.parametrize("parameters", ["sslrootcert={path}", "sslcert={path}", "sslcert={path}&sslkey={path}"])
async def test_a_missing_file_is_named_with_its_key_and_path(without_tls, tmp_path, parameters):
    path = tmp_path / "no.pem"
    for url in (without_tls, "postgresql:///try"):
        with pytest.raises(DatabaseRefusedError, match=f"database_url: ssl(rootcert|cert): {path} cannot be read"):
            await is_encrypted(f"{url}?sslmode=require&{parameters.format(path=path)}")
