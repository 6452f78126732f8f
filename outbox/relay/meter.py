"""Meter of events by the second."""

from dataclasses import dataclass


@dataclass(slots=True)
class Meter:
    """Counts what happens, by the second; for estimates of a rate only."""

    _second: float = 0.0
    _now: int = 0
    _before: int = 0

    def note(self, now: float) -> None:
        """Count one."""
        if now - self._second >= 1.0:
            self._move(now)
        self._now += 1

    def per_s(self, now: float) -> float:
        """Return how many there were in the busier one of the latest two seconds."""
        if now - self._second >= 1.0:
            self._move(now)
        return float(max(self._now, self._before))

    def _move(self, now: float) -> None:
        self._before = self._now if now - self._second < 2.0 else 0  # noqa: PLR2004 - the second before this one
        self._second, self._now = now, 0
