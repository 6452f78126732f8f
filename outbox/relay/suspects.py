"""Suspects: emails that several relays have died with (`quarantine.SUSPECT_AFTER`). One is held at a time.

The relays of one process die together. They hold one suspect among them, so that a guilty one falls alone.
"""

from collections.abc import Callable
from typing import Final

PROVEN_S: Final = 2.0  # a relay that has lived for so long dies of what it holds rather than of something else


class SuspectRule:
    """Rule for the relays of one process."""

    def __init__(self) -> None:
        self._holders: list[Callable[[], bool]] = []

    def join(self, holds_suspect: Callable[[], bool]) -> None:
        """Add a relay, which says if it holds a suspect or is asking for one."""
        self._holders.append(holds_suspect)

    def may_take(self, opened_at: float, now: float) -> bool:
        """Return True if a relay whose session was opened then may claim a suspect.

        A relay that dies at once, whatever it holds, must not make an innocent email guilty.
        """
        return now - opened_at >= PROVEN_S and not any(holds_suspect() for holds_suspect in self._holders)
