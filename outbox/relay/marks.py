"""Marks: connections ask for them, a tick writes them, and the guard stands between their commit and the final dot."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from outbox.database.connection import Connection
from outbox.log import Events
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.settlement import states_of
from outbox.relay.tick import TickResult
from outbox.relay.verdicts import Verdicts
from outbox.smtp.connection import SmtpConnection
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.verdict import Withdrawn

log = Events("outbox.relay")

LOCKED: Final = "another session has locked its row"

Asked = dict[int, tuple[SmtpConnection, Try]]
"""Marks by email, each with the connection that waits for it."""


class Marks:
    """Marks that connections of one relay have asked for.

    `is_held` returns True while the session that claimed an email is held: a mark is asked for under no other.
    """

    def __init__(self, verdicts: Verdicts, *, is_held: Callable[[OutgoingEmail], bool]) -> None:
        self.verdicts = verdicts
        self._is_held = is_held
        self._asked: Asked = {}

    def __len__(self) -> int:
        return len(self._asked)

    def emails(self) -> list[OutgoingEmail]:
        """Return the emails that wait for their marks."""
        return [tried.outgoing for _, tried in self._asked.values()]

    def ask(self, connection: SmtpConnection, tried: Try) -> None:
        """Put the try into the next tick's marks; the connection lets go of one that must not be sent."""
        email = tried.outgoing.email
        if not self._is_held(tried.outgoing):
            connection.abandon("the session that claimed it is gone")
        elif email in self._asked:  # cancelled, retried and claimed anew, all while another connection had it
            connection.abandon("another connection is about to send it")
        else:
            self._asked[email] = (connection, tried)

    def retract(self, connection: SmtpConnection) -> list[Try]:
        """Return the tries whose marks a connection only asked for before its end: nothing happened to them."""
        found = [email for email, (asking, _) in self._asked.items() if asking is connection]
        return [self._asked.pop(email)[1] for email in found]

    def clear(self) -> None:
        """Forget all: nothing of it is written."""
        self._asked.clear()

    def take(self) -> Asked:
        """Return the marks for a tick, and forget them."""
        asked, self._asked = self._asked, {}
        return asked

    def keep_refused(self, asked: Asked, done: TickResult) -> tuple[Asked, list[OutgoingEmail]]:
        """Keep the marks that the barrier refused for a later tick.

        Return the marks that the tick decided, and the emails whose connections have ended since.
        """
        decided = {*done.marked, *done.expired, *done.quarantined}
        ended: list[OutgoingEmail] = []
        for email, (connection, tried) in asked.items():
            if email in decided:
                continue
            if connection.is_marking(tried):
                self._asked.setdefault(email, (connection, tried))
            else:
                ended.append(tried.outgoing)
        return {email: mark for email, mark in asked.items() if email in decided}, ended

    def act_on(self, asked: Asked, done: TickResult, *, is_too_late: Callable[[], bool]) -> list[Try]:
        """Guard: write the final dot of each try that is marked, fresh and still held.

        `is_too_late` is asked right before each dot. Return the tries that are no longer this relay's.
        """
        lost: list[Try] = []
        for email, (connection, tried) in asked.items():
            is_waiting = connection.is_marking(tried)
            if email in done.expired or email in done.quarantined:
                if is_waiting:
                    connection.abandon("it is too late to send it, or its mark cannot be written")
            elif email not in done.marked:
                is_locked = email in done.locked
                if is_waiting:
                    connection.abandon(LOCKED if is_locked else "it is no longer this relay's")
                if is_locked:
                    self.verdicts.on_verdict(tried, Withdrawn(LOCKED))
                else:
                    lost.append(tried)
            else:
                tried.mark(done.marked[email])
                if not is_waiting:
                    self.verdicts.on_verdict(tried, Withdrawn("the connection was lost before the dot"))
                elif is_too_late():
                    connection.abandon("the guard stopped it")
                    self.verdicts.on_verdict(
                        tried, Withdrawn("the guard stopped it: too late after the mark, or the session was lost")
                    )
                else:
                    connection.send_final_dot()
        return lost

    def withdraw(self, asked: Asked) -> None:
        """Withdraw the tries of a tick that failed: their marks may be committed, and the next session undoes them."""
        for connection, tried in asked.values():
            is_waiting = connection.is_marking(tried)
            tried.mark(tried.attempt + 1)
            if is_waiting:
                connection.abandon("its mark is not known to be committed")
            self.verdicts.on_verdict(tried, Withdrawn("its mark was not confirmed, so the dot was not written"))


async def explain_lost(lost: Sequence[Try], connection: Connection, counts: Counter[str]) -> None:
    """Log why tries that were about to be sent were not: a person cancelled them, or else something is wrong."""
    if not lost:
        return
    states = await states_of(connection, [tried.outgoing.email for tried in lost])
    for tried in lost:
        email = tried.outgoing
        subject = {"key": email.key, "email": email.email, "attempt": tried.attempt, "relay": email.relay}
        state, _ = states.get(email.email, (None, None))
        if state == DeliveryState.CANCELLED:
            log.info("claim_cancelled", "{key} was cancelled at the last moment; it was not sent", **subject)
            counts["cancelled"] += 1
        elif state in (DeliveryState.SENT, DeliveryState.IN_DOUBT):
            log.info(
                "claim_told",
                "{key} is not sent: a relay on another Postgres server has sent it, or may have",
                **subject,
            )
        else:
            log.error("claim_lost", "{key} is no longer this relay's; it was not sent", **subject)
            counts["lost claims"] += 1
