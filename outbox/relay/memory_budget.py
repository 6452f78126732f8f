"""Memory budget for large messages in one process, shared by its relays.

It uses neither the database nor a clock: a relay asks how much its next tick may claim, and reports what it holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from outbox.settings import MESSAGE_BYTES_MAX

# A process needs about four times as much in all; the units and pods of `docs/deploy` leave room for that.
IN_FLIGHT_BYTES: Final = 24 * 1024 * 1024
ENVELOPE_BYTES_MAX: Final = 4096  # of the key, addresses, Message-ID and trace context: see `email_sizes` in schema.sql


@dataclass(eq=False, slots=True)
class Share:
    """Share of one relay in a budget. `in_flight` returns how many bytes it holds, `wake` makes it claim again."""

    budget: "Budget"
    in_flight: Callable[[], int]
    wake: Callable[[], None]
    bytes_max: int = MESSAGE_BYTES_MAX
    """How many bytes one email may have; the database says it when a session opens."""
    asked: int = 0
    """Bytes that a running tick may claim, and then what it has claimed until `in_flight` counts it."""
    wanted: int = 0
    """Bytes that the next email needs and did not get; 0 if no email waits for memory."""
    since: float = 0.0
    """Time since which that email waits."""

    def adopt_limit(self, message_bytes_max: int) -> None:
        """Let messages of so many bytes in, besides their envelopes."""
        self.bytes_max = message_bytes_max + ENVELOPE_BYTES_MAX
        self.budget.bytes_max = max(self.budget.bytes_max, self.bytes_max)

    def left(self) -> int:
        """Return how many bytes are free for this relay, without those that others have waited for longer."""
        return self.budget.bytes_max - sum(
            one.asked + one.in_flight() + (one.wanted if self._must_wait_for(one) else 0) for one in self.budget.shares
        )

    def ask(self) -> int:
        """Reserve bytes for the next tick, and return how many.

        A relay gets no more than an equal share unless the next email needs more: during a slow tick it must not keep
        the whole budget from the others.
        """
        left = self.left()
        self.asked = max(min(left, max(left // len(self.budget.shares), self.wanted)), 0)
        return self.asked

    def note_asked(self, asked: int) -> None:
        """Record how many bytes of the last claim `in_flight` does not count yet; 0 once it counts them all."""
        self.asked = asked

    def forget(self) -> None:
        """Want nothing and wake the others, since the claims of this relay are gone."""
        self.asked = 0
        self.note_wanted(0, 0.0)
        self.wake_others()

    def note_wanted(self, wanted: int, now: float) -> None:
        """Record how many bytes the next email needs and did not get."""
        self.since = (self.since or now) if wanted else 0.0
        self.wanted = wanted

    @property
    def has_enough_now(self) -> bool:
        """Return True if an email waits for memory and there is enough for it."""
        return self.wanted > 0 and self.left() >= self.wanted

    def wake_others(self) -> None:
        """Wake the other relays that wait for memory, after this one has released some."""
        for one in self.budget.shares:
            if one is not self and one.wanted:
                one.wake()

    def _must_wait_for(self, other: "Share") -> bool:
        return other is not self and other.wanted > 0 and (not self.wanted or other.since < self.since)


@dataclass(eq=False, slots=True)
class Budget:
    """Budget of a process: `bytes_max` for all its relays, at least one message of the largest size."""

    bytes_max: int = IN_FLIGHT_BYTES
    shares: list[Share] = field(default_factory=list)

    @classmethod
    def of(cls, message_bytes_max: int) -> "Budget":
        """Return the default budget, or a larger one if a single message may be larger."""
        return cls(max(IN_FLIGHT_BYTES, message_bytes_max))

    def share(self, in_flight: Callable[[], int], wake: Callable[[], None]) -> Share:
        """Add and return the share of another relay."""
        self.shares.append(Share(self, in_flight, wake))
        return self.shares[-1]
