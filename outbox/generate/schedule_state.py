"""State of the schedules: each report's latest tick, the edition that it starts, and the outcome.

The fleet keeps one row per report. The database's clock decides what the latest tick is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import Any, Final

from outbox.database.connection import Connection
from outbox.reports.period import Cadence, Covers, first_instant, period_at
from outbox.settings import EditionSettings, FirstTick, Settings, duration_s
from outbox.suggestions import times

# A tick that lies so far ahead was taken up when the database's clock was wrong, and does not count.
AHEAD_MAX: Final = timedelta(days=1)
FAILING_PATIENCE: Final = timedelta(hours=1)  # of a digest, with a report that fails
NAMED_MAX: Final = 10  # periods

READ: Final = """
SELECT now() AS now, n.report, s.tick_at, s.done_at, s.failures, s.retry_at, s.said, s.since,
       CASE WHEN s.report IS NULL
            THEN ARRAY(SELECT e.period FROM outbox.edition e
                        WHERE e.report = n.report AND e.done_elsewhere_at IS NULL) END AS made
  FROM unnest($1::text[]) AS n (report) LEFT JOIN outbox.schedule s ON s.report = n.report
"""


class Standing(StrEnum):
    """State of a tick."""

    DONE = "done"
    DUE = "due"  # it is to be started, or is in flight
    FAILING = "failing"
    MISSED = "missed"  # catch_up was over before it was done
    NEW = "new"  # it came before the schedule was followed


@dataclass(frozen=True, slots=True)
class Row:
    """The latest tick that the fleet has taken up; ticks up to `since` came before the schedule was followed."""

    tick_at: datetime
    done_at: datetime | None
    failures: int
    retry_at: datetime
    said: str | None
    since: datetime | None = None

    @property
    def failed(self) -> str:
        """Return how often its generate failed, and why the last time."""
        return f"failed {times(self.failures)}: {(self.said or '').rstrip('.')}"


@dataclass(frozen=True, slots=True)
class Tick:
    """A moment of a schedule, in UTC, and the key of the period whose edition it starts."""

    at: datetime
    period: str


@dataclass(frozen=True, slots=True)
class Latest:
    """The latest tick, its state, the end of its catch_up, and the fleet's row if that is about this tick."""

    tick: Tick
    standing: Standing
    until: datetime
    row: Row | None


@dataclass(frozen=True, slots=True)
class Agenda:
    """One report's schedule at a moment of the database's clock."""

    name: str
    report: EditionSettings
    now: datetime
    last: Latest | None
    ticks: list[Tick]
    """The next ones."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it for scripts; times are UTC."""
        last: dict[str, Any] | None = None
        if self.last is not None:
            row = self.last.row
            last = {
                "tick_at": self.last.tick.at,
                "period": self.last.tick.period,
                "state": self.last.standing,
                "caught_up_until": self.last.until,
                "done_at": row and row.done_at,
                "failures": row.failures if row else 0,
                "retry_at": row.retry_at if row and self.last.standing is Standing.FAILING else None,
                "said": row and row.said,
            }
        return {
            "report": self.name,
            "schedule": self.report.schedule,
            "timezone": self.report.timezone,
            "last": last,
            "next": [{"tick_at": tick.at, "period": tick.period} for tick in self.ticks],
        }


async def look(connection: Connection, settings: Settings, names: Sequence[str], count: int) -> list[Agenda]:
    """Return the state of these reports' schedules, and their next `count` ticks."""
    if not names:
        return []
    seen = await read(connection, names)
    now, found = seen.now, []
    for name in names:
        report = settings.report(name)
        last = seen.latest(name, report)
        found.append(Agenda(name, report, now, last, upcoming(report, now, count)))
    return found


@dataclass(frozen=True, slots=True)
class Seen:
    """Rows of the schedules at one moment of the database's clock, and the schedules that have none yet (`new`).

    A new schedule comes with the periods of the editions that outbox has made of its report, by cron or by hand.
    """

    now: datetime
    rows: Mapping[str, Row]
    new: Mapping[str, frozenset[str]]

    def latest(self, name: str, report: EditionSettings) -> "Latest | None":
        """Return the latest tick of a report's schedule (see `latest`).

        An edition that outbox has begun is its own to finish, although the schedule is new.
        """
        found = latest(report, self.rows.get(name), self.now, is_new=name in self.new)
        if found is not None and found.tick.period in self.new.get(name, ()):
            return latest(report, self.rows.get(name), self.now)
        return found

    def is_too_early_for_digest(self, digest: Latest, reports: Mapping[str, EditionSettings]) -> bool:
        """Return True if a report that a digest is to name is still to be made: it ticked before, and is not done.

        One that fails is waited for during `FAILING_PATIENCE` only, since it may fail for a single recipient for days.
        """
        ticks = [self.latest(name, report) for name, report in reports.items() if report.is_collected]
        waited_for = {Standing.DUE}
        if self.now < digest.tick.at + FAILING_PATIENCE:
            waited_for.add(Standing.FAILING)
        return any(one.tick.at <= digest.tick.at and one.standing in waited_for for one in ticks if one is not None)


async def read(connection: Connection, reports: Iterable[str]) -> Seen:
    """Return the rows of these reports (at least one)."""
    rows = await connection.fetch(READ, list(reports))
    known = {
        row["report"]: Row(row["tick_at"], row["done_at"], row["failures"], row["retry_at"], row["said"], row["since"])
        for row in rows
        if row["tick_at"] is not None
    }
    new = {row["report"]: frozenset(row["made"]) for row in rows if row["made"] is not None}
    return Seen(rows[0]["now"], known, new)


def scheduled(settings: Settings) -> Mapping[str, EditionSettings]:
    """Return the reports that have a schedule; the digest may be one."""
    return {name: report for name, report in settings.editions.items() if report.schedule is not None}


def latest(report: EditionSettings, row: Row | None, now: datetime, *, is_new: bool = False) -> Latest | None:
    """Return the latest tick of a report's schedule, or of the fleet's where another server's schedule was later.

    `is_new` is a schedule that no relay has followed yet: unless the settings ask for the latest tick, it starts with
    the next one, since another system may have made the edition of the latest. None if there never was a tick.
    """
    assert report.ticks is not None
    at = report.ticks.latest(now)
    if row is not None and row.tick_at > now + AHEAD_MAX:
        row = None
    if row is not None and (at is None or row.tick_at >= at):
        tick = tick_of(report, row.tick_at)
        until = caught_up_until(report, tick)
        return Latest(tick, _standing(row, now, until), until, row)
    if at is None:
        return None
    until = caught_up_until(report, tick := tick_of(report, at))
    if row is None and is_new and report.first_tick is FirstTick.NEXT:
        return Latest(tick, Standing.NEW, until, None)
    if row is not None and row.since is not None and at <= row.since:
        return Latest(tick, Standing.NEW, until, None)
    late = Standing.NEW if row is None else Standing.MISSED
    return Latest(tick, Standing.DUE if now < until else late, until, None)


def _standing(row: Row, now: datetime, until: datetime) -> Standing:
    if row.since is not None and row.tick_at <= row.since:
        return Standing.NEW
    if row.done_at is not None:
        return Standing.DONE
    if now >= until:
        return Standing.MISSED
    return Standing.FAILING if row.failures else Standing.DUE


def tick_of(report: EditionSettings, at: datetime) -> Tick:
    """Return the tick at that moment: its edition is that of the moment, however late it is started."""
    return Tick(at, period_at(at, cadence=report.cadence, timezone=report.zone, covers=report.covers).key)


def caught_up_until(report: EditionSettings, tick: Tick) -> datetime:
    """Return when it is too late to start the edition of a tick: after `catch_up`, or one cadence of civil time."""
    if report.catch_up is not None:
        return tick.at + timedelta(seconds=duration_s(report.catch_up))
    days = {Cadence.DAILY: 1, Cadence.WEEKLY: 7, Cadence.MONTHLY: 31}[report.cadence]
    civil = tick.at.astimezone(report.zone).replace(tzinfo=None, fold=0)
    return first_instant(civil + timedelta(days=days), report.zone)


def upcoming(report: EditionSettings, now: datetime, count: int) -> list[Tick]:
    """Return the next `count` ticks after `now`."""
    assert report.ticks is not None
    return [tick_of(report, at) for at in islice(report.ticks.after(now), count)]


def passed_over(report: EditionSettings, row: Row, tick: Tick) -> list[str]:
    """Return the periods between the fleet's row and `tick` that will not be started, at most `NAMED_MAX`.

    Only the latest tick is caught up with; a person decides about those before it.
    """
    assert report.ticks is not None
    found: list[str] = []
    at = row.tick_at if row.done_at is None else _after(report, row.tick_at)
    while at is not None and at < tick.at and len(found) < NAMED_MAX:
        key = tick_of(report, at).period
        done = row.done_at is not None and key == tick_of(report, row.tick_at).period
        if key != tick.period and not done:
            found.append(key)
        at = _after(report, _last_moment(report, at))
    return found


def _after(report: EditionSettings, moment: datetime) -> datetime | None:
    return next((tick.at for tick in upcoming(report, moment, 1)), None)


def _last_moment(report: EditionSettings, at: datetime) -> datetime:
    """Return the last moment whose tick would start the same edition as one at `at`."""
    running = period_at(at, cadence=report.cadence, timezone=report.zone, covers=Covers.CURRENT)
    return running.ends_at - timedelta(microseconds=1)
