"""Race: every entrant drains emails of one kind to the same sink, in turn; rates, duplicates and losses in a table."""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from rich.console import Console

from bench.harness.die_with_parent import die_with_parent
from bench.harness.environment import Environment, open_environment
from bench.harness.figures import Target, keep
from bench.peers import redis
from bench.peers.entrants import OUTBOX, PEERS, RELAY, SMTP_SOURCE, Entrant, entrants
from bench.peers.job import READY, Job
from bench.peers.result import Result, report, result_of
from bench.peers.venv import PYTHON, install, versions
from bench.speed.one_relay import message_of

QUIET_S = 1.0
"""So long nothing more must come once everybody has a mail, before the workers are told to stop."""
STALLED_S = 60.0
"""So long nothing may come before what has not come is called lost."""
STOP_S = 10.0
LEAST = {"as documented": 5.0, "pre-built": 2.0, SMTP_SOURCE: 0.35}
EMAILS_MIN = 200
EMAILS_MAX = 50_000


class AbsentError(Exception):
    """An entrant cannot take part; the message is the reason."""


@dataclass
class Race:
    """Race with its options and results."""

    emails: int
    """In the trial; then as many as take about `seconds` at the trial's rate, so that a slow peer takes no longer."""
    seconds: float
    size: int
    workers: int
    connections: int
    console: Console
    trial: dict[str, Result] = field(default_factory=dict)
    """Everybody's first run, which counts for nothing else."""
    found: dict[str, list[Result]] = field(default_factory=dict)

    async def run(self, url: str, fields: list[Entrant], *, outbox: bool, source: bool) -> None:
        """Run every entrant once, each on an empty queue."""
        async with open_environment(url, connections=self.connections) as environment:
            (environment.directory / READY).write_bytes(message_of(self.size))
            if outbox:
                await self._note(OUTBOX, self._relays(environment, OUTBOX, self.workers))
            for entrant in fields:
                await self._note(entrant.title, self._peer(environment, entrant))
            if source:
                await self._note(RELAY, self._relays(environment, RELAY, 1))
                await self._note(SMTP_SOURCE, self._smtp_source(environment))

    async def _note(self, title: str, run: Awaitable[Result]) -> None:
        try:
            result = await run
        except AbsentError as why:
            self.console.print(f"{title} is left out of this run: {why}", markup=False)
            return
        if title in self.trial:
            self.found.setdefault(title, []).append(result)
        self.trial.setdefault(title, result)
        self.console.print(f"{title}: {result.per_s:,.0f}/s", style="dim")

    def _share(self, title: str) -> int:
        """Return how many emails it gets in this run."""
        trial = self.trial.get(title)
        return self.emails if trial is None else min(max(round(trial.per_s * self.seconds), EMAILS_MIN), EMAILS_MAX)

    async def _relays(self, environment: Environment, title: str, count: int) -> Result:
        emails = self._share(title)
        await environment.reset(0)
        await environment.put_emails(emails, message_of(self.size))
        return await self._drain(
            environment, emails, [["outbox", "relay", "--until-empty"]] * count, sys.executable, {}
        )

    async def _peer(self, environment: Environment, entrant: Entrant) -> Result:
        peer = entrant.peer
        module, emails = f"bench.peers.{peer.module}", self._share(entrant.title)
        async with _fresh_database(environment) as database, _broker(environment, peer.name) as broker:
            job = Job(
                database=database, smtp=environment.smtp, redis=broker, emails=emails, size=self.size,
                workers=self.workers, connections=self.connections, ready=entrant.ready,
            )  # fmt: skip
            putting = await environment.start(module, "put", python=str(PYTHON), settings=job.settings())
            await putting.communicate()
            if putting.returncode:
                raise AbsentError(f"it could not enqueue. {_last_words(environment)}")
            await _settle(database)
            commands = [[module, "work"]] * (1 if peer.alone else self.workers)
            return await self._drain(environment, emails, commands, str(PYTHON), job.settings())

    async def _smtp_source(self, environment: Environment) -> Result:
        emails = self._share(SMTP_SOURCE)
        words = ["-d", "-N", "-s", str(self.connections), "-m", str(emails), "-l", str(self.size)]
        people = ["-f", "reports@example.com", "-t", "p@example.com"]
        since = environment.mark()
        process = await asyncio.create_subprocess_exec(
            SMTP_SOURCE, *words, *people, f"inet:{environment.smtp.removeprefix('smtp://')}", preexec_fn=die_with_parent
        )
        if await process.wait():
            raise AbsentError(f"it exited {process.returncode}.")
        return result_of(await environment.accepted(emails, since, deadline_s=5), emails, [])

    async def _drain(
        self, environment: Environment, emails: int, commands: list[list[str]], python: str, settings: dict[str, str]
    ) -> Result:
        """Start the workers, wait until all is sent or nothing more comes, end them."""
        since = environment.mark()
        workers = [await environment.start(*command, python=python, settings=settings) for command in commands]
        readers = [asyncio.create_task(worker.communicate()) for worker in workers]
        try:
            await _until_done(environment, emails, since, readers)
            ended = [worker.returncode for worker in workers if worker.returncode is not None]
        finally:
            await _end(workers, readers)
        await asyncio.sleep(0.2)  # the sink's journal is flushed more often than that
        return result_of(environment.lines(since), emails, [code for code in ended if code])


async def measure(
    url: str, *, emails: int, seconds: float, size: int, workers: int, connections: int, runs: int, only: list[str]
) -> None:
    """Run a trial and several runs; print a table and write bench/results/peers.json."""
    console = Console(width=max(Console().width, 110))
    race = Race(emails, seconds, size, workers, connections, console)
    peers = install([peer for peer in PEERS if not only or peer.name in only], console)
    if not redis.is_there():
        peers = [peer for peer in peers if peer.name != "celery"]
        console.print("celery is skipped: there is no redis-server on PATH.")
    source = not only or SMTP_SOURCE in only
    if source and not shutil.which(SMTP_SOURCE):
        source = False
        console.print("smtp-source is skipped: it is not on PATH (Debian: postfix).")
    for number in range(runs + 1):
        await race.run(url, entrants(peers), outbox=not only or OUTBOX in only, source=source)
        console.print(f"run {number} of {runs}" if number else "that was the trial", style="dim")
    asked = {"seconds": seconds, "size": size, "workers": workers, "connections": connections, "runs": runs}
    ratios = report(race.found, entrants(peers), asked, console)
    found = {title: [result.as_json() for result in results] for title, results in race.found.items()}
    targets = [
        Target(what, ratio, least, "times", at_least=True)
        for what, ratio in ratios.items()
        for words, least in LEAST.items()
        if words in what
    ]
    keep("peers", {**asked, "versions": versions(), "found": found, "ratios": ratios}, targets)


@asynccontextmanager
async def _fresh_database(environment: Environment) -> AsyncIterator[str]:
    """Make a database of the peer's own, so that none pays for what another left."""
    await environment.connection.execute("DROP DATABASE IF EXISTS peer WITH (FORCE)")
    await environment.connection.execute("CREATE DATABASE peer")
    yield environment.database.replace("/postgres?", "/peer?", 1)
    await environment.connection.execute("DROP DATABASE peer WITH (FORCE)")


@asynccontextmanager
async def _broker(environment: Environment, name: str) -> AsyncIterator[str]:
    if name != "celery":
        yield ""
        return
    async with redis.redis(environment.directory) as url:
        yield url


async def _settle(database: str) -> None:
    """Do what `Environment.put_emails` does for outbox: statistics, and no checkpoint of the enqueue in the drain."""
    connection = await asyncpg.connect(database)
    await connection.execute("ANALYZE")
    await connection.execute("CHECKPOINT")
    await connection.close()


async def _until_done(environment: Environment, emails: int, since: int, readers: list[asyncio.Task[Any]]) -> None:
    """Wait on the journal's size only: parsing it all the time would take from the workers' cores."""
    clock = asyncio.get_running_loop().time
    size, lines, grew_at = since, 0, clock()
    while not all(reader.done() for reader in readers):
        await asyncio.sleep(0.1)
        if environment.mark() > size:
            with environment.journal.open("rb") as journal:
                journal.seek(size)
                came = journal.read()
            size, lines, grew_at = size + len(came), lines + came.count(b"\n"), clock()
        quiet_s = clock() - grew_at
        if (lines >= emails and quiet_s > QUIET_S) or quiet_s > STALLED_S:
            return


async def _end(workers: list[asyncio.subprocess.Process], readers: list[asyncio.Task[Any]]) -> None:
    for worker in workers:
        if worker.returncode is None:
            with suppress(ProcessLookupError):
                worker.terminate()
    _, late = await asyncio.wait(readers, timeout=STOP_S)
    if late:
        for worker in workers:
            if worker.returncode is None:
                with suppress(ProcessLookupError):
                    worker.kill()
        await asyncio.wait(late)


def _last_words(environment: Environment) -> str:
    lines = (environment.directory / "log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
