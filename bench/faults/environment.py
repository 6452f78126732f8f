"""The real parts of a fault run: Postgres, the mail server, and servers that reach both through proxies of their own.

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
from bench.faults.server import Host, Life
from bench.faults.workload import DRAIN_S, REPLY_S, RESOLVER, settings_of
from bench.harness.environment import HOUSE, start
from bench.harness.fault_proxy import Proxy
from bench.harness.freeze import freeze, kill, thaw
from outbox.database.locks import RELAY_LOCKS
from outbox.operations.status import RELAYS
from outbox.sandbox.postgres import Server, StopMode, standby
from outbox.sandbox.smtp_sink import Sink, Visit

LOST: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
ADMIN_S: Final = 20.0


@dataclass(eq=False)
class Arena:
    """Everything that a fault may take hold of."""

    postgres: Server
    sink: Sink
    mail: Mail
    hosts: list[Host]
    seed: int | str
    lease_s: float
    patience_s: float = 2.0
    """How long a fault waits for its victim to have begun a message."""
    lives: list[Life] = field(default_factory=list)
    closing: bool = False
    postgres_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of the faults of Postgres: one at a time."""
    _standbys: ExitStack = field(default_factory=ExitStack)
    _postgres_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _admin: Any = None
    _admin_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _keepers: set[asyncio.Task[None]] = field(default_factory=set)

    async def sql(self, statement: str, *values: Any, deadline_s: float = ADMIN_S) -> list[Any]:
        """Rows of a statement of ours."""
        return list(await self.with_admin(lambda admin: admin.fetch(statement, *values), deadline_s=deadline_s))

    async def with_admin(self, work: Callable[[Any], Awaitable[Any]], *, deadline_s: float = ADMIN_S) -> Any:
        """Do it on a connection of ours, that no fault but Postgres' own blocks; tried again until the deadline."""
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
        """Stop it."""
        await self._in_postgres_thread(lambda: self.postgres.stop(mode))

    async def start_postgres(self) -> None:
        """Start it again."""
        await self._in_postgres_thread(self.postgres.start)

    async def add_standby(self, name: str) -> Server:
        """A streaming standby of the Postgres that is in charge."""
        made: list[Server] = []
        work = partial(standby, self.postgres, name=name, settings={"synchronous_commit": "on"})
        await self._in_postgres_thread(lambda: made.append(self._standbys.enter_context(work())))
        return made[0]

    async def fail_over(self, standby: Server) -> None:
        """The Postgres in charge is lost with its host, and the standby takes its place under the same address."""
        await self._in_postgres_thread(lambda: self.postgres.stop("immediate"))
        await self._in_postgres_thread(standby.promote)
        self._lead_to(standby)

    async def freeze_over(self, standby: Server) -> Server:
        """The Postgres in charge is frozen with all its sessions, and the standby takes its place; gives the former."""
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
        """The former Postgres goes on as it was, in charge again; the one that took its place is lost with its host."""
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

    async def run(self, host: Host, what: str, *words: str) -> Life:
        """Start `outbox …` on a server."""
        process = await start("outbox", *words, directory=host.directory, package=host.package)
        over = asyncio.get_running_loop().create_task(process.communicate())
        life = Life(len(self.lives), what, host.number, process, over, time.time())
        self.lives.append(life)
        return life

    async def fire_cron(self, host: Host) -> None:
        """`outbox generate`, unless the last one still runs; one that a fault kills is fired again."""
        if host.cron is None or not host.cron.is_alive:
            host.cron = await self.run(host, "generate", "generate")
            self._keep(self._refire(host, host.cron))

    async def _refire(self, host: Host, cron: Life) -> None:
        await cron.ended()
        if cron.ended_by is not None and not self.closing:
            await asyncio.sleep(self._pause_s(cron))
            await self.fire_cron(host)

    async def keep_relay(self, host: Host) -> None:
        """A relay, and another one a short pause after its end, until we close."""
        host.relay = await self.run(host, "relay", "relay")
        self._keep(self._restart(host, host.relay))

    async def _restart(self, host: Host, relay: Life) -> None:
        await relay.ended()
        if not self.closing:
            await asyncio.sleep(self._pause_s(relay))
        if not self.closing:
            await self.keep_relay(host)

    def _pause_s(self, life: Life) -> float:
        return random.Random(f"{self.seed}/pause/{life.number}").uniform(0.1, 0.5)

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    def whose(self, visit: Visit) -> int:
        """The number of the relay's life that a visit to the mail server comes from; -1 if nobody knows."""
        for host in self.hosts:
            if host.owns(visit.peer[1]) and host.relay is not None:
                return host.relay.number
        return -1

    async def busy_relay(self, number: int) -> Life | None:
        """The server's relay, once it has begun a message; when patience ends, as it is; None if none is there."""
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
            if all(one is not None and one.is_running and one.process.pid in standing for one in relays):
                return True
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.05)

    async def stop_relays(self) -> list[Life]:
        """SIGTERM to all; gives those that did not end with 0 in their time."""
        self.closing = True
        relays = [life for life in self.lives if life.what == "relay" and life.is_alive]
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
        """Every network whole, every process running, every mood gone."""
        for host in self.hosts:
            host.database.heal()
            host.smtp.heal()
        for life in self.lives:
            if life.is_alive:
                life.send(signal.SIGCONT)
        self.mail.calm()

    async def close(self) -> None:
        """End what is left."""
        self.closing = True
        for life in self.lives:
            if life.is_alive:
                life.send(signal.SIGKILL)
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._admin is not None:
            self._admin.terminate()
        await self._in_postgres_thread(self._standbys.close)
        self._postgres_thread.shutdown()


def socket_of(server: Server) -> Path:
    """Where its proxies reach it."""
    return Path(server.address["host"]) / f".s.PGSQL.{server.address['port']}"


@asynccontextmanager
async def arena(
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
) -> AsyncIterator[Arena]:
    """The parts, with a schema, nobody to write to, and nothing running yet.

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
            place = Arena(postgres, sink, mail, hosts, seed, lease_s)
            mail.whose = place.whose
            try:
                yield place
            finally:
                await place.close()
        finally:
            for host in hosts:
                await host.database.__aexit__()
                await host.smtp.__aexit__()
