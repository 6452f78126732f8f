"""Waiting for the reports that other servers make, no longer than they make some."""

import random
import time
from collections.abc import Iterable, Mapping
from typing import Final

from outbox.database.lock_wait import UNKNOWN
from outbox.generate.buckets import bucket_of

PAUSE_FIRST_S: Final = 0.02
PAUSE_MAX_S: Final = 0.5


class Patience:
    """Time limit that restarts with every new fact."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen: set[object] = set()
        self._since = time.monotonic()

    def note(self, fact: object) -> None:
        """Restart the time if the fact has not been noted before."""
        if fact not in self._seen:
            self._seen.add(fact)
            self._since = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Return True if there was no new fact within the limit."""
        return time.monotonic() - self._since > self._limit_s


class Pauses:
    """Pauses between looks at buckets that other servers hold; they grow until a bucket was free."""

    def __init__(self) -> None:
        self.is_idle = False
        """True if no bucket was free at the last look."""
        self._next_s = PAUSE_FIRST_S

    def end(self) -> None:
        """Begin with a short pause again: a bucket was free."""
        self.is_idle, self._next_s = False, PAUSE_FIRST_S

    def next_s(self) -> float:
        """Return how long to pause before the next look, with jitter; the pause after it will be longer."""
        self.is_idle = True
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, PAUSE_MAX_S)
        return pause_s * (0.5 + random.random())  # noqa: S311 - jitter, not a secret


class IdleHolders:
    """Sessions that held buckets and made no report within `wait_s`: no further recipient waits for them."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._idle: set[str] = set()

    def hold_all(self, missing: Iterable[str], holders: Mapping[int, str]) -> bool:
        """Return True if each of the missing recipients is in a bucket that such a session holds."""
        return all(holders.get(bucket_of(key)) in self._idle for key in missing)

    def give_up(self, missing: Iterable[str], holders: Mapping[int, str]) -> dict[str, str]:
        """Note the holders of the buckets of these recipients; return why these have no report, by key."""
        reasons = {}
        for key in missing:
            holder = holders.get(bucket_of(key)) or UNKNOWN
            self._idle.add(holder)
            reasons[key] = (
                f"its report is reserved by {holder}, and no report was made for {self._wait_s:g} s "
                "(generate_wait_s); let that session end, or end it with pg_terminate_backend, and run this again."
            )
        return reasons
