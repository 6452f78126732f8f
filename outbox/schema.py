"""The database's shape: `schema.sql` applied, older versions upgraded step by step, and a stranger's told apart."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from outbox.database import take_init_lock
from outbox.errors import SchemaError

# To change the schema: edit schema.sql and its last line, raise this, add UPGRADES[VERSION]. While programs of
# version COMPATIBLE and later may work on it, leave COMPATIBLE: a fleet is then upgraded server by server.
VERSION: Final = 6
COMPATIBLE: Final = 2

# What turns version n - 1 into n, for databases that were made before; `schema.sql` is always the newest whole.
# A step runs in one transaction with the others, so it must not say BEGIN, COMMIT or CONCURRENTLY.
UPGRADES: Final[Mapping[int, str]] = {
    2: """
        ALTER TABLE outbox.schema_version ADD COLUMN compatible integer;
        UPDATE outbox.schema_version SET compatible = version;
        ALTER TABLE outbox.schema_version ALTER COLUMN compatible SET NOT NULL, ADD CHECK (compatible <= version);
        ALTER TABLE outbox.delivery ADD COLUMN orphaned integer NOT NULL DEFAULT 0, ADD COLUMN doubted_at timestamptz;
        UPDATE outbox.delivery SET doubted_at = marked_at WHERE state = 'in_doubt';
        ALTER TABLE outbox.delivery ADD CHECK ((doubted_at IS NULL) = (state <> 'in_doubt'));
        CREATE INDEX delivery_doubt ON outbox.delivery (due_at, email)
            WHERE settled_at IS NULL AND doubted_at IS NOT NULL;
        CREATE INDEX delivery_suspect ON outbox.delivery (due_at, email) WHERE settled_at IS NULL AND orphaned >= 3;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved'));
        ALTER TABLE outbox.relay ADD COLUMN timeline bigint NOT NULL DEFAULT 0,
            ADD COLUMN stale integer NOT NULL DEFAULT 0, ADD COLUMN trouble text;
        CREATE TABLE outbox.route (
            name text PRIMARY KEY, since timestamptz NOT NULL DEFAULT now(), reason text NOT NULL,
            failures integer NOT NULL DEFAULT 1, relay integer, retry_at timestamptz NOT NULL);
        CREATE TABLE outbox.operation (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(),
            who text NOT NULL, what text NOT NULL, target text NOT NULL, why text NOT NULL,
            emails bigint NOT NULL CHECK (emails >= 0));
    """,
    3: """
        ALTER TABLE outbox.delivery ADD COLUMN send_before timestamptz, SET (fillfactor = 50);
        CREATE INDEX delivery_late ON outbox.delivery (send_before)
            WHERE settled_at IS NULL AND send_before IS NOT NULL;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved', 'expired'));
        CREATE TABLE outbox.pace (route text PRIMARY KEY, next_at timestamptz NOT NULL DEFAULT now());
        CREATE TABLE outbox.allowance (
            route text NOT NULL, since timestamptz NOT NULL, emails bigint NOT NULL CHECK (emails >= 0),
            PRIMARY KEY (route, since));
        CREATE TABLE outbox.pruned (
            what text PRIMARY KEY CHECK (what IN ('email', 'report')), up_to bigint NOT NULL,
            at timestamptz NOT NULL DEFAULT now());
    """,
    4: """
        ALTER TABLE outbox.edition ADD COLUMN completed_at timestamptz;
        UPDATE outbox.edition SET completed_at = now() WHERE created_at < now() - interval '1 day';
        ALTER TABLE outbox.email ADD COLUMN traceparent text, ADD COLUMN made_by text;
        ALTER TABLE outbox.delivery ADD COLUMN paused text,
            ADD CHECK (paused IS NULL OR state <> 'pending' OR due_at = 'infinity');
        CREATE INDEX delivery_paused ON outbox.delivery (paused) WHERE settled_at IS NULL AND paused IS NOT NULL;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved', 'expired', 'cancelled', 'retried'));
        ALTER TABLE outbox.relay ADD COLUMN sent bigint NOT NULL DEFAULT 0, ADD COLUMN last_reply text;
        CREATE TABLE outbox.pause (
            report text PRIMARY KEY, since timestamptz NOT NULL DEFAULT now(), who text NOT NULL, why text NOT NULL);
        CREATE TABLE outbox.schedule (
            report text PRIMARY KEY, tick_at timestamptz NOT NULL, done_at timestamptz,
            failures integer NOT NULL DEFAULT 0 CHECK (failures >= 0), retry_at timestamptz NOT NULL DEFAULT now(),
            said text);
        CREATE TABLE outbox.digest_item (
            report bigint PRIMARY KEY, address text NOT NULL, name text, link text NOT NULL,
            digest bigint);
        CREATE INDEX digest_item_open ON outbox.digest_item (address) WHERE digest IS NULL;
        CREATE INDEX digest_item_digest ON outbox.digest_item (digest) WHERE digest IS NOT NULL;
    """,
    5: """
        ALTER TABLE outbox.delivery ADD COLUMN route text NOT NULL DEFAULT '',
            ADD COLUMN priority smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN 0 AND 1);
        DROP INDEX outbox.delivery_due, outbox.delivery_suspect;
        CREATE INDEX delivery_due ON outbox.delivery (route, priority, due_at, email) WHERE settled_at IS NULL;
        CREATE INDEX delivery_suspect ON outbox.delivery (route, due_at, email)
            WHERE settled_at IS NULL AND orphaned >= 3;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved', 'expired', 'cancelled', 'retried', 'suppressed',
                               'bounced'));
        ALTER TABLE outbox.relay ADD COLUMN route text NOT NULL DEFAULT '';
        CREATE INDEX email_recipient ON outbox.email (lower(recipient) text_pattern_ops);
        CREATE TABLE outbox.rule (
            position integer PRIMARY KEY, route text NOT NULL CHECK (route <> ''), report text,
            domain text CHECK (domain = lower(domain)), CHECK (report IS NOT NULL OR domain IS NOT NULL));
        CREATE TABLE outbox.suppression (
            address text COLLATE "C" NOT NULL CHECK (address <> '' AND address = lower(address)),
            report text NOT NULL DEFAULT '', since timestamptz NOT NULL DEFAULT now(),
            reason text NOT NULL CHECK (reason IN ('bounced', 'complained', 'unsubscribed', 'decided')),
            who text NOT NULL, why text NOT NULL, email bigint, PRIMARY KEY (address, report));
        CREATE TABLE outbox.bounce (
            email bigint NOT NULL, message text NOT NULL, at timestamptz NOT NULL DEFAULT now(),
            kind text NOT NULL CHECK (kind IN ('hard', 'soft', 'complained')), status text,
            PRIMARY KEY (email, message));
    """,
    6: """
        SET LOCAL search_path = pg_catalog, pg_temp;
        -- email and delivery: bounds

        -- bounce tokens
        CREATE TABLE outbox.bounce_key (
            id smallint PRIMARY KEY CHECK (id BETWEEN 1 AND 999),
            secret bytea NOT NULL CHECK (octet_length(secret) = 32),
            created_at timestamptz NOT NULL DEFAULT now(), retired_at timestamptz);
        CREATE UNIQUE INDEX bounce_key_signs ON outbox.bounce_key ((true)) WHERE retired_at IS NULL;
        INSERT INTO outbox.bounce_key (id, secret)
        VALUES (1, sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid(), gen_random_uuid()), 'UTF8')));

        -- board sessions
        CREATE TABLE outbox.board_session (
            id bytea PRIMARY KEY CHECK (octet_length(id) = 32),
            name text NOT NULL CHECK (name <> '' AND octet_length(name) <= 500),
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL CHECK (expires_at > created_at AND expires_at < 'infinity'));
        CREATE INDEX board_session_expires ON outbox.board_session (expires_at);
    """,
}

# Functions have no version of their own: whoever upgrades puts the newest in place. One whose parameters change is
# dropped by the step that changes them.
_FUNCTION: Final = re.compile(r"^create function .*?\$\$;$", re.MULTILINE | re.DOTALL)


def schema_sql() -> str:
    """The text of schema.sql: beside this module in an installed wheel, beside the package in a checkout."""
    packaged = files("outbox") / "schema.sql"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parent.parent / "schema.sql").read_text(encoding="utf-8")


def functions_sql() -> str:
    """The functions of schema.sql, to be put in the place of older ones."""
    found = _FUNCTION.findall(schema_sql())
    return "\n".join(text.replace("create function", "create or replace function", 1) for text in found)


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
    connection: Any, *, version: int = VERSION, compatible: int = COMPATIBLE, upgrades: Mapping[int, str] = UPGRADES
) -> tuple[int | None, int]:
    """Create or upgrade the schema in one transaction; gives the version before and after.

    Idempotent. Servers that do this at once queue on one advisory lock, and all but the first find nothing to do.

    Raises:
        SchemaError: the database is newer than this code or not UTF8, or the schema belongs to something else.

    """
    async with connection.transaction(isolation="read_committed"):
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
            for step in range(before + 1, version + 1):
                await connection.execute(upgrades[step])
                await connection.execute(
                    "INSERT INTO outbox.schema_version (version, compatible) VALUES ($1, $2)",
                    step,
                    min(step, compatible),
                )
            if before < version:
                await connection.execute(functions_sql())
    return before, version


async def require_current(connection: Any) -> None:
    """Return if the database has the schema that this code is for, or a newer one that it may still work on.

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
    if found > VERSION and not await _is_compatible(connection, VERSION):
        raise SchemaError(_newer(found))


async def _is_compatible(connection: Any, version: int) -> bool:
    newest = "SELECT compatible FROM outbox.schema_version ORDER BY version DESC LIMIT 1"
    return bool(await connection.fetchval(newest) <= version)


def _newer(found: int) -> str:
    return (
        f"The database's outbox schema is newer (version {found}) than this program (version {VERSION}); "
        "upgrade outbox-mail on this server."
    )
