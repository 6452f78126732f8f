"""Entries of the suppression list: an address, the report that it gets no more email of, and the reason."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

ALL: Final = ""  # the report of a suppression that holds for every email


class Reason(StrEnum):
    """Reason why an address is on the list."""

    BOUNCED = "bounced"
    COMPLAINED = "complained"
    UNSUBSCRIBED = "unsubscribed"
    DECIDED = "decided"


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry to add to the list, its address as `mailbox.comparable` gives it."""

    address: str
    report: str = ALL
    reason: Reason = Reason.DECIDED
