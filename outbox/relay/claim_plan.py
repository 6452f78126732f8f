"""Plan of a relay's claims: where the next one begins, and how many of it may be urgent. Pure; `now` is an argument."""

from dataclasses import dataclass
from datetime import datetime

from outbox.relay.ledger import Frontier, Tick, Turns


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """Part of a tick's request: what to claim."""

    room: int
    """How many emails, besides suspects."""
    since: datetime | None = None
    """Ordinary emails that are due since then; None: all that are due."""
    urgent_since: datetime | None = None
    """Urgent ones that are due since then."""
    urgent_max: int = 0
    """How many of the claims may be urgent."""
    suspects: int = 0
    """How many emails that several relays have died with."""
    budget: int = 0
    """Bytes of large messages."""
    bytes_max: int = 0
    """Bytes of one message; larger ones are quarantined."""


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
        self._ordinary, self._urgent, self._share = Frontier(), Frontier(), Turns()

    def order(self, room: int, now: float) -> ClaimOrder:
        """Return what to claim next if there is room for so many."""
        return ClaimOrder(room, self._ordinary.since(now), self._urgent.since(now), self._share.urgent_of(room))

    def note(self, tick: Tick, order: ClaimOrder, now: float, *, in_parts: bool) -> Progress:
        """Record how far a tick with room for claims has come. `in_parts`: it was not one statement."""
        self._ordinary.note(tick.reached, order.since, now)
        self._urgent.note(tick.urgent_reached, order.urgent_since, now)
        is_left_over = self._share.note(tick.claims, order.room, order.urgent_max)
        has_more = (
            is_left_over
            or order.since is not None
            or (in_parts and not tick.locked)  # a lock may last: it is not looked at all the time
            or bool(tick.unfit)
            or (tick.bytes_wanted > 0 and bool(tick.claims))
            or len(tick.claims) >= order.room
        )
        return Progress(bool(tick.claims), has_more, now if order.urgent_since is None else self._urgent.all_at)
