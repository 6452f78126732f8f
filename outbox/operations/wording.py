"""Words for the facts of a snapshot, the same in a terminal and on the board: plain lines without colours or markup."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo

from outbox.database.pause_list import Pause
from outbox.mail.removed_message import LOST, PRUNED
from outbox.operations.attention import concerns_of
from outbox.operations.deferrals import GROUPS_MAX
from outbox.operations.email_counts import Waiting
from outbox.operations.snapshot import EditionOutcome, Snapshot
from outbox.reports.period import spoken_time
from outbox.settings import Settings

SECONDS_MAX: Final = 100  # a longer duration is shown in minutes
MINUTES_MAX: Final = 60
HOURS_MAX: Final = 48


class Level(StrEnum):
    """Importance of a line: BAD needs a person, WARN may, SOFT is a remark."""

    BAD = "bad"
    WARN = "warn"
    PLAIN = ""
    SOFT = "soft"


@dataclass(frozen=True, slots=True)
class Frame:
    """Settings that are shown with a snapshot: timezones of reports, limits, and the address of all redirected mail."""

    zones: Mapping[str, ZoneInfo] = field(default_factory=dict)
    rate: str | None = None
    daily_max: int | None = None
    redirect_to: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Frame":
        """Return the frame of these settings."""
        zones = {name: report.zone for name, report in settings.editions.items()}
        return cls(zones, settings.rate, settings.daily_max, settings.redirect_to)

    def zone(self, report: str) -> ZoneInfo | None:
        """Return the report's timezone; for the whole fleet (`""`) that of all reports, if they have one in common."""
        if report in self.zones:
            return self.zones[report]
        zones = set(self.zones.values())
        return zones.pop() if len(zones) == 1 else None


def progress_of(outcome: EditionOutcome) -> Iterator[tuple[int, str]]:
    """Yield each count of an edition that is not zero, with its word, except those that are always shown."""
    counts = (
        (outcome.waiting, "waiting"), (outcome.collected, "for a digest"), (outcome.in_doubt, "in doubt"),
        (outcome.failed, "failed"), (outcome.missing, "without a report"), (outcome.cancelled, "cancelled"),
        (outcome.waived, "waived"), (outcome.suppressed, "suppressed"),
    )  # fmt: skip
    yield from ((count, word) for count, word in counts if count)


def reasons(snapshot: Snapshot, frame: Frame, *, per_s: float) -> Iterator[tuple[str, Level]]:
    """Yield a sentence for each thing that waits or needs a person; `per_s` is how fast the fleet sends."""
    yield from ((f"{one.sentence} Fix: {one.fix}.", Level.BAD) for one in concerns_of(snapshot))
    for pause in snapshot.pauses:
        yield _pause(pause, frame), Level.WARN
    yield from ((one.sentence, Level.WARN) for one in (snapshot.deferrals or [])[:GROUPS_MAX])
    if snapshot.waiting is None:
        yield "It is not counted: there is too much of it, or this is the first look.", Level.SOFT
    else:
        yield from _waiting(snapshot, snapshot.waiting, frame, per_s)
    if frame.daily_max is not None and snapshot.given_today is not None:
        yield f"daily_max: {snapshot.given_today:,} of {frame.daily_max:,} in 24 hours", Level.SOFT


def _waiting(snapshot: Snapshot, found: Waiting, frame: Frame, per_s: float) -> Iterator[tuple[str, Level]]:
    if in_flight := sum(found.in_flight.values()):
        yield f"{in_flight:,} in the hands of relays", Level.PLAIN
    if found.due:
        waited_s = (snapshot.at - (found.oldest_due_at or snapshot.at)).total_seconds()
        limit = f", the rate is {frame.rate}" if frame.rate else ""
        left = _left(found.due + in_flight, per_s)
        yield f"{found.due:,} due, the oldest for {duration_label(waited_s)}{limit}{left}", Level.PLAIN
    if found.postponed:
        until = "" if found.next_at is None else f", the next until {spoken_time(found.next_at, frame.zone(''))}"
        yield f"{found.postponed:,} put off, to be tried again{until}", Level.PLAIN
    for report, n in sorted(found.paused.items()):
        yield f"{n:,} held back by the pause of {report or 'everything'}", Level.WARN


def _left(emails: int, per_s: float) -> str:
    """Return how long so many emails take."""
    return f"; at {rate_label(per_s)}/s about {duration_label(emails / per_s)} more" if per_s > 0 else ""


def _pause(pause: Pause, frame: Frame) -> str:
    why = f": {pause.why}" if pause.why else ""
    since = spoken_time(pause.since, frame.zone(pause.report))
    return f"{pause.report or 'Everything'} is paused since {since} by {pause.who}{why}"


def rate_label(per_s: float | None) -> str:
    """Return emails per second with two figures at least; nothing for None."""
    return "" if per_s is None else f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"  # noqa: PLR2004 - two figures


def duration_label(seconds: float) -> str:
    """Return a duration in its two largest units at most: `45 s`, `3 min`, `2 h 5 min`, `4 d`."""
    minutes = round(max(seconds, 0.0) / 60)
    if seconds < SECONDS_MAX:
        return f"{max(seconds, 0.0):.0f} s"
    if minutes < MINUTES_MAX:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < HOURS_MAX:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d"


def state_label(state: str) -> str:
    """Return the state of a delivery, or another name of the database, as words: `in doubt`."""
    return state.replace("_", " ")


_LOST: Final = "a failover of Postgres lost its message, and only its envelope is known"
_PRUNED: Final = "`outbox prune` removed its message by its age"


def removal_label(message: bytes) -> str | None:
    """Return why the message that stood there is gone; None if this is a message."""
    return {LOST: _LOST, PRUNED: _PRUNED}.get(message)


def no_message_label(*, is_lost: bool) -> str:
    """Return why an email has no message that could be sent: it was lost, or else pruned."""
    return _LOST if is_lost else f"{_PRUNED}, and only its envelope is kept"
