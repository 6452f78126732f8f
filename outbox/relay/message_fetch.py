"""Large messages of claims: fetched and checked after the claim is committed, within the memory budget."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.relay.holds import Holds
from outbox.relay.memory_budget import Share
from outbox.relay.pool import Pool
from outbox.relay.quarantine import is_of_a_row
from outbox.relay.session import Session
from outbox.relay.tick import TickResult
from outbox.smtp.outgoing import OutgoingEmail, Try

FETCHED_AT_ONCE: Final = 1024 * 1024  # bytes

MESSAGE_LIMIT: Final = "SELECT outbox.message_bytes_max()"


async def message_limit(connection: Connection) -> int:
    """Return the largest message that the database accepts, in bytes."""
    return int(await connection.fetchval(MESSAGE_LIMIT))


FETCH_MESSAGES: Final = "SELECT id, message FROM outbox.email WHERE id = ANY ($1::bigint[])"


async def fetch_messages(connection: Connection, claims: Sequence[OutgoingEmail]) -> list[OutgoingEmail]:
    """Return large claims with the bytes of their messages; without those whose rows are gone."""
    rows = await connection.fetch(FETCH_MESSAGES, [claim.email for claim in claims])
    messages = {row["id"]: row["message"] for row in rows}
    return [
        claim._replace(message=messages[claim.email], is_fetched=True) for claim in claims if claim.email in messages
    ]


class MessageFetch:
    """Claims of the last tick whose messages are still to be fetched, and emails that are to be quarantined."""

    def __init__(
        self, pool: Pool, holds: Holds, share: Share, patience: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._pool = pool
        self._holds = holds
        self._share = share
        self._patience = patience
        self._rest: TickResult | None = None

    def keep(self, done: TickResult) -> TickResult:
        """Keep what is to be fetched or quarantined; return the rest of the tick, which can be sent now."""
        ready, rest = _by_size(done)
        self._rest = rest if rest.claims or rest.unfit else None
        return ready

    def forget(self) -> None:
        """Forget the claims of a session that is lost."""
        self._rest = None

    async def run(
        self, session: Session, deliver: Callable[[list[Try]], None], *, is_stopping: Callable[[], bool]
    ) -> None:
        """Quarantine what cannot be sent; fetch and check large messages, and deliver their tries bit by bit."""
        if self._rest is None:
            return
        done, self._rest = self._rest, None
        try:
            with self._patience():
                for email, why in done.unfit.items():
                    await session.quarantine.put(session.connection, email, why)
                claims = list(await self._holds.sendable(session, done, is_stopping=is_stopping()))
            while claims and session.lost is None and not is_stopping():
                some = [claims.pop(0)]
                while claims and sum(claim.size for claim in some) + claims[0].size <= FETCHED_AT_ONCE:
                    some.append(claims.pop(0))
                with self._patience():  # each has a lease of its own
                    some = await self._fetch(session, some)
                deliver(await self._pool.ready.prepare_large(some))
                self._share.note_asked(sum(claim.size for claim in claims))
            deliver([Try(claim) for claim in claims])  # the relay stops: they are given back
        finally:
            self._share.note_asked(0)

    async def _fetch(self, session: Session, claims: Sequence[OutgoingEmail]) -> list[OutgoingEmail]:
        """Return the claims with their messages, without those whose messages cannot be read."""
        try:
            return await fetch_messages(session.connection, claims)
        except asyncpg.PostgresError as error:
            if not is_of_a_row(error):
                raise
            if len(claims) == 1:
                await session.quarantine.put(session.connection, claims[0].email, error)
                return []
        return [one for claim in claims for one in await self._fetch(session, [claim])]


def _by_size(done: TickResult) -> tuple[TickResult, TickResult]:
    """Return a tick's claims in two parts: small messages, then those still to be fetched or quarantined."""
    if all(claim.is_fetched for claim in done.claims):
        return done, replace(done, claims=[], listed=frozenset())
    small, large = ([claim for claim in done.claims if claim.is_fetched is is_fetched] for is_fetched in (True, False))
    listed = done.listed & {claim.email for claim in large}
    return replace(done, claims=small, listed=done.listed - listed), replace(done, claims=large, listed=listed)


STATEMENTS: Final = (FETCH_MESSAGES, MESSAGE_LIMIT)
