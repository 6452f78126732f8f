"""Addresses of Postgres and the mail server. One shows itself without its secrets, so that no log can spill them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from outbox.settings.postgres_hosts import plan_of
from outbox.settings.redaction import Redactor
from outbox.settings.secret_files import LoginSource

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# SQLAlchemy names a driver behind a plus; JDBC, django-environ, GeoDjango and Phoenix have schemes of their own.
_POSTGRES = re.compile(r"(jdbc:)?(postgres|postgresql|pgsql|psql|postgis|ecto|timescale)(\+[a-z0-9_]+)?")
_PORTS = {"smtp": 25, "smtps": 465, "lmtp": 24}
_ENCODE = "percent-encode @ / ? # : and % in the user and the password (p@ss is p%40ss)"


@dataclass(frozen=True, slots=True, repr=False)
class DatabaseUrl:
    """Address of Postgres. `dsn` holds the password; str and repr show `redacted`.

    `login` is the source to read the login again from once Postgres refuses it; None if it came from no file.
    """

    dsn: str
    login: "LoginSource[DatabaseUrl] | None" = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read postgresql://, postgres:// and the schemes that frameworks write, with any driver, such as
        postgresql+psycopg://; `?host=/socket/dir` names a socket.

        Raises:
            ValueError: the message says how the URL is wrong, without any part of it.
        """
        scheme, separator, rest = text.strip().partition("://")
        if not separator or not _POSTGRES.fullmatch(scheme.lower()):
            raise ValueError("is not a Postgres URL; write one like postgresql://user:password@host/database")
        url = cls(f"postgresql://{rest}")
        _refuse_what_hides_a_secret(url.dsn)
        hosts = _split(url.dsn).netloc.rpartition("@")[2]
        for host in hosts.split(","):
            named = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::([0-9]{1,5}))?", host)
            if not named or not 1 <= int(named[1] or 5432) <= 65535:  # noqa: PLR2004 - the ports of TCP
                raise ValueError(f"has a bad host or port; write host:5432, and {_ENCODE}")
        plan_of(url.dsn, {})
        return url

    @property
    def redacted(self) -> str:
        """Return the URL for people: every password in it is three stars."""
        parts = _split(self.dsn)
        userinfo, at, hosts = parts.netloc.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        options = "&".join(
            f"{name}={'***' if 'pass' in name.lower() else value}" for name, value in parse_qsl(parts.query)
        )
        secret = ":***" if colon else ""
        return f"postgresql://{user}{secret}{at}{hosts}{parts.path}{'?' if options else ''}{options}"

    @property
    def without_login(self) -> tuple[str, str, list[tuple[str, str]]]:
        """Return all of the URL but user and password: the hosts, the database and the parameters."""
        parts = _split(self.dsn)
        options = [(name, value) for name, value in parse_qsl(parts.query) if name not in {"user", "password"}]
        return parts.netloc.rpartition("@")[2], parts.path, options

    def __str__(self) -> str:
        return self.redacted

    def __repr__(self) -> str:
        return f"DatabaseUrl({self.redacted!r})"


@dataclass(frozen=True, slots=True, repr=False)
class SmtpAddress:
    """Address of the mail server. str and repr show neither password nor username (Postmark: both a token).

    `scheme` is smtp, lmtp or file. `path` is an LMTP server's socket, or the Maildir that stands for a server;
    then there is neither host nor port.
    """

    host: str
    port: int
    implicit_tls: bool
    username: str | None = None
    password: str | None = None
    scheme: str = "smtp"
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read smtp:// (port 25 unless given), smtps:// (TLS from the first byte, port 465), lmtp:// (port 24),
        lmtp:///path/to/socket or file:///path/of/maildir.

        Raises:
            ValueError: the message says how the URL is wrong, without any part of it.
        """
        text = text.strip()
        if not re.match(r"(?i)(smtps?|lmtp|file)://", text):
            raise ValueError("is not an SMTP URL; write one like smtp://user:password@host:587")
        _refuse_what_hides_a_secret(text)
        url = urlsplit(text)
        if url.scheme == "file" or (url.scheme == "lmtp" and not url.netloc):
            return cls._of_path(url)
        if url.scheme == "lmtp" and "@" in url.netloc:
            raise ValueError("has a login, which is not given by LMTP; write lmtp://host:24, or smtp:// with it")
        userinfo, at, _ = url.netloc.rpartition("@")
        user, _, password = userinfo.partition(":")
        if at and not (user and password):
            raise ValueError("has half a login; write user:password@ before the host, or neither")
        if url.path.strip("/") or url.query:
            raise ValueError(f"goes on after host and port; end it there, and {_ENCODE}")
        implicit_tls = url.scheme == "smtps"
        try:
            port = _PORTS[url.scheme] if url.port is None else url.port
            login = [unquote(part, errors="strict") if at else None for part in (user, password)]
        except ValueError:  # its own words would show what stands where the port should
            raise ValueError(f"has a bad port or login; write host:587, and {_ENCODE}") from None
        if not url.hostname or port == 0:
            raise ValueError("names no host and port; write one like smtp://host:25")
        username, secret = login
        scheme = "lmtp" if url.scheme == "lmtp" else "smtp"
        return cls(url.hostname, port, implicit_tls, username, secret, scheme)

    @classmethod
    def _of_path(cls, url: SplitResult) -> Self:
        path = unquote(url.path)
        if url.netloc or not path.strip("/") or url.query:
            example = "file:///var/mail/try" if url.scheme == "file" else "lmtp:///run/dovecot/lmtp"
            raise ValueError(f"is not {url.scheme}:// and a whole path; write one like {example}")
        return cls("", 0, implicit_tls=False, scheme=url.scheme, path=path)

    @property
    def name(self) -> str:
        """Return the name of the usual route through this server: host and port, or the URL without its login."""
        return f"{self.host}:{self.port}" if self.scheme == "smtp" else self.redacted

    @property
    def anonymous(self) -> Self:
        """Return this address without its login."""
        return replace(self, username=None, password=None)

    @property
    def redact(self) -> Callable[[str], str] | None:
        """Return the redactor for replies of this server; None if there is no login."""
        return _redactor(self.username or "", self.password or "") if self.username or self.password else None

    def without_login(self, text: str) -> str:
        """Return a reply of the server with the login redacted."""
        return text if self.redact is None else self.redact(text)

    @property
    def redacted(self) -> str:
        """Return the URL for people: a login in it is three stars."""
        if self.path is not None:
            return f"{self.scheme}://{quote(self.path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = "***@" if self.username else ""
        return f"{'smtps' if self.implicit_tls else self.scheme}://{login}{host}:{self.port}"

    def __str__(self) -> str:
        return self.redacted

    def __repr__(self) -> str:
        return f"SmtpAddress({self.redacted!r})"


@lru_cache(64)
def _redactor(username: str, password: str) -> Redactor:
    return Redactor(username, password)


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port to listen on: `127.0.0.1:9464`, `[::1]:9464`; `:9464` is every address, port 0 a free one.

    Raises:
        ValueError: it is not a host and a port; the message says how to write them.

    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})", text.strip())
    if not found or int(found[3]) > 65535:  # noqa: PLR2004 - the ports of TCP
        raise ValueError('is no host and port; write them like "127.0.0.1:9464" or "[::1]:9464"')
    return found[1] or found[2], int(found[3])


def _split(url: str) -> SplitResult:
    """Split a URL with several hosts: newer Pythons refuse brackets that do not begin the host."""
    parts = urlsplit(url.replace("[", "(").replace("]", ")"))
    return parts._replace(netloc=parts.netloc.replace("(", "[").replace(")", "]"))


def _refuse_what_hides_a_secret(url: str) -> None:
    """Raise ValueError for a raw @ / ? or # in a password: the rest of it would be in another part, which is shown."""
    try:
        parts = _split(url)
        parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(f"cannot be taken apart; {_ENCODE}") from None
    strays = url.count("@") - ("@" in parts.netloc)
    if strays or re.search(r"[\s#]", url) or re.search(r"[\[\]]", url.rpartition("@")[0]) or _CONTROL.search(url):
        raise ValueError(f"has a character that must be encoded; {_ENCODE}")
