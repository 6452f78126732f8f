"""Lock of one edition: generates share it while they make reports; removing or declaring an edition takes it alone.

So an edition is neither removed nor declared as done elsewhere (`mark_done`) while a generate makes it, and a generate
that begins at that moment sees the result. A role that may only connect can take the lock, too, but cannot hold
up the others for long: a foreign key guards the same.
"""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from outbox.database.connection import LOST_SESSION
from outbox.database.locks import EDITION_LOCKS, NAMESPACE_MASK
from outbox.errors import OutboxError
from outbox.generate.edition import DECLARED, Declared, Edition, open_edition
from outbox.reports.period import Period
from outbox.settings import EditionSettings

if TYPE_CHECKING:
    from outbox.generate.session import GenerateSession

WAIT_MAX_S: Final = 5.0  # for a session that holds the lock exclusively: it does so for one short transaction
LOOK_S: Final = 0.05

SHARE: Final = text("SELECT pg_try_advisory_lock_shared(:ns, :number)")
UNSHARE: Final = text("SELECT pg_advisory_unlock_shared(:ns, :number)")
EXCLUDE: Final = text("SELECT pg_try_advisory_xact_lock(:ns, :number)")
REMOVE: Final = text("SELECT outbox.remove_unused_edition(:id)")


def lock_number(edition: int) -> int:
    """Return the second integer of an edition's lock."""
    return edition & NAMESPACE_MASK


async def declared(session: "GenerateSession", edition: int) -> Declared | None:
    """Return the declaration that this edition is done elsewhere, if there is one."""
    rows = await session.fetch(DECLARED, {"id": edition})
    return Declared.of(rows[0]) if rows else None


async def open_shared(
    session: "GenerateSession", name: str, report: EditionSettings, period: Period
) -> tuple[Edition, Declared | None]:
    """Return the edition of this period, made if it is new, and its declaration; the session shares its lock.

    The edition's row is read after the lock is held: before, another session could remove it or declare it done.
    """
    until = time.monotonic() + WAIT_MAX_S
    while True:
        edition = await session.retried(lambda connection: open_edition(connection, name, report, period))
        lock = {"ns": EDITION_LOCKS, "number": lock_number(edition.id)}
        is_shared = bool((await session.fetch(SHARE, lock))[0][0])
        rows = await session.fetch(DECLARED, {"id": edition.id})
        if rows and (is_shared or time.monotonic() > until):
            return edition, Declared.of(rows[0])
        if is_shared:  # another session removed the edition after it was opened here
            await session.fetch(UNSHARE, lock)
        await asyncio.sleep(LOOK_S)


async def remove_unused(session: "GenerateSession", edition: int) -> None:
    """Remove an edition that nothing could be made of, unless another generate works on it. Raises nothing."""
    with suppress(OutboxError, SQLAlchemyError, *LOST_SESSION):
        async with session.ours() as connection, connection.begin():
            if await connection.scalar(EXCLUDE, {"ns": EDITION_LOCKS, "number": lock_number(edition)}):
                await connection.execute(REMOVE, {"id": edition})
