"""Reasons why Postgres, or a pooler in front of it, gives no session that outbox can use, each with its fix.

Pure: an error goes in, a `Refusal` or an error with one sentence comes out. PgBouncer reports most of its refusals as a
protocol violation (SQLSTATE 08P01) and newer versions some of them with a code of their own, so its sentences are
recognized by their words.
"""

import os
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, assert_never

import asyncpg

from outbox.errors import DatabaseUnavailableError, UnsafeDatabaseError
from outbox.settings.urls import DatabaseUrl


class Kind(StrEnum):
    """Action that a refusal needs."""

    LOGIN = "login"
    """A person corrects user or password, or a file with a newer one is read."""
    REFUSED = "refused"
    """A person corrects something else; waiting does not help."""
    UNSAFE = "unsafe"
    """A pooler through which no email could be sent safely."""
    AWAY = "away"
    """Waiting may help."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Behaviour of the server, as the rest of a sentence that begins with its name, and the fix."""

    kind: Kind
    says: str
    fix: str
    is_silent: bool = False
    """True if no server answered."""


ITSELF: Final = "give database_url the address of Postgres itself"
SESSION_MODE: Final = f"{ITSELF}, or set pool_mode = session in the pooler for this database or role"
AT_ROLE: Final = (
    f"{ITSELF}, or, with pool_mode = session, let the pooler ignore these settings (ignore_startup_parameters) and set "
    "them at the role, as docs/scale.md shows"
)

UNVERIFIED: Final = (
    "name the authority's certificate with sslrootcert in database_url, or the server by the name in its certificate"
)
_NO_TLS_FIX: Final = (
    "correct host and port of database_url, or turn TLS on in the server (ssl = on); on a private network you may take "
    "sslmode out of database_url (also sslrootcert=system and channel_binding=require)"
)
_LOGIN_FIX: Final = "correct the user or password of database_url"
_POOL_FIX: Final = "try again later, or raise the pooler's limit"

# Sentence, kind, fix. Sources: PgBouncer, src/client.c, src/objects.c, src/janitor.c, src/server.c, and its
# documentation, config.md; pgpool-II 4.3, src/protocol; Supavisor, lib/supavisor/client_handler.
POOLER_SENTENCES: Final[tuple[tuple[str, Kind, str], ...]] = (
    (r"unsupported startup parameter", Kind.UNSAFE, AT_ROLE),
    (r"unsupported startup option", Kind.UNSAFE, AT_ROLE),
    (r"no such database", Kind.REFUSED, "add it to [databases] in pgbouncer.ini, or correct database_url"),
    (r"tenant or user not found", Kind.LOGIN, _LOGIN_FIX),
    (r"password authentication failed", Kind.LOGIN, _LOGIN_FIX),
    (r"SASL authentication failed", Kind.LOGIN, _LOGIN_FIX),
    (r"authentication failed", Kind.LOGIN, _LOGIN_FIX),
    (r"auth failed", Kind.LOGIN, _LOGIN_FIX),
    (r"no such user", Kind.LOGIN, "add the user to PgBouncer's auth_file, or set its auth_query"),
    (r"login rejected", Kind.LOGIN, "allow it in PgBouncer's auth_hba_file"),
    (r"(wrong password type|bouncer config error)", Kind.LOGIN, "correct auth_type and auth_file of PgBouncer"),
    (r"(SSL|TLS) (is )?required", Kind.REFUSED, "add sslmode=require to database_url"),
    (r"no more connections allowed", Kind.AWAY, _POOL_FIX),
    (r"max clients reached", Kind.AWAY, _POOL_FIX),
    (r"too many (clients|connections|active clients)", Kind.AWAY, _POOL_FIX),
    (r"(does not allow connections|is disabled)", Kind.AWAY, "enable the database in the pooler (ENABLE)"),
    (r"server login has been failing", Kind.AWAY, "see the pooler's log: it cannot log in to Postgres"),
    (r"server login failed", Kind.AWAY, "see the pooler's log: it cannot log in to Postgres"),
    (r"cannot connect to server", Kind.AWAY, "see the pooler's log: it cannot reach Postgres"),
    (r"all backend nodes are down", Kind.AWAY, "see the pooler's log: it cannot reach Postgres"),
    (r"failed to create a backend connection", Kind.AWAY, "see the pooler's log: it cannot reach Postgres"),
    (r"(query_wait_timeout|client_login_timeout|pgbouncer_?timeout)", Kind.AWAY, _POOL_FIX),
    (r"(shutting down|suspended|paused)", Kind.AWAY, "try again later"),
)
_SENTENCES: Final = [(re.compile(words, re.IGNORECASE), kind, fix) for words, kind, fix in POOLER_SENTENCES]

# A statement that was prepared on another server process, or a name that another client's statement has.
SHARED_STATEMENTS: Final = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)

# Parameters of database_url go to the server as settings of the session.
_BAD_PARAMETER: Final = (
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.ClientConfigurationError,
)


def refusal_of(error: Exception) -> Refusal | None:  # noqa: C901, PLR0911, PLR0912 - a table
    """Return why no session came about; None for an error that is no refusal."""
    reason = reason_of(error)
    match error:
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            return Refusal(Kind.LOGIN, f"refuses the user or password of database_url ({reason})", _LOGIN_FIX)
        case asyncpg.InvalidCatalogNameError():
            return Refusal(Kind.REFUSED, f"says: {reason}", "create it or correct database_url")
        case asyncpg.ProtocolViolationError() | asyncpg.InternalServerError():
            return _of_pooler(reason)
        case asyncpg.FeatureNotSupportedError():
            return Refusal(Kind.UNSAFE, f"refuses a setting of our sessions ({reason})", AT_ROLE)
        case asyncpg.TargetServerAttributeNotMatched():
            fix = "promote a server, or correct target_session_attrs in database_url"
            return Refusal(Kind.AWAY, "is not of the kind that target_session_attrs asks for", fix)
        case asyncpg.CannotConnectNowError() | asyncpg.TooManyConnectionsError():
            return Refusal(Kind.AWAY, f"takes no connection now ({reason})", "try again later")
        case OSError() if "rejected SSL upgrade" in reason:
            return Refusal(Kind.REFUSED, "refuses TLS: it has none, or is no Postgres", _NO_TLS_FIX)
        case UnicodeError():
            return Refusal(Kind.REFUSED, f"has a host name that cannot be looked up ({reason})", "correct database_url")
        case ssl.SSLCertVerificationError():
            says = f"has a certificate that cannot be verified ({error.verify_message})"
            return Refusal(Kind.REFUSED, says, UNVERIFIED)
        case ssl.SSLError():
            return Refusal(Kind.REFUSED, f"fails in TLS ({reason})", "correct sslmode in database_url")
        case _ if isinstance(error, _BAD_PARAMETER):
            old = "idle_session_timeout" in reason
            fix = "outbox needs PostgreSQL 14 or later" if old else "correct it in database_url"
            return Refusal(Kind.REFUSED, f"refuses a parameter ({reason})", fix)
        case OSError() if error.filename and not isinstance(error, ConnectionError):  # a file of this machine
            says = f"is not asked, since {error.filename} cannot be read ({reason})"
            return Refusal(Kind.REFUSED, says, "make it readable, or set HOME to a directory of this user")
        case OSError() | asyncpg.PostgresConnectionError() | asyncpg.InterfaceError():
            return Refusal(Kind.AWAY, f"does not answer ({reason})", "start it or correct database_url", is_silent=True)
        case _:
            return None


def _of_pooler(reason: str) -> Refusal:
    for words, kind, fix in _SENTENCES:
        if words.search(reason):
            subject = "refuses a setting of our sessions" if fix is AT_ROLE else "says through its pooler"
            return Refusal(kind, f"{subject} ({reason})", fix)
    return Refusal(Kind.AWAY, f"gives no session ({reason})", "see its log, and the log of the pooler in front of it")


def reason_of(error: BaseException) -> str:
    """Return the error as words on one line; the system's own for an error of the network."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ssl.SSLError):
        return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno)
    if isinstance(error, asyncpg.PostgresError):  # without DETAIL and HINT
        return str(error).partition("\n")[0]
    return " ".join(str(error).split()) or type(error).__name__


def shows_shared_session(error: BaseException) -> bool:
    """Return True for an error that our statements get only from a pooler in transaction or statement mode."""
    return isinstance(error, SHARED_STATEMENTS) or "not allowed in statement pooling mode" in str(error)


def original_of(error: BaseException) -> BaseException:
    """Return asyncpg's error, which SQLAlchemy wraps twice."""
    original = getattr(error, "orig", None)
    return getattr(original, "__cause__", None) or original or error


class DatabaseRefusedError(DatabaseUnavailableError):
    """Postgres answers and refuses: waiting does not help, a person must correct something."""


class DatabaseLoginError(DatabaseRefusedError):
    """Postgres refuses user or password: a person must correct them, or a file with newer ones is read."""


def explain_refusal(url: DatabaseUrl, error: Exception) -> Exception:
    """Return an error that says in one sentence why there is no session; return other errors unchanged."""
    refusal = refusal_of(error)
    return error if refusal is None else _explained(url, refusal)


def explain_refusals(url: DatabaseUrl, failures: Sequence[tuple[str, Exception]]) -> Exception:
    """Return one error for all servers that were asked; a refused login weighs more than a server that is silent."""
    if len(failures) == 1:
        return explain_refusal(url, failures[0][1])
    refusals = [(label, refusal_of(error), error) for label, error in failures]
    for _, refusal, error in refusals:
        if refusal is None:
            return error
    found = [(label, refusal, error) for label, refusal, error in refusals if refusal is not None]
    worst = min((refusal for _, refusal, _ in found), key=lambda one: list(Kind).index(one.kind))
    reasons = "; ".join(
        f"{label}: {reason_of(error) if refusal.is_silent else refusal.says}" for label, refusal, error in found
    )
    verb = "does not answer" if all(refusal.is_silent for _, refusal, _ in found) else "gives no session"
    return _explained(url, replace(worst, says=f"{verb} ({reasons})"))


def _explained(url: DatabaseUrl, refusal: Refusal) -> Exception:
    if refusal.fix is UNVERIFIED and "channel_binding=require" in url.dsn:
        why = "it is verified for channel_binding=require, since asyncpg has no channel binding"
        refusal = replace(refusal, says=f"{refusal.says}; {why}")
    if refusal.is_silent and "sslnegotiation=direct" in url.dsn:
        fix = f"{refusal.fix}; sslnegotiation=direct needs PostgreSQL 17 or later with TLS"
        refusal = replace(refusal, fix=fix)
    match refusal.kind:
        case Kind.LOGIN:
            error: type[Exception] = DatabaseLoginError
        case Kind.REFUSED:
            error = DatabaseRefusedError
        case Kind.UNSAFE:
            return UnsafeDatabaseError(f"The pooler at {url.redacted} {refusal.says}; {refusal.fix}.")
        case Kind.AWAY:
            error = DatabaseUnavailableError
        case _:
            assert_never(refusal.kind)
    return error(f"Postgres at {url.redacted} {refusal.says}; {refusal.fix}.")
