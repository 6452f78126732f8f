"""Rules by which emails take routes: those of the settings, those in the database, and routes that no relay serves.

The rules that count are in the database (`outbox.route_of`), so that all who put emails in have the same ones, SQL and
`generate` alike. `outbox init` writes those of its settings there; a server whose settings differ logs it.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg

from outbox.database.connection import CHANNEL, LOST_SESSION, Connection
from outbox.database.lanes import LANES
from outbox.database.locks import ALIVE, RELAY_LOCKS, take_init_lock
from outbox.database.opening import connect
from outbox.database.schema import require_current
from outbox.errors import OutboxError
from outbox.log import Events
from outbox.settings import Settings

log = Events("outbox.relay")

COUNT_MAX: Final = 100_000
MOVED_AT_ONCE: Final = 1000
LOOK_EVERY_S: Final = 60.0
LOOK_MAX_S: Final = 10.0
USUAL: Final = "the usual route"


class Rule(NamedTuple):
    """Emails of this report, or to this domain, take this route; the first rule that fits counts."""

    route: str
    report: str | None
    domain: str | None


def rules_of(settings: Settings) -> list[Rule]:
    """Return the rules of the settings, in their order."""
    found: list[Rule] = []
    for name, route in settings.routes.items():
        found += [Rule(name, report, None) for report in route.reports]
        found += [Rule(name, None, domain) for domain in route.domains]
    return found


def route_for(settings: Settings, report: str | None, recipient: str) -> str:
    """Return the result of `outbox.route_of` once these settings' rules are in the database."""
    domain = recipient.rpartition("@")[2].lower()
    for rule in rules_of(settings):
        if rule.report is not None:
            fits = rule.report == report
        else:
            assert rule.domain is not None
            below = rule.domain.removeprefix("*")
            fits = domain.endswith(below) if below != rule.domain else domain == below
        if fits:
            return rule.route
    return ""


def label(route: str) -> str:
    """Return a route's name for people."""
    return f"route {route}" if route else USUAL


READ: Final = "SELECT route, report, domain FROM outbox.rule ORDER BY position"


async def read_rules(connection: Connection) -> list[Rule]:
    """Read the rules in the database, which are in force."""
    return [Rule(*row) for row in await connection.fetch(READ)]


async def difference(connection: Connection, settings: Settings) -> str | None:
    """Return how the rules in force differ from the settings, in a sentence with its fix; None if they do not."""
    ours, theirs = rules_of(settings), await read_rules(connection)
    if ours == theirs:
        return None
    return (
        f"the database's rules for routes are not those of these settings ({_in_words(ours, theirs)}); "
        "run `outbox init` with the settings that are right"
    )


def _in_words(ours: list[Rule], theirs: list[Rule]) -> str:
    new = [f"+ {rule.report or rule.domain} by {rule.route}" for rule in ours if rule not in theirs]
    gone = [f"- {rule.report or rule.domain} by {rule.route}" for rule in theirs if rule not in ours]
    return ", ".join([*new, *gone]) or "another order"


WRITE: Final = "INSERT INTO outbox.rule (position, route, report, domain) VALUES ($1, $2, $3, $4)"

# What a relay holds is sent where it is. Anything else would wait on a route that nobody serves any more.
MOVE: Final = f"""
WITH RECURSIVE {LANES}, chosen AS (
    SELECT d.email FROM (SELECT * FROM lane WHERE route <> ALL ($1::text[])) l CROSS JOIN LATERAL (
        SELECT email FROM outbox.delivery
         WHERE settled_at IS NULL AND route = l.route AND priority = l.priority AND due_at <= 'infinity'
           AND state = 'pending' AND relay IS NULL
         LIMIT $2 FOR UPDATE SKIP LOCKED) d
     LIMIT $2
)
UPDATE outbox.delivery d SET route = outbox.route_of(e.report, m.recipient)
  FROM chosen c JOIN outbox.email m ON m.id = c.email
  LEFT JOIN outbox.report r ON r.id = m.report LEFT JOIN outbox.edition e ON e.id = r.edition
 WHERE d.email = c.email AND d.route <> outbox.route_of(e.report, m.recipient)
RETURNING d.route
"""


@dataclass(slots=True)
class Written:
    """Changes by `write_rules`: the rules, in words, and the number of emails by the route that they take now."""

    changed: str | None = None
    moved: Counter[str] = field(default_factory=Counter)


async def write_rules(connection: Connection, settings: Settings) -> Written:
    """Put the rules of the settings in force, in one commit; then move emails off routes that no longer exist.

    Emails are moved in short commits. Idempotent, and safe on all servers at once.

    Raises:
        SchemaError: there is no schema, or it is another version's.

    """
    rules, written = rules_of(settings), Written()
    async with connection.transaction(isolation="read_committed"):
        await take_init_lock(connection)
        await require_current(connection)
        before = await read_rules(connection)
        if before != rules:
            written.changed = _in_words(rules, before)
            await connection.execute("DELETE FROM outbox.rule")
            await connection.executemany(WRITE, [(number, *rule) for number, rule in enumerate(rules, 1)])
    known = ["", *settings.routes]
    while moved := await connection.fetch(MOVE, known, MOVED_AT_ONCE):
        written.moved.update(row["route"] for row in moved)
    if written.moved:
        await connection.execute(f"NOTIFY {CHANNEL}")
    return written


@dataclass(frozen=True, slots=True)
class Unserved:
    """Route that no living relay serves, and the number of emails that wait for it, counted to `COUNT_MAX`."""

    route: str
    waiting: int
    due_at: datetime
    """Moment at which the first of them is, or was, due."""

    @property
    def sentence(self) -> str:
        """Return the problem and the fix."""
        return (
            f"{self.waiting:,} emails wait for route {self.route}, which no living relay serves: start a relay whose "
            f"settings have [routes.{self.route}], or run `outbox init` with settings that no longer have it."
        )


# The usual route is served by every relay's process, so it is unserved only where no relay is alive at all.
UNSERVED: Final = f"""
WITH RECURSIVE {LANES}
SELECT l.route,
       (SELECT count(*) FROM (SELECT FROM outbox.delivery
                               WHERE settled_at IS NULL AND route = l.route AND priority IN (0, 1)
                                 AND due_at < 'infinity' AND state = 'pending' LIMIT $2) d),
       (SELECT min(first.due_at) FROM unnest(array[0, 1]) AS p (priority) CROSS JOIN LATERAL (
            SELECT due_at FROM outbox.delivery
             WHERE settled_at IS NULL AND route = l.route AND priority = p.priority AND due_at < 'infinity'
               AND state = 'pending' ORDER BY due_at LIMIT 1) first) AS due_at
  FROM (SELECT DISTINCT route FROM lane WHERE route <> '') l
 WHERE l.route NOT IN (SELECT r.route {ALIVE})
 ORDER BY l.route
"""


async def read_unserved(connection: Connection) -> list[Unserved]:
    """Return the routes for which emails wait and that no living relay serves."""
    rows = await connection.fetch(UNSERVED, RELAY_LOCKS, COUNT_MAX)
    return [Unserved(*row) for row in rows if row["due_at"] is not None]


def told(written: Written) -> Iterator[str]:
    """Yield a line for each change."""
    if written.changed is not None:
        yield f"The rules for routes are those of these settings now ({written.changed})."
    for route, emails in sorted(written.moved.items()):
        yield f"{emails:,} emails that waited for a route that is no more take {label(route)} now."


async def watch_rules(settings: Settings) -> None:
    """Log, for ever, when the rules in force differ from these settings, or emails wait for a route without a relay."""
    known: set[str] = set()
    while True:
        try:
            found = await _problems(settings)
        except (OutboxError, *LOST_SESSION, asyncpg.PostgresError):
            found = known  # the relays say what is wrong with the database
        for problem in sorted(found - known):
            log.warning("routes_unfit", "{reason}", reason=problem)
        known = found
        await asyncio.sleep(LOOK_EVERY_S)


async def _problems(settings: Settings) -> set[str]:
    assert settings.database_url is not None
    server_settings = {"statement_timeout": str(int(LOOK_MAX_S * 1000)), "default_transaction_read_only": "on"}
    connection = await connect(settings.database_url, application="outbox routes", settings=server_settings)
    with connection.terminated_on_error(), connection.end_if_silent(LOOK_MAX_S):
        differs = await difference(connection, settings)
        waits = [one.sentence for one in await read_unserved(connection) if one.route not in settings.routes]
        await connection.close(timeout=LOOK_MAX_S)
    return {*waits, *([differs] if differs is not None else [])}
