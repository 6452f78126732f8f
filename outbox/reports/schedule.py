"""Ticks of a schedule, at which a report's editions are started without a cron. Nothing here reads a clock.

cronsim finds the civil times at which a schedule ticks, each of which is one tick: where clocks jump over it, at the
instant of the jump; where it comes twice, the first time. (Left to walk over a change of the clocks by itself, cronsim
gives two ticks that meet after a jump twice, and backwards passes over those of an hour that comes again.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from outbox.reports.period import first_instant

FIELDS: Final = 5
EXAMPLE: Final = '"0 6 * * mon" (minute, hour, day of month, month, day of week)'


@dataclass(frozen=True, slots=True)
class Schedule:
    """The ticks of a cron expression in a timezone. They are strictly increasing instants, given in UTC."""

    expression: str
    timezone: ZoneInfo

    def after(self, now: datetime) -> Iterator[datetime]:
        """Yield the ticks that are later than `now`; they end with the calendar."""
        last = now.astimezone(UTC)
        for civil in _civil(self.expression, now.astimezone(self.timezone)):
            # What clocks jump over meets at one instant, and what came before an hour that comes again is over.
            if (tick := first_instant(civil, self.timezone)) > last:
                yield (last := tick)

    def latest(self, now: datetime) -> datetime | None:
        """Return the last tick that is not later than `now`, or None if there never was one (within 50 years)."""
        here = now.astimezone(self.timezone)
        # In the second pass of an hour that comes twice, all that the first pass showed is over.
        overlap = (here.replace(fold=0).utcoffset() or timedelta()) - (here.utcoffset() or timedelta())
        edge = here + overlap + timedelta(seconds=1)
        found = (first_instant(civil, self.timezone) for civil in _civil(self.expression, edge, reverse=True))
        return next((tick for tick in found if tick <= now), None)


def _civil(expression: str, around: datetime, *, reverse: bool = False) -> Iterator[datetime]:
    """Yield the civil times of the expression after `around` (or before it, the latest first), all of them naive."""
    from cronsim import CronSim

    ticks = CronSim(expression, around.replace(tzinfo=None, microsecond=0, fold=0), reverse=reverse)
    try:
        yield from ticks
    except OverflowError:  # the edge of the calendar
        return


def fault_of(expression: str) -> str | None:
    """Return what is wrong with a cron expression, as the end of a sentence, with the fix; None if nothing is."""
    fields = expression.split()
    if len(fields) != FIELDS:
        count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
        return f"has {count} instead of {FIELDS}; write one like {EXAMPLE}"
    if (wrong := _unknown_field(fields)) is None:
        first = _civil(expression, datetime(2000, 1, 1))  # noqa: DTZ001 - civil time
        return None if next(first, None) else f"names a day that never comes; write one like {EXAMPLE}"
    if _unknown_field([*fields[:3], "*", fields[4]]) is None:  # the 30th is a day, but not of February
        return f"names a day that never comes; write one like {EXAMPLE}"
    return f"has an unknown {wrong}; write one like {EXAMPLE}"


def _unknown_field(fields: Sequence[str]) -> str | None:
    """Return the field that cronsim refuses."""
    from cronsim import CronSim, CronSimError

    try:
        CronSim(" ".join(fields), datetime(2000, 1, 1))  # noqa: DTZ001 - civil time
    except CronSimError as error:
        return str(error).removeprefix("Bad ")
    except ValueError:  # Python reads no number of thousands of digits
        return "number"
    return None
