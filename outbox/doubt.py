"""What happens to emails in doubt by themselves: sent again, or asked about. `hold` is that nothing happens here.

A resolver is the user's own function that may know: it looks into the mail server's log, or asks its API.

    def was_accepted(email: Doubt) -> bool | None:     # True: it arrived; False: it did not; None: ask again later
"""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

from outbox.database import storable
from outbox.errors import ConfigurationError
from outbox.plugin import load, said

RESENT_AT_ONCE: Final = 1000
ASKED_AT_ONCE: Final = 20
ASK_AGAIN_MAX_S: Final = 3600.0

# The grace is longer than the guard, so no process can still be about to write the first dot.
RESEND: Final = """
WITH chosen AS (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND doubted_at IS NOT NULL AND due_at <= now()
     ORDER BY due_at, email LIMIT $1 FOR UPDATE SKIP LOCKED
), resent AS (
    UPDATE outbox.delivery d SET state = 'pending', relay = NULL, doubted_at = NULL
      FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt, d.marked_at
)
INSERT INTO outbox.attempt (email, attempt, verdict, reply, marked_at)
SELECT email, attempt, 'resolved', 'in_doubt = "resend": sent again', marked_at FROM resent
"""


async def resend_doubtful(connection: Any) -> int:
    """Make deliveries pending whose doubt has lasted for its grace; gives how many. The bytes are the same ones."""
    return int((await connection.execute(RESEND, RESENT_AT_ONCE)).rpartition(" ")[2])


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
TAKE_DOUBTS: Final = """
WITH chosen AS (
    SELECT email FROM outbox.delivery
     WHERE settled_at IS NULL AND doubted_at IS NOT NULL AND due_at <= now()
     ORDER BY due_at, email LIMIT $1 FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE outbox.delivery d SET due_at = now() + $2 * interval '1 second' FROM chosen c WHERE d.email = c.email
    RETURNING d.email, d.attempt, d.marked_at
)
SELECT e.key, e.message_id, e.sender, e.recipient, t.attempt, t.marked_at, t.email,
       (SELECT count(*) FROM outbox.attempt a
         WHERE a.email = t.email AND a.attempt = t.attempt AND a.verdict = 'asked')::int
  FROM taken t JOIN outbox.email e ON e.id = t.email
"""


async def take_doubts(connection: Any, *, lease_s: float) -> list[Doubt]:
    """The next few emails to ask about, due longest first; nobody else asks about them for `lease_s`."""
    return [Doubt(*row) for row in await connection.fetch(TAKE_DOUBTS, ASKED_AT_ONCE, lease_s)]


# A late 250 or a person may have decided meanwhile: then nothing is in doubt any more, and the answer is dropped.
ANSWER: Final = """
WITH answers AS (
    SELECT * FROM unnest($1::bigint[], $2::integer[], $3::text[], $4::float8[], $5::text[])
        AS a (email, attempt, state, delay_s, reply)
), decided AS (
    UPDATE outbox.delivery d
       SET state = a.state,
           relay = CASE WHEN a.state = 'pending' THEN NULL ELSE d.relay END,
           due_at = CASE WHEN a.state = 'sent' THEN d.due_at
                         ELSE coalesce(now() + a.delay_s * interval '1 second', 'infinity') END,
           settled_at = CASE WHEN a.state = 'sent' THEN now() END,
           doubted_at = CASE WHEN a.state = 'in_doubt' THEN d.doubted_at END
      FROM answers a
     WHERE d.email = a.email AND d.attempt = a.attempt AND d.settled_at IS NULL AND d.state = 'in_doubt'
    RETURNING d.email, d.attempt, d.relay, d.marked_at, a.state, a.reply
)
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
SELECT email, attempt, relay, CASE WHEN state = 'in_doubt' THEN 'asked' ELSE 'resolved' END, reply, marked_at
  FROM decided
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a resolver said about a doubt, or why it could not."""

    doubt: Doubt
    accepted: bool | None
    said: str


async def write_answers(connection: Any, answers: Sequence[Answer], *, grace_s: float, asks_max: int) -> int:
    """Settle what was answered; ask again what was not, twice as late each time, and at last hold it."""

    def delay_s(answer: Answer) -> float | None:
        if answer.accepted is False:
            return 0.0
        asked = answer.doubt.asked + 1
        return None if asked >= asks_max else min(grace_s * 2.0**asked, max(ASK_AGAIN_MAX_S, grace_s))

    states = {True: "sent", False: "pending", None: "in_doubt"}
    done = await connection.execute(
        ANSWER,
        [a.doubt.email for a in answers],
        [a.doubt.attempt for a in answers],
        [states[a.accepted] for a in answers],
        [delay_s(a) for a in answers],
        [storable(a.said)[:500] for a in answers],
    )
    return int(done.rpartition(" ")[2])


def load_resolver(reference: str, directory: Path) -> Resolver:
    """The function that `module:callable` names; modules beside the settings are found too.

    Raises:
        ConfigurationError: no such module or function.

    """
    try:
        found = load(reference, directory)
    except Exception as error:  # noqa: BLE001 - importing runs the user's code
        raise ConfigurationError(
            f"resolver: {reference} cannot be used ({said(error)}); mend the name or the module."
        ) from None
    if not callable(found):
        raise ConfigurationError(f"resolver: {reference} is not callable; name a function of one argument.")
    return cast("Resolver", found)


def ask(resolver: Resolver, doubts: Sequence[Doubt], answered: Callable[[Answer], None]) -> None:
    """Ask about each one in a thread of its own, which may block or hang without keeping anybody from leaving."""

    def run() -> None:
        for doubt in doubts:
            answered(_answer(resolver, doubt))

    threading.Thread(target=run, name="resolver", daemon=True).start()


def _answer(resolver: Resolver, doubt: Doubt) -> Answer:
    try:
        accepted: Any = resolver(doubt)
        if inspect.isawaitable(accepted):
            accepted = asyncio.run(_awaited(accepted))
    except Exception as error:  # noqa: BLE001 - the user's code: it does not know, whatever it raised
        return Answer(doubt, None, f"the resolver raised {said(error)}")
    if accepted is not None and not isinstance(accepted, bool):
        return Answer(doubt, None, f"the resolver gave {type(accepted).__name__}; it must give True, False or None")
    words = {True: "it arrived", False: "it did not arrive", None: "it does not know yet"}
    return Answer(doubt, accepted, f"the resolver says: {words[accepted]}")


async def _awaited(given: Awaitable[Any]) -> Any:
    return await given
