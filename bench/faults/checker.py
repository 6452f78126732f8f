"""Checker of a run: compares what the SMTP server accepted with what the database says at the end. Pure.

It knows nothing of faults, relays or ticks. Each law gives the addresses that break it; none is the promise kept.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

SAYS_ACCEPTED: Final = frozenset({"sent", "in_doubt"})
SAYS_UNSENT: Final = frozenset({"in_doubt", "dead", "cancelled", "expired"})
OPEN: Final = frozenset({"pending", "sending"})


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Message that the SMTP server accepted; `server` is the one whose relay brought it, -1 if unknown."""

    at: float
    address: str
    message_id: str
    server: int = -1


@dataclass(frozen=True, slots=True)
class Delivery:
    """Email with the state of its delivery at the end."""

    address: str
    message_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """Line of an email's trail; times are Unix times."""

    address: str
    attempt: int
    verdict: str
    settled_at: float
    relay: int | None = None
    marked_at: float | None = None
    reply: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that is known from outside when a run is over.

    `reports` counts reports by address, `refused` is whom the SMTP server refused for good. `policy` is that of
    `in_doubt`; a person who resolved doubt by evidence does not allow a second copy, `resend` does.
    """

    recipients: AbstractSet[str]
    accepted: Sequence[Acceptance]
    deliveries: Sequence[Delivery]
    attempts: Sequence[Attempt] = ()
    reports: Mapping[str, int] = field(default_factory=dict)
    refused: AbstractSet[str] = frozenset()
    policy: str = "hold"


@dataclass(frozen=True, slots=True)
class Violation:
    """Broken law, with the recipients concerned."""

    law: str
    addresses: tuple[str, ...]


class _Index:
    """Facts by address."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.copies: dict[str, list[str]] = defaultdict(list)
        for one in facts.accepted:
            self.copies[one.address].append(one.message_id)
        self.states: dict[str, list[str]] = defaultdict(list)
        self.message_ids: dict[str, set[str]] = defaultdict(set)
        for delivery in facts.deliveries:
            self.states[delivery.address].append(delivery.state)
            self.message_ids[delivery.address].add(delivery.message_id)
        self.verdicts: dict[str, set[str]] = defaultdict(set)
        for attempt in facts.attempts:
            self.verdicts[attempt.address].add(attempt.verdict)
        self.resent = _resent_after_doubt(facts) if facts.policy == "resend" else Counter()


def _resent_after_doubt(facts: Facts) -> Counter[str]:
    """Count how often each address was recorded as sent again, each time after doubt about the very same attempt."""
    doubts: dict[tuple[str, int], float] = {}
    for one in facts.attempts:
        if one.verdict == "in_doubt":
            known = doubts.get((one.address, one.attempt), one.settled_at)
            doubts[one.address, one.attempt] = min(known, one.settled_at)
    never = float("inf")
    return Counter(
        one.address
        for one in facts.attempts
        if one.verdict == "resolved" and doubts.get((one.address, one.attempt), never) <= one.settled_at
    )


def _twice(index: _Index) -> list[str]:
    return [address for address, copies in index.copies.items() if len(copies) > 1 + index.resent[address]]


def _not_the_same(index: _Index) -> list[str]:
    return [address for address, copies in index.copies.items() if set(copies) - index.message_ids[address]]


def _to_strangers(index: _Index) -> list[str]:
    return [address for address in index.copies if address not in index.facts.recipients]


def _missing(index: _Index) -> list[str]:
    return [address for address in index.facts.recipients if address not in index.copies and not index.states[address]]


def _sent_in_vain(index: _Index) -> list[str]:
    return [address for address, states in index.states.items() if "sent" in states and address not in index.copies]


def _denied(index: _Index) -> list[str]:
    """Return accepted addresses that the database denies; under `resend` the last copy may have been refused."""
    return [
        address
        for address in index.copies
        if not SAYS_ACCEPTED.intersection(index.states[address])
        and not (index.resent[address] and "dead" in index.states[address])
    ]


def _stuck(index: _Index) -> list[str]:
    return [address for address, states in index.states.items() if OPEN.intersection(states)]


def _dead_without_cause(index: _Index) -> list[str]:
    return [
        address
        for address, states in index.states.items()
        if "dead" in states and address not in index.facts.refused and "quarantined" not in index.verdicts[address]
    ]


def _not_one_report(index: _Index) -> list[str]:
    return [address for address in index.facts.recipients if index.facts.reports.get(address, 0) != 1]


def _not_one_email(index: _Index) -> list[str]:
    return [address for address in index.facts.recipients if len(index.states[address]) != 1]


LAWS: Final[dict[str, Callable[[_Index], list[str]]]] = {
    "no address is sent more than once": _twice,
    "what is accepted is the message that the database holds": _not_the_same,
    "only recipients get email": _to_strangers,
    "every recipient who was not reached is in a state that says so": _missing,
    "nothing is `sent` that was not accepted": _sent_in_vain,
    "what was accepted is `sent` or `in_doubt`": _denied,
    "nothing is stuck": _stuck,
    "nothing is `dead` that was not refused": _dead_without_cause,
    "every recipient has one report": _not_one_report,
    "every recipient has one email": _not_one_email,
}


def check(facts: Facts) -> list[Violation]:
    """Return the laws that are broken, in order, each with its addresses."""
    index = _Index(facts)
    found = ((law, sorted(broken_by(index))) for law, broken_by in LAWS.items())
    return [Violation(law, tuple(addresses)) for law, addresses in found if addresses]


def figures(facts: Facts) -> dict[str, int]:
    """Count recipients, accepted, twice, lost (not reached, and no state says so), in doubt, dead."""
    index = _Index(facts)
    reached = set(index.copies)
    states = Counter(state for all_states in index.states.values() for state in all_states)
    doubtful = {address for address, all_states in index.states.items() if "in_doubt" in all_states}
    unsaid = {a for a in facts.recipients - reached if not SAYS_UNSENT.intersection(index.states[a])}
    return {
        "recipients": len(facts.recipients),
        "accepted": len(reached),
        "twice": len(_twice(index)),
        "resent": sum(index.resent.values()),
        "lost": len(unsaid),
        "in_doubt": len(doubtful),
        "in_doubt_not_accepted": len(doubtful - reached),
        "dead": states["dead"],
    }
