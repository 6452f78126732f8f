"""Large messages of claims: fetched and checked after the claim is committed, within the memory budget."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final

import asyncpg

from outbox.relay.holds import Holds
from outbox.relay.large_messages import fetch_messages
from outbox.relay.memory_budget import Share
from outbox.relay.pool import Pool
from outbox.relay.quarantine import is_of_a_row
from outbox.relay.session import Session
from outbox.relay.tick import TickResult
from outbox.smtp import route_headers
from outbox.smtp.outgoing import Claim

FETCHED_AT_ONCE: Final = 1024 * 1024  # bytes


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

    def keep(self, tick: TickResult) -> TickResult:
        """Keep what is to be fetched or quarantined; return the rest of the tick, which can be sent now."""
        ready, rest = _by_size(tick)
        self._rest = rest if rest.claims or rest.unfit else None
        return ready

    def forget(self) -> None:
        """Forget the claims of a session that is lost."""
        self._rest = None

    async def run(
        self, session: Session, deliver: Callable[[list[Claim]], None], *, is_stopping: Callable[[], bool]
    ) -> None:
        """Quarantine what cannot be sent; fetch and check large messages, and deliver their claims bit by bit."""
        if self._rest is None:
            return
        tick, self._rest = self._rest, None
        try:
            with self._patience():
                for email, why in tick.unfit.items():
                    await session.quarantine.put(session.connection, email, why)
                claims = await self._holds.sendable(session, tick, with_ready=False, is_stopping=is_stopping())
            claims = list(claims)
            while claims and session.lost is None and not is_stopping():
                some = [claims.pop(0)]
                while claims and sum(claim.size for claim in some) + claims[0].size <= FETCHED_AT_ONCE:
                    some.append(claims.pop(0))
                with self._patience():  # each has a lease of its own
                    await self._fetch(session, some)
                some = [claim for claim in some if claim.fetched]
                await asyncio.get_running_loop().run_in_executor(self._pool.checking_thread, _check_all, some)
                deliver(some)
                self._share.note_asked(sum(claim.size for claim in claims))
            deliver(claims)  # the relay stops: they are given back
        finally:
            self._share.note_asked(0)

    async def _fetch(self, session: Session, claims: list[Claim]) -> None:
        try:
            messages = await fetch_messages(session.connection, [claim.email for claim in claims])
        except asyncpg.PostgresError as error:
            if not is_of_a_row(error):
                raise
            for claim in claims:
                if len(claims) > 1:
                    await self._fetch(session, [claim])
                else:
                    await session.quarantine.put(session.connection, claim.email, error)
            return
        for claim in claims:
            if claim.email in messages:
                claim.message, claim.fetched = messages[claim.email], True


def _by_size(tick: TickResult) -> tuple[TickResult, TickResult]:
    """Return a tick's claims in two parts: small messages, then those still to be fetched or quarantined."""
    if all(claim.fetched for claim in tick.claims):
        return tick, replace(tick, claims=[], listed=frozenset())
    small, large = ([claim for claim in tick.claims if claim.fetched is fetched] for fetched in (True, False))
    listed = tick.listed & {claim.email for claim in large}
    return replace(tick, claims=small, listed=tick.listed - listed), replace(tick, claims=large, listed=listed)


def _check_all(claims: Sequence[Claim]) -> None:
    for claim in claims:
        route_headers.check(claim)
