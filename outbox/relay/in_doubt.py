"""What happens to emails in doubt by themselves: sent again, or asked about. `hold` is that nothing happens here.

A resolver is the user's own function that may know: it looks into the mail server's log, or asks its API.

    def was_accepted(email: Doubt) -> bool | None:     # True: it arrived; False: it did not; None: ask again later
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.errors import ConfigurationError
from outbox.log import Events
from outbox.relay.quarantine import Quarantine, is_of_a_row
from outbox.user_code import UntrustedCodeError, awaited, called, load, said

log = Events("outbox.relay")

RESENT_AT_ONCE: Final = 1000
ASKED_AT_ONCE: Final = 20
ASK_LEASE_S: Final = 300.0  # a resolver may take so long for a lot before another relay asks about the rest of it
ASK_AGAIN_MAX_S: Final = 3600.0
HUNG_MAX: Final = 3

# The grace is longer than the guard, so no process can still be about to write the first dot.
_RESEND: Final = """
WITH chosen AS ({chosen}
), held AS (
    UPDATE outbox.delivery d SET due_at = 'infinity' FROM chosen c WHERE d.email = c.email AND d.send_before <= now()
), resent AS (
    UPDATE outbox.delivery d SET state = 'pending', relay = NULL, doubted_at = NULL
      FROM chosen c WHERE d.email = c.email AND (d.send_before IS NULL OR d.send_before > now())
    RETURNING d.email, d.attempt, d.marked_at
)
INSERT INTO outbox.attempt (email, attempt, verdict, reply, marked_at)
SELECT email, attempt, 'resolved', 'in_doubt = "resend": sent again', marked_at FROM resent
"""
_IN_DOUBT: Final = """
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND doubted_at IS NOT NULL AND due_at <= now()"""
_ONE: Final = f"{_IN_DOUBT} AND email = $1 FOR UPDATE SKIP LOCKED"
# $1 how many, or the email in the statements for one; $2 emails that are left out.
IN_DOUBT: Final = f"{_IN_DOUBT} AND email <> ALL ($2::bigint[]) ORDER BY due_at, email LIMIT $1"
RESEND: Final = _RESEND.format(chosen=f"{IN_DOUBT} FOR UPDATE SKIP LOCKED")
RESEND_ONE: Final = _RESEND.format(chosen=_ONE)


async def resend_doubtful(connection: Connection, quarantine: Quarantine | None = None) -> int:
    """Make deliveries pending whose doubt has lasted for its grace; return how many. The bytes are the same ones.

    What is too late to send stays in doubt, for a person: pending, it would expire as if it had never been sent.
    """
    quarantine = quarantine or Quarantine()
    try:
        done = [await connection.execute(RESEND, RESENT_AT_ONCE, quarantine.left_out)]
    except Exception as error:
        if not is_of_a_row(error):
            raise
        rows = await connection.fetch(IN_DOUBT, RESENT_AT_ONCE, quarantine.left_out)
        done = await quarantine.sift(
            connection, [row["email"] for row in rows], lambda email: connection.execute(RESEND_ONE, email)
        )
    return sum(int(tag.rpartition(" ")[2]) for tag in done)


@dataclass(frozen=True, slots=True)
class Doubt:
    """An email of which nobody knows whether the server took it, as a resolver sees it."""

    key: str
    message_id: str
    sender: str
    recipient: str
    attempt: int
    marked_at: datetime
    """When the final dot was about to be written."""
    email: int
    asked: int
    """How often it was asked about before."""


Resolver = Callable[[Doubt], bool | None]

# Moving `due_at` on is what keeps two relays from asking about one email; who dies while it asks delays it that long.
_TAKE_DOUBTS: Final = """
WITH chosen AS ({chosen}
), taken AS (
    UPDATE outbox.delivery d SET due_at = now() + $2 * interval '1 second' FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt, d.marked_at
)
SELECT e.key, e.message_id, e.sender, e.recipient, t.attempt, t.marked_at, t.email,
       (SELECT count(*) FROM outbox.attempt a
         WHERE a.email = t.email AND a.attempt = t.attempt AND a.verdict = 'asked')::int
  FROM taken t JOIN outbox.email e ON e.id = t.email
"""
TAKE_DOUBTS: Final = _TAKE_DOUBTS.format(
    chosen=f"{_IN_DOUBT} AND email <> ALL ($3::bigint[]) ORDER BY due_at, email LIMIT $1 FOR UPDATE SKIP LOCKED"
)
TAKE_DOUBT: Final = _TAKE_DOUBTS.format(chosen=_ONE)


async def take_doubts(connection: Connection, *, lease_s: float, quarantine: Quarantine | None = None) -> list[Doubt]:
    """Return the next few emails to ask about, due longest first; no other relay asks about them for `lease_s`."""
    quarantine = quarantine or Quarantine()
    try:
        async with connection.transaction():  # rolls back if a row cannot be decoded
            rows = await connection.fetch(TAKE_DOUBTS, ASKED_AT_ONCE, lease_s, quarantine.left_out)
            return [Doubt(*row) for row in rows]
    except Exception as error:
        if not is_of_a_row(error):
            raise
    emails = [row["email"] for row in await connection.fetch(IN_DOUBT, ASKED_AT_ONCE, quarantine.left_out)]
    found = await quarantine.sift(connection, emails, lambda email: connection.fetch(TAKE_DOUBT, email, lease_s))
    return [Doubt(*row) for rows in found for row in rows]


# A late 250 or a person may have decided meanwhile: then nothing is in doubt any more, and the answer is dropped.
# By the key: after a failover the id may be another email's.
ANSWER: Final = """
WITH answers AS (
    SELECT m.id AS email, a.* FROM unnest($1::text[], $2::integer[], $3::text[], $4::float8[], $5::text[])
        AS a (key, attempt, state, delay_s, reply) JOIN outbox.email m ON m.key = a.key
), decided AS (
    UPDATE outbox.delivery d
       SET state = a.state,
           relay = CASE WHEN a.state = 'pending' THEN NULL ELSE d.relay END,
           due_at = CASE WHEN a.state = 'sent' THEN d.due_at
                         ELSE coalesce(now() + a.delay_s * interval '1 second', 'infinity') END,
           settled_at = CASE WHEN a.state = 'sent' THEN now() END,
           doubted_at = CASE WHEN a.state = 'in_doubt' THEN d.doubted_at END
      FROM answers a
     WHERE d.email = a.email AND d.attempt = a.attempt AND d.state = 'in_doubt'  -- by the primary key: see TICK
    RETURNING d.email, d.attempt, d.relay, d.marked_at, a.state, a.reply
)
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
SELECT email, attempt, relay, CASE WHEN state = 'in_doubt' THEN 'asked' ELSE 'resolved' END, reply, marked_at
  FROM decided
"""


STATEMENTS: Final = (RESEND, RESEND_ONE, IN_DOUBT, TAKE_DOUBTS, TAKE_DOUBT, ANSWER)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a resolver said about a doubt, or why it could not."""

    doubt: Doubt
    accepted: bool | None
    said: str


async def write_answers(
    connection: Connection,
    answers: Sequence[Answer],
    *,
    grace_s: float,
    asks_max: int,
    quarantine: Quarantine | None = None,
) -> int:
    """Settle what was answered; ask again what was not, twice as late each time, and at last hold it."""

    def delay_s(answer: Answer) -> float | None:
        if answer.accepted is False:
            return 0.0
        asked = answer.doubt.asked + 1
        return None if asked >= asks_max else min(grace_s * 2.0**asked, max(ASK_AGAIN_MAX_S, grace_s))

    states = {True: "sent", False: "pending", None: "in_doubt"}

    async def write(some: Sequence[Answer]) -> int:
        done = await connection.execute(
            ANSWER,
            [a.doubt.key for a in some],
            [a.doubt.attempt for a in some],
            [states[a.accepted] for a in some],
            [delay_s(a) for a in some],
            [storable(a.said)[:500] for a in some],
        )
        return int(done.rpartition(" ")[2])

    try:
        return await write(answers)
    except Exception as error:
        if not is_of_a_row(error):
            raise
    quarantine = quarantine or Quarantine()
    of = {a.doubt.email: a for a in answers}
    return sum(await quarantine.sift(connection, of, lambda email: write([of[email]])))


def load_resolver(reference: str, directory: Path) -> Resolver:
    """The function that `module:callable` names; modules beside the settings are found too.

    Raises:
        ConfigurationError: no such module or function.

    """
    try:
        found = load(reference, directory)
    except UntrustedCodeError as error:
        raise ConfigurationError(f"resolver: {error}") from error
    except (Exception, SystemExit) as error:  # noqa: BLE001 - importing runs the user's code
        raise ConfigurationError(
            f"resolver: {reference} cannot be used ({said(error)}); mend the name or the module."
        ) from None
    if not callable(found):
        raise ConfigurationError(f"resolver: {reference} is not callable; name a function of one argument.")
    return cast("Resolver", found)


@dataclass(slots=True, eq=False)
class _Lot:
    """Questions put together; `open` of them have no answer yet."""

    doubts: Sequence[Doubt]
    open: int
    heard_at: float


class Inquirer:
    """A relay's dealings with its resolver: some questions at a time, in a thread that may block or hang.

    The answers wait until the relay writes them. A question that has no answer for `ASK_LEASE_S` is left alone, and
    after `HUNG_MAX` of those nothing more is asked: threads cannot be ended.
    """

    def __init__(self, resolver: Resolver, *, grace_s: float, asks_max: int, wake: Callable[[], None]) -> None:
        self.resolver = resolver
        self.grace_s = grace_s
        self.asks_max = asks_max
        self.wake = wake
        self.answers: list[Answer] = []
        self._lot: _Lot | None = None
        self._hung = 0

    @property
    def trouble(self) -> str | None:
        """What keeps it from asking, if anything does."""
        if self._hung < HUNG_MAX:
            return None
        return f"the resolver hangs: {self._hung} calls have not returned, so nothing more is asked; restart this relay"

    async def ask(self, connection: Connection, now: float, quarantine: Quarantine | None = None) -> None:
        """Ask about the next few doubts that are due, unless earlier questions are still open."""
        if self._lot is not None and now - self._lot.heard_at > ASK_LEASE_S:
            self._lot = None
            self._hung += 1
            log.error("resolver_silent", "the resolver has given no answer for {silent_s:g} s", silent_s=ASK_LEASE_S)
        if self._lot is not None or self._hung >= HUNG_MAX:
            return
        doubts = await take_doubts(connection, lease_s=ASK_LEASE_S, quarantine=quarantine)
        if doubts:
            self._lot = _Lot(doubts, len(doubts), now)
            loop = asyncio.get_running_loop()
            threading.Thread(
                target=self._put, args=(self._lot, loop, time.monotonic()), name="resolver", daemon=True
            ).start()

    def _put(self, lot: "_Lot", loop: asyncio.AbstractEventLoop, began_at: float) -> None:
        """In the thread: all questions on one event loop, so that what an async resolver opens serves the next one."""
        with asyncio.Runner() as runner:
            for doubt in lot.doubts:
                is_late = time.monotonic() - began_at > ASK_LEASE_S  # others may ask by now
                answer = None if is_late else _answer(self.resolver, doubt, runner)
                with suppress(RuntimeError):  # the loop is closed: the relay has ended
                    loop.call_soon_threadsafe(self._heard, lot, answer)

    def _heard(self, lot: "_Lot", answer: "Answer | None") -> None:
        lot.open -= 1
        lot.heard_at = time.monotonic()
        if lot is self._lot and lot.open == 0:
            self._lot = None
        elif lot is not self._lot and lot.open == 0:
            self._hung -= 1  # it hung, and has come back
        if answer is not None:
            self.answers.append(answer)
            log.info(
                "doubt_answered",
                "{key} is in doubt: {said}",
                key=answer.doubt.key,
                email=answer.doubt.email,
                attempt=answer.doubt.attempt,
                said=answer.said,
                accepted=answer.accepted,
            )
            self.wake()

    async def write(self, connection: Connection, quarantine: Quarantine | None = None) -> int:
        """Write down what was answered; gives how many doubts that decided or put off."""
        answers = list(self.answers)
        decided = await write_answers(
            connection, answers, grace_s=self.grace_s, asks_max=self.asks_max, quarantine=quarantine
        )
        del self.answers[: len(answers)]
        return decided


def _answer(resolver: Resolver, doubt: Doubt, runner: asyncio.Runner) -> Answer:
    try:
        accepted: Any = called(resolver, doubt)
        if inspect.isawaitable(accepted):
            accepted = runner.run(awaited(accepted))
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it does not know, whatever it raised
        return Answer(doubt, None, f"the resolver raised {said(error)}")
    if accepted is not None and not isinstance(accepted, bool):
        return Answer(doubt, None, f"the resolver gave {type(accepted).__name__}; it must give True, False or None")
    words = {True: "it arrived", False: "it did not arrive", None: "it does not know yet"}
    return Answer(doubt, accepted, f"the resolver says: {words[accepted]}")
