"""Emails that a decision is about, as they were shown: some by name, or all that fit. Those that changed are left.

A confirmation carries what it showed in its form: of each email by name the attempt and the state, of all that fit the
moment and the last id. So nothing is remembered between the two, and any process may take the click.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.errors import ConfigurationError, OutboxError
from outbox.mail.delivery_state import DeliveryState
from outbox.operations.email_filter import Chosen, Selection, find
from outbox.operations.email_filter import name as name_all
from outbox.operations.resolve import DECIDABLE, UNDECIDED, Decision
from outbox.operations.retry_cancel import RETRIED_BY_DEFAULT, SWEEPING, Act
from outbox.web.responses import bigint

PICKED_MAX: Final = 60
MANY_MAX: Final = 100_000
NAMED_MAX: Final = 20

ACTS: Final = {"retry": Act.RETRY, "cancel": Act.CANCEL}
DECISIONS: Final = {"sent": Decision.SENT, "resend": Decision.RESEND, "discard": Decision.DISCARD}
COMMANDS: Final = {
    "retry": "retry", "cancel": "cancel", "sent": "resolve --sent", "resend": "resolve --resend",
    "discard": "resolve --discard",
}  # fmt: skip

STANDING: Final = """
SELECT d.email, d.attempt, d.state, m.key, m.recipient FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE d.email = ANY ($1::bigint[]) ORDER BY d.email
"""
NOW: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"


@dataclass(frozen=True, slots=True)
class Email:
    """Email that is named, in its present state."""

    id: int
    attempt: int
    state: str
    key: str
    to: str

    @property
    def seen(self) -> str:
        """Return the facts that have to be the same at the click."""
        return f"{self.id}:{self.attempt}:{self.state}"


@dataclass(frozen=True, slots=True)
class Fitting:
    """All emails that fit, as of a moment."""

    emails: list[int]
    named: list[Chosen]
    target: str
    up_to: int
    at: float


async def named(connection: Connection, ids: Sequence[int]) -> list[Email]:
    """Read these in their present state."""
    return [Email(*row) for row in await connection.fetch(STANDING, list(ids)[:PICKED_MAX])]


def picked(fields: Mapping[str, str]) -> list[int]:
    """Return the ids that were picked on a page."""
    said = [bigint(name.removeprefix("pick.")) for name in fields if name.startswith("pick.")]
    return [one for one in said if one is not None]


def seen_of(fields: Mapping[str, str]) -> dict[int, str]:
    """Return what a confirmation showed of each email by name."""
    said = [(bigint(one.partition(":")[0]), one) for one in fields.get("seen", "").split(",")]
    return dict([(number, one) for number, one in said if number is not None][:PICKED_MAX])


def selection_of(act: str, fields: Mapping[str, str]) -> Selection:
    """Return the filter of the form, as the commands have it.

    Raises:
        OutboxError: nothing narrows it down, or this cannot be done to what it asks for.

    """
    given = {key: storable(fields.get(key, "")).strip() or None for key in ("report", "period", "to")}
    state = fields.get("state", "")
    states = (state,) if state in list(DeliveryState) else ()
    chosen = Selection(report=given["report"], period=given["period"], to=given["to"], states=states)
    if not chosen.is_by_filter:
        raise OutboxError("Nothing is picked; pick emails, or narrow the list down to those that are meant.")
    if act in DECISIONS and (state not in DECIDABLE or (act == "sent" and state == DeliveryState.DEAD)):
        raise OutboxError("Only what is in doubt or dead is decided, and what is dead has not arrived.")
    if act == "retry" and state in (DeliveryState.SENT, DeliveryState.SENDING, DeliveryState.IN_DOUBT):
        raise OutboxError(f"What is {state.replace('_', ' ')} is not retried.")
    return chosen


async def fitting(
    connection: Connection, act: str, chosen: Selection, *, up_to: int | None = None, at: float | None = None
) -> Fitting:
    """Return the emails that the same command would touch, now, or those that have not changed since `at`.

    Raises:
        OutboxError: there is no such edition, or it is more than a page may do.

    """
    condition = SWEEPING[ACTS[act]] if act in ACTS else UNDECIDED
    if at is None or up_to is None:
        at = float(await connection.fetchval(NOW))
    else:
        changed = f"greatest(d.settled_at, d.doubted_at, d.marked_at) > to_timestamp({at!r})"
        condition = f"({condition}) AND d.email <= {up_to} AND ({changed}) IS NOT TRUE"
    states = chosen.states or (RETRIED_BY_DEFAULT if act == "retry" else ())
    try:
        emails = await find(connection, replace(chosen, states=states), condition)
    except ConfigurationError:
        emails = []  # there is no such edition
    if len(emails) > MANY_MAX:
        raise OutboxError(
            f"{len(emails):,} emails are more than a page may decide about at once ({MANY_MAX:,}); "
            f"use `outbox {command(act, chosen)}`."
        )
    return Fitting(emails, await name_all(connection, emails[:NAMED_MAX]), chosen.target, max(emails, default=0), at)


def command(act: str, chosen: Selection) -> str:
    """Return the command that does the same."""
    verb, _, option = COMMANDS[act].partition(" ")
    return " ".join(filter(None, (verb, option, chosen.target)))


def target_of(keys: Sequence[str]) -> str:
    """Return the keys of named emails as they are recorded."""
    return shlex.join(dict.fromkeys(keys))
