"""A run under faults, from its seed: real processes, real Postgres, a real mail server, and a verdict.

Relays start, crons fire on all servers at once, faults come as planned; then they are over, and within a stated bound
all must be settled. The checker judges what the mail server accepted against what the database says.
"""

import asyncio
import json
import math
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.arena import REPLY_S, RETRY_MAX_S, Arena, Life, arena, prepare
from bench.checker import Violation, check, figures
from bench.nemesis import FAULTS, NOT_FULL, Nemesis
from bench.plan import Strike, plan, storm
from bench.record import Record, Samples, gather
from bench.timeline import draw
from bench.world import RESULTS
from outbox.embedded import Server, postgres
from outbox.relay import DOUBT_GRACE_S
from outbox.resolve import Decision, resolve

STORM_S: Final = 0.6  # between two kills of a storm, when --minutes does not say it
STORM_PATIENCE_S: Final = 60.0  # a storm kills as often as it was told to, however long the next relay takes to start
BUSY: Final = 0.85  # the share of the time for which the mail server's pace leaves something to send
WAVE_MIN_S: Final = 6.0
PEOPLE_PER_S: Final = 200.0
START_S: Final = 60.0
BREAKER_S: Final = 5.0
SLACK_S: Final = 30.0  # processes start, on a machine that is busy
STORIES_MAX: Final = 20
ORDERLY: Final = "every command ends in its time"


@dataclass(frozen=True)
class Options:
    """What a run is made of; with the seed it is all that a replay needs."""

    seed: int = 1
    servers: int = 6
    recipients: int = 5000
    faults: tuple[str, ...] = tuple(FAULTS)
    minutes: float = 1.0
    in_doubt: str = "hold"
    storm: int = 0
    lease_s: float = 2.0
    connections: int = 4
    every_s: float = 1.5
    dot_s: float = 0.0
    resolve_after_s: float = 0.0
    schedule: Path | None = None
    packages: tuple[Path, ...] = ()
    out: Path = RESULTS / "faults"

    @property
    def seconds(self) -> float:
        """How long faults come."""
        return self.minutes * 60

    @property
    def directory(self) -> Path:
        """Where the verdict is written."""
        return self.out / str(self.seed)

    @property
    def bound_s(self) -> float:
        """From the end of all faults to all settled: takeover, a silent reply and its retry, the breaker, the rest."""
        takeover_s = 3 * self.lease_s
        grace_s = DOUBT_GRACE_S + 2 * self.lease_s if self.in_doubt == "resend" else self.resolve_after_s
        rest_s = self.recipients / PEOPLE_PER_S
        return takeover_s + 2 * REPLY_S + RETRY_MAX_S + BREAKER_S + grace_s + rest_s + SLACK_S

    def strikes(self) -> list[Strike]:
        """The schedule: a verdict's that is replayed, a storm, or a mix."""
        if self.schedule is not None:
            rows = json.loads(self.schedule.read_text())["schedule"]
            return [Strike.of(row) for row in rows]
        if self.storm:
            return storm(self.seed, self.storm, seconds=self.seconds, servers=self.servers)
        shapes = {name: FAULTS[name].shape for name in self.faults}
        return plan(
            self.seed, self.faults, shapes,
            seconds=self.seconds, servers=self.servers, lease_s=self.lease_s, every_s=self.every_s,
        )  # fmt: skip

    def replay(self) -> str:
        """The command that runs this again."""
        words = ["python", "-m", "bench", "faults"]
        for name, usual in Options.__dataclass_fields__.items():
            value = getattr(self, name)
            if name == "seed" or (value != usual.default and name != "out"):
                words += _option(name, value)
        return shlex.join(words)

    def as_row(self) -> dict[str, Any]:
        """The arguments as a verdict keeps them."""
        return {name: _plain(getattr(self, name)) for name in Options.__dataclass_fields__ if name != "out"}


def _option(name: str, value: Any) -> list[str]:
    flag = {"packages": "--package", "every_s": "--every", "lease_s": "--lease"}.get(
        name, f"--{name.replace('_', '-')}"
    )
    flag = flag.removesuffix("-s")
    if name == "faults":
        return [flag, ",".join(value)]
    if name == "packages":
        return [word for one in value for word in (flag, str(one))]
    return [flag, str(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(eq=False)
class Run:
    """One run on its way; what it saw that is no fact of the database."""

    options: Options
    arena: Arena
    nemesis: Nemesis
    samples: Samples
    began_at: float = 0.0
    over_at: float = 0.0
    settled_at: float = 0.0
    unorderly: list[str] = field(default_factory=list)

    async def play(self) -> Record:
        """All phases; gives the record."""
        await self._start()
        self.began_at = time.time()
        helpers = [asyncio.create_task(work) for work in (self.samples.take(), self._crons(), self._person())]
        try:
            await self._first_message()
            self.began_at = time.time()
            await self.nemesis.run()
            left_s = self.began_at + self.options.seconds - time.time()
            await asyncio.sleep(max(left_s, 0))
            helpers.pop(1).cancel()
            await self._end_faults()
            await self._settle()
            for life in await self.arena.stop_relays():
                self.unorderly.append(f"relay {life.number} of server {life.host} on SIGTERM")
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        return await gather(
            self.arena, self.nemesis.done, self.samples, began_at=self.began_at, policy=self.options.in_doubt
        )

    async def _start(self) -> None:
        options = self.options
        await prepare(self.arena.postgres.url, options.recipients, waves=self._waves()[0])
        if options.seconds:
            self.arena.mail.per_s = options.recipients / (options.seconds * BUSY)
        self.arena.mail.dot_s = options.dot_s
        self.arena.patience_s = STORM_PATIENCE_S if options.storm else self.arena.patience_s
        for host in self.arena.hosts:
            await self.arena.keep_relay(host)
        if not await self.arena.all_stand(START_S):
            raise SystemExit(f"bench: the relays did not start; {options.directory}/server-0/log says why.")

    async def _first_message(self) -> None:
        """Faults come once there is something to send, however long that takes on a busy machine."""
        end = time.monotonic() + START_S
        while not self.arena.sink.messages and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _waves(self) -> tuple[int, float]:
        """How often crons fire, and after how long again: more servers take longer to start as many processes."""
        if self.options.storm:
            return 1, 3600.0
        every_s = max(WAVE_MIN_S, 2.0 * self.options.servers)
        return max(math.ceil(self.options.seconds / every_s), 1), every_s

    async def _crons(self) -> None:
        waves, every_s = self._waves()
        for wave in range(waves):
            await self.arena.sql("UPDATE hired SET wave = $1", wave)
            await asyncio.gather(*(self.arena.fire_cron(host) for host in self.arena.hosts))
            await asyncio.sleep(every_s)

    async def _person(self) -> None:
        """Resolves doubt that has lasted, by what the mail server has: a second copy is then never excused."""
        after_s = self.options.resolve_after_s
        while after_s:
            await asyncio.sleep(0.2)
            for decision, arrived in ((Decision.SENT, True), (Decision.RESEND, False)):
                rows = await self.arena.sql(DOUBTFUL, after_s)
                keys = [row["key"] for row in rows if (row["recipient"] in self.arena.sink.addresses) is arrived]
                if keys:
                    await self.arena.with_admin(partial(resolve, keys=keys, decision=decision))

    async def _end_faults(self) -> None:
        self.arena.heal()
        await self.arena.sql(NOT_FULL)
        await self.arena.sql("UPDATE hired SET wave = $1", self._waves()[0])
        self.over_at = time.time()

    async def _settle(self) -> None:
        """A last generate, then wait until nothing is open, at most the bound."""
        end = self.over_at + self.options.bound_s
        await self._finish_crons(end)
        last = self.arena.hosts[self.options.seed % len(self.arena.hosts)]
        code = await self._ended(await self.arena.run(last, "generate", "generate"), end)
        if code != 0:
            self.unorderly.append(f"the last generate, on server {last.number}: exit code {code}")
        open_states = ["pending", "sending", *(["in_doubt"] if self.options.in_doubt == "resend" else [])]
        while time.time() < end:
            (row,) = await self.arena.sql(OPEN, open_states)
            if row["open"] == 0 and not self.arena.mail.waiting:
                break
            await asyncio.sleep(0.05)
        self.settled_at = time.time()

    async def _finish_crons(self, end: float) -> None:
        for host in self.arena.hosts:
            while host.cron is not None and host.cron.is_alive:
                if await self._ended(host.cron, end) is None:
                    self.unorderly.append(f"generate {host.cron.number} of server {host.number}")
                    break
                await asyncio.sleep(0)

    async def _ended(self, life: Life, end: float) -> int | None:
        """Its exit code, or None when it had to be killed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(end - time.time(), 0.1)):
                while life.is_alive:
                    await asyncio.sleep(0.05)
            return life.process.returncode
        life.end("the bound", 9)
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


@dataclass(frozen=True)
class Verdict:
    """How a run ended, as it is written down."""

    options: Options
    violations: list[Violation]
    row: dict[str, Any]

    @property
    def is_kept(self) -> bool:
        """Whether the promise was kept."""
        return not self.violations


def judge(run: Run, record: Record) -> Verdict:
    """Check, count, write verdict.json and timeline.svg."""
    violations = check(record.facts)
    if run.unorderly:
        violations.append(Violation(ORDERLY, tuple(run.unorderly)))
    options = run.options
    row = {
        "kept": not violations,
        "replay": options.replay(),
        "violations": [{"law": one.law, "addresses": list(one.addresses)} for one in violations],
        "figures": {
            **figures(record.facts),
            **record.kills(),
            "doubts": len(record.doubts()),
            "faults_s": round(run.over_at - run.began_at, 2),
            "settled_s": round(run.settled_at - run.over_at, 2),
            "settled_bound_s": round(options.bound_s, 2),
        },
        "stories": {address: record.story(address) for one in violations for address in one.addresses[:STORIES_MAX]},
        "doubts_by_fault": record.doubts_by_fault(),
        "moods_met": dict(sorted(record.arena.mail.met.items())),
        "tracebacks": _tracebacks(record),
        "arguments": options.as_row(),
        "schedule": [struck.as_row() for struck in record.strikes],
    }
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "verdict.json").write_text(json.dumps(row, indent=1) + "\n")
    (options.directory / "timeline.svg").write_text(_picture(run, record, row))
    return Verdict(options, violations, row)


def _tracebacks(record: Record) -> dict[str, int]:
    logs = {host.number: (host.directory / "log") for host in record.arena.hosts}
    counts = {f"server-{n}": log.read_text(errors="replace").count("Traceback (") for n, log in logs.items()}
    return {name: count for name, count in counts.items() if count}


def _picture(run: Run, record: Record, row: dict[str, Any]) -> str:
    options, counted = run.options, row["figures"]
    title = f"seed {options.seed}: {'kept' if row['kept'] else ', '.join(v['law'] for v in row['violations'])}"
    subtitle = (
        f"{options.servers} servers, {counted['recipients']} recipients, {len(record.strikes)} faults: "
        f"{counted['accepted']} accepted, {counted['twice']} twice, {counted['lost']} lost, "
        f"{counted['in_doubt']} in doubt, {counted['dead']} dead; settled {counted['settled_s']:.1f} s after the last"
    )
    over_s, settled_s = run.over_at - run.began_at, run.settled_at - run.began_at
    return draw(
        title, subtitle, record.lanes(), ends_s=settled_s + 0.5,
        notes=[(over_s, "faults over"), (settled_s, "settled")],
    )  # fmt: skip


async def play(server: Server, options: Options) -> Verdict:
    """One run on a Postgres of its own."""
    options.directory.mkdir(parents=True, exist_ok=True)
    for old in options.directory.glob("server-*/log"):
        old.unlink()
    async with arena(
        server,
        options.directory,
        seed=options.seed,
        servers=options.servers,
        lease_s=options.lease_s,
        connections=options.connections,
        in_doubt=options.in_doubt,
        packages=options.packages,
    ) as place:
        run = Run(options, place, Nemesis(place, options.strikes()), Samples(place))
        return judge(run, await run.play())


def run_one(options: Options) -> Verdict:
    """One run, with everything that it needs made for it and taken away afterwards."""
    settings = {"max_connections": str(20 + 8 * options.servers), "shared_buffers": "64MB"}
    with postgres(settings=settings) as server:
        return asyncio.run(play(server, options))
