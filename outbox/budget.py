"""The memory that large messages may have in one process, shared by its relays.

Without a database or a clock of its own: a relay asks what its next tick may claim, and says what it holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

# Largest message unless the settings say otherwise (`message_bytes_max`); `schema.sql` has the same default.
MESSAGE_BYTES_MAX: Final = 20 * 1024 * 1024
# A process needs about four times as much in all; the units and pods of `docs/deploy` leave room for that.
IN_FLIGHT_BYTES: Final = 24 * 1024 * 1024


@dataclass(eq=False, slots=True)
class Share:
    """One relay's part of a budget. `in_hand` tells how many bytes it holds, `wake` has it look again."""

    budget: "Budget"
    in_hand: Callable[[], int]
    wake: Callable[[], None]
    bytes_max: int = MESSAGE_BYTES_MAX
    """How many bytes one email may have; the database says it when a session opens."""
    asked: int = 0
    """What a tick under way may claim, and what it has claimed until that is in hand."""
    wanted: int = 0
    """What the next email needs that did not fit; 0 if nothing waits for memory."""
    since: float = 0.0
    """Since when that waits."""

    def left(self) -> int:
        """Return how many bytes are free for this relay; what others have waited for longer is not."""
        return self.budget.bytes_max - sum(
            one.asked + one.in_hand() + (one.wanted if self._must_wait_for(one) else 0) for one in self.budget.shares
        )

    def ask(self) -> int:
        """Reserve what the next tick may claim, and return it.

        It is no more than an equal share unless the next email needs more: a relay whose Postgres is slow must not
        keep all of it from the others meanwhile.
        """
        left = self.left()
        self.asked = max(min(left, max(left // len(self.budget.shares), self.wanted)), 0)
        return self.asked

    def note_wanted(self, wanted: int, now: float) -> None:
        """Remember what the next email needs and did not get."""
        self.since = (self.since or now) if wanted else 0.0
        self.wanted = wanted

    @property
    def has_enough_now(self) -> bool:
        """True if an email waits for memory, and there is enough for it."""
        return self.wanted > 0 and self.left() >= self.wanted

    def wake_others(self) -> None:
        """Have the other relays that wait for memory look again: this one has let go of something."""
        for one in self.budget.shares:
            if one is not self and one.wanted:
                one.wake()

    def _must_wait_for(self, other: "Share") -> bool:
        return other is not self and other.wanted > 0 and (not self.wanted or other.since < self.since)


@dataclass(eq=False, slots=True)
class Budget:
    """The budget of a process: `bytes_max` for all its relays, and at least one message of the largest size."""

    bytes_max: int = IN_FLIGHT_BYTES
    shares: list[Share] = field(default_factory=list)

    @classmethod
    def of(cls, message_bytes_max: int) -> "Budget":
        """Return the usual budget, or more where one message may have more."""
        return cls(max(IN_FLIGHT_BYTES, message_bytes_max))

    def share(self, in_hand: Callable[[], int], wake: Callable[[], None]) -> Share:
        """Return another relay's part."""
        self.shares.append(Share(self, in_hand, wake))
        return self.shares[-1]
