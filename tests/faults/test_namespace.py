"""A host loses its power: a relay in a network namespace of its own, whose link goes down without a word.

Postgres and the mail server are met over TCP across that link. Needs root and `ip`; the kernel's own timers are what
is shown here, so nothing stands in for them.
"""

import asyncio
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from outbox.sandbox.postgres import Server, postgres
from outbox.sandbox.smtp_sink import Sink, Stage, Stall
from outbox.testing.postgres import FAST
from tests.conftest import _make_template
from tests.support.fault_levers import SLOW, At, all_sent, balance, by_port, delivery
from tests.support.fleet import Fleet, Process, until

PORT = 25432
LEASE_S = 2
KEEPALIVE_S = 6  # tcp_keepalives_idle + interval * count
_numbers = itertools.count(1)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def no_namespaces() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and the command `ip`"
    probe = subprocess.run(["ip", "netns", "add", f"outbox-{os.getpid()}-0"], check=False, capture_output=True)
    if probe.returncode:
        return f"the kernel makes no network namespace: {probe.stderr.decode().strip()}"
    ip("netns", "delete", f"outbox-{os.getpid()}-0")
    return None


@dataclass
class Host:
    """A namespace with one link; `here` is our address on it, `link` our end."""

    namespace: str
    link: str
    here: str
    there: str

    def make(self) -> None:
        far = f"{self.link}f"
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "type", "veth", "peer", "name", far)
        ip("link", "set", far, "netns", self.namespace)
        ip("address", "add", f"{self.here}/30", "dev", self.link)
        ip("link", "set", self.link, "up")
        ip("-n", self.namespace, "address", "add", f"{self.there}/30", "dev", far)
        ip("-n", self.namespace, "link", "set", far, "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")

    def power_off(self) -> None:
        """The link is dead; no FIN, no RST, and no ICMP that says so."""
        ip("-n", self.namespace, "link", "set", f"{self.link}f", "down")

    def power_on(self) -> None:
        ip("-n", self.namespace, "link", "set", f"{self.link}f", "up")

    def remove(self) -> None:
        for command in (["netns", "delete", self.namespace], ["link", "delete", self.link]):
            subprocess.run(["ip", *command], check=False, capture_output=True)  # one takes the other along


@pytest.fixture
def host() -> Iterator[Host]:
    if reason := no_namespaces():
        pytest.skip(reason)
    number = next(_numbers)
    third, fourth = os.getpid() % 250, 4 * (number % 60)
    made = Host(
        f"outbox-{os.getpid()}-{number}",
        f"ob{os.getpid() % 10**7}x{number}"[:14],
        f"10.213.{third}.{fourth + 1}",
        f"10.213.{third}.{fourth + 2}",
    )
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def tcp_server() -> Iterator[Server]:
    """A Postgres that listens on TCP, also for those who are not on this host."""
    with postgres(settings={**FAST, "listen_addresses": "*"}, port=PORT + os.getpid() % 1000) as server:
        access = server.data / "pg_hba.conf"
        access.write_text(access.read_text() + "\nhost all all 10.213.0.0/16 trust\n")
        asyncio.run(_make_template(server))
        asyncio.run(reload(server))
        yield server


async def reload(server: Server) -> None:
    connection = await asyncpg.connect(server.url)
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


@pytest.fixture
async def fleet(host, tcp_server, tmp_path: Path) -> AsyncIterator[Fleet]:
    name = f"host_{next(_numbers)}"
    admin = await asyncpg.connect(tcp_server.url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
    await admin.close()
    url = tcp_server.database_url(name)
    connection = await asyncpg.connect(url)
    sink = Sink()
    await sink.start("0.0.0.0")
    company = Fleet(url, connection, sink, tmp_path, top=SLOW, smtp=f"smtp://127.0.0.1:{sink.port}")
    yield company
    await company.stop_all()
    await connection.close()
    await sink.stop()


async def relay_on(fleet: Fleet, host: Host) -> Process:
    """A relay on the other host: it meets Postgres and the mail server at our end of the link."""
    port = int(fleet.database.rsplit("port=", 1)[1])
    process = await fleet.start(
        "relay",
        environment={
            "OUTBOX_DATABASE_URL": by_port(fleet.database, port, host.here),
            "OUTBOX_SMTP_URL": f"smtp://{host.here}:{fleet.sink.port}",
        },
        within=("ip", "netns", "exec", host.namespace),
    )
    await process.says("holds its lock")
    return process


async def test_what_a_lost_host_had_claimed_is_sent_by_another(fleet, host):
    """While its session is idle: the server's keepalives, or the lease, notice."""
    fleet.sink.script = script = At(Stage.MAIL, Stall(), times=1)
    await fleet.put_emails(1)
    lost = await relay_on(fleet, host)
    await script.reached()
    await fleet.relay()
    host.power_off()
    lost_at = time.monotonic()
    await all_sent(fleet, 1)
    took_s = time.monotonic() - lost_at
    assert took_s < max(LEASE_S, KEEPALIVE_S) + 5
    assert (await delivery(fleet))["relay"] == 2
    assert lost.process.returncode is None
    await balance(fleet, 1)


async def test_a_host_that_is_lost_behind_its_dot_leaves_one_email_in_doubt_and_brings_no_other(fleet, host):
    fleet.sink.script = script = At(Stage.DOT, Stall(), times=1)
    fleet.top += "\nconnections_max = 1"
    await fleet.put_emails(10)
    lost = await relay_on(fleet, host)
    await script.reached()
    await fleet.relay()
    host.power_off()
    await until(lambda: fleet.sink.messages == 9, "the others are sent")
    assert await fleet.settled() == {"sent": 9, "in_doubt": 1}
    assert len(await balance(fleet, 10)) == 1
    assert lost.process.returncode is None


async def test_a_host_that_is_back_relays_again_and_sends_nothing_that_others_did(fleet, host):
    fleet.sink.script = script = At(Stage.MAIL, Stall(), times=1)
    await fleet.put_emails(20)
    back = await relay_on(fleet, host)
    await script.reached()
    other = await fleet.relay()
    host.power_off()
    await all_sent(fleet, 20)
    await back.says("no session yet")
    host.power_on()
    await until(lambda: sum("holds its lock" in line for line in back.log) == 2, "it is back as another")
    await other.kill()
    await fleet.put_emails(5, first=21)
    await all_sent(fleet, 25)
    await balance(fleet, 25)


async def test_a_generate_on_a_lost_host_ends_and_another_finishes_its_edition(fleet, host):
    """The query that it runs is the user's, and may take long: only its own kernel's keepalives can tell."""
    fleet.data = "select case when :key = '3' then pg_advisory_xact_lock_shared(7)::text end as waited"
    await fleet.hire(5)
    holder = await asyncpg.connect(fleet.database)
    await holder.execute("SELECT pg_advisory_lock(7)")
    port = int(fleet.database.rsplit("port=", 1)[1])
    cron = await fleet.start(
        "generate",
        environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, port, host.here)},
        within=("ip", "netns", "exec", host.namespace),
    )

    async def query_runs() -> bool:
        return await fleet.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox generate'"
            " AND wait_event_type = 'Lock' AND datname = current_database()"
        )

    await until(query_runs, "its query runs")
    host.power_off()
    await cron.says("was lost")
    await holder.close()
    ended = await fleet.run("generate")
    assert (ended.code, ended.err) == (0, "")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 5
