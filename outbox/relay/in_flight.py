"""Emails in flight: all that one relay holds and whose verdicts are not settled, wherever they are."""

from collections.abc import Mapping

from outbox.relay.claims import SMALL_BYTES
from outbox.relay.connections import Connections
from outbox.relay.marks import Marks
from outbox.relay.ready_queue import ReadyQueue
from outbox.relay.returns import Returns
from outbox.relay.verdicts import Verdicts
from outbox.smtp.outgoing import OutgoingEmail, Try


class InFlight:
    """Emails of one relay that wait for a connection, are on one, or wait for Postgres."""

    def __init__(
        self, connections: Connections, ready: ReadyQueue, returns: Returns, marks: Marks, verdicts: Verdicts
    ) -> None:
        self._connections = connections
        self._ready = ready
        self._returns = returns
        self._marks = marks
        self._verdicts = verdicts

    def emails(self) -> dict[int, OutgoingEmail]:
        """Return all of them by id, but for those whose verdicts only wait for a tick."""
        return {outgoing.email: outgoing for outgoing in self._held()}

    def large_bytes(self) -> int:
        """Return how many bytes its large messages have."""
        return sum({one.email: one.size for one in self._held() if one.size > SMALL_BYTES}.values())

    @property
    def has_suspect(self) -> bool:
        """Return True if one of them is a suspect: relays died with it."""
        return any(one.suspect for one in self._held())

    def _held(self) -> list[OutgoingEmail]:
        """Return all of them; one that waits for its mark comes twice."""
        held = [tried.outgoing for tried in self._ready]
        held += [one.current.outgoing for one in self._connections if one.current is not None]
        return [*held, *self._returns, *self._verdicts.waiting(), *self._marks.emails()]

    @property
    def is_empty(self) -> bool:
        """Return True if no try waits or is on a connection, and no verdict waits for a tick."""
        return not (self._ready or self._marks or self._verdicts.settlements or self._connections.is_busy)

    @property
    def has_work(self) -> bool:
        """Return True if an email is on a connection, or anything of one is still to be written to Postgres."""
        verdicts = self._verdicts
        is_unwritten = verdicts.settlements or verdicts.undecided or self._marks or self._returns
        return bool(is_unwritten or self._connections.is_busy)

    @property
    def is_waiting_for_marks(self) -> bool:
        """Return True if every connection that has an email waits for its mark."""
        return self._connections.busy <= len(self._marks)

    def awaiting_reply(self) -> list[Try]:
        """Return the tries whose final dot is written and not answered."""
        return [tried for one in self._connections if (tried := one.awaiting_reply) is not None]

    def renumber(self, emails: Mapping[str, tuple[int, int | None]]) -> None:
        """Adapt the tries that await their replies to another server: id and attempt of emails there, by key.

        Where the attempt is None the row there has no other one.
        """
        for tried in self.awaiting_reply():
            if tried.outgoing.key in emails:
                email, attempt = emails[tried.outgoing.key]
                tried.renumber(email, attempt or tried.attempt)  # the row there may have counted further
