"""Filter of emails: by their keys, or by what they have in common. It does not know what is then done with them.

Keys, editions and what is open are found by index. The rest (an address, a state that is settled) is found by reading
what there is, newest first where only the newest are wanted: some seconds for ten million emails. The board walks in
pages instead (`web/board/search.py`), with the same conditions.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from outbox import suggestions
from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.errors import ConfigurationError
from outbox.mail.delivery_state import OPEN


@dataclass(frozen=True, slots=True)
class Selection:
    """Filter as a person gave it. Keys stand alone; of all else an email must have everything that is given.

    `edition` is written as `progress 2026-W48`; in `to` a `*` stands for anything, and case does not matter.
    """

    keys: tuple[str, ...] = ()
    edition: str | None = None
    report: str | None = None
    period: str | None = None
    to: str | None = None
    states: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Return the options that were given beside the states, as they are typed."""
        given = {"--edition": self.edition, "--report": self.report, "--period": self.period, "--to": self.to}
        return [option for option, value in given.items() if value is not None]

    @property
    def is_by_filter(self) -> bool:
        """Return True if it selects all emails that fit, instead of named ones."""
        return bool(self.options or self.states)

    @property
    def target(self) -> str:
        """Return the filter as it is recorded: the keys, or an edition's name with what narrows it."""
        if not self.is_by_filter:
            return shlex.join(dict.fromkeys(self.keys))
        words = [self.edition.strip()] if self.edition is not None else []
        given = {"--report": self.report, "--period": self.period, "--to": self.to}
        words += [suggestions.option(name, value) for name, value in given.items() if value is not None]
        return " ".join([*words, *(f"--state {state}" for state in self.states)])


@dataclass(frozen=True, slots=True)
class Chosen:
    """Delivery that a decision would touch."""

    key: str
    address: str
    state: str


@dataclass(slots=True)
class EmailQuery:
    """Conditions in SQL on deliveries `d` with their emails `m`, and the parameters of these conditions."""

    source: str = "outbox.delivery d JOIN outbox.email m ON m.id = d.email"
    conditions: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def bind(self, value: Any) -> str:
        """Add a parameter and return its placeholder."""
        self.values.append(value)
        return f"${len(self.values)}"

    def add(self, condition: str) -> None:
        """Add a condition; all have to hold."""
        self.conditions.append(condition)

    def of_editions(self, editions: Sequence[int]) -> None:
        """Select only emails of reports of these editions."""
        self.source += f" JOIN outbox.report r ON r.id = m.report AND r.edition = ANY ({self.bind(editions)}::int[])"

    def with_keys(self, keys: Sequence[str]) -> None:
        """Select only emails with one of these keys."""
        self.add(f"m.key = ANY ({self.bind([key for key in keys if storable(key) == key])}::text[])")

    def in_states(self, states: Sequence[str]) -> None:
        """Select only deliveries in one of these states; those that are all open are read by the index of open rows."""
        self.add(f"d.state = ANY ({self.bind(list(states))}::text[])")
        if OPEN.issuperset(states):
            self.add("d.settled_at IS NULL")

    def addressed_to(self, pattern: str) -> None:
        """Select only emails to this address, in which `*` stands for anything; case does not matter."""
        like = literal(storable(pattern).strip()).replace("*", "%")
        self.add(f"lower(m.recipient) LIKE lower({self.bind(like)}::text)")

    @property
    def text(self) -> str:
        """Return the part of a statement after FROM."""
        return f"{self.source} WHERE {' AND '.join(self.conditions or ['true'])}"


def literal(text: str) -> str:
    """Return the text for LIKE, in which nothing of it stands for anything else."""
    for special in "\\%_":
        text = text.replace(special, "\\" + special)
    return text


EDITIONS: Final = """
SELECT coalesce(array_agg(id), '{}') FROM outbox.edition
 WHERE ($1::text IS NULL OR report = $1) AND ($2::text IS NULL OR period = $2)
"""


async def find_editions(connection: Connection, report: str | None, period: str | None) -> list[int]:
    """Return the ids of the editions of this report, or of this period, or both."""
    return list(await connection.fetchval(EDITIONS, report and storable(report), period and storable(period)))


async def _editions(connection: Connection, selection: Selection) -> list[int] | None:
    """Return the editions that a selection names; None if it names none.

    Raises:
        ConfigurationError: there is no such edition.

    """
    report, period = selection.report, selection.period
    if selection.edition is not None:
        report, _, period = storable(selection.edition).strip().rpartition(" ")
    elif report is None and period is None:
        return None
    if found := await find_editions(connection, report, period):
        return found
    if selection.edition is not None:
        raise ConfigurationError(
            f'--edition: there is no edition "{selection.edition}"; write one such as "progress 2026-W48".'
        )
    meant = " ".join(f"--{word} {value}" for word, value in {"report": report, "period": period}.items() if value)
    raise ConfigurationError(f"{meant}: there is no such edition; `outbox status` shows the latest.")


async def query_of(connection: Connection, selection: Selection) -> EmailQuery:
    """Return the conditions of a selection.

    Raises:
        ConfigurationError: there is no such edition.

    """
    query = EmailQuery()
    if (editions := await _editions(connection, selection)) is not None:
        query.of_editions(editions)
    if selection.keys:
        query.with_keys(selection.keys)
    if selection.states:
        query.in_states(selection.states)
    if selection.to is not None:
        query.addressed_to(selection.to)
    return query


async def find(connection: Connection, selection: Selection, condition: str = "true") -> list[int]:
    """Return the ids of all emails that fit and meet a condition on `d` and `m`, in the order in which they were made.

    Raises:
        ConfigurationError: there is no such edition.

    """
    query = await query_of(connection, selection)
    query.add(condition)
    found = await connection.fetchval(f"SELECT array_agg(d.email ORDER BY d.email) FROM {query.text}", *query.values)
    return list(found or ())


NAMES: Final = """
SELECT m.key, m.recipient, d.state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE d.email = ANY ($1::bigint[]) ORDER BY m.key
"""


async def name(connection: Connection, emails: Sequence[int]) -> list[Chosen]:
    """Return key, address and state of these, in the order of their keys."""
    return [Chosen(*row) for row in await connection.fetch(NAMES, emails)]
