"""Which emails a person means: by their keys, or by what they have in common. Knows nothing of what is then done.

Keys, editions and what is open are found by index. The rest (an address, a state that is settled) is looked for by
reading what there is, newest first where only the newest are wanted: some seconds for ten million emails.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from outbox import suggested
from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.errors import ConfigurationError

STATES: Final = ("pending", "sending", "in_doubt", "sent", "dead", "cancelled", "expired")
OPEN: Final = frozenset(("pending", "sending", "in_doubt"))
COUNTED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Selection:
    """What a person said. Keys stand alone; of all else an email must have everything that is given.

    `edition` is as people say it, `progress 2026-W48`; in `to` a `*` stands for anything, and case counts nowhere.
    """

    keys: tuple[str, ...] = ()
    edition: str | None = None
    report: str | None = None
    period: str | None = None
    to: str | None = None
    states: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The options that were given beside the states, as they are typed."""
        given = {"--edition": self.edition, "--report": self.report, "--period": self.period, "--to": self.to}
        return [option for option, value in given.items() if value is not None]

    @property
    def is_by_filter(self) -> bool:
        """Whether it takes in all that fits, instead of named emails."""
        return bool(self.options or self.states)

    @property
    def target(self) -> str:
        """What is meant, as it is written down: the keys, or an edition's name with what narrows it."""
        if not self.is_by_filter:
            return shlex.join(dict.fromkeys(self.keys))
        words = [self.edition.strip()] if self.edition is not None else []
        given = {"--report": self.report, "--period": self.period, "--to": self.to}
        words += [suggested.option(name, value) for name, value in given.items() if value is not None]
        return " ".join([*words, *(f"--state {state}" for state in self.states)])


@dataclass(frozen=True, slots=True)
class Chosen:
    """A delivery that a decision would touch."""

    key: str
    address: str
    state: str


EDITIONS: Final = """
SELECT array_agg(id) FROM outbox.edition
 WHERE ($1::text IS NULL OR report = $1) AND ($2::text IS NULL OR period = $2)
"""


async def _editions(connection: Connection, selection: Selection) -> list[int] | None:
    """The editions that are meant; None is any, and what belongs to none.

    Raises:
        ConfigurationError: there is no such edition.

    """
    report, period = selection.report, selection.period
    if selection.edition is not None:
        report, _, period = storable(selection.edition).strip().rpartition(" ")
    elif report is None and period is None:
        return None
    found = await connection.fetchval(EDITIONS, report and storable(report), period and storable(period))
    if found:
        return list(found)
    if selection.edition is not None:
        raise ConfigurationError(
            f'--edition: there is no edition "{selection.edition}"; write one such as "progress 2026-W48".'
        )
    meant = " ".join(f"--{word} {value}" for word, value in {"report": report, "period": period}.items() if value)
    raise ConfigurationError(f"{meant}: there is no such edition; `outbox status` shows the latest.")


class _Words:
    """Conditions in SQL, and their parameters."""

    def __init__(self) -> None:
        self.source = "outbox.delivery d JOIN outbox.email m ON m.id = d.email"
        self.conditions = ["true"]
        self.values: list[Any] = []

    def bind(self, value: Any) -> str:
        """The placeholder of one more parameter."""
        self.values.append(value)
        return f"${len(self.values)}"

    @property
    def text(self) -> str:
        """What stands behind FROM."""
        return f"{self.source} WHERE {' AND '.join(self.conditions)}"


async def _words(connection: Connection, selection: Selection, condition: str = "true") -> _Words:
    words = _Words()
    words.conditions.append(condition)
    editions = await _editions(connection, selection)
    if editions is not None:
        words.source += f" JOIN outbox.report r ON r.id = m.report AND r.edition = ANY ({words.bind(editions)}::int[])"
    if selection.keys:
        keys = [key for key in selection.keys if storable(key) == key]
        words.conditions.append(f"m.key = ANY ({words.bind(keys)}::text[])")
    if selection.states:
        words.conditions.append(f"d.state = ANY ({words.bind(list(selection.states))}::text[])")
        if OPEN.issuperset(selection.states):
            words.conditions.append("d.settled_at IS NULL")
    if selection.to is not None:
        address = words.bind(_pattern(storable(selection.to).strip()))
        words.conditions.append(f"lower(m.recipient) LIKE lower({address}::text)")
    return words


def _pattern(address: str) -> str:
    """For LIKE, in which only `*` is to mean anything."""
    for special in "\\%_":
        address = address.replace(special, "\\" + special)
    return address.replace("*", "%")


async def find(connection: Connection, selection: Selection, condition: str = "true") -> list[int]:
    """The ids of all emails that are meant and meet a condition on `d` and `m`, in the order in which they were made.

    Raises:
        ConfigurationError: there is no such edition.

    """
    words = await _words(connection, selection, condition)
    found = await connection.fetchval(f"SELECT array_agg(d.email ORDER BY d.email) FROM {words.text}", *words.values)
    return list(found or ())


NAMES: Final = """
SELECT m.key, m.recipient, d.state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE d.email = ANY ($1::bigint[]) ORDER BY m.key
"""


async def name(connection: Connection, emails: Sequence[int]) -> list[Chosen]:
    """Key, address and state of these, in the order of their keys."""
    return [Chosen(*row) for row in await connection.fetch(NAMES, emails)]


@dataclass(frozen=True, slots=True)
class Listed:
    """An email in a list: what it is, how it stands, and the last thing heard of it.

    `due_at` is null where it is due by itself no more; `paused` is the report under whose pause it was set aside.
    """

    key: str
    to: str
    report: str | None
    period: str | None
    state: str
    attempts: int
    relay: int | None
    paused: str | None
    created_at: datetime
    due_at: datetime | None
    marked_at: datetime | None
    settled_at: datetime | None
    doubted_at: datetime | None
    said: str
    route: str
    """Which one it takes; '' is the usual one."""
    urgent: bool
    needs_person: bool
    """In doubt, or failed and undecided (`attention`)."""

    @property
    def since(self) -> datetime:
        """Since when its state is as it is; of what is pending, when it was made."""
        return self.settled_at or self.doubted_at or (self.marked_at if self.state == "sending" else None) or (
            self.created_at
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listing:
    """The newest of what was meant; `more` there are beside these, or at least so many."""

    emails: list[Listed]
    more: int
    at_least: bool

    def as_json(self) -> dict[str, Any]:
        """For scripts; times as ISO 8601 in UTC."""
        return {"emails": [asdict(one) for one in self.emails], "more": self.more, "more_is_at_least": self.at_least}


LIST: Final = """
WITH found AS MATERIALIZED (SELECT d.email FROM {text} ORDER BY d.email DESC LIMIT {most})
SELECT m.key, m.recipient, e.report, e.period, d.state, d.attempt, d.relay, d.paused, m.created_at,
       CASE WHEN d.settled_at IS NULL AND d.state <> 'sending' THEN nullif(d.due_at, 'infinity') END AS due_at,
       d.marked_at, d.settled_at, d.doubted_at,
       coalesce((SELECT left(a.reply, 2000) FROM outbox.attempt a WHERE a.email = d.email
                  ORDER BY a.settled_at DESC, a.attempt DESC LIMIT 1), '') AS said,
       d.route, d.priority > 0 AS urgent,
       d.state = 'in_doubt'
       OR (EXISTS (SELECT FROM outbox.failure u WHERE u.email = d.email OFFSET 0)
           AND NOT EXISTS (SELECT FROM outbox.waiver w
                            WHERE w.edition = r.edition AND w.recipient_key = r.recipient_key OFFSET 0))
       AS needs_person,
       (SELECT count(*) FROM found) AS total
  FROM (SELECT email FROM found ORDER BY email DESC LIMIT {limit}) f
  JOIN outbox.delivery d ON d.email = f.email JOIN outbox.email m ON m.id = f.email
  LEFT JOIN outbox.report r ON r.id = m.report LEFT JOIN outbox.edition e ON e.id = r.edition
 ORDER BY f.email DESC
"""


async def list_emails(connection: Connection, selection: Selection, *, limit: int) -> Listing:
    """The newest emails that are meant, at most `limit`; how many more there are is counted up to `COUNTED_MAX`.

    Raises:
        ConfigurationError: there is no such edition.

    """
    words = await _words(connection, selection)
    text, most = words.text, words.bind(limit + COUNTED_MAX)
    rows = await connection.fetch(LIST.format(text=text, most=most, limit=words.bind(limit)), *words.values)
    more = rows[0]["total"] - len(rows) if rows else 0
    return Listing([Listed(*list(row)[:-1]) for row in rows], more, more == COUNTED_MAX)
