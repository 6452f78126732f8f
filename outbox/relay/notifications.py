"""Reaction of a relay to notifications: at once, unless the last ones led to nothing.

Every role of a database may NOTIFY, so a flood of notifications must not keep a relay busy. After a notification that
led to nothing the relay rests for `REST_FIRST_S`, then twice as long each time, at most `REST_MAX_S`. Notifications
during a rest are handled at its end. The first one that leads to an email resets the rest.
"""

from dataclasses import dataclass
from typing import Final

REST_FIRST_S: Final = 0.01
REST_MAX_S: Final = 1.0


@dataclass(slots=True)
class Notifications:
    """State of the rests. `now` is the time of any monotonic clock, in seconds."""

    rest_until: float = 0.0
    _rest_s: float = 0.0
    _is_pending: bool = False
    """True if a notification came since the last look began."""
    _is_tried: bool = False
    """True if the running look is the reaction to one."""

    def hear(self, now: float) -> float | None:
        """Return in how many seconds to act on a notification; None if that is already planned."""
        if now < self.rest_until and self._is_pending:
            return None
        if now >= self.rest_until + self._rest_s:
            self._rest_s = 0.0  # the last flood is over
        self._is_pending = True
        return max(self.rest_until - now, 0.0)

    def begin_look(self) -> None:
        """Record that a look begins; a notification after this may be too late for it."""
        self._is_tried, self._is_pending = self._is_pending, False

    def end_look(self, now: float, *, found: bool) -> float | None:
        """Record if the look found anything; return in how many seconds to look again for later notifications."""
        if found:
            self._rest_s = self.rest_until = 0.0
        elif self._is_tried and now >= self.rest_until:
            self._rest_s = min(max(2 * self._rest_s, REST_FIRST_S), REST_MAX_S)
            self.rest_until = now + self._rest_s
        self._is_tried = False
        return max(self.rest_until - now, 0.0) if self._is_pending else None
