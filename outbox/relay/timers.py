"""Due times of a relay: when it claims, sweeps, expires, ticks without work, and stops to drain.

All of it is pure: `now` is the caller's steady clock, in seconds, and no other object writes a due time.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

POLL_FIRST_S: Final = 0.1
GATHER_SHARE: Final = 2.0  # of the last tick's time is rested after it
GATHER_MAX_S: Final = 0.02
SWEEP_MIN_S: Final = 0.4
SWEEP_MAX_S: Final = 4.0
SWEEP_SHARE_S: Final = 0.2  # the fleet together sweeps about five times a second
EXPIRE_MIN_S: Final = 1.0  # the fleet together looks for expired emails once a second
EXPIRE_MAX_S: Final = 10.0
REPEAT_REST: Final = 5.0  # times the duration of a repeated upkeep is rested before the next
STRANDED_FIRST_S: Final = 30.0  # it has to read all open rows, so it is rare
STRANDED_EVERY_S: Final = 600.0
STRANDED_SOON_S: Final = 1.0  # if `until_empty` waits for it


@dataclass(frozen=True, slots=True)
class Outlook:
    """Other times that the next turn of the main loop depends on."""

    can_claim: bool = False
    """True if more emails may be claimed."""
    starts_at: float | None = None
    """When the rate limit lets the next ready email start."""
    resumes_at: float | None = None
    """When the pause of an open circuit breaker ends."""
    barrier_look_at: float | None = None
    """When to look at the failover barrier again; None if it is lifted."""


class Timers:
    """Due times of one relay. Before the first session everything is due at once."""

    def __init__(self, *, poll_max_s: float, lease_s: float, uniform: Callable[[], float] = random.random) -> None:
        self._pulse_s = lease_s / 3
        self._poll_max_s = min(poll_max_s, self._pulse_s)
        self._uniform = uniform
        self._poll_at, self._poll_s = 0.0, POLL_FIRST_S
        self._sweep_at = self._expire_at = self._pulse_at = 0.0
        self._stranded_at = self._stranded_soon_at = 0.0
        self._ticked_at = self._tick_s = 0.0
        self._drain_until: float | None = None
        self._is_stopping = False

    def restart(self, now: float) -> None:
        """Begin with a new session: poll and sweep at once, look for stranded rows later."""
        self._poll_at = self._sweep_at = 0.0
        self._stranded_at = now + STRANDED_FIRST_S
        self._stranded_soon_at = now + STRANDED_SOON_S

    def poll_now(self) -> None:
        """Let the next turn claim."""
        self._poll_at = 0.0

    def pulse_now(self) -> None:
        """Let the next turn tick, even without work: a tick reads the state of the fleet."""
        self._pulse_at = 0.0

    def sweep_now(self) -> None:
        """Let the next turn sweep."""
        self._sweep_at = 0.0

    def expire_now(self) -> None:
        """Let the next turn sweep, and expire and resume emails with it."""
        self._expire_at = self._sweep_at = 0.0

    def is_poll_due(self, now: float) -> bool:
        """Return True if it is time to claim."""
        return now >= self._poll_at

    def is_pulse_due(self, now: float) -> bool:
        """Return True if a tick is due even without work."""
        return now >= self._pulse_at

    def is_sweep_due(self, now: float) -> bool:
        """Return True if a sweep is due."""
        return now >= self._sweep_at

    def is_expire_due(self, now: float) -> bool:
        """Return True if the next sweep also expires and resumes emails."""
        return now >= self._expire_at

    def is_stranded_due(self, now: float, *, soon: bool = False) -> bool:
        """Return True if it is time to look for stranded rows; `soon` if an `until_empty` waits for that alone."""
        return now >= (self._stranded_soon_at if soon else self._stranded_at)

    def note_tick(self, began_at: float, now: float) -> None:
        """Record a tick; the next one without work is due a third of a lease later."""
        self._ticked_at, self._tick_s = now, now - began_at
        self._pulse_at = now + self._pulse_s

    @property
    def rest_until(self) -> float:
        """Return the end of the rest after the last tick.

        Each tick costs Postgres the same whatever it moves. So after one that took long a relay rests a while, and a
        fleet at its limit moves more with each.
        """
        return self._ticked_at + min(GATHER_SHARE * self._tick_s, GATHER_MAX_S)

    def note_claims(self, now: float, *, found: bool, has_more: bool, urgent_at: float) -> None:
        """Record a look for work: look again at once if there is more, else after a pause that doubles.

        An urgent email that a long transaction committed lies behind the urgent cursor: it is found at `urgent_at`.
        """
        if found or has_more:
            self._poll_s = POLL_FIRST_S
        if has_more:
            return
        self._poll_at = now + self._poll_s * (0.8 + 0.2 * self._uniform())
        self._poll_s = min(2 * self._poll_s, self._poll_max_s)
        if urgent_at > now:
            self._poll_at = min(self._poll_at, urgent_at)

    def note_sweep(self, now: float, relays: int) -> None:
        """Record a sweep in a fleet of so many relays."""
        self._sweep_at = now + self._jittered(min(max(SWEEP_SHARE_S * relays, SWEEP_MIN_S), SWEEP_MAX_S))

    def note_expire(self, now: float, relays: int) -> None:
        """Record that a relay of so many begins to expire and resume emails."""
        self._expire_at = now + self._jittered(min(EXPIRE_MIN_S * relays, EXPIRE_MAX_S))

    def repeat_expire(self, now: float, took_s: float) -> None:
        """Resume more emails soon; the rest before it is proportional to `took_s`, the duration of the last portion."""
        self._expire_at = self._sweep_at = now + REPEAT_REST * took_s

    def note_stranded(self, now: float, *, soon: bool = False) -> None:
        """Record a look for stranded rows."""
        if soon:
            self._stranded_soon_at = now + STRANDED_SOON_S
        else:
            self._stranded_at = now + self._jittered(STRANDED_EVERY_S)

    def begin_drain(self, now: float, drain_s: float) -> float:
        """Give what is in flight `drain_s` to finish; return when that is over."""
        self._is_stopping = True
        self._drain_until = now + drain_s
        return self._drain_until

    def stop(self) -> None:
        """Stop now: nothing is claimed any more."""
        self._is_stopping = True

    @property
    def is_stopping(self) -> bool:
        """Return True once the relay drains or stops."""
        return self._is_stopping

    def is_drained(self, now: float) -> bool:
        """Return True if the time to drain is over."""
        return self._drain_until is not None and now > self._drain_until

    def next_turn_at(self, outlook: Outlook) -> float:
        """Return when the main loop has something to do, if nothing wakes it before."""
        if outlook.barrier_look_at is not None:
            return min(self._pulse_at, outlook.barrier_look_at)
        if self._drain_until is not None:
            return min(self._pulse_at, self._drain_until)
        times = [self._sweep_at, self._pulse_at, outlook.starts_at, outlook.resumes_at]
        if outlook.can_claim:
            times.append(self._poll_at)
        return min(at for at in times if at is not None)

    def _jittered(self, pause_s: float) -> float:
        return pause_s * (0.8 + 0.4 * self._uniform())
