"""Run under faults, from its seed: real processes, real Postgres, a real mail server, and a verdict.

Relays start, crons fire on all servers at once, faults come as planned; then they are over, and within a stated bound
all must be settled. The checker judges what the mail server accepted against what the database says.
"""

import asyncio
import math
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bench.faults.environment import Environment, open_environment
from bench.faults.evidence import Record, Samples, gather
from bench.faults.nemesis import Nemesis
from bench.faults.options import Options
from bench.faults.postgres import NOT_FULL
from bench.faults.report import Verdict, judge
from bench.faults.server import ServerProcess
from bench.faults.workload import prepare
from outbox.operations.resolve import Decision, resolve
from outbox.sandbox.postgres import Server, postgres

STORM_PATIENCE_S: Final = 60.0  # a storm kills as often as it was told to, however long the next relay takes to start
BUSY: Final = 0.85  # the share of the time for which the mail server's pace leaves something to send
WAVE_MIN_S: Final = 6.0
START_S: Final = 60.0
QUIET_S: Final = 0.5  # all relays have a session, and what they had to tell after an outage is told


@dataclass(eq=False)
class Run:
    """Run in progress, with what it saw beside the facts of the database."""

    options: Options
    environment: Environment
    nemesis: Nemesis
    samples: Samples
    began_at: float = 0.0
    over_at: float = 0.0
    settled_at: float = 0.0
    unorderly: list[str] = field(default_factory=list)

    async def play(self) -> Record:
        """Execute all phases and return the record."""
        await self._start()
        self.began_at = time.time()
        crons = asyncio.create_task(self._crons())
        helpers = [crons, *(asyncio.create_task(work) for work in (self.samples.take(), self._person()))]
        try:
            await self._first_message()
            self.began_at = time.time()
            await self.nemesis.run()
            left_s = self.began_at + self.options.seconds - time.time()
            await asyncio.sleep(max(left_s, 0))
            crons.cancel()
            await self._end_faults()
            await self._settle()
            for process in await self.environment.stop_relays():
                self.unorderly.append(f"relay {process.number} of server {process.host} on SIGTERM")
        finally:
            for helper in helpers:
                helper.cancel()
            ends = await asyncio.gather(*helpers, return_exceptions=True)
            self.unorderly += [f"the harness: {end!r}" for end in ends if isinstance(end, Exception)]
        times = (self.began_at, self.over_at, self.settled_at)
        policy = self.options.in_doubt
        return await gather(self.environment, self.nemesis.done, self.samples, times=times, policy=policy)

    async def _start(self) -> None:
        options = self.options
        settings = self.environment.hosts[0].directory / "outbox.toml"
        await prepare(
            self.environment.postgres.url, options.recipients, settings, waves=self._waves()[0], routes=options.routes
        )
        if options.seconds:
            self.environment.mail.per_s = options.recipients / (options.seconds * BUSY)
        self.environment.mail.dot_s = options.dot_s
        self.environment.patience_s = STORM_PATIENCE_S if options.storm else self.environment.patience_s
        for host in self.environment.hosts:
            await self.environment.keep_relay(host)
        if not await self.environment.all_stand(START_S):
            raise SystemExit(f"bench: the relays did not start; {options.directory}/server-0/log says why.")

    async def _first_message(self) -> None:
        """Wait until there is something to send, however long that takes on a busy machine."""
        end = time.monotonic() + START_S
        while not self.environment.sink.messages and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _waves(self) -> tuple[int, float]:
        """Return how often crons fire, and the seconds between: more servers take longer to start their processes."""
        if self.options.storm:
            return 1, 3600.0
        every_s = max(WAVE_MIN_S, 2.0 * self.options.servers)
        return max(math.ceil(self.options.seconds / every_s), 1), every_s

    async def _crons(self) -> None:
        waves, every_s = self._waves()
        for wave in range(waves):
            await self.environment.sql("UPDATE hired SET wave = $1", wave)
            await asyncio.gather(*(self.environment.fire_cron(host) for host in self.environment.hosts))
            await asyncio.sleep(every_s)

    async def _person(self) -> None:
        """Resolve doubt that has lasted, by what the mail server has: a second copy is then never excused."""
        after_s = self.options.resolve_after_s
        while after_s:
            await asyncio.sleep(0.2)
            for decision, arrived in ((Decision.SENT, True), (Decision.RESEND, False)):
                rows = await self.environment.sql(DOUBTFUL, after_s)
                keys = [row["key"] for row in rows if (row["recipient"] in self.environment.sink.addresses) is arrived]
                if keys:
                    await self.environment.with_admin(partial(resolve, keys=keys, decision=decision))

    async def _end_faults(self) -> None:
        self.environment.heal()
        await self.environment.sql(NOT_FULL)
        await self.environment.sql("UPDATE hired SET wave = $1", self._waves()[0])
        self.over_at = time.time()

    async def _settle(self) -> None:
        """Run a last generate, then wait until nothing is open, at most until the bound."""
        end = self.over_at + self.options.bound_s
        await self._finish_crons(end)
        last = self.environment.hosts[self.options.seed % len(self.environment.hosts)]
        code = await self._ended(await self.environment.run(last, "generate", "generate"), end)
        if code != 0:
            self.unorderly.append(f"the last generate, on server {last.number}: exit code {code}")
        open_states = ["pending", "sending", *(["in_doubt"] if self.options.in_doubt != "hold" else [])]
        while time.time() < end:
            (row,) = await self.environment.sql(OPEN, open_states)
            if row["open"] == 0 and not self.environment.mail.waiting:
                self.settled_at = self.settled_at or time.time()
                if await self.environment.all_stand(0) and time.time() - self.settled_at > QUIET_S:
                    return
            else:
                self.settled_at = 0.0  # late news from a relay without a session may still make something due
            await asyncio.sleep(0.05)
        self.settled_at = self.settled_at or time.time()

    async def _finish_crons(self, end: float) -> None:
        for host in self.environment.hosts:
            while host.cron is not None and host.cron.is_alive:
                if await self._ended(host.cron, end) is None:
                    self.unorderly.append(f"generate {host.cron.number} of server {host.number}")
                    break
                await asyncio.sleep(0)

    async def _ended(self, process: ServerProcess, end: float) -> int | None:
        """Return the exit code, or None if the process had to be killed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(end - time.time(), 0.1)):
                while process.is_alive:
                    await asyncio.sleep(0.05)
            return process.child.returncode
        process.end("the bound", signal.SIGKILL)
        return None


DOUBTFUL: Final = """
SELECT m.key, m.recipient FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE d.state = 'in_doubt' AND d.settled_at IS NULL
   AND (SELECT max(a.settled_at) FROM outbox.attempt a WHERE a.email = d.email AND a.verdict = 'in_doubt')
       < now() - $1 * interval '1 second'
"""
OPEN: Final = """
SELECT (SELECT count(*) FROM outbox.delivery WHERE state = ANY ($1::text[]) AND settled_at IS NULL) AS open
"""


async def play(server: Server, options: Options) -> Verdict:
    """Execute a run on a running Postgres."""
    options.directory.mkdir(parents=True, exist_ok=True)
    for old in options.directory.glob("server-*/log"):
        old.unlink()
    async with open_environment(
        server,
        options.directory,
        seed=options.seed,
        servers=options.servers,
        lease_s=options.lease_s,
        connections=options.connections,
        routes=options.routes,
        in_doubt=options.in_doubt,
        packages=options.packages,
    ) as environment:
        run = Run(options, environment, Nemesis(environment, options.strikes()), Samples(environment))
        return judge(options, await run.play(), run.unorderly)


def run_one(options: Options) -> Verdict:
    """Execute a run on a Postgres of its own, which is removed afterwards."""
    settings = {"max_connections": str(20 + (6 + 2 * options.routes) * options.servers), "shared_buffers": "64MB"}
    with postgres(settings=settings) as server:
        return asyncio.run(play(server, options))
