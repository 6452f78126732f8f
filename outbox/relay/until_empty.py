"""End of a relay that runs until the outbox is empty, or until only a person can let the rest go."""

from collections import Counter

from outbox.database.pause_list import Pause, read_pauses
from outbox.log import Events
from outbox.relay import pauses
from outbox.relay.holds import Holds
from outbox.relay.remaining import is_empty, never_taken
from outbox.relay.server_state import ServerState
from outbox.relay.session import Session

log = Events("outbox.relay")


class UntilEmpty:
    """Look for the end of the work on one route."""

    def __init__(self, route: str, server: ServerState, holds: Holds, counts: Counter[str]) -> None:
        self._route = route
        self._server = server
        self._holds = holds
        self._counts = counts
        self.left_held: list[Pause] = []
        """The pauses under which mail is left, if that is why the relay stops."""
        self.left_refused: str | None = None
        """Refusal of the sender, this host or the login, if that is why the relay stops."""

    async def is_over(self, session: Session, now: float, *, is_idle: bool) -> bool:
        """Return True if nothing is left to send, or only what a person must let go. `is_idle`: this relay has none."""
        self.left_refused = self._server.refused_for_good(now, has_other_mail=not is_idle)
        if self.left_refused is not None:
            return True
        if not is_idle:
            return False
        if await is_empty(session.connection, route=self._route, left_out=session.quarantine.left_out):
            stuck = await never_taken(session.connection, route=self._route)
            for email, why in stuck.items():
                log.warning(
                    "email_never_taken", "email {email} is never sent: {why}; set its row right", email=email, why=why
                )
            self._log("outbox_empty", "the outbox is empty: {summary}")
            return True
        if self._holds.holds_any and await pauses.is_held(session.connection, route=self._route):
            self.left_held = [one for one in await read_pauses(session.connection) if one.waiting]
            self._log("outbox_held", "nothing is left but what is paused: {summary}")
            return True
        return False

    def _log(self, event: str, text: str) -> None:
        log.info(event, text, summary=summary_of(self._counts), counts=dict(self._counts))


def summary_of(counts: Counter[str]) -> str:
    """Return what was done so far, in words."""
    return ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) or "nothing was sent"
