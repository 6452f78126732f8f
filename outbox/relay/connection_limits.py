"""Limits of a mail server on connections, found from what it refuses: their number, and the messages on each.

Pure: no clock, no socket.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

LIMIT_SEEN_MIN: Final = 3  # so many connections in a row ended after the same number of messages: that is a limit
LIMIT_KEPT_S: Final = 3600.0


@dataclass(slots=True)
class SessionLimit:
    """Number of messages that the server takes on one connection, found from those that ended."""

    found: int | None = None
    _until: float = 0.0
    _seen: deque[int] = field(default_factory=lambda: deque(maxlen=LIMIT_SEEN_MIN))

    def note(self, messages: int, now: float) -> bool:
        """Note after how many messages a connection ended; return True if that shows a limit that was not known."""
        self._seen.append(messages)
        if len(self._seen) < LIMIT_SEEN_MIN or len(set(self._seen)) > 1:
            return False
        self._until = now + LIMIT_KEPT_S
        is_new = messages != self.found
        self.found = messages
        return is_new

    def at(self, now: float) -> int | None:
        """Return the limit for a new connection; None if there is none, or if it was found too long ago."""
        return self.found if now < self._until else None


OPEN_PAUSE_MIN_S: Final = 0.5
OPEN_PAUSE_MAX_S: Final = 30.0
MORE_AFTER_S: Final = 60.0
MORE_AFTER_MAX_S: Final = 960.0


@dataclass(slots=True)
class ConnectionLimit:
    """Number of connections that a server grants this relay, found from the ones that it refuses.

    It is what was open when one more was refused. One more is tried now and then, ever more rarely while it is refused.
    `now` is any steady clock.
    """

    found: int | None = None
    said: str = ""
    retry_at: float = 0.0
    _more_at: float = 0.0
    _more_after_s: float = MORE_AFTER_S
    _pause_s: float = OPEN_PAUSE_MIN_S

    def refuse(self, working: int, said: str, now: float) -> None:
        """Note that the server refused one more connection than these."""
        if now >= self.retry_at:  # else it was opened before the last one was refused
            is_probe = self.found is not None and working >= self.found
            self._more_after_s = min(2 * self._more_after_s, MORE_AFTER_MAX_S) if is_probe else MORE_AFTER_S
            self.retry_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, OPEN_PAUSE_MAX_S)
        self.found = max(working, 1)
        self.said = said
        self._more_at = now + self._more_after_s

    def note_working(self, working: int, now: float) -> None:
        """Note that the server took an email while these connections were open."""
        self._pause_s = OPEN_PAUSE_MIN_S
        if self.found is not None and working > self.found:
            self.found = working
            self._more_at = now + self._more_after_s

    def hurry(self, now: float) -> None:
        """Let one be tried at once."""
        self.retry_at = min(self.retry_at, now)

    def may_open(self, open_now: int, now: float) -> bool:
        """Return True if one more than these may be tried."""
        if self.found is None:
            return True
        return now >= self.retry_at and open_now < self.found + (now >= self._more_at)
