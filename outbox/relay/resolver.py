"""Resolver: the user's own function that may know what became of an email in doubt, run beside the relay.

It looks into the mail server's log, for example, or asks the server's API.

    def was_accepted(email: Doubt) -> bool | None:     # True: it arrived; False: it did not; None: ask again later
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from outbox.database.connection import Connection
from outbox.errors import ConfigurationError
from outbox.log import Events
from outbox.relay.in_doubt import Answer, Doubt, take_doubts, write_answers
from outbox.relay.quarantine import Quarantine
from outbox.user_code import UntrustedCodeError, awaited, called, load, said

log = Events("outbox.relay")

ASK_LEASE_S: Final = 300.0  # a resolver may take so long for a batch before another relay asks about the rest of it
HUNG_MAX: Final = 3

Resolver = Callable[[Doubt], bool | None]


def load_resolver(reference: str, directory: Path) -> Resolver:
    """Return the function that `module:callable` names; modules beside the settings are found too.

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
class _Batch:
    """Questions that are put together; `open` of them have no answer yet."""

    doubts: Sequence[Doubt]
    open: int
    answered_at: float


class ResolverRunner:
    """Calls a relay's resolver, with a few questions at a time, in a thread that may block or hang.

    The answers wait until the relay writes them. A batch without an answer for `ASK_LEASE_S` is given up, and after
    `HUNG_MAX` of those nothing more is asked: threads cannot be ended.
    """

    def __init__(self, resolver: Resolver, *, grace_s: float, asks_max: int, wake: Callable[[], None]) -> None:
        self.resolver = resolver
        self.grace_s = grace_s
        self.asks_max = asks_max
        self.wake = wake
        self.answers: list[Answer] = []
        self._batch: _Batch | None = None
        self._hung = 0

    @property
    def trouble(self) -> str | None:
        """Reason why nothing more is asked, if so."""
        if self._hung < HUNG_MAX:
            return None
        return f"the resolver hangs: {self._hung} calls have not returned, so nothing more is asked; restart this relay"

    async def ask(self, connection: Connection, now: float, quarantine: Quarantine) -> None:
        """Ask about the next few doubts that are due, unless earlier questions are still open."""
        if self._batch is not None and now - self._batch.answered_at > ASK_LEASE_S:
            self._batch = None
            self._hung += 1
            log.error("resolver_silent", "the resolver has given no answer for {silent_s:g} s", silent_s=ASK_LEASE_S)
        if self._batch is not None or self._hung >= HUNG_MAX:
            return
        doubts = await take_doubts(connection, lease_s=ASK_LEASE_S, quarantine=quarantine)
        if doubts:
            self._batch = _Batch(doubts, len(doubts), now)
            loop = asyncio.get_running_loop()
            threading.Thread(
                target=self._run, args=(self._batch, loop, time.monotonic()), name="resolver", daemon=True
            ).start()

    def _run(self, batch: _Batch, loop: asyncio.AbstractEventLoop, began_at: float) -> None:
        """Put all questions, in the thread, on one event loop, so that what an async resolver opens serves the next."""
        with asyncio.Runner() as runner:
            for doubt in batch.doubts:
                is_late = time.monotonic() - began_at > ASK_LEASE_S  # others may ask by now
                answer = None if is_late else _answer(self.resolver, doubt, runner)
                with suppress(RuntimeError):  # the loop is closed: the relay has ended
                    loop.call_soon_threadsafe(self._receive, batch, answer)

    def _receive(self, batch: _Batch, answer: Answer | None) -> None:
        batch.open -= 1
        batch.answered_at = time.monotonic()
        if batch is self._batch and batch.open == 0:
            self._batch = None
        elif batch is not self._batch and batch.open == 0:
            self._hung -= 1  # it hung, and has come back
        if answer is not None:
            self.answers.append(answer)
            log.info(
                "doubt_answered",
                "{key} is in doubt: {said}",
                key=answer.doubt.key,
                email=answer.doubt.email,
                attempt=answer.doubt.attempt,
                said=answer.reply,
                accepted=answer.accepted,
            )
            self.wake()

    async def write(self, connection: Connection, quarantine: Quarantine) -> int:
        """Write the answers; return how many deliveries that changed."""
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
