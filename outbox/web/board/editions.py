"""Pages of the editions and of what became of each; pages of decisions and pauses."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, TypeVar

import asyncpg
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from outbox.database.connection import Connection
from outbox.database.pause_list import read_pauses
from outbox.operations.snapshot import Edition, EditionOutcome, read_outcomes
from outbox.operations.watch import REST
from outbox.web.board.auth import User
from outbox.web.board.context import BoardContext
from outbox.web.responses import bigint

T = TypeVar("T")

PAGE: Final = 20
COUNTING_MAX_S: Final = 0.1  # for all editions of a page together; what is not counted by then is not
COUNT_MAX_S: Final = 2.0
REMEMBERED_MAX: Final = 500
ID_MAX: Final = 2**31 - 1

# In the order of their beginnings; the table is small, some rows for each report and week. A page begins after an
# edition, whose time Postgres looks up itself: it may be one that Python cannot represent.
EDITIONS: Final = """
SELECT id, report, period, expected, completed_at, done_elsewhere_at FROM outbox.edition
 WHERE ($1::int IS NULL OR (starts_at, id) < (SELECT a.starts_at, a.id FROM outbox.edition a WHERE a.id = $1))
 ORDER BY starts_at DESC, id DESC LIMIT $2
"""
EDITION: Final = (
    "SELECT id, report, period, expected, completed_at, done_elsewhere_at FROM outbox.edition WHERE id = $1"
)

# Recipients without a report, about whom no person has decided, and how many there are.
MISSING: Final = """
SELECT recipient_key, left(reason, 500) AS reason, count(*) OVER () AS n
  FROM outbox.missing_report WHERE edition = $1 ORDER BY recipient_key LIMIT $2
"""
MISSING_MAX: Final = 20

# Emails of the edition's own reports: the email of a digest belongs to the digest.
BY_STATE: Final = """
SELECT coalesce(d.state, 'none') AS state, count(*) AS n
  FROM outbox.report r
 CROSS JOIN LATERAL (SELECT id FROM outbox.email WHERE report = r.id OFFSET 0) m
  LEFT JOIN LATERAL (SELECT state FROM outbox.delivery WHERE email = m.id OFFSET 0) d ON true
 WHERE r.edition = $1 GROUP BY 1
"""

OPERATIONS: Final = """
SELECT id, at, left(who, 300) AS who, left(what, 300) AS what, left(target, 1000) AS target, left(why, 1000) AS why,
       emails
  FROM outbox.operation
 WHERE ($1::bigint IS NULL OR id < $1) ORDER BY id DESC LIMIT $2
"""
DECISIONS_MAX: Final = 50


class Editions:
    """GET /editions and below, /pauses and /decisions."""

    def __init__(self, board: BoardContext) -> None:
        self.board = board
        self._outcomes: dict[int, tuple[float, EditionOutcome | None]] = {}

    async def index(self, request: Request, user: User) -> Response:
        """Return a page of editions, the newest first."""
        after = _edition_id(request.query_params.get("before", ""))
        async with self.board.store.connection() as connection:
            rows = await connection.fetch(EDITIONS, after, PAGE + 1)
            ends_at = time.monotonic() + COUNTING_MAX_S
            seen = [await self._counted(connection, Edition(*row), ends_at) for row in rows[:PAGE]]
        before = rows[PAGE - 1]["id"] if len(rows) > PAGE else None
        return self.board.page(
            request, "board/editions.html.j2", user, section="/editions", title="Editions", editions=seen,
            before=before,
        )  # fmt: skip

    async def _counted(self, connection: Connection, edition: Edition, ends_at: float) -> Edition:
        """Return the edition with its counts: those of the live snapshot, those of a while ago, or none."""
        snapshot = self.board.live.seen.snapshot
        for known in [] if snapshot is None else snapshot.editions:
            if known.id == edition.id and known.outcome is not None:
                return known
        fresh_until, outcome = self._outcomes.get(edition.id, (0.0, None))
        began_at = time.monotonic()
        if began_at >= fresh_until and began_at < ends_at:
            outcome = await _outcome(connection, edition.id, time_max_s=max(ends_at - began_at, 0.01))
            took_s = time.monotonic() - began_at
            while len(self._outcomes) >= REMEMBERED_MAX:
                self._outcomes.pop(next(iter(self._outcomes)))
            self._outcomes[edition.id] = (began_at + max(REST * took_s, 1.0), outcome)
        return replace(edition, outcome=outcome)

    async def one(self, request: Request, user: User) -> Response:
        """Return the page of an edition: what became of its emails."""
        if (number := _edition_id(request.path_params["edition"])) is None:
            raise HTTPException(404)
        async with self.board.store.connection() as connection:
            row = await connection.fetchrow(EDITION, number)
            if row is None:
                raise HTTPException(404)
            edition = replace(Edition(*row), outcome=await _outcome(connection, number))
            states = await _bounded(connection, lambda: connection.fetch(BY_STATE, number))
            missing = await _bounded(connection, lambda: connection.fetch(MISSING, number, MISSING_MAX)) or []
        return self.board.page(
            request, "board/edition.html.j2", user, section="/editions",
            title=f"{edition.report} {edition.period}", edition=edition,
            counts=None if states is None else {one["state"]: one["n"] for one in states}, missing=missing,
        )  # fmt: skip

    async def pauses(self, request: Request, user: User) -> Response:
        """Return the page of the pauses in force and the reports that can be paused."""
        async with self.board.store.connection() as connection:
            pauses = await read_pauses(connection)
        held = {one.report for one in pauses}
        return self.board.page(
            request, "board/pauses.html.j2", user, section="/pauses", title="Pauses", pauses=pauses,
            free=[report for report in ("", *self.board.settings.editions) if report not in held],
        )  # fmt: skip

    async def decisions(self, request: Request, user: User) -> Response:
        """Return a page of decisions, made here or with the commands: who, when and why."""
        before = bigint(request.query_params.get("before", ""))
        async with self.board.store.connection() as connection:
            rows = await connection.fetch(OPERATIONS, before, DECISIONS_MAX + 1)
        return self.board.page(
            request, "board/decisions.html.j2", user, section="/decisions", title="Decisions",
            operations=rows[:DECISIONS_MAX], more=rows[DECISIONS_MAX - 1]["id"] if len(rows) > DECISIONS_MAX else None,
        )  # fmt: skip


def _edition_id(text: str) -> int | None:
    number = bigint(text)
    return number if number is not None and -ID_MAX - 1 <= number <= ID_MAX else None


async def _outcome(connection: Connection, edition: int, *, time_max_s: float = COUNT_MAX_S) -> EditionOutcome | None:
    found = await _bounded(connection, lambda: read_outcomes(connection, [edition]), time_max_s=time_max_s)
    return (found or {}).get(edition)


async def _bounded(
    connection: Connection, read: Callable[[], Awaitable[T]], *, time_max_s: float = COUNT_MAX_S
) -> T | None:
    """Return what is read; None if it takes too long."""
    try:
        async with connection.transaction(readonly=True):
            await connection.execute(f"SET LOCAL statement_timeout = {max(int(time_max_s * 1000), 1)}")
            await connection.execute("SET LOCAL max_parallel_workers_per_gather = 0")
            return await read()
    except asyncpg.QueryCanceledError:
        return None
