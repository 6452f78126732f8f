"""Behind pgpool-II in streaming replication mode, with a primary and a standby: what works there."""

import asyncio
import shutil
import signal
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from bench.harness.pgbouncer import _account
from outbox.database import schema
from outbox.database.locks import ALIVE, RELAY_LOCKS
from outbox.sandbox.postgres import postgres, standby
from outbox.testing.postgres import FAST
from tests.faults.test_failover import PEOPLE
from tests.support.fleet import Fleet, free_port, until

PGPOOL = shutil.which("pgpool") or shutil.which("pgpool", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(PGPOOL is None, reason="pgpool-II is not installed (apt-get install pgpool2)")

SETTINGS = """
backend_clustering_mode = 'streaming_replication'
listen_addresses = '127.0.0.1'
port = {port}
socket_dir = '{directory}'
unix_socket_directories = '{directory}'
pcp_port = {pcp_port}
pcp_socket_dir = '{directory}'
pid_file_name = '{directory}/pgpool.pid'
logdir = '{directory}'
work_dir = '{directory}'
num_init_children = 24
enable_pool_hba = off
sr_check_user = 'postgres'
load_balance_mode = {balance}
failover_on_backend_error = off
"""
BACKEND = """
backend_hostname{number} = '{host}'
backend_port{number} = {port}
backend_weight{number} = {number}
backend_flag{number} = 'DISALLOW_TO_FAILOVER'
"""


@asynccontextmanager
async def pgpool(*servers, balance):
    """The URL of the servers' `postgres` database through a pgpool; the first is the primary, others get all reads."""
    user, port = _account(), free_port()
    with tempfile.TemporaryDirectory(prefix="outbox-pgpool-", dir="/tmp") as made:
        directory = Path(made)
        if user is not None:
            shutil.chown(directory, user.pw_uid, user.pw_gid)
        (config := directory / "pgpool.conf").write_text(
            SETTINGS.format(balance=balance, port=port, pcp_port=free_port(), directory=directory)
            + "".join(BACKEND.format(number=number, **server.address) for number, server in enumerate(servers))
        )
        for name in ("pool_hba.conf", "pcp.conf"):
            (directory / name).touch()
        process = await asyncio.create_subprocess_exec(
            PGPOOL, "-n", "-f", str(config), "-F", str(directory / "pcp.conf"), "-a", str(directory / "pool_hba.conf"),
            cwd="/", user=user and user.pw_uid, group=user and user.pw_gid, extra_groups=[] if user else None,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        try:

            async def answers():
                assert process.returncode is None, "pgpool ended"
                try:
                    connection = await asyncpg.connect(url, timeout=5)
                except (OSError, asyncpg.PostgresError, TimeoutError):
                    return False
                await connection.close()
                return True

            await until(answers, "pgpool answers", deadline_s=40)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            await process.wait()


@pytest.fixture
def servers():
    with postgres(settings=FAST) as primary, standby(primary) as follower:
        yield primary, follower


@pytest.fixture
async def company(request, servers, sink, forks, tmp_path):
    leader = await asyncpg.connect(servers[0].url)
    await schema.initialise(leader)
    await leader.execute(PEOPLE)
    async with pgpool(*servers, balance=getattr(request, "param", "off")) as url:
        fleet = Fleet(url, leader, sink, tmp_path, forks=forks)
        yield fleet
        await fleet.stop_all()
    await leader.close()


async def alive(fleet, count):
    return await fleet.connection.fetchval(f"SELECT count(*) {ALIVE}", RELAY_LOCKS) == count


@pytest.mark.parametrize("company", ["on"], indirect=True)
async def test_a_relay_refuses_a_pgpool_that_spreads_a_session_over_servers(company):
    await company.put_emails(1)
    for command in ("relay", "doctor"):
        ended = await company.run(command, deadline_s=60)
        assert ended.code == 1
        said = " ".join((ended.out if command == "doctor" else ended.sentences[-1]).split())
        assert "load_balance_mode = off" in said
        assert "transaction mode" not in said
    assert company.sink.messages == 0


async def test_a_relay_and_generate_work_through_pgpool_in_streaming_mode(company):
    fleet = company
    await fleet.hire(12)
    first = await fleet.relay()
    crons = [await fleet.start("generate") for _ in range(3)]
    assert [(await cron.ended(60)).code for cron in crons] == [0] * 3
    assert await fleet.settled(40) == {"sent": 12}
    second = await fleet.relay()
    first.send(signal.SIGSTOP)
    await until(lambda: alive(fleet, 1), "the stopped relay's session has ended", deadline_s=40)
    await fleet.put_emails(10, first=101)
    assert await fleet.settled(40) == {"sent": 22}  # and it has written so, else they would be in doubt
    await second.kill()
    await until(lambda: alive(fleet, 0), "the killed relay's session has ended", deadline_s=40)
    first.send(signal.SIGCONT)
    await fleet.put_emails(10, first=201)
    await until(lambda: fleet.sink.messages == 32, "the first relay sends again", deadline_s=60)
    assert fleet.twice == {}
    ended = await fleet.run("doctor", deadline_s=60)
    faults = [line.split()[1] for line in ended.out.splitlines() if line.startswith("fault ")]
    assert set(faults) <= {"database.durability"}, ended.out  # the tests' servers have fsync off
