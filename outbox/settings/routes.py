"""Settings of mail servers, at the top level and in the tables `[routes.NAME]` and `dkim`; rules that pick a route."""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, InstanceOf, PlainSerializer, ValidationInfo, field_validator

from outbox.mail.header_fields import CARRIERS, FIELD_NAME, OURS
from outbox.mail.host_name import is_domain, is_fqdn, is_literal
from outbox.mail.structured_fields import header_field
from outbox.mail.verp import TOKEN_MAX
from outbox.settings.keys import DIGEST, quoted
from outbox.settings.reports import EditionSettings
from outbox.settings.urls import SmtpAddress
from outbox.settings.values import CONTROL, Table, count, is_ascii_address, is_rate, parsed, per_second, shown
from outbox.suggestions import did_you_mean

RULES: Final = frozenset({"reports", "domains"})
"""Keys of a route that say which emails take it."""


class StartTls(StrEnum):
    """Use of STARTTLS (RFC 3207) on a connection that begins in clear text.

    With a login it is always required, with a verified certificate.
    """

    AUTO = "auto"  # where the server offers it; the certificate is not verified (RFC 7435)
    ALWAYS = "always"  # or nothing is sent; the certificate is verified
    NEVER = "never"


class DkimSettings(Table):
    """Signature on emails (RFC 6376), and the private key for it; needs the extra `outbox-mail[dkim]`."""

    domain: str
    selector: str
    key_file: str  # PEM; a relative path begins in the directory of the settings file

    @field_validator("domain", "selector")
    @classmethod
    def _is_a_name_in_dns(cls, name: str, info: ValidationInfo) -> str:
        if not is_domain(name):
            example = 'domain = "example.com"' if info.field_name == "domain" else 'selector = "2026a"'
            raise ValueError(f"{shown(name)} is no name in the DNS; write one like {example}, in ASCII")
        return name.lower()

    @property
    def record_name(self) -> str:
        """Return the name of the DNS record with the public key (RFC 6376 §3.6.2.1)."""
        return f"{self.selector}._domainkey.{self.domain}"


class ServerSettings(Table):
    """Settings of one SMTP server: its limits, the connection, and the additions to its emails."""

    rate: str | None = None  # emails that the whole fleet may start, as "14/s" or "600/min"
    daily_max: Annotated[int, count(1_000_000_000)] | None = None  # in any 24 hours, of the whole fleet
    connections_max: Annotated[int, count(1000)] = 16  # of each relay
    messages_per_connection_max: Annotated[int, count(1_000_000)] = 500
    headers: dict[str, str] = {}  # further header fields; {email_id} and {key} in their values are the email's
    return_path: str | None = None  # MAIL FROM, as "bounces+{token}@example.com" (VERP); the sender's address if None
    dkim: DkimSettings | None = None
    dsn: Annotated[bool, Field(strict=True)] = True  # where the server offers it, bounces name the email (RFC 3461)
    starttls: StartTls = StartTls.AUTO
    helo_name: str | None = None  # name in EHLO; None: the host name if fully qualified, else the address literal

    @property
    def rate_per_s(self) -> float | None:
        """Return the fleet's rate in emails per second; None is no limit."""
        return None if self.rate is None else per_second(self.rate)

    @field_validator("rate")
    @classmethod
    def _is_a_rate(cls, rate: str | None) -> str | None:
        if rate is not None and not is_rate(rate):
            raise ValueError(f'{shown(rate)} is no rate; write one like "14/s", "600/min" or "5000/h"')
        return rate

    @field_validator("helo_name")
    @classmethod
    def _is_accepted_in_ehlo(cls, name: str | None) -> str | None:
        name = name and name.strip().rstrip(".")
        if name is not None and not (is_fqdn(name) or is_literal(name)):
            raise ValueError(
                f"{shown(name)} is not a fully qualified domain name or an address literal, which mail servers expect "
                'in EHLO; use for example "reports.example.com" or "[192.0.2.1]"'
            )
        return name

    @field_validator("headers")
    @classmethod
    def _can_be_written(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            _check_field(name, value)
        if len({name.lower() for name in headers}) < len(headers):
            raise ValueError("has a field twice, in capitals and in small letters; keep one of them")
        return headers

    @field_validator("return_path")
    @classmethod
    def _can_be_bounced_to(cls, path: str | None) -> str | None:
        path = path and path.strip()
        if path is not None and not is_ascii_address(path.replace("{token}", "0" * TOKEN_MAX)):
            raise ValueError(
                'is no address that bounces can go to; write one like "bounces+{token}@example.com", '
                f"of at most 64 characters before the @ with {TOKEN_MAX} for {{token}}"
            )
        return path


def _check_field(name: str, value: str) -> None:
    """Raise ValueError if a route cannot add this header field."""
    if not FIELD_NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} is no header field's name; use letters, digits and hyphens")
    if name.lower() in (OURS | CARRIERS) - {"reply-to"}:
        raise ValueError(f"{name} is written by outbox or by mail servers; take it out")
    if name.lower() == "reply-to" and not is_ascii_address(value.strip()):
        raise ValueError(f"{name} must be one address; use for example help@example.com")
    if CONTROL.search(value):
        raise ValueError(f"{name} has a line break or another control character; write it on one line")
    unknown = set(re.findall(r"\{(.*?)\}", value)) - {"email_id", "key"}
    if unknown:
        raise ValueError(f"{name} has {{{min(unknown)}}}; write {{email_id}} or {{key}}, or neither")
    try:
        header_field(name, value.replace("{email_id}", "1").replace("{key}", "key"))
    except ValueError as error:
        raise ValueError(f"{name} cannot be written: {error}") from None


class RouteSettings(ServerSettings):
    """Table `[routes.NAME]`: one more server, and which emails take it. A key that is left out is as at the top level.

    An email takes the first route, in the order of the settings, whose `reports` have its report or whose `domains`
    its recipient's domain (`example.com`; `*.example.com` is each below it), or the one that its application named.
    """

    smtp_url: Annotated[InstanceOf[SmtpAddress], parsed(SmtpAddress), PlainSerializer(str)]
    reports: list[str] = []
    domains: list[str] = []

    @field_validator("domains")
    @classmethod
    def _are_domains(cls, domains: list[str]) -> list[str]:
        lower = [domain.strip().lower() for domain in domains]
        for domain in lower:
            if not is_domain(domain.removeprefix("*.")):
                raise ValueError(
                    f"{shown(domain)} is no domain; write one like example.com, or *.example.com for each below it "
                    "(xn--bcher-kva.example for bücher.example)"
                )
        return lower


def check_rules(routes: Mapping[str, RouteSettings], editions: Mapping[str, EditionSettings]) -> None:
    """Raise ValueError if a route names a report that has no emails, or two routes have the same rule."""
    taken: dict[str, str] = {}
    for name, route in routes.items():
        for report in route.reports:
            _check_report(name, report, editions)
        for rule in (*route.reports, *route.domains):
            if rule in taken:
                both = f"{taken[rule]} and {name}" if taken[rule] != name else f"{name} twice"
                raise ValueError(f"{rule} stands in {both}; keep it in one place")
            taken[rule] = name


def _check_report(route: str, report: str, editions: Mapping[str, EditionSettings]) -> None:
    if report not in editions:
        guess = did_you_mean(report, editions)
        raise ValueError(
            f"{route} names the report {shown(report)}, which is not configured; mend the name, or write "
            f"[reports.{quoted(report)}]{guess}"
        )
    if editions[report].is_collected:
        raise ValueError(
            f'{route} names {report}, which has no email of its own (deliver = "digest"); write "{DIGEST}" in its place'
        )


def tls_problem(address: SmtpAddress, starttls: StartTls | None) -> str | None:
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
