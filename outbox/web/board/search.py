"""Search for emails, page by page from the newest on, in a time that does not grow with the outbox.

What an index finds whole (a key, an address, what is open, an edition) is taken from it as long as it is not too much.
All else is looked for among the next so many emails; the page says how far that was, and goes on from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, tzinfo
from typing import Any, Final
from urllib.parse import urlencode

import asyncpg

from outbox.database.connection import Connection
from outbox.database.plans import BY_INDEX
from outbox.database.values import storable
from outbox.mail.delivery_state import OPEN, DeliveryState
from outbox.operations.email_columns import DUE_AT, last_reply
from outbox.operations.email_filter import EmailQuery, find_editions, literal
from outbox.web.responses import bigint

PAGE: Final = 50
NARROW_MAX: Final = 10_000
WALK_MAX: Final = 50_000  # deliveries, by their state and days
WALK_EMAILS_MAX: Final = 20_000  # ... with the email or the report of each
WALK_REPLIES_MAX: Final = 10_000  # ... with all that was heard of each
TIME_MAX_S: Final = 2.0
WHERE: Final = ("address", "key", "reply")
# An id may be reserved long before its row is committed, so times and ids go together to within a margin only.
MARGIN: Final = 10_000
TEXT_MAX: Final = 300


@dataclass(frozen=True, slots=True)
class Wanted:
    """Query of a search. `before` is the id below which the page begins; days are in the reports' timezone."""

    q: str = ""
    where: str = "address"
    state: str = ""
    report: str = ""
    period: str = ""
    since: date | None = None
    until: date | None = None
    before: int | None = None

    @classmethod
    def of(cls, said: Mapping[str, str]) -> "Wanted":
        """Return the search of a query string; what is not a filter is ignored."""
        where, state, before = said.get("where", ""), said.get("state", ""), said.get("before", "")
        return cls(
            _text(said.get("q", "")),
            where if where in WHERE else "address",
            state if state in list(DeliveryState) else "",
            _text(said.get("report", "")),
            _text(said.get("period", "")),
            _day(said.get("since", "")),
            _day(said.get("until", "")),
            bigint(before),
        )

    @property
    def said(self) -> dict[str, str]:
        """Return the filters that were given, for a query string."""
        given = {
            "q": self.q,
            "where": self.where if self.q else "",
            "state": self.state,
            "report": self.report,
            "period": self.period,
            "since": "" if self.since is None else self.since.isoformat(),
            "until": "" if self.until is None else self.until.isoformat(),
        }
        return {name: value for name, value in given.items() if value}

    def page(self, before: int) -> str:
        """Return the query string of the page that goes on below an id."""
        return urlencode({**self.said, "before": before})

    @property
    def walk_max(self) -> int:
        """Return how many emails one page may read: the fewer, the more has to be read of each."""
        if self.q and self.where == "reply":
            return WALK_REPLIES_MAX
        return WALK_EMAILS_MAX if self.q or self.report or self.period else WALK_MAX

    @property
    def to(self) -> str:
        """Return the pattern of the address: `*` stands for anything, and an address without one is a beginning."""
        return self.q if "*" in self.q else self.q + "*"


def _text(said: str) -> str:
    return storable(said).strip()[:TEXT_MAX]


def _day(said: str) -> date | None:
    try:
        day = date.fromisoformat(said)
    except ValueError:
        return None
    return day if 1970 <= day.year <= 2999 else None  # noqa: PLR2004 - one that has a neighbour in every zone


@dataclass(frozen=True, slots=True)
class Row:
    """Email in the list, with the last reply."""

    id: int
    key: str
    to: str
    report: str | None
    period: str | None
    state: str
    attempts: int
    paused: str | None
    created_at: datetime
    due_at: datetime | None
    since: datetime
    said: str


@dataclass(frozen=True, slots=True)
class Found:
    """Page of a search. `more_below` is the id below which there may be more; None if that was all.

    `looked` is how many emails were read in vain for the rest of the page; 0 if none had to be.
    """

    rows: list[Row]
    more_below: int | None = None
    looked: int = 0
    is_cut: bool = False


ROWS: Final = f"""
SELECT m.id, left(m.key, 500), left(m.recipient, 500), e.report, e.period, d.state, d.attempt, d.paused, m.created_at,
       {DUE_AT} AS due_at,
       coalesce(d.settled_at, d.doubted_at, CASE WHEN d.state = 'sending' THEN d.marked_at END, m.created_at) AS since,
       coalesce({last_reply("d.email", characters=300)}, '') AS said
  FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
  LEFT JOIN outbox.report r ON r.id = m.report LEFT JOIN outbox.edition e ON e.id = r.edition
 WHERE d.email = ANY ($1::bigint[]) ORDER BY d.email DESC
"""

BY_KEY: Final = "SELECT id FROM outbox.email WHERE key = $1"
BY_ADDRESS: Final = """
SELECT id FROM outbox.email WHERE lower(recipient) ~>=~ $1::text AND lower(recipient) ~<~ $2::text LIMIT $3
"""
IN_DOUBT: Final = "SELECT email FROM outbox.delivery WHERE settled_at IS NULL AND doubted_at IS NOT NULL LIMIT $1"
NOT_SETTLED: Final = "SELECT email FROM outbox.delivery WHERE settled_at IS NULL AND due_at <= 'infinity' LIMIT $1"
OF_EDITIONS: Final = """
SELECT m.id FROM outbox.report r JOIN outbox.email m ON m.report = r.id WHERE r.edition = ANY ($1::int[]) LIMIT $2
"""
BOUND: Final = """
SELECT email FROM outbox.delivery WHERE email <= $1 ORDER BY email DESC OFFSET $2 LIMIT 1
"""
MADE_AT: Final = "SELECT id, created_at FROM outbox.email WHERE id >= $1 ORDER BY id LIMIT 1"
ENDS: Final = "SELECT coalesce(min(id), 0), coalesce(max(id), 0) FROM outbox.email"


async def browse(connection: Connection, wanted: Wanted, zone: tzinfo) -> Found:
    """Return one page; it is cut if a statement takes longer than `TIME_MAX_S`."""
    try:
        async with connection.transaction(readonly=True):
            await connection.execute(f"SET LOCAL statement_timeout = {int(TIME_MAX_S * 1000)}")
            await connection.execute(BY_INDEX)
            return await _browse(connection, wanted, zone)
    except asyncpg.QueryCanceledError:
        return Found([], is_cut=True)


async def _browse(connection: Connection, wanted: Wanted, zone: tzinfo) -> Found:
    editions: list[int] = []
    if wanted.report or wanted.period:
        editions = await find_editions(connection, wanted.report or None, wanted.period or None)
        if not editions:
            return Found([])
    low, high = await _ids_of_days(connection, wanted, zone)
    # The ends are inclusive, since one beyond the largest id that there may be is no bigint.
    last = high if wanted.before is None else min(high, wanted.before - 1)
    if last < low:
        return Found([])
    query = query_of(wanted, editions, zone)
    ids = await _narrow(connection, wanted, editions)
    if ids is not None:
        query.add(f"d.email = ANY ({query.bind(ids)}::bigint[])")
        floor, looked = low, 0
    else:
        walk = wanted.walk_max
        bound = await connection.fetchval(BOUND, last, walk - 1)
        floor, looked = (low, 0) if bound is None or bound <= low else (bound, walk)
    found = [row["email"] for row in await connection.fetch(page_of(query, floor, last), *query.values)]
    rows = [Row(*row) for row in await connection.fetch(ROWS, found[:PAGE])]
    if len(found) > PAGE:
        return Found(rows, found[PAGE - 1])
    return Found(rows, floor, looked) if looked else Found(rows)


def page_of(query: EmailQuery, floor: int, last: int) -> str:
    """Return the statement for the ids of one page and one more, from the newest on, from `last` down to `floor`."""
    query.add(f"d.email BETWEEN {query.bind(floor)} AND {query.bind(last)}")
    return f"SELECT d.email FROM {query.text} ORDER BY d.email DESC LIMIT {PAGE + 1}"


def query_of(wanted: Wanted, editions: list[int], zone: tzinfo) -> EmailQuery:
    """Return the conditions of a search, except the range of ids."""
    query = EmailQuery()
    if editions:
        query.of_editions(editions)
    if wanted.state:
        query.in_states([wanted.state])
    if wanted.q and wanted.where == "address":
        query.addressed_to(wanted.to)
    elif wanted.q and wanted.where == "key":
        query.add(f"m.key LIKE {query.bind('%' + literal(wanted.q) + '%')}")
    elif wanted.q:
        reply = query.bind("%" + literal(wanted.q) + "%")
        query.add(f"EXISTS (SELECT FROM outbox.attempt a WHERE a.email = d.email AND a.reply ILIKE {reply})")
    if wanted.since is not None:
        query.add(f"m.created_at >= {query.bind(_dawn(wanted.since, zone))}")
    if wanted.until is not None:
        query.add(f"m.created_at < {query.bind(_dawn(wanted.until + timedelta(1), zone))}")
    return query


async def _narrow(connection: Connection, wanted: Wanted, editions: list[int]) -> list[int] | None:
    """Return the ids of all candidates, if an index has them and there are not too many."""
    if wanted.q and wanted.where == "key":
        found = await connection.fetchval(BY_KEY, wanted.q)
        if found is not None:
            return [found]
    if wanted.q and wanted.where == "address" and (head := wanted.q.lower().partition("*")[0]):
        after = head + "\U0010ffff"  # no character is behind it
        ids = await _few(connection, BY_ADDRESS, head, after)
        if ids is not None:
            return ids
    if wanted.state == DeliveryState.IN_DOUBT and (ids := await _few(connection, IN_DOUBT)) is not None:
        return ids
    if wanted.state in OPEN and (ids := await _few(connection, NOT_SETTLED)) is not None:
        return ids
    return await _few(connection, OF_EDITIONS, editions) if editions else None


async def _few(connection: Connection, statement: str, *arguments: Any) -> list[int] | None:
    rows = await connection.fetch(statement, *arguments, NARROW_MAX + 1)
    return None if len(rows) > NARROW_MAX else [row[0] for row in rows]


async def _ids_of_days(connection: Connection, wanted: Wanted, zone: tzinfo) -> tuple[int, int]:
    """Return the first and the last id that emails of these days may have, by bisection: times have no index."""
    lowest, highest = await connection.fetchrow(ENDS)
    low, high = lowest, highest
    if wanted.since is not None:
        low = max(await _first_made(connection, _dawn(wanted.since, zone), lowest, highest) - MARGIN, lowest)
    if wanted.until is not None:
        dusk = _dawn(wanted.until + timedelta(1), zone)
        high = min(await _first_made(connection, dusk, lowest, highest) + MARGIN, highest)
    return low, high


async def _first_made(connection: Connection, at: datetime, low: int, high: int) -> int:
    """Return the first id from `low` on that was made at `at` or later; one beyond the last if none was."""
    high += 1
    while low < high:
        middle = (low + high) // 2
        row = await connection.fetchrow(MADE_AT, middle)
        if row is None or row["created_at"] >= at:
            high = middle
        else:
            low = row["id"] + 1
    return low


def _dawn(day: date, zone: tzinfo) -> datetime:
    return datetime.combine(day, time(), zone)
