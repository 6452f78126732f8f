"""Errors of queries: of a query as such, or of the values of one call; as sentences with the fix where it is known."""

import re
from collections.abc import Sequence
from typing import Final

import asyncpg
from sqlalchemy.exc import DBAPIError

from outbox.database.connection import Connection, is_lost
from outbox.database.locks import is_lock_timeout
from outbox.reports.query_parameters import Query


class QueryError(Exception):
    """A query is wrong as such: it would fail for every recipient."""


class RowError(Exception):
    """A source failed on the values of one call: other recipients may do better."""


class UnreadableError(RowError):
    """A row has a value that Python cannot represent; the message names column and value."""


class StaleStatementError(Exception):
    """A statement that was prepared earlier is no longer valid, or met a deadlock; a new transaction may do better."""


def ends_session(driver: Connection, error: Exception) -> bool:
    """Return True for an error that is not about the statement: the session is over, or it waited for a lock."""
    if driver.is_closed() or is_lock_timeout(error):
        return True
    if isinstance(error, asyncpg.PostgresError):
        return is_lost(error)
    if isinstance(error, asyncpg.exceptions.UnsupportedClientFeatureError):
        return False
    # "cannot switch to state …": a statement met the server's farewell.
    farewell = isinstance(error, asyncpg.InternalClientError) and "another operation" in str(error)
    return farewell or isinstance(error, (asyncpg.InterfaceError, OSError, TimeoutError))


def is_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Return True if an error, or what it and SQLAlchemy wrapped, is of that class of Postgres's."""
    while error is not None and not isinstance(error, kind):
        error = getattr(error, "orig", None) or error.__cause__
    return error is not None


def is_in(error: Exception, classes: tuple[str, ...]) -> bool:
    """Return True for an error of Postgres in one of these classes of SQLSTATE."""
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(classes)


def message_of(error: BaseException) -> str:
    """Return the message of Postgres without the statement and its parameters: they hold people's data."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return str(error.orig.__cause__ or error.orig).replace("\n", " ")
    return str(error).replace("\n", " ").split(" [SQL:", 1)[0]


def describe(error: BaseException) -> str:
    """Return an error as words on one line."""
    return " ".join(str(error).split()) or type(error).__name__


_POSITION: Final = re.compile(r"\$(\d+)")
_ARGUMENT: Final = re.compile(r"invalid input for query argument \$(\d+)")
_OPERATOR: Final = re.compile(r"operator does not exist: (.+?) (\S+) (.+?)$")


def describe_refusal(query: Query, error: asyncpg.PostgresError) -> str:
    """Return the message of Postgres with the names of parameters, and the fix where it is known."""
    words = _with_names(query, describe(error))
    fix = _fix_of(str(error).partition("\n")[0], query)
    return f"{words}; {fix}" if fix else words


def _with_names(query: Query, words: str) -> str:
    """Return the words with `:name` in place of `$1`."""

    def name(found: re.Match[str]) -> str:
        number = int(found[1])
        return f":{query.names[number - 1]}" if 0 < number <= len(query.names) else found[0]

    return _POSITION.sub(name, words)


def _fix_of(message: str, query: Query) -> str:
    found = _OPERATOR.match(message)
    if found is None:
        return ""
    left, _, right = found.groups()
    if "text[]" in (left, right) and "keys" in query.names:
        element = _type_word(left if right == "text[]" else right)
        array = ":keys" if element in ("text", "character varying") else f"cast(:keys as {element}[])"
        return f":keys is an array: write = any({array}) in place of in (:keys)"
    if "text" in (left, right):
        other = _type_word(left if right == "text" else right)
        if "keys" in query.names:
            return f"keys are text: compare with any(cast(:keys as {other}[]))"
        if "key" in query.names:
            return f"the key is text: compare with cast(:key as {other})"
    return ""


def _type_word(type_name: str) -> str:
    return "int" if type_name == "integer" else type_name


def describe_parameter(query: Query, types: Sequence[str], error: Exception) -> str | None:
    """Return why a parameter does not fit its type in the query, which is one of `types`; None for another error.

    It is the same for every recipient: the keys and the period are always text, so this is one of the bounds.
    """
    found = _ARGUMENT.match(str(error))
    if found is None:
        return None
    number = int(found[1])
    name, wanted = query.names[number - 1], types[number - 1]
    if wanted == "timestamp":
        return (
            f"it compares :{name} with a timestamp without time zone; say in which time zone the column is written: "
            f"(col at time zone 'UTC') >= :{name}, or, which can use an index on col, "
            f"col >= :{name}::timestamptz at time zone 'UTC'"
        )
    return f"it uses :{name} as {wanted}, but it is a timestamp with time zone; cast it: :{name}::timestamptz"
