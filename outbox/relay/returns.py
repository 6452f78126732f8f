"""Emails that a relay gives back to Postgres in its next turn, at once or after a rest."""

from collections.abc import Iterator

from outbox.relay.circuit_breaker import PAUSE_MAX_S
from outbox.smtp.outgoing import OutgoingEmail


class Returns:
    """Claims that this relay does not send now: any relay may claim a released one at once, a rested one later."""

    def __init__(self) -> None:
        self._released: list[OutgoingEmail] = []
        self._rested: list[OutgoingEmail] = []
        self._held: list[tuple[OutgoingEmail, float]] = []

    def __len__(self) -> int:
        return len(self._released) + len(self._rested) + len(self._held)

    def __iter__(self) -> Iterator[OutgoingEmail]:
        yield from self._released
        yield from self._rested
        yield from (outgoing for outgoing, _ in self._held)

    def release(self, outgoing: OutgoingEmail) -> None:
        """Give an email back, for any relay."""
        self._released.append(outgoing)

    def rest(self, outgoing: OutgoingEmail) -> None:
        """Give an email back that nothing can be done for while the server is in trouble, for `PAUSE_MAX_S`."""
        self._rested.append(outgoing)

    def hold(self, outgoing: OutgoingEmail, rest_s: float) -> None:
        """Give an email back that is not to be claimed again for so many seconds, or a little longer."""
        self._held.append((outgoing, rest_s))

    def clear(self) -> None:
        """Forget all: the session that claimed them is gone."""
        self._released.clear()
        self._rested.clear()
        self._held.clear()

    def take(self) -> list[tuple[float, list[int]]]:
        """Return what there is, and forget it: how many seconds each group of emails rests.

        Those that are held rest together, for as long as the longest of them.
        """
        longest_s = max((rest_s for _, rest_s in self._held), default=0.0)
        groups = [
            (0.0, [one.email for one in self._released]),
            (PAUSE_MAX_S, [one.email for one in self._rested]),
            (longest_s, [one.email for one, _ in self._held]),
        ]
        self.clear()
        return [(rest_s, emails) for rest_s, emails in groups if emails]
