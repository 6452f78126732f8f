"""Decides what a relay claims next: where a claim begins, and how many of it are urgent. Pure: `now` is an argument."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from outbox.relay.tick import TickRequest, TickResult
from outbox.smtp.outgoing import OutgoingEmail

LOOK_FOR_ALL_S: Final = 1.0  # what is due before the cursor waits for so long, at most
ORDINARY_SHARE: Final = 0.25  # of what is claimed, while urgent emails and others wait


@dataclass(slots=True)
class ClaimCursor:
    """Time in the due times of a lane at which the next claim begins, while more is due than is claimed at once.

    Now and then, and once less than asked for comes back, all that is due is claimed from: an email before the cursor,
    which came free or was passed over since another relay was claiming it, waits for so long. `now` is a monotonic
    clock, in seconds.
    """

    reached: datetime | None = None
    all_at: float = 0.0

    def since(self, now: float) -> datetime | None:
        """Return the due time at which the next claim begins; None: it takes all that is due."""
        return None if now >= self.all_at else self.reached

    def note(self, reached: datetime | None, since: datetime | None, now: float) -> None:
        """Move on after a tick that claimed from `since` on, and reached that far."""
        self.reached = reached
        if since is None:
            self.all_at = now + LOOK_FOR_ALL_S


@dataclass(slots=True)
class PriorityShare:
    """Share of the claims that urgent emails get: they come first, but one claim in four is another's.

    So no stream of urgent emails starves the others. If less than four are claimed at a time, the others are `owed` the
    rest until it adds up to one.
    """

    owed: float = 0.0

    def urgent_max(self, claims_max: int) -> int:
        """Return how many of so many claims may be urgent."""
        return claims_max - min(int(self.owed + ORDINARY_SHARE * claims_max), claims_max)

    def note(self, claims: Sequence[OutgoingEmail], claims_max: int, urgent_max: int) -> bool:
        """Count what was claimed; return True if more urgent emails may wait although less than asked for was claimed.

        That is so if they used up `urgent_max` and the others did not use up the rest.
        """
        urgent = sum(claim.urgent for claim in claims if not claim.suspect)
        ordinary = sum(not claim.urgent for claim in claims if not claim.suspect)
        both_wait = urgent >= urgent_max and ordinary >= claims_max - urgent
        self.owed = max(self.owed + ORDINARY_SHARE * claims_max - ordinary, 0.0) if both_wait else 0.0
        return urgent_max < claims_max and urgent >= urgent_max and not both_wait


@dataclass(frozen=True, slots=True)
class Progress:
    """Result of a tick that claimed."""

    found: bool
    """True if it has claimed anything."""
    has_more: bool
    """True if more is due than was claimed, or may be."""
    urgent_at: float
    """When to look for all urgent emails again."""


class ClaimPlan:
    """Plan of one session's claims, in its two lanes."""

    def __init__(self) -> None:
        self._ordinary, self._urgent, self._share = ClaimCursor(), ClaimCursor(), PriorityShare()

    def request(self, claims_max: int, now: float) -> TickRequest:
        """Return the part of a request that says what to claim."""
        return TickRequest(
            claims_max=claims_max,
            since=self._ordinary.since(now),
            urgent_since=self._urgent.since(now),
            urgent_max=self._share.urgent_max(claims_max),
        )

    def note(self, request: TickRequest, done: TickResult, now: float, *, in_parts: bool) -> Progress:
        """Record how far a tick that could claim has come. `in_parts`: it was not one statement."""
        self._ordinary.note(done.reached, request.since, now)
        self._urgent.note(done.urgent_reached, request.urgent_since, now)
        is_left_over = self._share.note(done.claims, request.claims_max, request.urgent_max or 0)
        has_more = (
            is_left_over
            or request.since is not None
            or (in_parts and not done.locked)  # a lock may last: it is not looked at all the time
            or bool(done.unfit)
            or (done.bytes_wanted > 0 and bool(done.claims))
            or len(done.claims) >= request.claims_max
        )
        return Progress(bool(done.claims), has_more, now if request.urgent_since is None else self._urgent.all_at)
