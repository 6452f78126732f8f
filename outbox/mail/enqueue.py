"""`outbox.enqueue`: one statement on whatever connection the caller's transaction lives on. It never commits.

SQLAlchemy (Session, Connection and their async kin), asyncpg and psycopg 3. A driver is known by the class that it is
given, so none is imported here.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, overload

from outbox import tracing
from outbox.errors import OutboxError, SchemaError
from outbox.mail.email import Email

if TYPE_CHECKING:
    import asyncpg
    import asyncpg.pool
    import psycopg
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

_ARGUMENTS: Final = {
    "key": "text",
    "sender": "text",
    "recipients": "text[]",
    "head": "bytea",
    "domain": "text",
    "tail": "bytea",
    "send_at": "timestamptz",
    "send_before": "timestamptz",
    "priority": "integer",
    "route": "text",
    "traceparent": "text",
    "made_by": "text",
}
_TYPES: Final = tuple(_ARGUMENTS.values())


def _statement(placeholder: Callable[[int], str]) -> str:
    said = (f"{name} => CAST({placeholder(n)} AS {kind})" for n, (name, kind) in enumerate(_ARGUMENTS.items(), 1))
    return f"SELECT outbox.put({', '.join(said)})"


_NUMBERED: Final = _statement(lambda number: f"${number}")
_PERCENT: Final = _statement(lambda _: "%s")
_NAMED: Final = _statement(lambda number: f":p{number}")

_NO_SCHEMA: Final = frozenset(("3F000", "42883"))  # invalid_schema_name, undefined_function


@overload
def enqueue(
    session: "Session | scoped_session[Session] | Connection | psycopg.Connection[Any]", email: Email
) -> bool: ...
@overload
def enqueue(
    session: "AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection | psycopg.AsyncConnection[Any]"
    " | asyncpg.Connection | asyncpg.pool.PoolConnectionProxy",
    email: Email,
) -> Awaitable[bool]: ...
def enqueue(session: Any, email: Email) -> bool | Awaitable[bool]:
    """Put an email into the outbox within the caller's transaction; gives (async: awaited) whether it is new.

    It is sent once that commits, and never if it does not. An email whose key is there already is not put in again, and
    nothing is changed. Nothing is committed and nothing else flushed; on a connection that commits by itself each call
    is a transaction. Of two transactions with one key the later waits for the end of the earlier.

    Raises:
        OutboxError: `session` is none that it knows, or leads to another database than Postgres.
        SchemaError: there is no outbox schema, or an older one.

    """
    for kind in type(session).__mro__:
        put = _WAYS.get((kind.__module__.partition(".")[0], kind.__name__))
        if put is not None:
            return put(session, _values(email))
    raise OutboxError(
        f"outbox.enqueue cannot use a {type(session).__name__}; give it a SQLAlchemy session or connection, or one of "
        "asyncpg or psycopg 3."
    )


def _values(email: Email) -> tuple[Any, ...]:
    pieces = email.pieces
    return (
        email.key, pieces.sender, pieces.recipients, pieces.head, pieces.domain, pieces.tail,
        email.send_at, email.send_before, int(email.priority == "urgent"), email.route,
        tracing.current(), tracing.made_by(),
    )  # fmt: skip


def _with_session(session: Any, values: tuple[Any, ...]) -> bool:
    """Of a session only its connection is used: its own `execute` would flush first what waits there."""
    return _with_connection(session.connection(), values)


async def _with_async_session(session: Any, values: tuple[Any, ...]) -> bool:
    return await _with_async_connection(await session.connection(), values)


async def _with_async_connection(connection: Any, values: tuple[Any, ...]) -> bool:
    return bool(await connection.run_sync(_with_connection, values))


def _with_connection(connection: Any, values: tuple[Any, ...]) -> bool:
    from sqlalchemy import ARRAY, DateTime, LargeBinary, Text, bindparam, text
    from sqlalchemy.exc import DBAPIError

    if connection.dialect.name != "postgresql":
        raise OutboxError(f"The outbox is in Postgres, and this session leads to {connection.dialect.name}.")
    types: dict[str, Any] = {"text[]": ARRAY(Text), "bytea": LargeBinary, "timestamptz": DateTime(timezone=True)}
    bound: list[Any] = [bindparam(f"p{n}", type_=types[kind]) for n, kind in enumerate(_TYPES, 1) if kind in types]
    try:
        is_new = connection.execute(
            text(_NAMED).bindparams(*bound), {f"p{n}": value for n, value in enumerate(values, 1)}
        ).scalar_one()
    except DBAPIError as error:
        raise _explained(error, error.orig) from error
    return bool(is_new)


async def _with_asyncpg(connection: Any, values: tuple[Any, ...]) -> bool:
    try:
        return bool(await connection.fetchval(_NUMBERED, *values))
    except Exception as error:
        raise _explained(error, error) from error


def _with_psycopg(connection: Any, values: tuple[Any, ...]) -> bool:
    from psycopg.rows import tuple_row

    try:
        with connection.cursor(row_factory=tuple_row) as cursor:
            return bool(cursor.execute(_PERCENT, values).fetchone()[0])
    except Exception as error:
        raise _explained(error, error) from error


async def _with_async_psycopg(connection: Any, values: tuple[Any, ...]) -> bool:
    from psycopg.rows import tuple_row

    try:
        async with connection.cursor(row_factory=tuple_row) as cursor:
            await cursor.execute(_PERCENT, values)
            return bool((await cursor.fetchone())[0])
    except Exception as error:
        raise _explained(error, error) from error


def _explained(error: Exception, fault: Any) -> Exception:
    """A sentence where the schema is missing; any other fault is the caller's own, as the driver says it."""
    state = getattr(fault, "sqlstate", None) or getattr(fault, "pgcode", None)
    if state in _NO_SCHEMA:
        return SchemaError("The database has no outbox schema of this version; run `outbox init`.")
    return error


# By the name of a driver and of the class that its connections have, or inherit.
_WAYS: Final[dict[tuple[str, str], Callable[[Any, tuple[Any, ...]], bool | Awaitable[bool]]]] = {
    ("sqlalchemy", "Session"): _with_session,
    ("sqlalchemy", "scoped_session"): _with_session,
    ("sqlalchemy", "Connection"): _with_connection,
    ("sqlalchemy", "AsyncSession"): _with_async_session,
    ("sqlalchemy", "async_scoped_session"): _with_async_session,
    ("sqlalchemy", "AsyncConnection"): _with_async_connection,
    ("asyncpg", "Connection"): _with_asyncpg,
    ("asyncpg", "PoolConnectionProxy"): _with_asyncpg,
    ("psycopg", "Connection"): _with_psycopg,
    ("psycopg", "AsyncConnection"): _with_async_psycopg,
}
