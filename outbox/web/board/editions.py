"""All editions, what became of each, and of one more; what people decided, and what they hold back."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import asyncpg
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from outbox.database.connection import Connection
from outbox.operations.attention import MISSING
from outbox.operations.watch import COUNTED, REST, EditionSeen
from outbox.relay.pauses import read_pauses
from outbox.web.board.auth import User
from outbox.web.board.context import Desk
from outbox.web.responses import bigint

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

# Recipients without a report, about whom nobody has decided.
UNREACHED: Final = f"""
SELECT u.recipient_key, u.reason, u.n FROM outbox.edition e CROSS JOIN LATERAL (
    SELECT u.recipient_key, left(u.reason, 500) AS reason, count(*) OVER () AS n
      FROM {MISSING} ORDER BY u.recipient_key LIMIT $2) u
 WHERE e.id = $1
"""
UNREACHED_MAX: Final = 20

BY_STATE: Final = """
SELECT coalesce(d.state, 'none') AS state, count(*) AS n
  FROM outbox.report r
 CROSS JOIN LATERAL (SELECT id FROM outbox.email WHERE report = r.id OFFSET 0) m
  LEFT JOIN LATERAL (SELECT state FROM outbox.delivery WHERE email = m.id OFFSET 0) d ON true
 WHERE r.edition = $1 GROUP BY 1
"""
# As `outbox status` says it: what is suppressed is cancelled, and what bounced is of those that were sent.
CAME_BACK: Final = """
SELECT 'suppressed' AS what, count(*) AS n
  FROM outbox.report r
 CROSS JOIN LATERAL (SELECT id FROM outbox.email WHERE report = r.id OFFSET 0) m
 CROSS JOIN LATERAL (SELECT email, state FROM outbox.delivery WHERE email = m.id OFFSET 0) d
 WHERE r.edition = $1 AND d.state = 'cancelled'
   AND 'suppressed' = (SELECT a.verdict FROM outbox.attempt a
                        WHERE a.email = d.email ORDER BY a.settled_at DESC LIMIT 1)
UNION ALL
SELECT 'bounced', count(DISTINCT b.email)
  FROM outbox.bounce b
 CROSS JOIN LATERAL (SELECT report FROM outbox.email WHERE id = b.email OFFSET 0) m
 CROSS JOIN LATERAL (SELECT edition FROM outbox.report WHERE id = m.report OFFSET 0) r
 WHERE r.edition = $1 AND b.kind IN ('hard', 'complained')
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

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._counted: dict[int, tuple[float, Mapping[str, Any]]] = {}

    async def index(self, request: Request, user: User) -> Response:
        """The newest first, page by page."""
        after = _edition_id(request.query_params.get("before", ""))
        async with self.desk.store.connection() as connection:
            rows = await connection.fetch(EDITIONS, after, PAGE + 1)
            ends_at = time.monotonic() + COUNTING_MAX_S
            seen = [await self._counts(connection, _edition(row), ends_at) for row in rows[:PAGE]]
        before = rows[PAGE - 1]["id"] if len(rows) > PAGE else None
        return self.desk.page(
            request, "board/editions.html.j2", user, section="/editions", title="Editions", editions=seen,
            before=before,
        )  # fmt: skip

    async def _counts(self, connection: Connection, edition: EditionSeen, ends_at: float) -> EditionSeen:
        """With its counts: those of the live look, those that were counted a while ago, or none."""
        look = self.desk.live.seen.look
        for known in [] if look is None else look.editions:
            if known.id == edition.id and known.made is not None:
                return known
        fresh_until, counts = self._counted.get(edition.id, (0.0, {}))
        began_at = time.monotonic()
        if began_at >= fresh_until and began_at < ends_at:
            found = await _bounded(connection, COUNTED, edition.id, time_max_s=max(ends_at - began_at, 0.01))
            took_s = time.monotonic() - began_at
            counts = dict(found[0]) if found else {}
            while len(self._counted) >= REMEMBERED_MAX:
                self._counted.pop(next(iter(self._counted)))
            self._counted[edition.id] = (began_at + max(REST * took_s, 1.0), counts)
        return replace(edition, **counts) if counts else edition

    async def one(self, request: Request, user: User) -> Response:
        """An edition by what became of its emails."""
        if (number := _edition_id(request.path_params["edition"])) is None:
            raise HTTPException(404)
        async with self.desk.store.connection() as connection:
            row = await connection.fetchrow(EDITION, number)
            if row is None:
                raise HTTPException(404)
            counted = await _bounded(connection, COUNTED, number)
            states = await _bounded(connection, BY_STATE, number)
            came_back = await _bounded(connection, CAME_BACK, number)
            unreached = await _bounded(connection, UNREACHED, number, UNREACHED_MAX) or []
        edition = EditionSeen(*row)
        if counted:
            edition = replace(edition, **counted[0])
        return self.desk.page(
            request, "board/edition.html.j2", user, section="/editions",
            title=f"{edition.report} {edition.period}", edition=edition,
            counts=None if states is None else {one["state"]: one["n"] for one in states},
            came_back=None if came_back is None else {one["what"]: one["n"] for one in came_back},
            unreached=unreached,
        )  # fmt: skip

    async def pauses(self, request: Request, user: User) -> Response:
        """What is held back, and what might be."""
        async with self.desk.store.connection() as connection:
            pauses = await read_pauses(connection)
        held = {one.report for one in pauses}
        return self.desk.page(
            request, "board/pauses.html.j2", user, section="/pauses", title="Pauses", pauses=pauses,
            free=[report for report in ("", *self.desk.settings.editions) if report not in held],
        )  # fmt: skip

    async def decisions(self, request: Request, user: User) -> Response:
        """Who decided what, when and why: here, or with the commands."""
        before = bigint(request.query_params.get("before", ""))
        async with self.desk.store.connection() as connection:
            rows = await connection.fetch(OPERATIONS, before, DECISIONS_MAX + 1)
        return self.desk.page(
            request, "board/decisions.html.j2", user, section="/decisions", title="Decisions",
            operations=rows[:DECISIONS_MAX], more=rows[DECISIONS_MAX - 1]["id"] if len(rows) > DECISIONS_MAX else None,
        )  # fmt: skip


def _edition(row: Any) -> EditionSeen:
    return EditionSeen(*row)


def _edition_id(text: str) -> int | None:
    number = bigint(text)
    return number if number is not None and -ID_MAX - 1 <= number <= ID_MAX else None


async def _bounded(connection: Connection, statement: str, *arguments: Any, time_max_s: float = COUNT_MAX_S) -> Any:
    """The rows; None if they took too long."""
    try:
        async with connection.transaction(readonly=True):
            await connection.execute(f"SET LOCAL statement_timeout = {max(int(time_max_s * 1000), 1)}")
            await connection.execute("SET LOCAL max_parallel_workers_per_gather = 0")
            return await connection.fetch(statement, *arguments)
    except asyncpg.QueryCanceledError:
        return None
