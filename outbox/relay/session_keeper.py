"""Sessions of a relay, one after the other. The first one may take a lease to open; a lost one is replaced.

A Postgres that is silent never stops a relay for longer than a few leases: each wait for it has a limit, and the
session is lost at that limit.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg

from outbox.database.connection import LOST_SESSION
from outbox.database.refusal import DatabaseRefusedError
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.log import Events
from outbox.relay.barrier_watch import BarrierWatch
from outbox.relay.memory_budget import Share
from outbox.relay.message_fetch import message_limit
from outbox.relay.reopening import Reopening
from outbox.relay.session import Session, SessionEvents
from outbox.relay.statements import STATEMENTS
from outbox.settings import Settings

log = Events("outbox.relay")

REOPEN_FIRST_S: Final = 0.02
REOPEN_MAX_S: Final = 2.0
OPEN_LEASES_MAX: Final = 3  # a server that falls silent while a session is opened is given up after so many leases
FIRST_PAUSE_S: Final = 0.5  # between tries to open the first session
LAST_WORD_S: Final = 1.0  # when the relay has to stop, a Postgres that is silent for so long is not waited for


class SessionKeeper:
    """Keeper of a relay's one session. All of it runs on the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        route: str,
        *,
        barrier: BarrierWatch,
        share: Share,
        events: SessionEvents,
        on_opened: Callable[[Session], None],
    ) -> None:
        assert settings.database_url is not None
        self._url = settings.database_url
        self._lease_s = settings.lease_s
        self._bytes_max = settings.message_bytes_max
        self._route = route
        self._barrier = barrier
        self._share = share
        self._events = events
        self._on_opened = on_opened
        self.current: Session | None = None
        self.former: Session | None = None
        """The last session, until it is ended in the ledger."""
        self.turned_at = time.monotonic()
        """When the main loop last took a turn, or a try to get a session ended: see `monitoring.health`."""
        self._pause_s = REOPEN_FIRST_S
        self._opening: asyncio.Timeout | None = None
        self._asked_at: float | None = None
        self._drain_until: float | None = None

    @property
    def holds_session(self) -> bool:
        """Return True if the relay holds its session, as far as it knows."""
        return self.current is not None and self.current.lost is None

    def is_current(self, relay: int) -> bool:
        """Return True if that is the identity of the session that the relay holds."""
        session = self.current
        return session is not None and session.lost is None and relay == session.relay

    def note_turn(self) -> None:
        """Note that the main loop makes progress."""
        self.turned_at = time.monotonic()

    async def open_first(self) -> None:
        """Open the first session. A server that does not answer may be restarting: it has one lease for that.

        If the relay is stopped meanwhile, there may be no session.

        Raises:
            OutboxError: the database refuses, or is not there.

        """
        patience_until = time.monotonic() + self._lease_s
        while True:
            self.note_turn()
            try:
                await self._open()
            except DatabaseRefusedError:
                raise
            except DatabaseUnavailableError as error:
                if self._is_stopping:
                    return
                if time.monotonic() > patience_until:
                    raise
                log.warning("database_unavailable", "{reason} Trying again.", reason=error)
                await asyncio.sleep(FIRST_PAUSE_S)
            else:
                return
            if self._is_stopping:
                return

    async def reopen(self, is_done: Callable[[], bool]) -> None:
        """Replace the lost session, however long it takes, unless the relay `is_done` before."""
        lost = self.current
        assert lost is not None
        log.warning("session_lost", "relay {relay} lost its session: {reason}", relay=lost.relay, reason=lost.lost)
        self.former = lost
        if time.monotonic() - lost.opened_at > self._lease_s:
            self._pause_s = REOPEN_FIRST_S
        reopening = Reopening(self._url)
        while not is_done():
            self.note_turn()
            await asyncio.sleep(self._pause_s * (0.5 + random.random()))  # noqa: S311 - jitter, not a secret
            self._pause_s = min(2 * self._pause_s, REOPEN_MAX_S)
            try:
                await self._open()
            except (OutboxError, *LOST_SESSION, asyncpg.PostgresError) as error:
                await reopening.refused(error, self._ends_pause)
            else:
                return

    def stop(self, drain_until: float, *, has_work: bool) -> None:
        """Limit all waiting for Postgres from now on: to the end of the drain, or to now if there is no work left."""
        self._drain_until = drain_until
        loop, left_s = asyncio.get_running_loop(), drain_until - time.monotonic()
        loop.call_later(left_s + LAST_WORD_S, self._wait_no_more)
        if self._opening is not None and not self._opening.expired():
            until = loop.time() + (left_s if has_work else 0.0)
            self._opening.reschedule(min(self._opening.when() or until, until))

    def forget_former(self) -> None:
        """Note that the former session is ended in the ledger."""
        self.former = None

    @contextmanager
    def patience(self, at_most_s: float | None = None) -> Iterator[None]:
        """Lose the session if Postgres is silent for a lease, or for `at_most_s`.

        A network that is cut causes no error.
        """
        session = self.current
        assert session is not None
        silent_s = min(self._lease_s, at_most_s or self._lease_s)
        reason = f"Postgres did not answer within {silent_s:g} s"
        silence = asyncio.get_running_loop().call_later(silent_s, session.lose, reason)
        self._asked_at = self.turned_at = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = None
            silence.cancel()

    @property
    def _is_stopping(self) -> bool:
        return self._drain_until is not None

    def _ends_pause(self) -> bool:
        """Return True if a pause must end; the relay is not stuck while it asks."""
        self.note_turn()
        return self._is_stopping

    def _wait_no_more(self) -> None:
        """Lose the session of a Postgres that does not answer, since the time to stop is over."""
        if self._asked_at is None or self.current is None:
            return
        left_s = self._asked_at + LAST_WORD_S - time.monotonic()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, self._wait_no_more)
        else:
            self.current.lose("Postgres was silent when the relay had to stop")

    async def _open(self) -> None:
        """Open a session and begin with it.

        Raises:
            DatabaseUnavailableError: not now; all other errors are final.

        """
        within_s = OPEN_LEASES_MAX * self._lease_s
        if self._drain_until is not None:
            within_s = max(min(within_s, self._drain_until - time.monotonic()), 0.0)
        former = self.former.server if self.former is not None else None
        try:
            async with asyncio.timeout(within_s) as self._opening:
                session = await Session.open(
                    self._url,
                    lease_s=self._lease_s,
                    events=self._events,
                    former=self.former,
                    route=self._route,
                    statements=STATEMENTS,
                    standing=self._barrier.standing(former),
                )
                await self._adopt_limit(session)
        except LOST_SESSION as error:
            raise DatabaseUnavailableError(
                f"Postgres at {self._url.redacted} went away while a session was opened "
                f"({str(error) or type(error).__name__})."
            ) from error
        except asyncpg.InsufficientPrivilegeError as error:
            if "permission denied for schema" in str(error):  # it has no rights at all, which is no matter of time
                raise
            raise DatabaseUnavailableError(  # until the rights on what an upgrade brought are granted
                f"Postgres at {self._url.redacted} refuses: {error}; "
                "let the owner of the schema run `outbox init --roles`."
            ) from error
        finally:
            self._opening = None
        self._barrier.begin(session, former, time.monotonic())
        self._on_opened(session)
        self.current = session

    async def _adopt_limit(self, session: Session) -> None:
        """Take what the database lets in: another server's `outbox init` may have set more than these settings have."""
        try:
            limit = await message_limit(session.connection)
        except asyncpg.InsufficientPrivilegeError:  # a role with rights by hand, from before there was a limit
            limit = 0
        except BaseException as error:
            session.lose(str(error) or type(error).__name__)
            raise
        self._share.adopt_limit(max(self._bytes_max, limit))
