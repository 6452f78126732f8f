"""Beside the corridor of sending: starts `outbox generate` when a report's schedule ticks, as this server's cron would.

Every relay does so, and they meet in the database like crons: generate shares the work by its bucket locks, and the
unique key has the last word. The row of a report in `outbox.schedule` says which tick was taken up and whether it is
done, so that a fleet that slept through a tick, or whose generate failed, comes back to it.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.lock_wait import lock_waits
from outbox.database.opening import connect
from outbox.database.values import storable
from outbox.errors import OutboxError
from outbox.generate.schedule_state import (
    AHEAD_MAX,
    Latest,
    Row,
    Seen,
    Standing,
    making,
    passed_over,
    read,
    scheduled,
    upcoming,
)
from outbox.log import Events
from outbox.settings import DIGEST, EditionSettings, Settings

log = Events("outbox.starter")

LOOK_MAX_S: Final = 30.0  # the database's clock may jump, and a machine may sleep
LOOK_MIN_S: Final = 0.05
TROUBLE_FIRST_S: Final = 1.0
LOCK_MAX_S: Final = 5.0
SILENCE_MAX_S: Final = 10.0  # a Postgres that does not answer for so long is asked over a new connection
AGAIN_FIRST_S: Final = 60.0  # after a generate that failed; doubles up to
AGAIN_MAX_S: Final = 3600.0
FAILING_PATIENCE: Final = timedelta(hours=1)  # of a digest, with a report that fails
EARLY_S: Final = 2.0  # until a digest looks again whether its reports are made
AT_ONCE_MAX: Final = 4  # generates under way on this server
STOP_S: Final = 5.0  # what a generate gets to end in
LINES_MAX: Final = 20  # of one generate that are logged
LINE_MAX: Final = 1000  # characters

# Relays race to take up a tick; all but the first find it taken up, and start it as well.
TAKE_UP: Final = """
INSERT INTO outbox.schedule AS s (report, tick_at) VALUES ($1, $2)
ON CONFLICT (report) DO UPDATE
   SET tick_at = excluded.tick_at, done_at = NULL, failures = 0, retry_at = now(), said = NULL
 WHERE s.tick_at < excluded.tick_at OR s.tick_at > now() + $3::interval
RETURNING s.tick_at
"""

# A new schedule starts with its next tick: $2 is the latest before.
FOLLOW: Final = """
INSERT INTO outbox.schedule (report, tick_at, done_at, since) VALUES ($1, $2, now(), now())
ON CONFLICT (report) DO NOTHING RETURNING report
"""

DONE: Final = """
UPDATE outbox.schedule SET done_at = now(), said = NULL WHERE report = $1 AND tick_at = $2 AND done_at IS NULL
"""

# Failures of several relays at once count as one: each has seen the same number before.
FAILED: Final = """
UPDATE outbox.schedule
   SET failures = failures + 1, said = $4,
       retry_at = now() + make_interval(secs => least($5::float8 * 2 ^ least(failures, 30), $6::float8))
 WHERE report = $1 AND tick_at = $2 AND done_at IS NULL AND failures = $3
"""

_Under = tuple[str, str]  # a report and a period


class Starter:
    """The schedules of one relay's settings; `command` is how `outbox` is run with them, before its command's name."""

    def __init__(self, settings: Settings, command: Sequence[str]) -> None:
        settings.require("database_url", "sender")
        self.settings = settings
        self.command = command
        self.reports = scheduled(settings)
        self._under_way: dict[_Under, asyncio.Task[None]] = {}
        self._tried: dict[str, datetime] = {}
        self._missed: dict[str, datetime] = {}
        self._wake = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Start nothing more; what is under way goes on until `run` is cancelled."""
        self._stopping = True

    async def run(self) -> None:
        """Start what is due until cancelled, and end what is under way then: others finish it, or the next start does.

        Trouble with the database is outlived.
        """
        try:
            trouble_s, said = TROUBLE_FIRST_S, ""
            while True:
                self._wake.clear()
                try:
                    wait_s = await self._look()
                    trouble_s, said = TROUBLE_FIRST_S, ""
                except Exception as error:  # noqa: BLE001 - the outermost loop: mail must go on whatever happens here
                    known = isinstance(error, (OutboxError, asyncpg.PostgresError, *LOST_SESSION))
                    if (reason := str(error) or type(error).__name__) != said:
                        say = log.warning if known else log.exception
                        say(
                            "schedules_unseen",
                            "the schedules cannot be looked at, trying again: {reason}",
                            reason=reason,
                        )
                    wait_s, said, trouble_s = trouble_s, reason, min(2 * trouble_s, LOOK_MAX_S)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait_s)
        finally:
            under_way = list(self._under_way.values())
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _look(self) -> float:
        """Start what is due now; gives the seconds until the next look."""
        if self._stopping:
            return LOOK_MAX_S
        async with self._connected() as connection:
            seen = await read(connection, self.reports)
            now = seen.now
            looked_at = time.monotonic()
            moments = [now + timedelta(seconds=LOOK_MAX_S)]
            for name, report in self.reports.items():
                found = seen.latest(name, report)
                if name in seen.new and (found is None or found.standing is Standing.NEW):
                    await self._follow(connection, name, found, now)
                elif found is not None:
                    moments += await self._consider(connection, name, found, seen)
                moments += [tick.at for tick in upcoming(report, now, 1)]
        passed_s = time.monotonic() - looked_at
        return max((min(moments) - now).total_seconds() - passed_s, LOOK_MIN_S)

    async def _consider(self, connection: Connection, name: str, found: Latest, seen: Seen) -> list[datetime]:
        """Start the latest tick of a report if it is due; return the moment at which it will be, if that is known."""
        now, row = seen.now, seen.rows.get(name)
        if found.standing is Standing.MISSED:
            self._say_missed(name, found)
        if found.standing not in (Standing.DUE, Standing.FAILING) or (name, found.tick.period) in self._under_way:
            return []
        # Another server's failure may be its own fault: each tries once by itself before it waits.
        if found.row is not None and self._tried.get(name) == found.tick.at and found.row.retry_at > now:
            return [found.row.retry_at]
        if name == DIGEST and self._is_too_early(found, seen):
            return [now + timedelta(seconds=EARLY_S)]
        if len(self._under_way) >= AT_ONCE_MAX:
            return []  # the next that ends wakes us
        if found.row is None:
            await self._take_up(connection, name, found, row)
        self._tried[name] = found.tick.at
        failures = found.row.failures if found.row is not None else 0
        under = (name, found.tick.period)
        log.info(
            "schedule_ticked",
            "{report} {period}: its schedule ticked at {tick}, generating",
            report=name,
            period=found.tick.period,
            tick=_civil(found.tick.at, self.reports[name]),
        )
        left_s = max((found.until - now).total_seconds(), 1.0)
        task = asyncio.get_running_loop().create_task(self._make(under, found.tick.at, failures, left_s))
        self._under_way[under] = task
        task.add_done_callback(partial(self._ended, under))
        return []

    def _is_too_early(self, found: Latest, seen: Seen) -> bool:
        """Whether a report that the digest is to tell of is still to be made: it ticked before, and is not done.

        One that fails is waited for a while only, since it may fail for a single recipient for days.
        """
        collected = [(name, report) for name, report in self.reports.items() if report.is_collected]
        before = [seen.latest(name, report) for name, report in collected]
        waited_for = {Standing.DUE} | ({Standing.FAILING} if seen.now < found.tick.at + FAILING_PATIENCE else set())
        return any(one.tick.at <= found.tick.at and one.standing in waited_for for one in before if one is not None)

    async def _follow(self, connection: Connection, name: str, found: Latest | None, now: datetime) -> None:
        """Begin to follow a new schedule: its next tick is the first."""
        if await connection.fetchval(FOLLOW, name, now if found is None else found.tick.at) is None:
            return  # another relay was first
        report = self.reports[name]
        first = [_civil(tick.at, report) for tick in upcoming(report, now, 1)]
        log.info(
            "schedule_new",
            "{report}: its schedule is followed from now on, with the next tick: {first}",
            report=name,
            first=", ".join(first),
        )
        if found is not None:
            log.info(
                "schedule_new",
                "{report} {period}: no relay makes it, since its tick at {tick} came before the schedule was followed; "
                "run `outbox {command} --period {period}` if no other system has made it",
                report=name,
                command=" ".join(making(name)),
                period=found.tick.period,
                tick=_civil(found.tick.at, report),
            )

    async def _take_up(self, connection: Connection, name: str, found: Latest, row: Row | None) -> None:
        taken = await connection.fetchval(TAKE_UP, name, found.tick.at, AHEAD_MAX)
        if taken and row is not None and (left := passed_over(self.reports[name], row, found.tick)):
            log.warning(
                "schedule_passed_over",
                "{report}: nothing was started, or finished, for {periods}; only the latest tick is caught up with, so "
                "run `outbox {command} --period …` for those that are wanted",
                report=name,
                command=" ".join(making(name)),
                periods=", ".join(left),
            )

    def _say_missed(self, name: str, found: Latest) -> None:
        if self._missed.get(name) == found.tick.at:
            return
        self._missed[name] = found.tick.at
        report = self.reports[name]
        log.warning(
            "schedule_missed",
            "{report} {period}: its schedule ticked at {tick} and it was not done by {until} (catch_up), so it is "
            "missed; run `outbox {command} --period {period}` if it is wanted",
            report=name,
            command=" ".join(making(name)),
            period=found.tick.period,
            tick=_civil(found.tick.at, report),
            until=_civil(found.until, report),
        )

    def _ended(self, under: _Under, task: "asyncio.Task[None]") -> None:
        del self._under_way[under]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            name, period = under
            log.error(
                "fault",
                "{report} {period}: its generate was lost sight of: {error!r}",
                report=name,
                period=period,
                error=error,
            )

    async def _make(self, under: _Under, tick_at: datetime, failures: int, left_s: float) -> None:
        """One generate, and what became of it written down. One that hangs is ended when its catch_up is over."""
        name, period = under
        try:
            say = partial(_say, f"{name} {period}")
            async with asyncio.timeout(left_s):
                fault = await run_child([*self.command, *making(name), "--period", period], say)
        except TimeoutError:
            fault = "it was not done when catch_up was over, and was ended"
        except OSError as error:
            fault = f"outbox cannot be started: {error.strerror or error}"
        try:
            async with self._connected() as connection:
                if fault is None:
                    await connection.execute(DONE, name, tick_at)
                else:
                    values = (storable(_beyond_name(f"{name} {period}", fault)), AGAIN_FIRST_S, AGAIN_MAX_S)
                    await connection.execute(FAILED, name, tick_at, failures, *values)
        except (OutboxError, asyncpg.PostgresError, *LOST_SESSION) as error:
            # It is found not done, and made again, which repeats nothing.
            log.warning(
                "schedule_unwritten",
                "{report} {period}: what became of it could not be written: {reason}",
                report=name,
                period=period,
                reason=str(error) or type(error).__name__,
            )
            await asyncio.sleep(SILENCE_MAX_S)

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Run as long as what is inside."""
        running = asyncio.get_running_loop().create_task(self.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        """A short connection of our own; one that falls silent is ended, since a cancel would wait for its answer.

        Raises:
            DatabaseUnavailableError: no connection, or others hold a row for longer than `LOCK_MAX_S`.

        """
        url = self.settings.database_url
        assert url is not None
        limits = {"statement_timeout": str(int(SILENCE_MAX_S * 1000)), "lock_timeout": str(int(LOCK_MAX_S * 1000))}
        connection = await connect(url, application="outbox schedule", settings=limits)
        try:
            with connection.end_if_silent(SILENCE_MAX_S):
                async with lock_waits(url, connection, "The schedule"):
                    yield connection
                await connection.close(timeout=SILENCE_MAX_S)
        finally:
            if not connection.is_closed():
                connection.terminate()


def _civil(at: datetime, report: EditionSettings) -> str:
    return f"{at.astimezone(report.zone):%Y-%m-%d %H:%M %Z}"


def _say(edition: str, level: int, line: str) -> None:
    say = log.warning if level >= logging.WARNING else log.info
    say("generate_said", "{edition}: {line}", edition=edition, line=_beyond_name(edition, line))


def _beyond_name(edition: str, line: str) -> str:
    """The line without the edition's name, where it begins with it."""
    return line.removeprefix(f"{edition}: ").removeprefix(f"{edition}, ")


async def run_child(command: Sequence[str], say: Callable[[int, str], None]) -> str | None:
    """Run a command to its end: None if it exits with 0, else the last sentence that it said.

    `say` is given its lines as they come, with a level of `logging`. Cancelled, it ends the child. The child hears no
    Ctrl-C of ours, and does not outlive us (Linux).

    Raises:
        OSError: it cannot be started.

    """
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_leash(os.getpid()),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    heard: list[str] = []
    try:
        await asyncio.gather(
            _listen(child.stdout, partial(say, logging.INFO), []),
            _listen(child.stderr, partial(say, logging.WARNING), heard),
        )
        code = await child.wait()
    finally:
        await asyncio.shield(_end(child))
    if code == 0:
        return None
    if code < 0:
        return f"outbox was ended by {_name(-code)}"
    return heard[-1] if heard else f"outbox ended with {code} and said nothing"


async def _listen(stream: asyncio.StreamReader, say: Callable[[str], None], heard: list[str]) -> None:
    """Say the first lines of a stream as they come, and keep the last one in `heard`."""
    count = 0
    async for line in _lines(stream):
        count += 1
        heard[:] = [line]
        if count <= LINES_MAX:
            say(line)
    if count > LINES_MAX:
        say(f"… and {count - LINES_MAX} more lines")


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a stream, however long they are, without the program's name; what is beyond LINE_MAX is left out."""
    rest = b""
    while piece := await stream.read(65_536):
        *whole, rest = (rest + piece).split(b"\n")
        for line in _spoken(whole):
            yield line
        rest = rest[: 4 * LINE_MAX]
    for line in _spoken([rest]):
        yield line


def _spoken(lines: Iterable[bytes]) -> list[str]:
    said = [line.decode(errors="replace").strip().removeprefix("outbox: ") for line in lines]
    return [line[:LINE_MAX] for line in said if line]


async def _end(child: asyncio.subprocess.Process) -> None:
    """End a child that still runs. Killed at any moment, generate leaves nothing half done."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if child.returncode is not None:
            return
        with suppress(ProcessLookupError):
            child.send_signal(signum)
        with suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), STOP_S)


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _leash(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program, so that it is ended when we die, whatever we die of (prctl(2))."""
    if sys.platform != "linux":
        return None
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    set_parent_death_signal = 1

    def leash() -> None:
        libc.prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # we died in between
            os._exit(1)

    return leash
