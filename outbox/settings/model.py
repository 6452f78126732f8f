"""All settings as one frozen object: the top-level keys, `[retry]`, and the rules that join several keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, InstanceOf, PlainSerializer, PrivateAttr, ValidationInfo, field_validator

from outbox.errors import ConfigurationError
from outbox.mail.mailbox import Mailbox, is_plain, parse_mailbox
from outbox.settings.keys import DIGEST, quoted, variable
from outbox.settings.origin import Origin
from outbox.settings.reports import DigestSettings, EditionSettings, ReportSettings, with_titles
from outbox.settings.routes import RULES, RouteSettings, ServerSettings, StartTls, check_rules, tls_problem
from outbox.settings.secret_files import LoginSource
from outbox.settings.urls import DatabaseUrl, SmtpAddress, parse_listen
from outbox.settings.values import (
    MESSAGE_BYTES_MAX,
    REFERENCE,
    LogFormat,
    LogLevel,
    Table,
    WhenInDoubt,
    address_of,
    count,
    duration_s,
    is_duration,
    parsed,
    seconds,
    shown,
)
from outbox.settings.web import WebSettings
from outbox.suggestions import did_you_mean

_EXAMPLES: Final = {
    "database_url": 'database_url = "postgresql://user:password@host/database"',
    "smtp_url": 'smtp_url = "smtp://host:25"',
    "sender": 'sender = "Progress reports <reports@example.com>"',
    "reports": "a table [reports.NAME] with link, recipients and data",
    "digest": "a table [digest] with a link",
}
_Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class RetrySettings(Table):
    """Table `[retry]`: exponential backoff with full jitter, up to `base_s`, doubled each time, never above `max_s`."""

    base_s: Annotated[float, seconds(0.001, 86_400)] = 30.0
    max_s: Annotated[float, seconds(0.001, 604_800)] = 3600.0
    attempts_max: Annotated[int, count(1000)] = 12

    @field_validator("max_s")
    @classmethod
    def _reaches_base(cls, max_s: float, info: ValidationInfo) -> float:
        if max_s < info.data.get("base_s", 0):
            raise ValueError(f"{max_s:g} is below base_s; write at least {info.data['base_s']:g}")
        return max_s


class Settings(ServerSettings):
    """Everything that a command needs to know. A key that only some commands need may be None: see `require`."""

    _origin: Origin | None = PrivateAttr(None)

    directory: Path = Field(default_factory=Path.cwd)  # of the settings file, and of templates/ beside it

    database_url: Annotated[
        InstanceOf[DatabaseUrl] | None, parsed(DatabaseUrl), PlainSerializer(lambda url: url and str(url))
    ] = None
    smtp_url: Annotated[
        InstanceOf[SmtpAddress] | None, parsed(SmtpAddress), PlainSerializer(lambda url: url and str(url))
    ] = None
    sender: str | None = None
    redirect_to: str | None = None  # for staging: every email goes to this address instead of its recipient
    in_doubt: WhenInDoubt = WhenInDoubt.HOLD
    doubt_grace_s: Annotated[float, seconds(1, 604_800)] = 60.0  # a verdict may come so late before the policy acts
    resolver: str | None = None  # "module:callable", for in_doubt = "ask"
    asks_max: Annotated[int, count(1000)] = 10
    # An address is suppressed once so many different emails to it failed within that time, whatever the bounces say
    # of its mailbox; None: only bounces that say that the address does not exist suppress it.
    bounces_max: Annotated[int, count(1000)] | None = None
    bounces_within: str = "90d"
    retry: RetrySettings = RetrySettings()
    reports: dict[_Name, ReportSettings] = {}
    digest: DigestSettings | None = None
    routes: dict[_Name, RouteSettings] = {}  # beside the usual one, which goes to smtp_url
    web: WebSettings = WebSettings()

    batch_max: Annotated[int, count(1000)] = 100
    # Longest wait of generate for reports that another session has reserved but does not make, and for a lock.
    generate_wait_s: Annotated[float, seconds(1, 86_400)] = 600.0
    # Octets of one message, headers and attachments included; `outbox init` writes it to the database.
    message_bytes_max: Annotated[int, Field(ge=65_536, le=104_857_600, strict=True)] = MESSAGE_BYTES_MAX

    lease_s: Annotated[float, seconds(2, 3600)] = 10.0
    failover_grace_s: Annotated[float, seconds(0, 3600)] = 30.0  # after a failover: relays reassert what they sent
    guard_s: Annotated[float, seconds(0.1, 3600)] = 5.0  # from the mark to the dot
    drain_s: Annotated[float, seconds(0, 3600)] = 30.0
    poll_max_s: Annotated[float, seconds(0.05, 300)] = 5.0
    idle_s: Annotated[float, seconds(0.1, 3600)] = 5.0  # then an idle SMTP connection is closed
    connect_timeout_s: Annotated[float, seconds(0.1, 3600)] = 30.0
    # RFC 5321 §4.5.3.2: the replies before the dot, and the one to it.
    command_timeout_s: Annotated[float, seconds(0.1, 3600)] = 300.0
    data_done_timeout_s: Annotated[float, seconds(0.1, 7200)] = 600.0

    log_format: LogFormat = LogFormat.AUTO  # of `outbox relay`
    log_level: LogLevel = LogLevel.INFO
    log_addresses: Annotated[bool, Field(strict=True)] = False  # else each is shown as <address>
    http: str | None = None  # "127.0.0.1:9464": address on which a relay answers /metrics, /livez and /readyz
    dead_man_url: str | None = None  # called when an edition is complete: each report is made and sent

    @property
    def bounces_within_s(self) -> float:
        """Return `bounces_within` in seconds."""
        return duration_s(self.bounces_within)

    @property
    def sender_mailbox(self) -> Mailbox:
        """Return `sender` as a name and an address; it must be set (see `require`)."""
        assert self.sender is not None
        return parse_mailbox(self.sender)

    @property
    def wants_verified_tls(self) -> bool:
        """Return True if nothing but EHLO may be sent to the mail server before TLS with a verified certificate."""
        address = self.smtp_url
        if address is None or address.scheme != "smtp":
            return False
        return address.implicit_tls or address.username is not None or self.starttls is StartTls.ALWAYS

    @property
    def editions(self) -> Mapping[str, EditionSettings]:
        """Return everything that has editions: the reports by their names, and the digest if there is one."""
        return {**self.reports, **({DIGEST: self.digest} if self.digest is not None else {})}

    def on_route(self, name: str) -> "Settings":
        """Return these settings for one route: its own keys replace those of the top level.

        '' is the usual route, whose settings are these themselves.

        Raises:
            ConfigurationError: there is no route of that name; the message names those that there are.

        """
        if not name:
            return self
        if name not in self.routes:
            known = ", ".join(self.routes)
            fix = f"write one of {known}{did_you_mean(name, self.routes)}" if known else "write a table for it"
            raise ConfigurationError(f"routes.{quoted(name)}: is not configured; {fix}.")
        route = self.routes[name]
        return self.model_copy(update={key: getattr(route, key) for key in route.model_fields_set - RULES})

    def smtp_login(self, route: str) -> LoginSource[SmtpAddress]:
        """Return the source of the mail server's address and login for a route; '' is the usual one."""
        address = self.on_route(route).smtp_url
        assert address is not None
        if self._origin is None:
            return LoginSource(address, (), lambda: address)
        return self._origin.smtp_login(route, address)

    def smtp_login_age_s(self, route: str) -> float | None:
        """Return how long ago the file with a route's login was written; None if it came from the environment."""
        return None if self._origin is None else self._origin.smtp_login_age_s(route)

    def require(self, *keys: str) -> None:
        """Raise unless all of these top-level keys are set.

        Raises:
            ConfigurationError: one sentence for each that is not.

        """
        problems = [
            f"{key}: is not set; write {_EXAMPLES[key]} in outbox.toml, or set {variable(key)}."
            for key in keys
            if not getattr(self, key)
        ]
        if problems:
            raise ConfigurationError(problems)

    def report(self, name: str) -> EditionSettings:
        """Return the report of that name; the digest is one, too.

        Raises:
            ConfigurationError: there is none; the message names those that there are.

        """
        self.require("digest" if name == DIGEST else "reports")
        if name not in self.editions:
            known = ", ".join(sorted(self.editions)) + did_you_mean(name, self.editions)
            raise ConfigurationError(f"reports.{quoted(name)}: is not configured; write one of {known}.")
        return self.editions[name]

    @field_validator("bounces_within")
    @classmethod
    def _is_duration(cls, length: str) -> str:
        if not is_duration(length):
            raise ValueError(f'{shown(length)} is not a duration; use for example "90d", "26w" or "48h"')
        return length

    @field_validator("sender")
    @classmethod
    def _is_one_mailbox(cls, sender: str | None) -> str | None:
        if sender is None:
            return None
        sender = sender.strip()
        if not is_plain(sender):
            raise ValueError(
                'is not one mailbox; write one like "Progress reports <reports@example.com>",'
                " with a domain in ASCII, and with quotes around a name that has punctuation"
            )
        try:
            parse_mailbox(sender)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}; correct it") from None
        return sender

    @field_validator("redirect_to")
    @classmethod
    def _is_one_address(cls, address: str | None) -> str | None:
        if address is None:
            return None
        found = address_of(address.strip())
        if found is None:
            raise ValueError(
                'is not one address; write one like "staging@example.com", without a name, or take the key out'
            )
        return found

    @field_validator("smtp_url")
    @classmethod
    def _fits_starttls(cls, address: SmtpAddress | None, info: ValidationInfo) -> SmtpAddress | None:
        if address is not None and (problem := tls_problem(address, info.data.get("starttls"))) is not None:
            raise ValueError(problem)
        return address

    @field_validator("resolver")
    @classmethod
    def _names_a_function(cls, resolver: str | None, info: ValidationInfo) -> str | None:
        if resolver is not None and not REFERENCE.fullmatch(resolver):
            raise ValueError(f'{shown(resolver)} names no function; write one like "myapp.mail:was_accepted"')
        if resolver is None and info.data.get("in_doubt") is WhenInDoubt.ASK:
            raise ValueError('is missing; in_doubt = "ask" asks it, so write one like "myapp.mail:was_accepted"')
        return resolver

    @field_validator("http")
    @classmethod
    def _is_host_and_port(cls, http: str | None) -> str | None:
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
        return with_titles(reports)

    @field_validator("digest")
    @classmethod
    def _exists_if_collected(cls, digest: DigestSettings | None, info: ValidationInfo) -> DigestSettings | None:
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
        if {"reports", "digest"} <= set(info.data):  # else those are invalid themselves, and must be corrected first
            digest = {DIGEST: info.data["digest"]} if info.data["digest"] else {}
            check_rules(routes, {**info.data["reports"], **digest})
        return routes

    @field_validator("routes")
    @classmethod
    def _fit_starttls_each(cls, routes: dict[str, RouteSettings], info: ValidationInfo) -> dict[str, RouteSettings]:
        for name, route in routes.items():
            starttls = route.starttls if "starttls" in route.model_fields_set else info.data.get("starttls")
            if (problem := tls_problem(route.smtp_url, starttls)) is not None:
                raise ValueError(f"{name}.smtp_url {problem}")
        return routes

    @field_validator("guard_s")
    @classmethod
    def _ends_before_the_lease(cls, guard_s: float, info: ValidationInfo) -> float:
        if guard_s >= info.data.get("lease_s", guard_s + 1):
            raise ValueError(f"{guard_s:g} is not below lease_s; write less than {info.data['lease_s']:g}")
        return guard_s
