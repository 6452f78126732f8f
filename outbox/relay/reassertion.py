"""Reassertion: what a new session writes before it claims.

Another server, or a new start of it, may lack what this relay has written: its verdicts are written again (`failover`).
And the former session, which did not die with its claims, is ended in the ledger.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from outbox.database.failover_barrier import ServerId
from outbox.log import Events
from outbox.relay.failover import EmailThere, reassert
from outbox.relay.session import Session
from outbox.relay.settlement import Settlement
from outbox.relay.sweep import judge_former
from outbox.relay.verdict_history import VerdictHistory
from outbox.smtp.outgoing import Claim

log = Events("outbox.relay")


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Adaptation of what a relay has in flight to a new server, where the emails have other ids."""

    emails: Mapping[str, EmailThere] = field(default_factory=dict)
    """By their keys."""
    reported: Collection[tuple[str, int]] = ()
    """Key and attempt of each verdict."""
    unsettled: Collection[Settlement] = ()
    """Verdicts that no commit had confirmed when it began."""

    def settlements(self, present: Iterable[Settlement]) -> list[Settlement]:
        """Return the verdicts that are still to be settled, with the ids that their emails have here.

        What was judged meanwhile has the old ids, which may be another email's on this server.
        """
        return [
            replace(one, email=self.emails[one.key].email) if one.key in self.emails else one
            for one in present
            if one not in self.unsettled or (one.key, one.attempt) not in self.reported
        ]

    def renumber(self, claims: Iterable[Claim]) -> None:
        """Give claims whose final dot awaits its reply the fence that they have here."""
        for claim in claims:
            if claim.key in self.emails:
                here = self.emails[claim.key]
                claim.email = here.email
                claim.attempt = here.attempt or claim.attempt  # the row may have counted further


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

    async def write(
        self, session: Session, unsettled: Sequence[Settlement], awaiting_reply: Sequence[Claim], doubt_s: float | None
    ) -> Adaptation:
        """Write what the server may not know.

        `unsettled` are verdicts that no commit has confirmed, `awaiting_reply` claims whose final dot is written.
        """
        unsettled = list(unsettled)  # more may come while this waits for Postgres
        verdicts = self._history.recall(unsettled, awaiting_reply, time.monotonic(), doubt_s=doubt_s)
        done = await reassert(session.connection, verdicts, self._patience, route=self._route, instance=self._instance)
        self._complete_on = session.server
        self._history.note_known()
        log.warning(
            "verdicts_told_again",
            "another Postgres, or a new start of it: {told} verdicts were told, {new} new to it",
            told=len(verdicts),
            new=done.changed,
        )
        return Adaptation(done.emails, {(one.key, one.attempt) for one in verdicts}, unsettled)

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
