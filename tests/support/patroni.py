"""Cluster of Patroni 3 with etcd and HAProxy. Debian: patroni, etcd-server, haproxy, postgresql."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from bench.harness.freeze import family_of, send
from tests.support.fleet import free_port, until

HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"
POSTGRES = max(Path("/usr/lib/postgresql").glob("1[5-6]/bin"), default=None)
IS_THERE = bool(shutil.which("patroni") and shutil.which("etcd") and Path(HAPROXY).exists() and POSTGRES)
DEADLINE_S = 180
TTL_S = 20  # the shortest that Patroni takes: a frozen leader loses its lock after so long

NODE = """
scope: outbox
name: {name}
restapi: {{listen: "127.0.0.1:{rest}", connect_address: "127.0.0.1:{rest}"}}
etcd3: {{host: "127.0.0.1:{etcd}"}}
bootstrap:
  dcs:
    ttl: {ttl}
    loop_wait: 2
    retry_timeout: 3
    maximum_lag_on_failover: 104857600
    synchronous_mode: {synchronous}
    postgresql:
      use_pg_rewind: true
      parameters: {{fsync: "off", max_connections: 60, shared_buffers: 32MB, wal_keep_size: 128MB}}
  initdb: [{{encoding: UTF8}}, {{locale: C}}, {{auth: trust}}]
  pg_hba: ["host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust", "local all all trust"]
postgresql:
  listen: "127.0.0.1:{port}"
  connect_address: "127.0.0.1:{port}"
  data_dir: {directory}/data
  bin_dir: {binaries}
  parameters: {{unix_socket_directories: "{directory}"}}
  authentication:
    superuser: {{username: postgres, password: x}}
    replication: {{username: replicator, password: x}}
    rewind: {{username: postgres, password: x}}
"""

PROXY = """
defaults
  mode tcp
  timeout connect 2s
  timeout client 1h
  timeout server 1h
listen primary
  bind 127.0.0.1:{port}
  option httpchk OPTIONS /primary
  http-check expect status 200
  default-server inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


@dataclass
class Node:
    """One Patroni with its Postgres."""

    name: str
    directory: Path
    port: int
    rest: int
    patroni: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def family(self) -> list[int]:
        """Return Patroni, its Postgres and all backends."""
        found = family_of(self.patroni.pid) if self.patroni is not None else []
        with suppress(OSError, ValueError, IndexError):
            postmaster = int((self.directory / "data/postmaster.pid").read_text().splitlines()[0])
            found += family_of(postmaster)
        return found

    def signal(self, signum: signal.Signals) -> None:
        send(self.family(), signum)

    async def is_primary(self) -> bool:
        """Return True if it accepts writes."""
        try:
            connection = await asyncpg.connect(self.url, timeout=1)
        except (OSError, asyncpg.PostgresError, TimeoutError):
            return False
        try:
            return not await connection.fetchval("SELECT pg_is_in_recovery()", timeout=1)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            return False
        finally:
            connection.terminate()


@dataclass
class Cluster:
    """Two or more nodes, one etcd, and HAProxy before them."""

    nodes: list[Node]
    proxy: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def hosts_url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"

    @property
    def proxy_url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.proxy}/postgres"

    async def state(self) -> dict[str, tuple[str, str]]:
        """Return role and state of each member, as the first node that answers sees them."""
        for node in self.nodes:
            with suppress(OSError, urllib.error.URLError, json.JSONDecodeError, TimeoutError):
                members = (await asyncio.to_thread(_get, f"http://127.0.0.1:{node.rest}/cluster"))["members"]
                return {one["name"]: (one["role"], one["state"]) for one in members}
        return {}

    async def leader(self) -> Node:
        """Return the node that accepts writes, as soon as there is one."""
        found: list[Node] = []

        async def is_there() -> bool:
            found[:] = [node for node in self.nodes if await node.is_primary()]
            return len(found) == 1

        await until(is_there, "one node accepts writes", DEADLINE_S)
        return found[0]

    async def whole(self, *, synchronous: bool) -> None:
        """Wait until all members run, and one is a synchronous standby if there has to be one."""

        async def is_so() -> bool:
            members = (await self.state()).values()
            states = [state in ("running", "streaming") for _, state in members]
            roles = [role for role, _ in members]
            is_synchronous = not synchronous or "sync_standby" in roles
            return len(states) == len(self.nodes) and all(states) and "leader" in roles and is_synchronous

        try:
            await until(is_so, "all nodes run", DEADLINE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {await self.state()}") from error

    async def switch_over(self, leader: Node, candidate: Node) -> None:
        body = json.dumps({"leader": leader.name, "candidate": candidate.name}).encode()
        await asyncio.to_thread(_post, f"http://127.0.0.1:{leader.rest}/switchover", body)


def _get(url: str) -> dict[str, list[dict[str, str]]]:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return dict(json.load(answer))


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60):
        pass


async def promoted_at(node: Node) -> float:
    """Wait until the node accepts writes; return when that was."""
    await until(node.is_primary, f"{node.name} is promoted", DEADLINE_S)
    return time.time()


@contextmanager
def directory_of_postgres() -> Iterator[Path]:
    """Yield a directory that the user postgres owns: no Postgres runs as root."""
    directory = Path(tempfile.mkdtemp(prefix="patroni-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def cluster(*, nodes: int, synchronous: bool) -> AsyncIterator[Cluster]:
    """Yield a cluster whose members all run."""
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    with directory_of_postgres() as home:
        etcd, peer = free_port(), free_port()
        members = [Node(f"p{n}", home / f"p{n}", free_port(), free_port()) for n in range(1, nodes + 1)]
        made = Cluster(members, free_port())

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            with (home / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env={"PATH": "/usr/bin:/bin:/usr/sbin", "HOME": str(home)}, **user,
                )  # fmt: skip
            made.processes.append(process)
            return process

        try:
            start(
                "etcd", "etcd", "--name", "e", "--data-dir", str(home / "etcd"), "--unsafe-no-fsync",
                "--listen-client-urls", f"http://127.0.0.1:{etcd}", "--advertise-client-urls", f"http://127.0.0.1:{etcd}",
                "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls",
                f"http://127.0.0.1:{peer}", "--initial-cluster", f"e=http://127.0.0.1:{peer}",
            )  # fmt: skip
            for node in members:
                node.directory.mkdir()
                written = NODE.format(
                    name=node.name, rest=node.rest, etcd=etcd, port=node.port, directory=node.directory,
                    binaries=POSTGRES, ttl=TTL_S, synchronous=str(synchronous).lower(),
                )  # fmt: skip
                (node.directory / "patroni.yml").write_text(written)
                if user:
                    shutil.chown(node.directory, "postgres", "postgres")
                node.patroni = start(node.name, "patroni", str(node.directory / "patroni.yml"))
                if node is members[0]:
                    await made.leader()
            servers = "\n".join(f"  server {n.name} 127.0.0.1:{n.port} check port {n.rest}" for n in members)
            (home / "haproxy.cfg").write_text(PROXY.format(port=made.proxy, servers=servers))
            start("haproxy", HAPROXY, "-db", "-f", str(home / "haproxy.cfg"))
            await made.whole(synchronous=synchronous)
            yield made
        finally:
            for node in members:
                node.signal(signal.SIGCONT)
                node.signal(signal.SIGKILL)
            for process in made.processes:
                process.kill()
                process.wait()
