"""Declaration that another system made an edition, such as the cron job that outbox replaces.

The declaration is a part of the edition, which exists from then on; `outbox.operation` keeps each declaration and undo.
`generate` does not make such an edition, a schedule takes its tick as done, and no dead man's switch is called.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from outbox.database.engine import driver_of
from outbox.database.lock_wait import MAY_GENERATE, holders
from outbox.database.locks import EDITION_LOCKS
from outbox.database.plans import EMAIL_OF_REPORT
from outbox.database.values import storable
from outbox.errors import OutboxError
from outbox.generate.edition import DECLARED, Declared, Edition, open_edition, plan_edition
from outbox.generate.edition_lock import EXCLUDE, REMOVE, lock_number
from outbox.operations.wording import state_label
from outbox.settings import EditionSettings, command_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

TRIES_MAX: Final = 3
MARK_DONE: Final = "mark-done"  # in `operation.what`

HOLD: Final = text("SELECT id FROM outbox.edition WHERE id = :id FOR UPDATE")

MADE: Final = text(f"""
SELECT coalesce(d.state, 'waiting for a digest') AS state, count(*) AS emails
  FROM outbox.report r
  {EMAIL_OF_REPORT}
 WHERE r.edition = :id GROUP BY 1 ORDER BY 1
""")

DECLARE: Final = text("""
UPDATE outbox.edition
   SET done_elsewhere_at = now(), done_elsewhere_by = :who, done_elsewhere_why = :why, completed_at = now(),
       expected = :expected
 WHERE id = :id
""")
# The number of its recipients is unknown before the next look of generate: `expected` was the number of its emails.
UNDO: Final = text("""
UPDATE outbox.edition
   SET done_elsewhere_at = NULL, done_elsewhere_by = NULL, done_elsewhere_why = NULL,
       completed_at = NULL, expected = NULL
 WHERE id = :id
""")
OPERATION: Final = text("""
INSERT INTO outbox.operation (who, what, target, why, emails) VALUES (:who, :what, :target, :why, :emails)
""")


class EmailsExistError(OutboxError):
    """Emails of the edition exist, and the caller has not decided to keep them."""


async def mark_done(
    connection: "AsyncConnection",
    name: str,
    report: EditionSettings,
    period_key: str,
    *,
    who: str,
    why: str,
    keep_emails: bool = False,
) -> str:
    """Declare an edition as done by another system; return a sentence about it. Idempotent.

    A period that has not ended can be declared, too: the other system may still have to make it.

    Raises:
        ConfigurationError: the key is not a period, or this server's settings are not the fleet's.
        EmailsExistError: emails of the edition exist, and `keep_emails` is false.
        OutboxError: a generate makes the edition at this moment.

    """
    for _ in range(TRIES_MAX):
        planned = await plan_edition(connection, name, report, period_key, early=True, asker="PERIOD")
        edition = await open_edition(connection, name, report, planned.period)
        async with connection.begin():
            await _exclude(connection, edition)
            if await connection.scalar(HOLD, {"id": edition.id}) is None:
                continue  # a generate that could make nothing of it has removed it
            declared = await _declared(connection, edition)
            if declared is not None:
                return f"{edition.name} is already {declared.sentence}."
            made = {row.state: row.emails for row in await connection.execute(MADE, {"id": edition.id})}
            if made and not keep_emails:
                raise EmailsExistError(_refusal(edition, made))
            count = sum(made.values())
            words = {"who": storable(who), "why": storable(why)}
            await connection.execute(DECLARE, {"id": edition.id, "expected": count, **words})
            await connection.execute(OPERATION, _operation(edition, MARK_DONE, who, why, count))
        kept = f" Its {_emails_label(made)} stay as they are; what waits is sent." if made else ""
        return f"{edition.name} is marked as done elsewhere: outbox will not make it.{kept}"
    raise OutboxError(f"{name} {period_key} is opened and removed by others at this moment; run this again.")


async def undo_mark_done(
    connection: "AsyncConnection", name: str, report: EditionSettings, period_key: str, *, who: str, why: str
) -> str:
    """Take a declaration back; return a sentence about it.

    Raises:
        ConfigurationError: the key is not a period, or this server's settings are not the fleet's.
        OutboxError: the edition is not marked as done.

    """
    edition = await plan_edition(connection, name, report, period_key, early=True, asker="PERIOD")
    async with connection.begin():
        if await connection.scalar(HOLD, {"id": edition.id}) is None or await _declared(connection, edition) is None:
            raise OutboxError(f"{edition.name} is not marked as done elsewhere, so there is nothing to undo.")
        await connection.execute(UNDO, {"id": edition.id})
        await connection.execute(OPERATION, _operation(edition, f"{MARK_DONE} --undo", who, why, 0))
        await connection.execute(REMOVE, {"id": edition.id})
    again = f"outbox {' '.join(command_of(name))} --period {edition.period.key}"
    return f"{edition.name} is no longer marked as done elsewhere; `{again}` makes it now."


async def _exclude(connection: "AsyncConnection", edition: Edition) -> None:
    """Take the edition's lock until the transaction ends. Roles that may not generate cannot prevent that."""
    number = lock_number(edition.id)
    if await connection.scalar(EXCLUDE, {"ns": EDITION_LOCKS, "number": number}):
        return
    found = await holders(await driver_of(connection), EDITION_LOCKS, [number], MAY_GENERATE)
    if found:
        raise OutboxError(
            f"{edition.name} is being made at this moment by {found[number]}; nothing was marked. Wait until that "
            "generate ends, or end it, and run this again."
        )


async def _declared(connection: "AsyncConnection", edition: Edition) -> Declared | None:
    row = (await connection.execute(DECLARED, {"id": edition.id})).one()
    return Declared.of(row)


def _operation(edition: Edition, what: str, who: str, why: str, emails: int) -> Mapping[str, Any]:
    words = {"who": who, "what": what, "target": edition.name, "why": why}
    return {**{name: storable(word) for name, word in words.items()}, "emails": emails}


def _refusal(edition: Edition, made: Mapping[str, int]) -> str:
    return (
        f"{edition.name} has {_emails_label(made)} already; nothing was marked. Cancel what waits with "
        f'`outbox cancel --edition "{edition.name}" --why …`, or leave it to be sent; then add --keep-emails.'
    )


def _emails_label(made: Mapping[str, int]) -> str:
    """Return how many emails there are, by state: `5 emails (3 sent, 2 pending)`."""
    count = sum(made.values())
    states = ", ".join(f"{emails:,} {state_label(state)}" for state, emails in made.items())
    return f"{count:,} {'email' if count == 1 else 'emails'} ({states})"
