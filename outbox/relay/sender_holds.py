"""Senders whose mail waits, since the server refuses it and takes that of others. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from outbox.smtp.outgoing import Try

HOLD_FIRST_S: Final = 1.0  # pause of a sender whom the server refuses while it takes others; doubles each time
HOLD_MAX_S: Final = 60.0
PROBES_MAX: Final = 64  # claims of which one is chosen to ask a server that refused the sender
PASSED_OVER_S: Final = 30.0  # so that the next choice sees others


@dataclass(slots=True)
class Hold:
    """Pause of one sender; `until` is of the caller's steady clock."""

    reason: str
    until: float = 0.0
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class SortedOut:
    """Tries by what becomes of them: `free` ones are sent, `held` ones rest for so many seconds, any relay may have the
    `released` ones.
    """

    free: Sequence[Try]
    held: Sequence[tuple[Try, float]] = ()
    released: Sequence[Try] = ()


@dataclass(slots=True)
class SenderHolds:
    """Pauses of single senders, and the senders that a server refused while it refused all. `now` is a steady clock."""

    holds: dict[str, Hold] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.holds)

    def refuse(self, sender: str, reason: str, now: float) -> bool:
        """Let the mail of a sender wait, twice as long each time; return True if it did not wait before."""
        hold = self.holds.get(sender)
        is_new = hold is None
        if hold is None:
            hold = self.holds[sender] = Hold(reason)
        if now >= hold.until:  # else it is news of the same refusal
            hold.reason = reason
            hold.refusals += 1
            hold.until = now + min(HOLD_FIRST_S * 2 ** (hold.refusals - 1), HOLD_MAX_S)
        return is_new

    def accept(self, sender: str) -> bool:
        """Note that the server takes mail of this sender; return True if its mail had to wait."""
        self._refused.clear()
        return self.holds.pop(sender, None) is not None

    def wait_s(self, sender: str, now: float) -> float:
        """Return for how many seconds the mail of a sender still waits; 0 if it may be sent."""
        hold = self.holds.get(sender)
        return max(hold.until - now, 0.0) if hold is not None else 0.0

    def sort_out(self, tries: Sequence[Try], now: float) -> SortedOut:
        """Return which tries wait, since their senders do."""
        waits_s = [(tried, self.wait_s(tried.outgoing.sender, now)) for tried in tries]
        held = [(tried, wait_s) for tried, wait_s in waits_s if wait_s > 0]
        return SortedOut([tried for tried, wait_s in waits_s if wait_s <= 0], held)

    def choose_probe(self, tries: SortedOut, *, is_free: bool) -> SortedOut:
        """Return one free try to ask a server with that refused all, unless it is not `is_free` but asked already.

        It is of a sender whose mail was not refused, if possible. If all of a full choice are of refused senders they
        rest for a while, so that a backlog of one bad sender does not hide the mail of others.
        """
        others = [tried for tried in tries.free if not self.refused_the_route(tried.outgoing.sender)]
        chosen = (others or tries.free)[:1] if is_free else []
        rest = [tried for tried in tries.free if tried not in chosen]
        if not others and len(tries.free) >= PROBES_MAX:
            return SortedOut(chosen, [*tries.held, *((tried, PASSED_OVER_S) for tried in rest)])
        return SortedOut(chosen, tries.held, rest)

    def note_route_refusal(self, sender: str) -> None:
        """Note a sender with whose mail the server refused the route."""
        self._refused.add(sender)

    def refused_the_route(self, sender: str) -> bool:
        """Return True if the server refused the route with mail of this sender, and has taken no mail since."""
        return sender in self._refused

    def reasons(self, *, refusals_min: int = 0) -> list[tuple[str, str]]:
        """Return the senders that were refused so often in a row, each with the reason."""
        return [(sender, hold.reason) for sender, hold in self.holds.items() if hold.refusals >= refusals_min]
