"""When a relay acts on notifications: at once, unless the last ones led to nothing.

Every role of a database may NOTIFY, so a flood of notifications must not keep a relay busy. After one that led to
nothing the relay rests, from `REST_FIRST_S` on, twice as long each time, `REST_MAX_S` at most. What comes during a rest
is acted upon at its end. The first that leads to an email ends all rests.
"""

from dataclasses import dataclass
from typing import Final

REST_FIRST_S: Final = 0.01
REST_MAX_S: Final = 1.0


@dataclass(slots=True)
class Notifications:
    """Decides without a clock of its own: `now` is any steady clock, in seconds."""

    rest_until: float = 0.0
    _rest_s: float = 0.0
    _is_pending: bool = False
    """One came since the last look began."""
    _is_tried: bool = False
    """The look that is under way is for one."""

    def hear(self, now: float) -> float | None:
        """Return in how many seconds to act on a notification; None if that is planned already."""
        if now < self.rest_until and self._is_pending:
            return None
        if now >= self.rest_until + self._rest_s:
            self._rest_s = 0.0  # the last flood is over
        self._is_pending = True
        return max(self.rest_until - now, 0.0)

    def begin_look(self) -> None:
        """Note that what is due is about to be looked at: what comes from now on may be too late for it."""
        self._is_tried, self._is_pending = self._is_pending, False

    def end_look(self, now: float, *, found: bool) -> float | None:
        """Note whether the look found anything; return in how many seconds to look again for what came meanwhile."""
        if found:
            self._rest_s = self.rest_until = 0.0
        elif self._is_tried and now >= self.rest_until:
            self._rest_s = min(max(2 * self._rest_s, REST_FIRST_S), REST_MAX_S)
            self.rest_until = now + self._rest_s
        self._is_tried = False
        return max(self.rest_until - now, 0.0) if self._is_pending else None
