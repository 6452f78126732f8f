"""The database's shape: `schema.sql` applied, older versions upgraded step by step, and a stranger's told apart."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from outbox.database import INIT_LOCK
from outbox.errors import SchemaError

# To change the schema: edit schema.sql and its last line, raise this, add UPGRADES[VERSION].
VERSION: Final = 1

# What turns version n - 1 into n, for databases that were made before; `schema.sql` is always the newest whole.
# A step runs in one transaction with the others, so it must not say BEGIN, COMMIT or CONCURRENTLY.
UPGRADES: Final[Mapping[int, str]] = {}


def schema_sql() -> str:
    """The text of schema.sql: beside this module in an installed wheel, beside the package in a checkout."""
    packaged = files("outbox") / "schema.sql"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parent.parent / "schema.sql").read_text(encoding="utf-8")


async def installed_version(connection: Any) -> int | None:
    """The version that the database has, or None if it has none.

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


async def initialise(
    connection: Any, *, version: int = VERSION, upgrades: Mapping[int, str] = UPGRADES
) -> tuple[int | None, int]:
    """Create or upgrade the schema in one transaction; gives the version before and after.

    Idempotent. Servers that do this at once queue on one advisory lock, and all but the first find nothing to do.

    Raises:
        SchemaError: the database is newer than this code or not UTF8, or the schema belongs to something else.

    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute("SELECT pg_advisory_xact_lock($1, 0)", INIT_LOCK)
        encoding = await connection.fetchval("SHOW server_encoding")
        if encoding != "UTF8":
            # A name or an SMTP reply that the encoding lacks would fail a whole batch, and again with every try.
            raise SchemaError(f"The database's encoding is {encoding}; outbox needs one that was created with UTF8.")
        before = await installed_version(connection)
        if before is None:
            await connection.execute(schema_sql())
        elif before > version:
            raise SchemaError(_newer(before))
        else:
            for step in range(before + 1, version + 1):
                await connection.execute(upgrades[step])
                await connection.execute("INSERT INTO outbox.schema_version (version) VALUES ($1)", step)
    return before, version


async def require_current(connection: Any) -> None:
    """Return if the database has just the schema that this code is for.

    Raises:
        SchemaError: it is missing, older or newer; the sentence says which, and the mend.

    """
    found = await installed_version(connection)
    if found is None:
        raise SchemaError("The database has no outbox schema yet; run `outbox init`.")
    if found < VERSION:
        raise SchemaError(
            f"The database's outbox schema is older (version {found}) than this program (version {VERSION}); "
            "run `outbox init` to upgrade it."
        )
    if found > VERSION:
        raise SchemaError(_newer(found))


def _newer(found: int) -> str:
    return (
        f"The database's outbox schema is newer (version {found}) than this program (version {VERSION}); "
        "upgrade outbox-mail on this server."
    )
