"""Scheduler: starts `outbox generate` when a report's schedule ticks, as this server's cron would.

Every relay process runs one beside its relays, and they meet in the database like crons: generate shares the work by
its bucket locks, and the unique key has the last word. The row of a report in `outbox.schedule` says which tick was
taken up and whether it is done, so that a fleet that was down at a tick, or whose generate failed, comes back to it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.errors import OutboxError
from outbox.generate.child_process import run_child
from outbox.generate.schedule_state import (
    Latest,
    Row,
    Seen,
    Standing,
    passed_over,
    read,
    scheduled,
    upcoming,
)
from outbox.generate.schedule_table import SILENCE_MAX_S, follow, record_outcome, schedule_connection, take_up
from outbox.log import Events
from outbox.settings import DIGEST, EditionSettings, Settings, command_of

log = Events("outbox.starter")

LOOK_MAX_S: Final = 30.0  # the database's clock may jump, and a machine may sleep
LOOK_MIN_S: Final = 0.05
RETRY_FIRST_S: Final = 1.0  # after a look that failed; doubles up to LOOK_MAX_S
EARLY_S: Final = 2.0  # until a digest looks again whether its reports are made
AT_ONCE_MAX: Final = 4  # generates in flight on this server

_Edition = tuple[str, str]  # a report and a period


class Scheduler:
    """Scheduler of the reports of one server's settings.

    `command` is how `outbox` is run with these settings, up to the name of its command.
    """

    def __init__(self, settings: Settings, command: Sequence[str]) -> None:
        settings.require("database_url", "sender")
        self._settings = settings
        self._command = command
        self._reports = scheduled(settings)
        self._in_flight: dict[_Edition, asyncio.Task[None]] = {}
        self._tried: dict[str, datetime] = {}
        """Latest tick of each report that this server has started."""
        self._missed: dict[str, datetime] = {}
        """Latest tick of each report that was logged as missed."""
        self._wake = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Start nothing more; what is in flight goes on until `run` is cancelled."""
        self._stopping = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run as long as the block."""
        task = asyncio.get_running_loop().create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def run(self) -> None:
        """Start what is due until cancelled, and end what is in flight then: others finish it, or the next start does.

        An error of the database is logged, and the look is repeated.
        """
        try:
            retry_s, logged = RETRY_FIRST_S, ""
            while True:
                self._wake.clear()
                try:
                    wait_s = await self._look()
                    retry_s, logged = RETRY_FIRST_S, ""
                except Exception as error:  # noqa: BLE001 - the outermost loop: mail must go on whatever happens here
                    reason = str(error) or type(error).__name__
                    if reason != logged:
                        _log_failed_look(error, reason)
                    wait_s, logged, retry_s = retry_s, reason, min(2 * retry_s, LOOK_MAX_S)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait_s)
        finally:
            in_flight = list(self._in_flight.values())
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    async def _look(self) -> float:
        """Start what is due now; return the seconds until the next look."""
        if self._stopping:
            return LOOK_MAX_S
        async with schedule_connection(self._settings) as connection:
            seen = await read(connection, self._reports)
            now = seen.now
            looked_at = time.monotonic()
            moments = [now + timedelta(seconds=LOOK_MAX_S)]
            for name, report in self._reports.items():
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
        now = seen.now
        if found.standing is Standing.MISSED:
            self._warn_missed(name, found)
        if found.standing not in (Standing.DUE, Standing.FAILING) or (name, found.tick.period) in self._in_flight:
            return []
        # The cause of another server's failure may be that server: each tries once by itself before it waits.
        if found.row is not None and self._tried.get(name) == found.tick.at and found.row.retry_at > now:
            return [found.row.retry_at]
        if name == DIGEST and seen.is_too_early_for_digest(found, self._reports):
            return [now + timedelta(seconds=EARLY_S)]
        if len(self._in_flight) >= AT_ONCE_MAX:
            return []  # the next one that ends wakes the loop
        if found.row is None:
            await self._take_up(connection, name, found, seen.rows.get(name))
        self._start(name, found, now)
        return []

    def _start(self, name: str, found: Latest, now: datetime) -> None:
        """Start generate for the edition of a tick."""
        self._tried[name] = found.tick.at
        failures = found.row.failures if found.row is not None else 0
        edition = (name, found.tick.period)
        log.info(
            "schedule_ticked",
            "{report} {period}: its schedule ticked at {tick}, generating",
            report=name,
            period=found.tick.period,
            tick=_civil(found.tick.at, self._reports[name]),
        )
        left_s = max((found.until - now).total_seconds(), 1.0)
        task = asyncio.get_running_loop().create_task(self._make(edition, found.tick.at, failures, left_s))
        self._in_flight[edition] = task
        task.add_done_callback(partial(self._ended, edition))

    async def _follow(self, connection: Connection, name: str, found: Latest | None, now: datetime) -> None:
        """Begin to follow a new schedule: its next tick is the first."""
        if not await follow(connection, name, now if found is None else found.tick.at):
            return
        report = self._reports[name]
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
                command=" ".join(command_of(name)),
                period=found.tick.period,
                tick=_civil(found.tick.at, report),
            )

    async def _take_up(self, connection: Connection, name: str, found: Latest, row: Row | None) -> None:
        """Take up a tick, and log the periods that are passed over with it."""
        is_taken = await take_up(connection, name, found.tick.at)
        if is_taken and row is not None and (left := passed_over(self._reports[name], row, found.tick)):
            log.warning(
                "schedule_passed_over",
                "{report}: nothing was started, or finished, for {periods}; only the latest tick is caught up with, so "
                "run `outbox {command} --period …` for those that are wanted",
                report=name,
                command=" ".join(command_of(name)),
                periods=", ".join(left),
            )

    def _warn_missed(self, name: str, found: Latest) -> None:
        if self._missed.get(name) == found.tick.at:
            return
        self._missed[name] = found.tick.at
        report = self._reports[name]
        log.warning(
            "schedule_missed",
            "{report} {period}: its schedule ticked at {tick} and it was not done by {until} (catch_up), so it is "
            "missed; run `outbox {command} --period {period}` if it is wanted",
            report=name,
            command=" ".join(command_of(name)),
            period=found.tick.period,
            tick=_civil(found.tick.at, report),
            until=_civil(found.until, report),
        )

    def _ended(self, edition: _Edition, task: "asyncio.Task[None]") -> None:
        del self._in_flight[edition]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            name, period = edition
            log.error(
                "fault",
                "{report} {period}: its generate was lost sight of: {error!r}",
                report=name,
                period=period,
                error=error,
            )

    async def _make(self, edition: _Edition, tick_at: datetime, failures: int, left_s: float) -> None:
        """Run one generate, and record its outcome. One that hangs is ended when its catch_up is over.

        Killed at any moment, generate leaves nothing half done.
        """
        name, period = edition
        try:
            async with asyncio.timeout(left_s):
                command = [*self._command, *command_of(name), "--period", period]
                problem = await run_child(command, partial(_log_line, f"{name} {period}"))
        except TimeoutError:
            problem = "it was not done when catch_up was over, and was ended"
        except OSError as error:
            problem = f"outbox cannot be started: {error.strerror or error}"
        problem = problem and _without_name(f"{name} {period}", problem)
        try:
            async with schedule_connection(self._settings) as connection:
                await record_outcome(connection, name, tick_at, failures=failures, problem=problem)
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


def _log_failed_look(error: Exception, reason: str) -> None:
    is_known = isinstance(error, (OutboxError, asyncpg.PostgresError, *LOST_SESSION))
    write = log.warning if is_known else log.exception
    write("schedules_unseen", "the schedules cannot be looked at, trying again: {reason}", reason=reason)


def _civil(at: datetime, report: EditionSettings) -> str:
    return f"{at.astimezone(report.zone):%Y-%m-%d %H:%M %Z}"


def _log_line(edition: str, level: int, line: str) -> None:
    write = log.warning if level >= logging.WARNING else log.info
    write("generate_said", "{edition}: {line}", edition=edition, line=_without_name(edition, line))


def _without_name(edition: str, line: str) -> str:
    """Return the line without the edition's name, where it begins with it."""
    return line.removeprefix(f"{edition}: ").removeprefix(f"{edition}, ")
