"""Emails sent in each minute of the last hour, from the relays' own counts. It reads nothing.

A table of minutes would cost relays a write for each tick. So a process remembers what it saw itself; the time before
it is counted among the newest emails, which is too little if more were sent than those.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from outbox.database.driver import Record

MINUTES: Final = 60
HEIGHT, WIDTH = 120, 600


@dataclass(frozen=True, slots=True)
class Plot:
    """Plot as SVG points: the line and the area under it, in a box of `WIDTH` by `HEIGHT`."""

    line: str
    area: str
    most: int
    """In one minute; the top of the picture."""
    total: int
    latest: int
    """In the last whole minute."""
    seen_from: float
    """Position from which on this process saw all itself."""
    begun_at: datetime | None


@dataclass(slots=True)
class Hour:
    """Counts by the minute, of the database's clock."""

    begun_at: datetime | None = None
    _minutes: dict[int, int] = field(default_factory=dict)
    _sent: dict[int, int] = field(default_factory=dict)
    _newest: int = 0

    @property
    def is_begun(self) -> bool:
        """Return True if the hour before is counted."""
        return self.begun_at is not None

    def begin(self, before: Iterable[Record], at: datetime) -> None:
        """Add the counts of the hour before `at`."""
        self.begun_at = at
        self._minutes = {row["minute"]: row["n"] for row in before}

    def note(self, at: datetime, sent: Mapping[int, int]) -> None:
        """Note how many emails each relay has sent in its life, by `at`.

        A relay that was not there at the last look has sent all of its own since; what was sent while nobody could
        look counts for the minute in which somebody could again.
        """
        if self._sent:
            since = sum(
                max(count - self._sent.get(relay, 0), 0)
                for relay, count in sent.items()
                if relay in self._sent or relay > self._newest
            )
            minute = _minute(at)
            self._minutes[minute] = self._minutes.get(minute, 0) + since
            self._minutes = {one: n for one, n in self._minutes.items() if one > minute - MINUTES}
        self._sent = dict(sent)
        self._newest = max(sent, default=self._newest)

    def plot(self, now: datetime) -> Plot:
        """Return the hour that ends at `now`, with the running minute so far."""
        last = _minute(now)
        counts = [self._minutes.get(minute, 0) for minute in range(last - MINUTES + 1, last + 1)]
        most = max(*counts, 1)
        step = WIDTH / (MINUTES - 1)
        points = " ".join(
            f"{at * step:.1f},{HEIGHT - (HEIGHT - 6) * count / most:.1f}" for at, count in enumerate(counts)
        )
        begun = last - MINUTES if self.begun_at is None else _minute(self.begun_at)
        return Plot(
            line=points,
            area=f"0,{HEIGHT} {points} {WIDTH},{HEIGHT}",
            most=max(counts),
            total=sum(counts),
            latest=counts[-2],
            seen_from=min(max(begun - (last - MINUTES + 1), 0) * step, WIDTH),
            begun_at=self.begun_at if begun > last - MINUTES + 1 else None,
        )


def _minute(at: datetime) -> int:
    return int(at.timestamp() // 60)
