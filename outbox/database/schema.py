"""Database schema: installs `schema.sql`, upgrades older versions (`upgrades`), and recognises foreign schemas."""

import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.database.locks import take_init_lock
from outbox.database.upgrades import UPGRADES
from outbox.errors import OutboxError, SchemaError

# To change the schema: edit schema.sql and its last line, raise VERSION, add `upgrades.UPGRADES[VERSION]`. While
# programs of version COMPATIBLE and later may work on it, leave COMPATIBLE: a fleet is then upgraded server by server.
VERSION: Final = 9
COMPATIBLE: Final = 2

# Functions and triggers have no version of their own: an upgrade replaces all of them by the newest. A function whose
# parameters change is dropped by the step that changes them.
_REPLACED: Final = re.compile(r"^create ((?:function .*?\$\$|trigger [^;]*);)$", re.MULTILINE | re.DOTALL)

# So it is with views: one whose columns change is dropped by the step that changes them.
_VIEWS: Final = re.compile(r"^create (view [^;]*;)$", re.MULTILINE)
VIEWS_SINCE: Final = 9


def schema_sql() -> str:
    """Return the text of schema.sql: beside this module in an installed wheel, beside the package in a checkout."""
    packaged = files("outbox") / "schema.sql"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "schema.sql").read_text(encoding="utf-8")


def functions_sql() -> str:
    """Return the functions and triggers of schema.sql, with their rights, to replace older ones."""
    found = [f"create or replace {text}" for text in _REPLACED.findall(schema_sql())]
    return "\n".join([*found, "revoke all on all functions in schema outbox from public;\n"])


def views_sql(version: int = VERSION) -> str:
    """Return the views of schema.sql, to replace older ones; nothing for a version that lacks the tables."""
    return "\n".join(f"create or replace {text}" for text in _VIEWS.findall(schema_sql()) if version >= VIEWS_SINCE)


async def installed_version(connection: Connection) -> int | None:
    """Return the version that the database has, or None if it has none.

    Raises:
        SchemaError: a schema called `outbox` is there that outbox did not make.

    """
    ours, taken = await connection.fetchrow(
        "SELECT to_regclass('outbox.schema_version') IS NOT NULL,"
        " EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'outbox')"
    )
    if ours:
        return int(await connection.fetchval("SELECT max(version) FROM outbox.schema_version"))
    if taken:
        raise SchemaError(
            "The database has a schema `outbox` that is not this program's; rename it, or use another database."
        )
    return None


# Expressions of constraints, indexes and defaults bind to what the path names when they are made, and stay so.
PIN_PATH: Final = "SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL standard_conforming_strings = on"


# A step and the triggers that are replaced after it lock tables in an order of their own. In this order generate,
# `enqueue` and relays lock them, so an upgrade waits for their transactions instead of meeting a deadlock.
LOCK_IN_ORDER: Final = "LOCK TABLE outbox.report, outbox.email, outbox.delivery IN SHARE ROW EXCLUSIVE MODE"


async def initialise(
    connection: Connection,
    *,
    version: int = VERSION,
    compatible: int = COMPATIBLE,
    upgrades: Mapping[int, str] = UPGRADES,
    then: Callable[[Connection], Awaitable[None]] | None = None,
) -> tuple[int | None, int]:
    """Create or upgrade the schema in one transaction; return the version before and after.

    Idempotent. Servers that do this at once queue on one advisory lock, and all but the first find nothing to do.
    `then` is awaited at the end of the transaction of an upgrade. New constraints apply to new rows at once; older
    rows are checked after the commit, so that relays need not wait, and stay as they are if they violate one.

    Raises:
        SchemaError: the database is newer than this code or not UTF8, or the schema belongs to something else.

    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(PIN_PATH)
        await take_init_lock(connection)
        encoding = await connection.fetchval("SHOW server_encoding")
        if encoding != "UTF8":
            # A name or an SMTP reply that the encoding lacks would fail a whole batch, and again with every try.
            raise SchemaError(f"The database's encoding is {encoding}; outbox needs one that was created with UTF8.")
        before = await installed_version(connection)
        if before is None:
            await connection.execute(schema_sql())
        elif before > version:
            if not await _is_compatible(connection, version):
                raise SchemaError(_newer(before))
            return before, before
        else:
            if before < version:
                await connection.execute(LOCK_IN_ORDER)
            for step in range(before + 1, version + 1):
                await connection.execute(upgrades[step])
                await connection.execute(
                    "INSERT INTO outbox.schema_version (version, compatible) VALUES ($1, $2)",
                    step,
                    min(step, compatible),
                )
            if before < version:
                await connection.execute(functions_sql() + views_sql(version))
                if then is not None:
                    await then(connection)
    if before is not None and before < version:
        await validate_constraints(connection)
    return before, version


UNVALIDATED: Final = """
SELECT conrelid::regclass::text AS relation, quote_ident(conname) AS name
  FROM pg_constraint WHERE connamespace = to_regnamespace('outbox') AND contype = 'c' AND NOT convalidated ORDER BY 1, 2
"""


async def read_broken(connection: Connection) -> list[str]:
    """Return the names of the CHECKs that some older row violates."""
    return [row["name"] for row in await connection.fetch(UNVALIDATED)]


async def validate_constraints(connection: Connection) -> None:
    """Validate newer CHECKs on older rows; one that some row violates applies to new rows only.

    Relays keep running: it takes no lock that they wait for (PostgreSQL docs, ALTER TABLE, VALIDATE CONSTRAINT).
    """
    async with connection.transaction():
        await connection.execute(PIN_PATH)
        added = await connection.fetch(UNVALIDATED)
    for relation, name in added:
        with suppress(asyncpg.CheckViolationError):
            async with connection.transaction():
                await connection.execute(PIN_PATH)
                await connection.execute(f"ALTER TABLE {relation} VALIDATE CONSTRAINT {name}")


SIZE: Final = "email_message_size"
READ_SIZE: Final = "SELECT outbox.message_bytes_max()"


async def limit_messages(connection: Connection, bytes_max: int) -> int | None:
    """Set the limit on messages, in octets; return the former limit, or None if it is the same.

    A relay quarantines larger messages that are in the outbox already, unless its own settings allow them.

    Raises:
        OutboxError: the limit has to change, and this role does not own the schema.

    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(PIN_PATH)
        await take_init_lock(connection)
        try:
            before = int(await connection.fetchval(READ_SIZE))
        except asyncpg.InsufficientPrivilegeError as error:
            raise OutboxError(
                "This role does not own the outbox schema; run `outbox init` as its owner, the role that made it."
            ) from error
        if before == bytes_max:
            return None
        try:
            await connection.execute(
                f"ALTER TABLE outbox.email DROP CONSTRAINT IF EXISTS {SIZE},"
                f" ADD CONSTRAINT {SIZE} CHECK (octet_length(message) <= {int(bytes_max)}) NOT VALID"
            )
        except asyncpg.InsufficientPrivilegeError as error:
            raise OutboxError(
                f"message_bytes_max is {bytes_max} here and {before} in the database, and this role may not change it; "
                "run `outbox init` as the schema's owner, or correct the setting."
            ) from error
    await validate_constraints(connection)
    return before


async def require_current(connection: Connection) -> None:
    """Raise unless the database has the schema that this code is for, or a newer one that it may still work on.

    Raises:
        SchemaError: it is missing, older or newer; the sentence says which, and the fix.

    """
    found = await installed_version(connection)
    if found is None:
        raise SchemaError("The database has no outbox schema yet; run `outbox init`.")
    if found < VERSION:
        raise SchemaError(
            f"The database's outbox schema is older (version {found}) than this program (version {VERSION}); "
            "run `outbox init` to upgrade it."
        )
    if found > VERSION and not await _is_compatible(connection, VERSION):
        raise SchemaError(_newer(found))


async def _is_compatible(connection: Connection, version: int) -> bool:
    newest = "SELECT compatible FROM outbox.schema_version ORDER BY version DESC LIMIT 1"
    return bool(await connection.fetchval(newest) <= version)


def _newer(found: int) -> str:
    return (
        f"The database's outbox schema is newer (version {found}) than this program (version {VERSION}); "
        "upgrade outbox-mail on this server."
    )
