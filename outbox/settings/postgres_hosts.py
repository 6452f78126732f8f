"""Hosts of a database URL: which are asked for a session, in which order, and for how long.

Parameters are libpq's (PostgreSQL docs, 34.1.2); `postgres_parameters` translates all others. `outbox.database.dialing`
asks the hosts.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

from outbox.settings.postgres_parameters import Parameters, translate

DEFAULT_PORT: Final = 5432

SESSION_ATTRS: Final = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
# Parameters that this module acts on by itself.
_OURS: Final = frozenset({"host", "hostaddr", "port", "target_session_attrs", "connect_timeout", "load_balance_hosts"})

# Not urlsplit: newer Pythons refuse brackets that do not begin the host, as in a list of hosts.
_URL: Final = re.compile(r"[a-z]+://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Host:
    """A host of a URL: a name, an address or a socket's directory. `address` is its libpq `hostaddr`, if given."""

    name: str
    port: int
    address: str = ""

    @property
    def is_socket(self) -> bool:
        """Return True for a Unix-domain socket, which has no addresses."""
        return self.name.startswith("/")

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Parts of a database URL that decide where to connect, and the rest of it, for asyncpg."""

    base: str = field(repr=False)
    """The URL without hosts and parameters."""
    hosts: tuple[Host, ...]
    """Empty if the URL and the environment name none: asyncpg then has defaults, or finds them in a service file."""
    target_session_attrs: str | None
    connect_timeout_s: float | None
    shuffles: bool
    parameters: Parameters = field(repr=False)
    """All parameters of the URL, as libpq spells them."""
    users: tuple[str | None, ...] = field(repr=False)
    """Where the user may be named: the URL, the environment, a service file."""

    @property
    def dsn(self) -> str:
        """Return the URL for asyncpg; it names no host."""
        return self.dsn_of(self.parameters.given)

    def dsn_of(self, parameters: Mapping[str, str]) -> str:
        """Return the URL for asyncpg with these parameters."""
        ours = _OURS - {"port"} if not self.hosts else _OURS
        rest = urlencode([(name, value) for name, value in parameters.items() if name not in ours], quote_via=quote)
        return f"{self.base}{'?' if rest else ''}{rest}"

    @property
    def is_ordered(self) -> bool:
        """Return True if the order of the hosts is a preference."""
        return not self.shuffles and self.target_session_attrs in (None, "any")


def plan_of(dsn: str, environ: Mapping[str, str] = os.environ) -> Plan:
    """Read what decides where to connect.

    Raises:
        ValueError: a parameter is malformed; the error says which and how to write it.

    """
    parts = _URL.fullmatch(dsn)
    assert parts is not None
    userinfo, at, listed = parts["authority"].rpartition("@")
    parameters = translate(dict(parse_qsl(parts["query"] or "")), environ)
    given = parameters.given
    attrs = given.get("target_session_attrs") or environ.get("PGTARGETSESSIONATTRS") or None
    if attrs is not None and attrs not in SESSION_ATTRS:
        raise ValueError(f"has a bad target_session_attrs; write one of {', '.join(SESSION_ATTRS)}")
    balance = given.get("load_balance_hosts") or environ.get("PGLOADBALANCEHOSTS") or "disable"
    if balance not in {"disable", "random"}:
        raise ValueError("has a bad load_balance_hosts; write disable or random")
    hosts = _hosts(listed, given, environ)
    service = given.get("service") or environ.get("PGSERVICE")
    return Plan(
        f"postgresql://{userinfo}{at}{parts['path']}",
        hosts,
        attrs,
        _connect_timeout(given.get("connect_timeout") or environ.get("PGCONNECT_TIMEOUT") or ""),
        balance == "random",
        parameters,
        (userinfo.partition(":")[0], given.get("user"), environ.get("PGUSER"), service),
    )


def _connect_timeout(text: str) -> float | None:
    """Return seconds, or None for no limit: 0, negative, or not given."""
    try:
        seconds = int(text or 0)
    except ValueError:
        raise ValueError("has a bad connect_timeout; write whole seconds, such as 5") from None
    return float(seconds) if seconds > 0 else None


def _hosts(listed: str, given: Mapping[str, str], environ: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the hosts of the URL's authority, else of `host`, else of PGHOST, with their ports and addresses."""
    named = listed or given.get("host") or environ.get("PGHOST", "")
    addresses = given["hostaddr"].split(",") if given.get("hostaddr") else []
    specs = named.split(",") if named else [""] * len(addresses)
    if not specs:
        return ()
    if addresses and len(addresses) != len(specs):
        raise ValueError(f"has {len(addresses)} hostaddr for {len(specs)} hosts; write as many")
    ports = (given.get("port") or environ.get("PGPORT") or str(DEFAULT_PORT)).split(",")
    if len(ports) not in {1, len(specs)} or not all(port.strip().isdecimal() for port in ports):
        raise ValueError(f"has a bad port for {len(specs)} hosts; write one number, or one for each host")
    found = []
    for index, spec in enumerate(specs):
        name, own = _name_and_port(unquote(spec))
        address = addresses[index] if addresses else ""
        port = int(own or ports[index if len(ports) > 1 else 0])
        if not (name or address):
            raise ValueError("has an empty host; write host:5432 between the commas")
        found.append(Host(name or address, port, address))
    return tuple(found)


def _name_and_port(spec: str) -> tuple[str, str]:
    if spec.startswith("["):
        name, _, port = spec[1:].partition("]")
        return name, port.removeprefix(":")
    if spec.startswith("/") or spec.count(":") > 1:
        return spec, ""
    name, _, port = spec.partition(":")
    return name, port
