"""What the user decides: `outbox.toml` and OUTBOX_* variables, checked whole. This room opens no connection.

Every fault is one sentence that says the key, what is wrong and the mend; all of them come at once. Addresses
with passwords show themselves without their secrets, so that no log, repr or fault can spill one.

    urls                 database and SMTP URLs, shown without their secrets
    secret_files         logins from files, read again after a server refuses them
    redaction            removes a login from a server's replies
    postgres_hosts       hosts of a database URL: which are asked, in which order, for how long
    postgres_parameters  parameters of a database URL: libpq's, in other spellings, of other tools
    postgres_local       TLS files and user name that a connection takes from this machine
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from outbox.errors import ConfigurationError
from outbox.mail.header_fields import CARRIERS, FIELD_NAME, OURS
from outbox.mail.host_name import is_fqdn, is_literal
from outbox.mail.structured_fields import header_field
from outbox.mail.verp import TOKEN_MAX
from outbox.reports.language import find
from outbox.reports.period import Cadence, Covers
from outbox.reports.query_parameters import parse
from outbox.reports.schedule import Schedule, fault_of
from outbox.settings.secret_files import LoginSource, age_s
from outbox.settings.urls import DatabaseUrl, SmtpAddress, parse_listen
from outbox.suggestions import did_you_mean as _did_you_mean
from outbox.trust import distrust_of

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # module:name
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# RFC 5322 §3.4 without its comments, groups and quoted local parts: an address, or a name and <an address>.
_UTF8 = r"\u00a1-\u2027\u202a-\ud7ff\ue000-\U0010ffff"  # in a local part: RFC 6532 §3.2
_ADDRESS = rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~.{_UTF8}-]+@[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


def _mailbox_of(atom: str) -> re.Pattern[str]:
    """An address alone (RFC 5321 §4.1.2)."""
    return re.compile(rf"(?=.{{3,254}}\Z)(?=.{{1,64}}@){atom}(?:\.{atom})*@{_LABEL}(?:\.{_LABEL})*")


_RCPT = _mailbox_of(_ATOM)
_RCPT_UTF8 = _mailbox_of(_ATOM.replace("A-Z", f"A-Z{_UTF8}"))
_MAILBOX = re.compile(rf"""{_ADDRESS}|(?:"(?:[^"\\]|\\.)*"\s*|[^"<>,;:@()\[\]\\]*)<{_ADDRESS}>""")

# Largest message unless the settings say otherwise (`message_bytes_max`); `schema.sql` has the same default.
MESSAGE_BYTES_MAX: Final = 20 * 1024 * 1024

_Address = TypeVar("_Address", DatabaseUrl, SmtpAddress)


def _parsed(kind: type[_Address]) -> BeforeValidator:
    return BeforeValidator(lambda value: kind.parse(value) if isinstance(value, str) else value)


class WhenInDoubt(StrEnum):
    """What happens to an email of which nobody knows whether the server took it."""

    HOLD = "hold"
    RESEND = "resend"
    ASK = "ask"


class StartTls(StrEnum):
    """Use of STARTTLS (RFC 3207) on a connection that begins in clear text.

    With a login it is always required, with a verified certificate.
    """

    AUTO = "auto"  # where the server offers it; the certificate is not verified (RFC 7435)
    ALWAYS = "always"  # or nothing is sent; the certificate is verified
    NEVER = "never"


class LogFormat(StrEnum):
    """How a relay's log looks: sentences for people, or JSON for programs."""

    AUTO = "auto"  # human on a terminal, JSON elsewhere
    HUMAN = "human"
    JSON = "json"


class LogLevel(StrEnum):
    """From which gravity on a relay says what happens."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _seconds(least: float, most: float) -> Any:
    return Field(ge=least, le=most, strict=True, allow_inf_nan=False)


def _count(most: int) -> Any:
    return Field(ge=1, le=most, strict=True)


_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*/\s*(s|min|h)")
_RATE_MIN, _RATE_MAX = 1e-5, 1e6  # per second: one a day, and more than any server takes
_LINK_MAX = 900  # in a header, whose lines end at 998 (RFC 5322 §2.1.1)
_DAYS_MAX = 36_500  # within what Postgres can add to now
_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d|w)")


def _per_second(rate: str) -> float:
    """A rate as people write it, per second; 0 if it is none."""
    found = _RATE.fullmatch(rate.strip())
    return float(found[1]) / _UNITS_S[found[2]] if found else 0.0


def duration_s(text: str) -> float:
    """`48h`, `400d`, `2w`, `90min` or `30s` in seconds; 0 if it is none."""
    found = _DURATION.fullmatch(text.strip())
    return float(found[1]) * _UNITS_S[found[2]] if found else 0.0


class _Table(BaseModel):
    # Defaults are validated too: rules that look at two keys must hold for a key that is left out.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)


class RetrySettings(_Table):
    """Exponential backoff with full jitter: up to `base_s`, doubled each time, never above `max_s`."""

    base_s: Annotated[float, _seconds(0.001, 86_400)] = 30.0
    max_s: Annotated[float, _seconds(0.001, 604_800)] = 3600.0
    attempts_max: Annotated[int, _count(1000)] = 12

    @field_validator("max_s")
    @classmethod
    def _reaches_base(cls, max_s: float, info: ValidationInfo) -> float:
        if max_s < info.data.get("base_s", 0):
            raise ValueError(f"{max_s:g} is below base_s; write at least {info.data['base_s']:g}")
        return max_s


DIGEST = "digest"  # the name of the report over reports


class Deliver(StrEnum):
    """How a report comes to its recipient: in an email of its own, or in the next digest for the address."""

    EMAIL = "email"
    DIGEST = "digest"


class Priority(StrEnum):
    """Which emails of a route go first."""

    NORMAL = "normal"
    URGENT = "urgent"


class FirstTick(StrEnum):
    """Tick that a new schedule starts with."""

    NEXT = "next"
    LATEST = "latest"


class EditionSettings(_Table):
    """What reports and the digest have in common: when, about which period, and what their emails are like."""

    cadence: Cadence = Cadence.WEEKLY
    covers: Covers = Covers.PREVIOUS
    timezone: str = "UTC"
    link: str
    unsubscribe: str | None = None  # where one click ends the emails, as the link; of mail readers, too (RFC 8058)
    schedule: str | None = None  # when every relay starts the edition, as cron says it: "0 6 * * mon"
    first_tick: FirstTick = FirstTick.NEXT  # which tick a new schedule starts with
    catch_up: str | None = None  # how long after a tick of the schedule it is still worth starting; one cadence if None
    send_before: str | None = None  # how long after it was made an email is worth sending, as "48h"; then it expires
    priority: Priority = Priority.NORMAL  # urgent: before others that wait for the same route
    locale: str = "en"  # of dates, numbers and the packaged words, for whom the query gives no `locale`
    title: str = ""  # never empty once it is read as part of Settings: the report's name stands in

    @property
    def zone(self) -> ZoneInfo:
        """The civil time in which periods begin and end."""
        return ZoneInfo(self.timezone)

    @property
    def is_collected(self) -> bool:
        """Whether it goes into a digest instead of an email of its own."""
        return False

    @property
    def is_empty_allowed(self) -> bool:
        """Return True if an edition without recipients is right; a digest has none when nothing waits for it."""
        return True

    @property
    def send_before_s(self) -> float | None:
        """How many seconds after it was made an email expires; None is never."""
        return None if self.send_before is None else duration_s(self.send_before)

    def unsubscribe_link(self, token: str) -> str | None:
        """Where who got the report of that token ends the emails; None if nowhere."""
        return self.unsubscribe and self.unsubscribe.replace("{token}", token)

    @property
    def is_urgent(self) -> bool:
        """Whether its emails go before others."""
        return self.priority is Priority.URGENT

    @property
    def ticks(self) -> Schedule | None:
        """When its editions are started, in its civil time; None if only a cron or a person does."""
        return None if self.schedule is None else Schedule(self.schedule, self.zone)

    @field_validator("schedule")
    @classmethod
    def _ticks(cls, schedule: str | None) -> str | None:
        if schedule is not None and (fault := fault_of(schedule)) is not None:
            raise ValueError(f"{_shown(schedule)} {fault}")
        return schedule

    @field_validator("catch_up", "send_before")
    @classmethod
    def _is_a_while(cls, length: str | None) -> str | None:
        if length is not None and not 0 < duration_s(length) <= _UNITS_S["d"] * _DAYS_MAX:
            raise ValueError(f'{_shown(length)} is no length of time; write one like "48h", "90min" or "5d"')
        return length

    @field_validator("catch_up", "first_tick")
    @classmethod
    def _follows_a_schedule(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given not in (None, FirstTick.NEXT) and info.data.get("schedule", "") is None:
            raise ValueError('stands without a schedule; write one beside it, like schedule = "0 6 * * mon"')
        return given

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):  # unknown, outside of the database, a directory of it
            known = False
        else:
            # Servers must agree: `localtime` differs between them, and right/ counts leap seconds.
            known = name != "localtime" and not name.startswith(("posix", "right/"))
        if not known:
            guess = _did_you_mean(name, available_timezones() - {"localtime"})
            raise ValueError(f"{_shown(name)} is no IANA timezone; write one like America/New_York{guess}")
        return name

    @field_validator("locale")
    @classmethod
    def _names_a_language(cls, locale: str) -> str:
        if locale != "en" and find(locale) is None:
            raise ValueError(f"{_shown(locale)} names no language; write one like en, de, fr-CA or pt-BR")
        return locale

    @field_validator("link")
    @classmethod
    def _holds_the_token(cls, link: str) -> str:
        if "{token}" not in link:
            raise ValueError("has no {token}; write one like https://reports.example.com/r/{token}")
        return link

    @field_validator("unsubscribe")
    @classmethod
    def _fits_in_a_header(cls, link: str | None) -> str | None:
        if link is None:
            return None
        if "{token}" not in link:
            raise ValueError("has no {token}; write one like https://reports.example.com/u/{token}")
        if (
            not re.fullmatch(r"https://[A-Za-z0-9.:\[\]-]+([/?][!#-;=?-~]*)?", link)
            or "=?" in link
            or len(link) > _LINK_MAX
        ):
            raise ValueError(
                "cannot stand in List-Unsubscribe: mail readers follow nothing but https there (RFC 8058), in ASCII; "
                "write one like https://reports.example.com/u/{token}"
            )
        return link

    @field_validator("title")
    @classmethod
    def _is_one_line(cls, title: str) -> str:
        if _CONTROL.search(title):
            raise ValueError("has a line break or another control character; write it on one line")
        return title


class DigestSettings(EditionSettings):
    """The digest: one email per address and period that tells of all reports with `deliver = "digest"`."""

    title: str = "Your reports"


class ReportSettings(EditionSettings):
    """One report: what EditionSettings say, how it is delivered, and from which queries or which Python class."""

    deliver: Deliver = Deliver.EMAIL
    source: str | None = None
    recipients: str | None = None
    data: str | None = None
    may_be_empty: Annotated[bool, Field(strict=True)] = False  # an edition without recipients is not an error

    @property
    def is_collected(self) -> bool:
        """Whether it goes into a digest instead of an email of its own."""
        return self.deliver is Deliver.DIGEST

    @property
    def is_empty_allowed(self) -> bool:
        """Return True if an edition without recipients is right."""
        return self.may_be_empty

    @field_validator("deliver")
    @classmethod
    def _has_an_email_that_expires(cls, deliver: Deliver, info: ValidationInfo) -> Deliver:
        if deliver is Deliver.DIGEST and info.data.get("send_before") is not None:
            raise ValueError(
                "stands beside send_before, but the report has no email of its own; move send_before to [digest]"
            )
        return deliver

    @field_validator("source")
    @classmethod
    def _names_a_class(cls, source: str | None) -> str | None:
        if source is not None and not _REFERENCE.fullmatch(source):
            raise ValueError(f'{_shown(source)} names no class; write one like "myapp.reports:Progress"')
        return source

    @field_validator("recipients", "data")
    @classmethod
    def _comes_from_one_place(cls, query: str | None, info: ValidationInfo) -> str | None:
        if "source" not in info.data:
            return query  # it has a fault of its own, which must be mended first
        if info.data["source"] is not None and query is not None:
            raise ValueError("stands beside source; keep the source, or the queries recipients and data")
        if info.data["source"] is None and not (query or "").strip():
            wanted = "who is owed a report" if info.field_name == "recipients" else "what is in a report"
            raise ValueError(f'is missing; write a query that says {wanted}, or source = "module:Class"')
        return query

    @field_validator("data")
    @classmethod
    def _asks_by_key(cls, data: str | None) -> str | None:
        asked = {"key", "keys"}.intersection(parse(data or "").names)
        if data is not None and len(asked) != 1:
            wrong = "uses both :key and :keys" if asked else "uses neither :key nor :keys"
            raise ValueError(f"{wrong}; compare with :key (one recipient) or with :keys (a batch of them)")
        return data


class DkimSettings(_Table):
    """Whose signature emails bear (RFC 6376), and the private key for it; needs the extra `outbox-mail[dkim]`."""

    domain: str
    selector: str
    key_file: str  # PEM; a relative path begins where the config lies

    @field_validator("domain", "selector")
    @classmethod
    def _is_a_name_in_dns(cls, name: str, info: ValidationInfo) -> str:
        if not _DOMAIN.fullmatch(name):
            example = 'domain = "example.com"' if info.field_name == "domain" else 'selector = "2026a"'
            raise ValueError(f"{_shown(name)} is no name in the DNS; write one like {example}, in ASCII")
        return name.lower()

    @property
    def record_name(self) -> str:
        """Where the public key is published (RFC 6376 §3.6.2.1)."""
        return f"{self.selector}._domainkey.{self.domain}"


SECRET_MIN = 16  # characters of a secret that cannot be guessed


class WebSettings(_Table):
    """Table `[web]`: report pages behind links, and the board for users who sign in."""

    http: str = "127.0.0.1:8025"
    url: str | None = None  # address in browsers, if a proxy serves it elsewhere, as "https://intern/outbox/"
    board: Annotated[bool, Field(strict=True)] = True  # else the report pages alone
    read_only: Annotated[bool, Field(strict=True)] = False  # the board accepts no decisions
    board_token: SecretStr | None = None  # users who know it may sign in
    board_token_file: str | None = None  # ... or a file that holds it
    board_header: str | None = None  # header in which a sign-in proxy names the user
    board_users: list[str] = []  # users of the proxy who may see the board
    history: Annotated[bool, Field(strict=True)] = False  # a page names the recipient's earlier editions
    expires: str | None = None  # how long after it was made a page is shown, as "400d"
    user_header: str | None = None  # header in which a proxy names the recipient's address
    trusted_proxies: list[str] = []  # addresses or networks whose headers are believed

    @property
    def expires_s(self) -> float | None:
        """Return how many seconds after it was made a page expires; None is never."""
        return None if self.expires is None else duration_s(self.expires)

    @property
    def proxies(self) -> "list[ipaddress.IPv4Network | ipaddress.IPv6Network]":
        """Return the networks of the trusted proxies."""
        return [ipaddress.ip_network(proxy, strict=False) for proxy in self.trusted_proxies]

    @property
    def has_sign_in(self) -> bool:
        """Return True if these settings have a sign-in for the board; else `outbox web` prints a link with a token."""
        return self.board_token is not None or self.board_token_file is not None or self.board_header is not None

    @field_validator("http")
    @classmethod
    def _is_a_place(cls, http: str) -> str:
        parse_listen(http)
        return http

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        found = re.fullmatch(
            r"(?i)(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?((?:/[A-Za-z0-9._~-]+)*)/?", url
        )
        if found is None or {".", ".."} & set(found[4].split("/")):
            raise ValueError(
                'is not the address of a page; write one like "https://intern.example.com/outbox/", without a query'
            )
        scheme, port = found[1].lower(), found[3] or ""
        port = "" if (scheme, port) in {("http", ":80"), ("https", ":443")} else port
        return f"{scheme}://{found[2].lower()}{port}{found[4]}/"

    @field_validator("board_token")
    @classmethod
    def _is_long(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and len(token.get_secret_value()) < SECRET_MIN:
            raise ValueError(f"is too short to be secret; write at least {SECRET_MIN} random characters")
        return token

    @field_validator("board_token_file")
    @classmethod
    def _is_the_only_token(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and info.data.get("board_token") is not None:
            raise ValueError("stands beside board_token; keep one of them")
        return path

    @field_validator("board_users")
    @classmethod
    def _are_named(cls, users: list[str], info: ValidationInfo) -> list[str]:
        if not users and info.data.get("board_header") is not None:
            raise ValueError(
                "is missing beside board_header, by which everybody whom the proxy knows would be let in; "
                'write one like ["anna@example.com"]'
            )
        return [user.strip().lower() for user in users]

    @field_validator("board_header", "user_header")
    @classmethod
    def _is_a_header(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9-]+", name):
            raise ValueError(f"{_shown(name)} is no header; write one like X-Forwarded-Email")
        return name

    @field_validator("expires")
    @classmethod
    def _is_a_while(cls, length: str | None) -> str | None:
        if length is not None and not 0 < duration_s(length) <= _UNITS_S["d"] * _DAYS_MAX:
            raise ValueError(f'{_shown(length)} is no length of time; write one like "400d", "52w" or "48h"')
        return length

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: list[str], info: ValidationInfo) -> list[str]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(
                    f'{_shown(proxy)} is no address or network; write one like "127.0.0.1" or "10.0.0.0/8"'
                ) from None
        heard = [key for key in ("board_header", "user_header") if info.data.get(key) is not None]
        if heard and not proxies:
            raise ValueError(
                f"is missing beside {heard[0]}, which anybody could send; write the proxy's address, "
                'like ["127.0.0.1"]'
            )
        return proxies


class WaySettings(_Table):
    """What goes with an SMTP server: how fast and by how many connections it is fed, and what its emails bear more."""

    rate: str | None = None  # of the whole fleet, as "14/s" or "600/min": emails that may be started
    daily_max: Annotated[int, _count(1_000_000_000)] | None = None  # in any 24 hours, of the whole fleet
    connections_max: Annotated[int, _count(1000)] = 16  # of each relay
    messages_per_connection_max: Annotated[int, _count(1_000_000)] = 500
    headers: dict[str, str] = {}  # further header fields; {email_id} and {key} in their values are the email's
    return_path: str | None = None  # MAIL FROM, as "bounces+{token}@example.com" (VERP); the sender's address if None
    dkim: DkimSettings | None = None
    dsn: Annotated[bool, Field(strict=True)] = True  # where the server offers it, bounces name the email (RFC 3461)
    starttls: StartTls = StartTls.AUTO
    helo_name: str | None = None  # name in EHLO; None: the host name if fully qualified, else the address literal

    @property
    def rate_per_s(self) -> float | None:
        """The fleet's rate in emails per second; None is no limit."""
        return None if self.rate is None else _per_second(self.rate)

    @field_validator("rate")
    @classmethod
    def _is_a_rate(cls, rate: str | None) -> str | None:
        if rate is not None and not _RATE_MIN <= _per_second(rate) <= _RATE_MAX:
            raise ValueError(f'{_shown(rate)} is no rate; write one like "14/s", "600/min" or "5000/h"')
        return rate

    @field_validator("helo_name")
    @classmethod
    def _is_accepted_in_ehlo(cls, name: str | None) -> str | None:
        name = name and name.strip().rstrip(".")
        if name is not None and not (is_fqdn(name) or is_literal(name)):
            raise ValueError(
                f"{_shown(name)} is not a fully qualified domain name or an address literal, which mail servers expect "
                'in EHLO; use for example "reports.example.com" or "[192.0.2.1]"'
            )
        return name

    @field_validator("headers")
    @classmethod
    def _can_be_written(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not FIELD_NAME.fullmatch(name):
                raise ValueError(f"{_shown(name)} is no header field's name; use letters, digits and hyphens")
            if name.lower() in (OURS | CARRIERS) - {"reply-to"}:
                raise ValueError(f"{name} is written by outbox or by mail servers; take it out")
            if name.lower() == "reply-to" and not (value.isascii() and _RCPT.fullmatch(value.strip())):
                raise ValueError(f"{name} must be one address; use for example help@example.com")
            if _CONTROL.search(value):
                raise ValueError(f"{name} has a line break or another control character; write it on one line")
            unknown = set(re.findall(r"\{(.*?)\}", value)) - {"email_id", "key"}
            if unknown:
                raise ValueError(f"{name} has {{{min(unknown)}}}; write {{email_id}} or {{key}}, or neither")
            try:
                header_field(name, value.replace("{email_id}", "1").replace("{key}", "key"))
            except ValueError as error:
                raise ValueError(f"{name} cannot be written: {error}") from None
        if len({name.lower() for name in headers}) < len(headers):
            raise ValueError("has a field twice, in capitals and in small letters; keep one of them")
        return headers

    @field_validator("return_path")
    @classmethod
    def _can_be_bounced_to(cls, path: str | None) -> str | None:
        if path is not None and not _RCPT.fullmatch(path.strip().replace("{token}", "0" * TOKEN_MAX)):
            raise ValueError(
                'is no address that bounces can go to; write one like "bounces+{token}@example.com", '
                f"of at most 64 characters before the @ with {TOKEN_MAX} for {{token}}"
            )
        return path and path.strip()


class RouteSettings(WaySettings):
    """One more route: a server, and which emails take it. What it leaves out is as at the top level.

    An email takes the first route, as they stand in the settings, whose `reports` have its report or whose `domains`
    its recipient's domain (`example.com`; `*.example.com` is each below it), or that whoever put it in named.
    """

    smtp_url: Annotated[InstanceOf[SmtpAddress], _parsed(SmtpAddress), PlainSerializer(str)]
    reports: list[str] = []
    domains: list[str] = []

    @field_validator("domains")
    @classmethod
    def _are_domains(cls, domains: list[str]) -> list[str]:
        lower = [domain.strip().lower() for domain in domains]
        for domain in lower:
            if not _DOMAIN.fullmatch(domain.removeprefix("*.")):
                raise ValueError(
                    f"{_shown(domain)} is no domain; write one like example.com, or *.example.com for each below it "
                    "(xn--bcher-kva.example for bücher.example)"
                )
        return lower


@dataclass(frozen=True, repr=False)
class Origin:
    """Where settings were read from. All origins are equal: settings are compared by their values."""

    config: Path | None = field(compare=False)
    environ: Mapping[str, str] = field(compare=False)
    files: tuple[Path, ...] = field(compare=False)


class Settings(WaySettings):
    """Everything that a command needs to know. What only some commands need may be None: see `require`."""

    _origin: Origin | None = PrivateAttr(None)

    directory: Path = Field(default_factory=Path.cwd)  # where the config lies, and templates/ beside it

    database_url: Annotated[
        InstanceOf[DatabaseUrl] | None, _parsed(DatabaseUrl), PlainSerializer(lambda url: url and str(url))
    ] = None
    smtp_url: Annotated[
        InstanceOf[SmtpAddress] | None, _parsed(SmtpAddress), PlainSerializer(lambda url: url and str(url))
    ] = None
    sender: str | None = None
    redirect_to: str | None = None  # for staging: every email goes to this address instead of its recipient
    in_doubt: WhenInDoubt = WhenInDoubt.HOLD
    doubt_grace_s: Annotated[float, _seconds(1, 604_800)] = 60.0  # how long late news may take before the policy acts
    resolver: str | None = None  # "module:callable", for in_doubt = "ask"
    asks_max: Annotated[int, _count(1000)] = 10
    # An address is suppressed once so many different emails to it failed within that time, whatever the bounces say
    # of its mailbox; None: only bounces that say that the address does not exist suppress it.
    bounces_max: Annotated[int, _count(1000)] | None = None
    bounces_within: str = "90d"
    retry: RetrySettings = RetrySettings()
    reports: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], ReportSettings] = {}
    digest: DigestSettings | None = None
    routes: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], RouteSettings] = {}  # beside that to smtp_url
    web: WebSettings = WebSettings()

    batch_max: Annotated[int, _count(1000)] = 100
    # How long generate waits for reports that another session has reserved but does not make, and a query for a lock.
    generate_wait_s: Annotated[float, _seconds(1, 86_400)] = 600.0
    # Octets of one message, headers and attachments included; `outbox init` writes it to the database.
    message_bytes_max: Annotated[int, Field(ge=65_536, le=104_857_600, strict=True)] = MESSAGE_BYTES_MAX

    lease_s: Annotated[float, _seconds(2, 3600)] = 10.0
    failover_grace_s: Annotated[float, _seconds(0, 3600)] = 30.0  # after a failover: for relays to say what they sent
    guard_s: Annotated[float, _seconds(0.1, 3600)] = 5.0  # from the mark to the dot
    drain_s: Annotated[float, _seconds(0, 3600)] = 30.0
    poll_max_s: Annotated[float, _seconds(0.05, 300)] = 5.0
    idle_s: Annotated[float, _seconds(0.1, 3600)] = 5.0  # then an idle SMTP connection is closed
    connect_timeout_s: Annotated[float, _seconds(0.1, 3600)] = 30.0
    # RFC 5321 §4.5.3.2: the replies before the dot, and the one to it.
    command_timeout_s: Annotated[float, _seconds(0.1, 3600)] = 300.0
    data_done_timeout_s: Annotated[float, _seconds(0.1, 7200)] = 600.0

    log_format: LogFormat = LogFormat.AUTO  # of `outbox relay`
    log_level: LogLevel = LogLevel.INFO
    log_addresses: Annotated[bool, Field(strict=True)] = False  # else each is shown as <address>
    http: str | None = None  # "127.0.0.1:9464": where a relay answers /metrics, /livez and /readyz
    dead_man_url: str | None = None  # called when an edition is complete: each report is made and sent

    @property
    def bounces_within_s(self) -> float:
        """Return `bounces_within` in seconds."""
        return duration_s(self.bounces_within)

    @field_validator("bounces_within")
    @classmethod
    def _is_a_duration(cls, length: str) -> str:
        if not 0 < duration_s(length) <= _UNITS_S["d"] * _DAYS_MAX:
            raise ValueError(f'{_shown(length)} is not a duration; use for example "90d", "26w" or "48h"')
        return length

    @property
    def wants_verified_tls(self) -> bool:
        """Return True if nothing but EHLO may be said to the mail server before TLS with a verified certificate."""
        address = self.smtp_url
        if address is None or address.scheme != "smtp":
            return False
        return address.implicit_tls or address.username is not None or self.starttls is StartTls.ALWAYS

    def on_route(self, name: str) -> "Settings":
        """These settings as they are for one route: what it says of its own is in the place of what the top level says.

        '' is the usual one, whose settings are these themselves.

        Raises:
            ConfigurationError: there is none of that name; the sentence names those that there are.
        """
        if not name:
            return self
        if name not in self.routes:
            known = ", ".join(self.routes)
            mend = f"write one of {known}{_did_you_mean(name, self.routes)}" if known else "write a table for it"
            raise ConfigurationError(f"routes.{_quoted(name)}: is not configured; {mend}.")
        route = self.routes[name]
        return self.model_copy(update={key: getattr(route, key) for key in route.model_fields_set - _RULES})

    def smtp_login(self, route: str) -> LoginSource[SmtpAddress]:
        """Return the source of the mail server's address and login for a route; '' is the usual one."""
        address = self.on_route(route).smtp_url
        assert address is not None
        if self._origin is None:
            return LoginSource(address, (), lambda: address)
        return LoginSource(address, self._origin.files, partial(_smtp_login_again, self._origin, route, address))

    def smtp_login_age_s(self, route: str) -> float | None:
        """Return how long ago the file with a route's login was written; None if it came from the environment."""
        origin = self._origin
        if origin is None:
            return None
        variable = _variable("smtp_url")
        if not route and variable in origin.environ:
            return None
        file = origin.environ.get(f"{variable}_FILE") if not route else None
        return age_s(origin.files if file is None else (Path(file),))

    def require(self, *keys: str) -> None:
        """Return if all of these top-level keys are set.

        Raises:
            ConfigurationError: a sentence for each that is not.
        """
        faults = [
            f"{key}: is not set; write {_EXAMPLES[key]} in outbox.toml, or set {_variable(key)}."
            for key in keys
            if not getattr(self, key)
        ]
        if faults:
            raise ConfigurationError(faults)

    def report(self, name: str) -> EditionSettings:
        """The report of that name; the digest is one, too.

        Raises:
            ConfigurationError: there is none; the sentence names those that there are.
        """
        if name == DIGEST:
            self.require("digest")
        else:
            self.require("reports")
        if name not in self.editions:
            known = ", ".join(sorted(self.editions)) + _did_you_mean(name, self.editions)
            raise ConfigurationError(f"reports.{_quoted(name)}: is not configured; write one of {known}.")
        return self.editions[name]

    @property
    def editions(self) -> Mapping[str, EditionSettings]:
        """All that there are editions of: the reports by their names, and the digest where there is one."""
        return {**self.reports, **({DIGEST: self.digest} if self.digest is not None else {})}

    @field_validator("sender")
    @classmethod
    def _is_one_mailbox(cls, sender: str | None) -> str | None:
        if sender is not None and (_CONTROL.search(sender) or not _MAILBOX.fullmatch(sender.strip())):
            raise ValueError(
                'is not one mailbox; write one like "Progress reports <reports@example.com>",'
                " with a domain in ASCII, and with quotes around a name that has punctuation"
            )
        return sender

    @field_validator("smtp_url")
    @classmethod
    def _fits_starttls(cls, address: SmtpAddress | None, info: ValidationInfo) -> SmtpAddress | None:
        if address is not None and (fault := _tls_fault(address, info.data.get("starttls"))) is not None:
            raise ValueError(fault)
        return address

    @field_validator("redirect_to")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is None or _RCPT_UTF8.fullmatch(address.strip()):
            return address and address.strip()
        raise ValueError(
            'is not one address; write one like "staging@example.com", without a name, or take the key out'
        )

    @field_validator("resolver")
    @classmethod
    def _can_be_asked(cls, resolver: str | None, info: ValidationInfo) -> str | None:
        if resolver is not None and not _REFERENCE.fullmatch(resolver):
            raise ValueError(f'{_shown(resolver)} names no function; write one like "myapp.mail:was_accepted"')
        if resolver is None and info.data.get("in_doubt") is WhenInDoubt.ASK:
            raise ValueError('is missing; in_doubt = "ask" asks it, so write one like "myapp.mail:was_accepted"')
        return resolver

    @field_validator("http")
    @classmethod
    def _is_a_place(cls, http: str | None) -> str | None:
        if http is not None:
            parse_listen(http)
        return http

    @field_validator("dead_man_url")
    @classmethod
    def _can_be_called(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/?#]+([/?#]\S*)?", url):
            raise ValueError('is no web address; write one like "https://hc-ping.com/your-check"')
        unknown = set(re.findall(r"\{(.*?)\}", url or "")) - {"edition", "report", "period"}
        if unknown:
            raise ValueError(f"has {{{min(unknown)}}}; write {{edition}}, {{report}} or {{period}}, or none of them")
        return url

    @field_validator("reports")
    @classmethod
    def _have_titles(cls, reports: dict[str, ReportSettings]) -> dict[str, ReportSettings]:
        if DIGEST in reports:
            raise ValueError("no report can be called digest, since that is the name of the digest; call it otherwise")
        return {
            name: report
            if report.title
            else report.model_copy(update={"title": re.sub("[_-]+", " ", name).strip().capitalize()})
            for name, report in reports.items()
        }

    @field_validator("digest")
    @classmethod
    def _is_there_if_wanted(cls, digest: DigestSettings | None, info: ValidationInfo) -> DigestSettings | None:
        collected = [name for name, report in info.data.get("reports", {}).items() if report.is_collected]
        if digest is None and collected:
            raise ValueError(
                f'is missing, but reports.{collected[0]} has deliver = "digest"; '
                'write a table [digest] with a link, such as link = "https://reports.example.com/r/{token}"'
            )
        return digest

    @field_validator("routes")
    @classmethod
    def _have_rules_that_fit(cls, routes: dict[str, RouteSettings], info: ValidationInfo) -> dict[str, RouteSettings]:
        if not {"reports", "digest"} <= set(info.data):
            return routes  # those have faults of their own, which must be mended first
        known = {**info.data["reports"], **({DIGEST: info.data["digest"]} if info.data["digest"] else {})}
        taken: dict[str, str] = {}
        for name, route in routes.items():
            for report in route.reports:
                if report not in known:
                    guess = _did_you_mean(report, known)
                    raise ValueError(
                        f"{name} names the report {_shown(report)}, which is not configured; mend the name, or write "
                        f"[reports.{_quoted(report)}]{guess}"
                    )
                if known[report].is_collected:
                    raise ValueError(
                        f"{name} names {report}, which has no email of its own "
                        f'(deliver = "digest"); write "{DIGEST}" in its place'
                    )
            for rule in (*route.reports, *route.domains):
                if rule in taken:
                    both = f"{taken[rule]} and {name}" if taken[rule] != name else f"{name} twice"
                    raise ValueError(f"{rule} stands in {both}; keep it in one place")
                taken[rule] = name
        return routes

    @field_validator("routes")
    @classmethod
    def _fit_starttls(cls, routes: dict[str, RouteSettings], info: ValidationInfo) -> dict[str, RouteSettings]:
        for name, route in routes.items():
            starttls = route.starttls if "starttls" in route.model_fields_set else info.data.get("starttls")
            if (fault := _tls_fault(route.smtp_url, starttls)) is not None:
                raise ValueError(f"{name}.smtp_url {fault}")
        return routes

    @field_validator("guard_s")
    @classmethod
    def _is_over_before_the_lease(cls, guard_s: float, info: ValidationInfo) -> float:
        if guard_s >= info.data.get("lease_s", guard_s + 1):
            raise ValueError(f"{guard_s:g} is not below lease_s; write less than {info.data['lease_s']:g}")
        return guard_s


def _tls_fault(address: SmtpAddress, starttls: StartTls | None) -> str | None:
    """Return why a server cannot be used with this `starttls`; None if it can, or if `starttls` itself is invalid."""
    if starttls is StartTls.NEVER and address.username is not None and not address.implicit_tls:
        return (
            'has a login, and starttls = "never" would send it in clear text; take starttls out, write smtps://, '
            "or take the login out"
        )
    if starttls is StartTls.ALWAYS and address.scheme == "lmtp" and address.path is None:
        return (
            'is LMTP, which is not encrypted, and starttls is "always"; write starttls = "never" for this server '
            "if nobody else is on its network, or use smtp:// or a socket"
        )
    return None


_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){50}""")  # more parts than any valid key has
_RULES = frozenset({"reports", "domains"})  # of a route: which emails take it
_KEYS = frozenset(Settings.model_fields) - {"directory"}
_TEXT_KEYS = frozenset(
    {
        *("database_url", "smtp_url", "sender", "redirect_to", "in_doubt", "resolver", "rate", "return_path"),
        *("starttls", "helo_name"),
        *("log_format", "log_level", "http", "dead_man_url"),
    }
)
_EXAMPLES = {
    "database_url": 'database_url = "postgresql://user:password@host/database"',
    "smtp_url": 'smtp_url = "smtp://host:25"',
    "sender": 'sender = "Progress reports <reports@example.com>"',
    "reports": "a table [reports.NAME] with link, recipients and data",
    "digest": "a table [digest] with a link",
}


def load(config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read `config`, else the file that OUTBOX_CONFIG names, else ./outbox.toml if there is one.

    OUTBOX_<KEY> replaces the whole of a top-level key. Text is taken as it is; numbers and tables are written
    as in TOML (`OUTBOX_RETRY={base_s = 5}`). An empty variable counts as not set, an unknown one is not ours. Without
    it, OUTBOX_<KEY>_FILE names a file that holds the value, as secrets are handed out.

    A file that is only found in the working directory must be this user's: see `trust`.

    Raises:
        ConfigurationError: all the faults that there are.
    """
    faults: list[str] = []
    asker, path = _place(config, environ)
    values = _read(path, asker, faults) if asker or _is_found(path) else {}
    given = _read_variables(environ, faults)
    if "directory" in values:  # a field of the model, but the path alone says it: see below
        faults.append(_unknown(["directory"], "directory"))
    try:
        settings = Settings.model_validate({**values, **given, "directory": path.absolute().parent})
    except ValidationError as error:
        faults += [_sentence(detail, given) for detail in error.errors(include_url=False)]
        raise ConfigurationError(faults) from None  # pydantic's error knows the secrets
    if faults:
        raise ConfigurationError(faults)
    origin = _origin_of(config, path if asker or values else None, environ)
    settings._origin = origin  # noqa: SLF001 - only `load` knows it
    url = settings.database_url
    if url is None or not origin.files:
        return settings
    login = LoginSource(url, origin.files, partial(_database_login_again, origin, url))
    return settings.model_copy(update={"database_url": replace(url, login=login)})


def _origin_of(config: Path | None, read: Path | None, environ: Mapping[str, str]) -> Origin:
    """Return what `load` needs to read the same settings again; paths are absolute, for any working directory."""
    ours = {name: value for name, value in environ.items() if name.startswith("OUTBOX_")}
    secrets = [f"{_variable(key)}_FILE" for key in sorted(_KEYS)]
    for name in ("OUTBOX_CONFIG", *secrets):
        if path := ours.get(name, "").strip():
            ours[name] = str(Path(path).absolute())
    files = [] if read is None else [read.absolute()]
    files += [Path(ours[name]) for name in secrets if ours.get(name, "").strip()]
    return Origin(config and config.absolute(), ours, tuple(files))


def _again(origin: Origin) -> Settings | str:
    """Return the settings as their files have them now, or why they cannot be used."""
    try:
        return load(origin.config, origin.environ)
    except ConfigurationError as error:
        return error.faults[0]


def _database_login_again(origin: Origin, former: DatabaseUrl) -> DatabaseUrl | str:
    """Return the database's address with the login that the files have now.

    Another server or database is not taken: what this process has sent and claimed belongs to the former one.
    """
    found = _again(origin)
    if isinstance(found, str):
        return found
    url = found.database_url
    if url is None or url.without_login != former.without_login:
        return "database_url now names another server or database; restart outbox to use it."
    return replace(url, login=None)


def _smtp_login_again(origin: Origin, route: str, former: SmtpAddress) -> SmtpAddress | str:
    """Return the mail server's address with the login that the files have now; another server is not taken."""
    found = _again(origin)
    if isinstance(found, str):
        return found
    try:
        address = found.on_route(route).smtp_url
    except ConfigurationError as error:
        return error.faults[0]
    if address is None or address.anonymous != former.anonymous:
        return "smtp_url now names another server; restart outbox to use it."
    return address


def _place(config: Path | None, environ: Mapping[str, str]) -> tuple[str, Path]:
    """Who names the configuration file ("" if nobody does), and where it lies."""
    if config is not None:
        return "--config", config
    if named := environ.get("OUTBOX_CONFIG", "").strip():
        return "OUTBOX_CONFIG", Path(named)
    return "", Path("outbox.toml")


def _is_found(path: Path) -> bool:
    """Return True if the file is in the working directory; settings can run code, so it must be this user's.

    One that is not there now is not read either: in /tmp somebody else may put one there the next moment.

    Raises:
        ConfigurationError: others can write or replace it.

    """
    try:
        distrust = distrust_of(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigurationError(
            f"{path}: cannot be read ({error.strerror}); make it a file that this user can read."
        ) from None
    if distrust is not None:
        raise ConfigurationError(
            f"{path}: found in the working directory but not used, since settings can run code and "
            f"{distrust}, or name the file with --config or OUTBOX_CONFIG if you trust it."
        )
    return True


def _read(path: Path, asker: str, faults: list[str]) -> dict[str, Any]:
    """What the file says; nothing if it is not there although nobody named it."""
    try:
        return _toml(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        if asker:
            faults.append(f"{asker}: {path} does not exist; name a file that does.")
    except OSError as error:
        faults.append(f"{path}: cannot be read ({error.strerror}); make it a file that this user can read.")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        faults.append(f"{path}, line {line}: is not UTF-8; save the file as UTF-8.")
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).removesuffix(")").partition(" (at ")
        where = place if place.startswith("line") else "last line"
        faults.append(f"{path}, {where}: is not TOML ({what}); correct it there or in the line before.")
    except ValueError as error:
        faults.append(f"{path}: {error}.")
    return {}


def _toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: it is not TOML, or nested so deeply that tomllib would fail or take minutes: it calls itself for
            each bracket, and walks from the top for each part of a key.

    """
    deep = "is nested too deeply; write fewer brackets, and keys of fewer parts"
    if _LONG_KEY.search(text):
        raise ValueError(deep)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(deep) from None


def _read_variables(environ: Mapping[str, str], faults: list[str]) -> dict[str, Any]:
    """The keys that variables give; a text that is not TOML is a fault, and its key counts as not given."""
    given: dict[str, Any] = {}
    for key in sorted(_KEYS):
        text = environ.get(_variable(key), "").strip() or _read_secret(f"{_variable(key)}_FILE", environ, faults)
        if not text:
            continue
        if key in _TEXT_KEYS:
            given[key] = text
            continue
        try:
            (given[key],) = _toml(f"{key} = {text}").values()
        except ValueError:  # not TOML, or more than one value
            faults.append(f"{_variable(key)}: is not TOML; write what would follow `{key} =` in one line.")
    return given


def _read_secret(variable: str, environ: Mapping[str, str], faults: list[str]) -> str:
    """What the file that a variable names holds: systemd, Docker and Kubernetes hand out secrets as files."""
    path = environ.get(variable, "").strip()
    if not path:
        return ""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").strip()
    except OSError as error:
        faults.append(f"{variable}: {path} cannot be read ({error.strerror}); name a file that this user can read.")
    except ValueError:
        faults.append(f"{variable}: {path} is not UTF-8; save the file as UTF-8.")
    else:
        if text:
            return text
        faults.append(f"{variable}: {path} is empty; write the value into it.")
    return ""


def _variable(key: str) -> str:
    return f"OUTBOX_{key.upper()}"


# What a key that must be there looks like.
_WANTED = {
    "link": 'write one like "https://reports.example.com/r/{token}"',
    "smtp_url": 'write one like "smtp://host:25"',
    "domain": 'write whose signature it is, like "example.com"',
    "selector": "write under which name in the DNS the public key is",
    "key_file": "name the file with the private key in PEM",
}

# What pydantic calls a fault, and how a sentence about it goes on.
_FAULTS = {
    "string_type": "is not text; put it in quotes",
    "is_instance_of": "is not text; put it in quotes",
    "float_type": "is not a number; write one without quotes",
    "finite_number": "is not a finite number; write one such as 30",
    "bool_type": "is neither true nor false; write one of them without quotes",
    "int_type": "is not a whole number; write one without quotes and without a point",
    "greater_than_equal": "{value} is too small; write {ge:.15g} or more",
    "less_than_equal": "{value} is too large; write {le:.15g} or less",
    "list_type": 'is not a list; put it into brackets, as in ["one", "two"]',
    "enum": "{value} is not a choice; write {expected}",
    "missing": "is missing; {wanted}",
    "string_pattern_mismatch": "is no name for a {kind}; use a-z, 0-9, - and _, and begin with a letter",
    "model_type": "is not a table; begin it with [{table}] and write its keys below",
    "dict_type": "is not a table; begin it with [{table}.NAME] and write its keys below",
    "value_error": "{error}",
}


def _sentence(detail: ErrorDetails, given: Mapping[str, Any]) -> str:
    """One fault as pydantic found it, in the user's words. `given` are the keys that came from variables."""
    loc = [_quoted(str(part)) for part in detail["loc"] if part != "[key]"]
    key = ".".join([_variable(loc[0]) if loc[0] in given else loc[0], *loc[1:]])
    if detail["type"] == "extra_forbidden":
        return _unknown(loc, key)
    fault = _FAULTS.get(detail["type"], "cannot be used; write another value")
    context = {
        **detail.get("ctx", {}),
        "value": _shown(detail["input"]),
        "table": ".".join(loc),
        "kind": loc[0].removesuffix("s"),
        "wanted": _WANTED.get(loc[-1], "write it"),
    }
    return f"{key}: {fault.format_map(context)}."


def _unknown(loc: Sequence[str], key: str) -> str:
    table: type[BaseModel] = Settings
    if len(loc) > 1:
        tables: dict[str, type[BaseModel]] = {
            "retry": RetrySettings,
            "digest": DigestSettings,
            "web": WebSettings,
            "dkim": DkimSettings,
            "reports": ReportSettings,
            "routes": DkimSettings if "dkim" in loc[2:-1] else RouteSettings,
        }
        table = tables.get(loc[0], Settings)
        if loc[-1] in _KEYS:
            return f"{key}: belongs at the top level; move it above the first [table]."
    guess = _did_you_mean(loc[-1], set(table.model_fields) - {"directory"})
    return f"{key}: is not a key that outbox knows; take it out or mend its name{guess}."


def table_of(report: str) -> str:
    """Where a report's settings stand: `reports.progress`, or `digest`."""
    return DIGEST if report == DIGEST else f"reports.{_quoted(report)}"


def _quoted(part: str) -> str:
    """A part of a dotted key as TOML spells it."""
    return part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'


def _shown(value: object) -> str:
    """The user's value, unless it may be a URL with a password that went to the wrong key."""
    if isinstance(value, str):
        return "this" if re.search("[:@]", value) or _CONTROL.search(value) else f'"{value}"'
    return str(value)
