"""Environment of a fault run: Postgres, the mail server, and servers that reach both through proxies of their own.

A server runs a relay, which is started again when it ends as systemd would do it, and a `generate` when cron fires.
The faults are in `nemesis`; here is what they take hold of.
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import asyncpg

from bench.faults.mail_server import Mail
from bench.faults.server import Host, ServerProcess
from bench.faults.workload import DRAIN_S, REPLY_S, RESOLVER, settings_of
from bench.harness.environment import HOUSE, start
from bench.harness.fault_proxy import Proxy
from bench.harness.freeze import freeze, kill, thaw
from outbox.database.locks import RELAY_LOCKS
from outbox.operations.snapshot import RELAYS
from outbox.sandbox.postgres import Server, StopMode, standby
from outbox.sandbox.smtp_sink import Sink, Visit

LOST: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
ADMIN_S: Final = 20.0


@dataclass(eq=False)
class Environment:
    """Everything on which a fault may act."""

    postgres: Server
    sink: Sink
    mail: Mail
    hosts: list[Host]
    seed: int | str
    lease_s: float
    patience_s: float = 2.0
    """How long a fault waits for its victim to have begun a message."""
    processes: list[ServerProcess] = field(default_factory=list)
    closing: bool = False
    postgres_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of the faults of Postgres: one at a time."""
    _standbys: ExitStack = field(default_factory=ExitStack)
    _postgres_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _admin: Any = None
    _admin_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _keepers: set[asyncio.Task[None]] = field(default_factory=set)

    async def sql(self, statement: str, *values: Any, deadline_s: float = ADMIN_S) -> list[Any]:
        """Return the rows of a statement of the harness."""
        return list(await self.with_admin(lambda admin: admin.fetch(statement, *values), deadline_s=deadline_s))

    async def with_admin(self, work: Callable[[Any], Awaitable[Any]], *, deadline_s: float = ADMIN_S) -> Any:
        """Run `work` on our own connection, which only faults of Postgres end; repeat it until the deadline."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                async with self._admin_lock, asyncio.timeout(max(end - time.monotonic(), 0.1)):
                    if self._admin is None or self._admin.is_closed():
                        self._admin = await asyncpg.connect(self.postgres.url, timeout=2)
                    return await work(self._admin)
            except LOST as error:
                if self._admin is not None and not isinstance(error, asyncpg.PostgresError):
                    self._admin.terminate()
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.05)

    async def stop_postgres(self, mode: StopMode) -> None:
        """Stop Postgres."""
        await self._in_postgres_thread(lambda: self.postgres.stop(mode))

    async def start_postgres(self) -> None:
        """Start Postgres again."""
        await self._in_postgres_thread(self.postgres.start)

    async def add_standby(self, name: str) -> Server:
        """Start a streaming standby of the primary."""
        made: list[Server] = []
        work = partial(standby, self.postgres, name=name, settings={"synchronous_commit": "on"})
        await self._in_postgres_thread(lambda: made.append(self._standbys.enter_context(work())))
        return made[0]

    async def fail_over(self, standby: Server) -> None:
        """Lose the primary with its host, and promote the standby, which takes over its address."""
        await self._in_postgres_thread(lambda: self.postgres.stop("immediate"))
        await self._in_postgres_thread(standby.promote)
        self._lead_to(standby)

    async def freeze_over(self, standby: Server) -> Server:
        """Freeze the primary with all its sessions, promote the standby, and return the former primary."""
        former = self.postgres
        freeze(former)
        try:
            await self._in_postgres_thread(standby.promote)
        except BaseException:
            thaw(former)
            raise
        self._lead_to(standby)
        return former

    async def thaw_back(self, former: Server) -> None:
        """Thaw the former primary, which leads again, and lose the one that replaced it with its host."""
        lost = self.postgres
        thaw(former)
        await self._in_postgres_thread(partial(kill, lost))
        self._lead_to(former)

    def _lead_to(self, server: Server) -> None:
        self.postgres = server
        if self._admin is not None:
            self._admin.terminate()
        for host in self.hosts:
            host.database.target = socket_of(server)
            host.database.cut(reset=True)

    async def _in_postgres_thread(self, work: Callable[[], None]) -> None:
        # Always the same thread: the kernel stops the server when the thread that forked it ends.
        await asyncio.get_running_loop().run_in_executor(self._postgres_thread, work)

    async def run(self, host: Host, what: str, *words: str) -> ServerProcess:
        """Start `outbox …` on a server."""
        child = await start("outbox", *words, directory=host.directory, package=host.package)
        over = asyncio.get_running_loop().create_task(child.communicate())
        process = ServerProcess(len(self.processes), what, host.number, child, over, time.time())
        self.processes.append(process)
        return process

    async def fire_cron(self, host: Host) -> None:
        """Run `outbox generate`, unless the last one still runs; one that a fault kills is started again."""
        if host.cron is None or not host.cron.is_alive:
            host.cron = await self.run(host, "generate", "generate")
            self._keep(self._refire(host, host.cron))

    async def _refire(self, host: Host, cron: ServerProcess) -> None:
        await cron.ended()
        if cron.ended_by is not None and not self.closing:
            await asyncio.sleep(self._pause_s(cron))
            await self.fire_cron(host)

    async def keep_relay(self, host: Host) -> None:
        """Run a relay, and another one a short pause after its end, until the environment closes."""
        host.relay = await self.run(host, "relay", "relay")
        self._keep(self._restart(host, host.relay))

    async def _restart(self, host: Host, relay: ServerProcess) -> None:
        await relay.ended()
        if not self.closing:
            await asyncio.sleep(self._pause_s(relay))
        if not self.closing:
            await self.keep_relay(host)

    def _pause_s(self, process: ServerProcess) -> float:
        return random.Random(f"{self.seed}/pause/{process.number}").uniform(0.1, 0.5)

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    def whose(self, visit: Visit) -> int:
        """Return the number of the relay's process from which a visit comes; -1 if it is unknown."""
        for host in self.hosts:
            if host.owns(visit.peer[1]) and host.relay is not None:
                return host.relay.number
        return -1

    async def busy_relay(self, number: int) -> ServerProcess | None:
        """Return the server's relay, once it has begun a message or `patience_s` is over; None if there is none."""
        host, end = self.hosts[number], time.monotonic() + self.patience_s
        while time.monotonic() < end:
            relay = host.relay
            if relay is not None and relay.is_running and self.mail.begun[relay.number] > 0:
                return relay
            await asyncio.sleep(0.02)
        return host.relay if host.relay is not None and host.relay.is_running else None

    async def all_stand(self, deadline_s: float) -> bool:
        """Wait until every server's relay has a session; False if one has none by the deadline."""
        end = time.monotonic() + deadline_s
        while True:
            standing = {row["pid"] for row in await self.sql(RELAYS, RELAY_LOCKS)}
            relays = [host.relay for host in self.hosts]
            if all(one is not None and one.is_running and one.child.pid in standing for one in relays):
                return True
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.05)

    async def stop_relays(self) -> list[ServerProcess]:
        """Send SIGTERM to all relays; return those that did not end with exit code 0 in time."""
        self.closing = True
        relays = [process for process in self.processes if process.what == "relay" and process.is_alive]
        for relay in relays:
            relay.send(signal.SIGTERM)
        bad = []
        for relay in relays:
            try:
                async with asyncio.timeout(DRAIN_S + REPLY_S + 5):
                    code = await relay.ended()
            except TimeoutError:
                relay.send(signal.SIGKILL)
                code = await relay.ended()
            if code != 0:
                bad.append(relay)
        return bad

    def heal(self) -> None:
        """Restore every network, resume every process and end the mail server's misbehaviour."""
        for host in self.hosts:
            host.database.heal()
            host.smtp.heal()
        for process in self.processes:
            if process.is_alive:
                process.send(signal.SIGCONT)
        self.mail.calm()

    async def close(self) -> None:
        """End all processes that are left."""
        self.closing = True
        for process in self.processes:
            if process.is_alive:
                process.send(signal.SIGKILL)
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._admin is not None:
            self._admin.terminate()
        await self._in_postgres_thread(self._standbys.close)
        self._postgres_thread.shutdown()


def socket_of(server: Server) -> Path:
    """Return the socket at which the proxies reach the server."""
    return Path(server.address["host"]) / f".s.PGSQL.{server.address['port']}"


@asynccontextmanager
async def open_environment(
    postgres: Server,
    directory: Path,
    *,
    seed: int | str,
    servers: int,
    lease_s: float,
    connections: int,
    routes: int = 1,
    in_doubt: str = "hold",
    reply_s: float = REPLY_S,
    packages: Sequence[Path] = (),
) -> AsyncIterator[Environment]:
    """Start all parts, with a schema, without recipients, and with no process running yet.

    Server n runs the `outbox` below packages[n % len(packages)], so that a fleet may be of two versions.
    """
    mail = Mail(seed)
    if in_doubt == "ask":
        mail.log = directory / "accepted"
        mail.log.touch()
    async with Sink(mail, keep_messages=False, on_accepted=mail.note) as sink:
        hosts = []
        try:
            for number in range(servers):
                package = packages[number % len(packages)] if packages else HOUSE
                host = Host(
                    number,
                    directory / f"server-{number}",
                    package,
                    await Proxy(socket_of(postgres)).__aenter__(),
                    await Proxy((sink.host, sink.port)).__aenter__(),
                )
                hosts.append(host)
                host.directory.mkdir(parents=True, exist_ok=True)
                (host.directory / "mailserver.py").write_text(RESOLVER)
                settings = settings_of(host, lease_s, connections, in_doubt, reply_s, routes=routes)
                (host.directory / "outbox.toml").write_text(settings)
            environment = Environment(postgres, sink, mail, hosts, seed, lease_s)
            mail.whose = environment.whose
            try:
                yield environment
            finally:
                await environment.close()
        finally:
            for host in hosts:
                await host.database.__aexit__()
                await host.smtp.__aexit__()
