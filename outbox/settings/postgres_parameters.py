"""Parameters of a database URL: which reach the driver, which are done in another way, and which are left out.

Providers and tools write parameters into one and the same URL, in their own spellings. There are four kinds:

- parameters of libpq (PostgreSQL docs, 34.1.2). The driver, asyncpg, knows some of them; the others are translated,
  left out where they change nothing for outbox, or refused where leaving them out would make the connection less safe;
- spellings of other drivers for the same thing, such as JDBC's `ssl=true`, which libpq accepts, too;
- parameters of other tools, such as Prisma's `schema`. They are left out with a warning;
- settings of the server, such as `statement_timeout`. They are passed on.

Pure: the file system is asked by `outbox.database` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

# Left out without a word: outbox has its own and shorter limits for a dead peer, names its sessions itself (so that
# pg_stat_activity shows `outbox relay`), and says the rest of these by itself.
_OWN: Final = frozenset({
    "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
    "application_name", "fallback_application_name", "ApplicationName", "tcpKeepAlive",
    "sslcompression", "sslsni", "gssdelegation", "max_protocol_version", "sslcertmode",
})  # fmt: skip

# What the driver cannot do, and what to write instead. Leaving these out would drop a protection.
_REFUSED: Final = {
    "require_auth": "take it out, and write sslmode=verify-full, which shows that the server is the right one",
    "requirepeer": "take it out; the directory of the socket says whose server it is",
    "sslcrldir": "write sslcrl and the path of one file",
    "scram_client_key": "write the password",
    "scram_server_key": "write the password",
    "replication": "take it out: outbox needs ordinary sessions",
}

_PRISMA: Final = "Prisma"
_POOLS: Final = "a connection pool"
# Parameters of other tools, by their names in lower case.
_FOREIGN: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("schema", "pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "sslidentity",
         "max_connection_lifetime", "max_idle_connection_lifetime", "single_use_connections"), _PRISMA),
    **dict.fromkeys(
        ("pool", "pool_size", "poolsize", "max_overflow", "pool_recycle", "pool_pre_ping", "pool_max_conns",
         "pool_min_conns", "pool_max_conn_lifetime", "pool_max_conn_lifetime_jitter", "pool_max_conn_idle_time",
         "pool_health_check_period", "min_connections", "max_connections", "minpoolsize", "maxpoolsize", "max", "min",
         "idle_timeout", "checkout_timeout", "reaping_frequency", "idletimeoutmillis", "keepalive"), _POOLS),
    **dict.fromkeys(
        ("conn_max_age", "conn_health_checks", "disable_server_side_cursors", "atomic_requests", "engine"), "Django"),
    **dict.fromkeys(
        ("prepared_statements", "advisory_locks", "schema_search_path", "statement_limit", "encoding", "adapter",
         "min_messages", "variables", "insert_returning", "database_tasks", "replica", "migrations_paths"), "Rails"),
    **dict.fromkeys(
        ("prepared_statement_cache_size", "prepared_statement_name_func", "async_fallback", "command_timeout",
         "timeout", "executemany_mode", "executemany_batch_page_size", "use_native_hstore", "plugin", "echo",
         "max_cached_statement_lifetime", "max_cacheable_statement_size", "isolation_level"), "SQLAlchemy"),
    **dict.fromkeys(
        ("currentschema", "sslfactory", "sslfactoryarg", "sslhostnameverifier", "sslpasswordcallback", "socketfactory",
         "preparethreshold", "preparedstatementcachequeries", "preparedstatementcachesizemib", "rewritebatchedinserts",
         "sockettimeout", "logintimeout", "canceltimeout", "cancelsignaltimeout", "stringtype", "binarytransfer",
         "defaultrowfetchsize", "adaptivefetch", "assumeminserverversion", "readonly", "readonlymode", "autosave",
         "preferquerymode", "loglevel", "loggerlevel", "loggerfile", "logunclosedconnections",
         "hostrecheckseconds", "quotereturningidentifiers", "cleanupsavepoints", "escapesyntaxcallmode",
         "databasemetadatacachefields", "disablecolumnsanitiser", "receivebuffersize", "sendbuffersize",
         "unknownlength", "maxresultbuffer", "allowencodingchanges", "protocolversion", "jaasapplicationname",
         "jaaslogin", "kerberosservername", "usespnego", "xmlfactoryfactory", "localsocketaddress",
         "cloudsqlinstance", "enableiamauth", "iptypes"), "JDBC"),
    **dict.fromkeys(
        ("statement_cache_mode", "statement_cache_capacity", "description_cache_capacity", "default_query_exec_mode",
         "prefer_simple_protocol", "binary_parameters", "disable_prepared_binary_result", "x-migrations-table",
         "x-multi-statement", "x-statement-timeout"), "Go"),
    **dict.fromkeys(
        ("statement_cache_size", "statement-cache-capacity", "cached_statement_lifetime"), "another driver"),
    **dict.fromkeys(("uselibpqcompat", "query_timeout", "connectiontimeoutmillis", "types"), "node-postgres"),
    **dict.fromkeys(("supa", "workaround", "pool_mode"), "Supabase"),
    **dict.fromkeys(("charset", "serverversion"), "Doctrine"),
    **dict.fromkeys(("sslkeylogfile", "servicefile", "min_protocol_version"), "libpq"),
}  # fmt: skip

_SCHEMAS: Final = frozenset({"schema", "currentschema", "schema_search_path"})
_PROTECTING: Final = frozenset({
    "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslcrldir", "sslnegotiation", "ssl", "ssl_require",
    "requiressl", "tls", "encrypt", "channel_binding", "gssencmode", "require_auth", "requirepeer",
    "ssl_min_protocol_version", "ssl_max_protocol_version",
})  # fmt: skip
_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})
SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_REQUIRING: Final = SSL_MODES[3:]
_TARGETS: Final = {
    "any": "any", "primary": "primary", "master": "primary", "secondary": "standby", "slave": "standby",
    "preferprimary": "any", "prefersecondary": "prefer-standby", "preferslave": "prefer-standby",
}  # fmt: skip
SYSTEM: Final = "system"
"""Value of `sslrootcert` for the certificate authorities that the system trusts."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters as libpq spells them, without those that are left out."""

    given: Mapping[str, str]
    warnings: tuple[str, ...]
    """A sentence for each that was left out although it may matter."""


def translate(given: Mapping[str, str], environ: Mapping[str, str]) -> Parameters:
    """Return what outbox does for the parameters of a URL.

    Raises:
        ValueError: one is malformed, or cannot be kept; the error says which and how to write it.

    """
    found = {_with_its_case(name): value for name, value in given.items()}
    found = {name: value for name, value in found.items() if name not in _OWN}
    for name, fix in _REFUSED.items():
        if name in found:
            raise ValueError(f"asks for {name}, which asyncpg does not have; {fix}")
    _translate_spellings(found)
    warnings = [_warn_of(name) for name in found if _tool_of(name)]
    found = {name: value for name, value in found.items() if not _tool_of(name)}
    if (encoding := found.pop("client_encoding", "utf8")).lower().replace("-", "") not in {"utf8", "auto", "unicode"}:
        warnings.append(f'ignores client_encoding of database_url ("{encoding}"): outbox and Postgres exchange UTF-8')
    _secure(found, environ)
    return Parameters(found, tuple(warnings))


def _with_its_case(name: str) -> str:
    """Return the name as libpq writes it, if it protects: `SSLMODE` must not be left out as unknown."""
    return name.lower() if name.lower() in _PROTECTING else name


def _secure(found: dict[str, str], environ: Mapping[str, str]) -> None:
    """Set `sslmode` and `sslrootcert` to what protects as much as was asked for."""
    _refuse_gss(found.pop("gssencmode", "") or environ.get("PGGSSENCMODE", ""))
    binding = found.pop("channel_binding", "") or environ.get("PGCHANNELBINDING", "")
    if binding not in {"", "disable", "prefer", "require"}:
        raise ValueError("has a bad channel_binding; write disable, prefer or require")
    mode = found.get("sslmode") or environ.get("PGSSLMODE") or ""
    roots = found.get("sslrootcert") or environ.get("PGSSLROOTCERT") or ""
    if mode not in {"", *SSL_MODES}:
        raise ValueError(f"has a bad sslmode; write one of {', '.join(SSL_MODES)}")
    if binding == "require":
        if mode in {"disable", "allow"}:
            raise ValueError(f"asks for channel_binding=require and sslmode={mode}; write sslmode=require")
        # asyncpg has no SCRAM-SHA-256-PLUS. Its purpose is that no other host stands between client and server, which a
        # verified certificate shows as well.
        mode = found["sslmode"] = "verify-full"
        roots = roots or found.setdefault("sslrootcert", SYSTEM)
    if roots == SYSTEM:
        if mode not in {"", "verify-full"}:  # as libpq: weaker modes would accept any certificate of any authority
            raise ValueError(f"has sslrootcert=system, which sslmode={mode} is too weak for; write sslmode=verify-full")
        mode = found["sslmode"] = "verify-full"
        found["sslrootcert"] = SYSTEM
    if found.get("sslnegotiation") == "direct" and mode not in _REQUIRING:
        raise ValueError("has sslnegotiation=direct without TLS being required; write sslmode=require beside it")


def _translate_spellings(found: dict[str, str]) -> None:
    """Replace other drivers' spellings by libpq's, which win where both are there."""
    for name, ours in {
        "sslMode": "sslmode", "channelBinding": "channel_binding", "gssEncMode": "gssencmode",
        "connectTimeout": "connect_timeout", "sslRootCert": "sslrootcert", "sslCert": "sslcert", "sslKey": "sslkey",
    }.items():  # fmt: skip
        if name in found:
            found.setdefault(ours, found.pop(name))
    for name in ("ssl", "ssl_require", "requiressl", "tls", "encrypt"):
        mode = _ssl_mode(name, found.pop(name, ""))
        if mode and found.get("sslmode", "prefer") == "prefer":
            found["sslmode"] = mode
    if found.pop("sslaccept", "") == "strict":  # Prisma: with a verified certificate
        found["sslmode"] = "verify-full"
        found.setdefault("sslrootcert", SYSTEM)
    if found.get("sslmode") in {"no-verify", "required"}:  # node-postgres; Django's MySQL habit
        found["sslmode"] = "require"
    if (target := found.pop("targetServerType", None)) is not None:
        found.setdefault("target_session_attrs", _TARGETS.get(target.lower(), target))
    if (balance := found.pop("loadBalanceHosts", None)) is not None:
        found.setdefault("load_balance_hosts", "random" if balance.lower() in _TRUE else "disable")
    if (path := found.pop("unix_sock", None)) is not None:  # pg8000: the socket itself instead of its directory
        found.setdefault("host", path.rpartition("/.s.PGSQL.")[0] or path)


def _ssl_mode(name: str, value: str) -> str:
    """Return the sslmode for another driver's yes or no, or ""; libpq itself reads `ssl=true` as `sslmode=require`."""
    if value.lower() in _TRUE:
        return "require"
    if value.lower() in _FALSE:
        return "disable" if name in {"ssl", "tls"} else ""
    if value not in {"", *SSL_MODES, "no-verify"}:
        raise ValueError(f"has a bad {name}; write sslmode with one of {', '.join(SSL_MODES)}")
    return value


def _refuse_gss(mode: str) -> None:
    if mode == "require":
        raise ValueError("asks for gssencmode=require, which asyncpg does not have; write sslmode=verify-full")
    if mode not in {"", "disable", "prefer"}:
        raise ValueError("has a bad gssencmode; write disable or prefer")


def _tool_of(name: str) -> str | None:
    return "libpq" if name.startswith("oauth_") else _FOREIGN.get(name.lower())


def _warn_of(name: str) -> str:
    tool = _tool_of(name)
    whose = f"it is a parameter of {tool}" if tool != "libpq" else "asyncpg does not have it"
    hint = ""
    if name.lower() in _SCHEMAS:
        hint = "; if your queries name tables without their schema, write options=-csearch_path%3DNAME"
    return f"ignores {name} of database_url: {whose}{hint}"


def warn_unknown(name: str) -> str:
    """Return the warning for a parameter that neither libpq nor the server knows."""
    return f"ignores {name} of database_url: Postgres does not know it"
