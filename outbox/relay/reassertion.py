"""Reassertion: what a new session writes before it claims.

Another server, or a new start of it, may lack what this relay has written: its verdicts are written again (`failover`).
And the former session, which did not die with its claims, is ended in the ledger.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from outbox.database.failover_rules import ServerId
from outbox.log import Events
from outbox.relay.failover import reassert
from outbox.relay.in_flight import InFlight
from outbox.relay.session import Session
from outbox.relay.sweep import judge_former
from outbox.relay.verdict_history import VerdictHistory
from outbox.relay.verdicts import Verdicts

log = Events("outbox.relay")


class Reassertion:
    """Reassertion over all sessions of one relay."""

    def __init__(
        self,
        history: VerdictHistory,
        patience: Callable[[], AbstractContextManager[None]],
        *,
        route: str,
        instance: str,
    ) -> None:
        self._history = history
        self._patience = patience
        self._route = route
        self._instance = instance
        self._complete_on: ServerId | None = None
        """The server that has all verdicts."""

    def begin(self, session: Session) -> None:
        """Note a new session. The server of the first one lacks nothing."""
        self._complete_on = self._complete_on or session.server

    def is_complete_on(self, session: Session) -> bool:
        """Return True if the session's server has all verdicts."""
        return self._complete_on == session.server

    async def write(self, session: Session, verdicts: Verdicts, in_flight: InFlight, doubt_s: float | None) -> None:
        """Write what the server may lack, and adapt to the ids that the emails have there."""
        unsettled = list(verdicts.settlements)  # more may come while this waits for Postgres
        recent = self._history.recall(unsettled, in_flight.awaiting_reply(), time.monotonic(), doubt_s=doubt_s)
        done = await reassert(session.connection, recent, self._patience, route=self._route, instance=self._instance)
        verdicts.renumber(
            {key: there.email for key, there in done.emails.items()},
            asserted=unsettled,
            reported={(one.key, one.attempt) for one in recent},
        )
        in_flight.renumber({key: (there.email, there.attempt) for key, there in done.emails.items()})
        self._complete_on = session.server
        self._history.note_known()
        log.warning(
            "verdicts_told_again",
            "another Postgres, or a new start of it: {told} verdicts were told, {new} new to it",
            told=len(recent),
            new=done.changed,
        )

    async def end_former(self, session: Session, former: Session, doubt_s: float | None) -> None:
        """End the former session in the ledger: its unmarked claims are free, what it had marked is in doubt."""
        with self._patience():
            await judge_former(
                session.connection,
                former.relay,
                former.timeline,
                doubt_s=doubt_s,
                quarantine=session.quarantine,
                instance=self._instance,
                present=session.relay,
            )
        self._history.note_known()
