"""All checks of `outbox doctor`, in the order in which a report travels.

They change nothing and send nothing. Each finding comes with a suggested fix; a check that depends on one that failed
says that it was not made.
"""

import asyncio
import resource
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, assert_never

from outbox.doctor.database import examine_database
from outbox.doctor.finding import Finding, Grade, note, ok, problem, problem_of
from outbox.doctor.fleet import examine_fleet
from outbox.doctor.lmtp_maildir import examine_lmtp, examine_maildir
from outbox.doctor.reports import examine_reports
from outbox.doctor.smtp import examine_smtp
from outbox.errors import OutboxError
from outbox.mail.verp import TOKEN_MAX
from outbox.relay.resolver import load_resolver
from outbox.settings import Settings, WhenInDoubt
from outbox.smtp.dkim import load_signer

FILES_BESIDE: Final = 64  # files that are open beside the SMTP connections


async def examine(settings: Settings) -> list[Finding]:
    """Return all findings, in order.

    Raises:
        ConfigurationError: a setting that generate or relay needs is not set.

    """
    settings.require("database_url", "smtp_url", "sender", "reports")
    sender = settings.sender_mailbox
    database = await examine_database(settings)
    reports = await examine_reports(settings, database)
    smtp: list[Finding] = []
    for name in ("", *settings.routes):
        found = await examine_server(
            settings.on_route(name),
            sender=sender.address,
            recipient=settings.redirect_to or reports.recipient or sender.address,
            largest_bytes=max(database.largest_bytes, reports.largest_bytes),
        )
        smtp += [replace(one, check=f"{name}.{one.check}") for one in found] if name else found
    fleet = await examine_fleet(settings, database)
    rest = [*look_at_redirect(settings), look_at_doubt(settings), look_at_limits(settings)]
    return [*database.findings, *reports.findings, *smtp, *fleet, *rest]


async def examine_server(settings: Settings, *, sender: str, recipient: str, largest_bytes: int) -> list[Finding]:
    """Return the findings about the mail server of a route, and about the signature of emails that go there."""
    assert settings.smtp_url is not None
    signature = look_at_dkim(settings, sender)
    if settings.smtp_url.scheme == "file":
        return [*await asyncio.to_thread(examine_maildir, settings.smtp_url), *signature]
    examine = examine_lmtp if settings.smtp_url.scheme == "lmtp" else examine_smtp
    bounces_to = (settings.return_path or sender).replace("{token}", "0" * TOKEN_MAX)
    found = await examine(settings, sender=bounces_to, recipient=recipient, largest_bytes=largest_bytes)
    return [*found, *signature]


def has_problem(findings: Iterable[Finding]) -> bool:
    """Return True if a person is needed."""
    return any(finding.grade is Grade.PROBLEM for finding in findings)


def look_at_dkim(settings: Settings, sender: str) -> list[Finding]:
    """Check that emails can be signed, and name the DNS record for it; no finding where they are not signed."""
    if settings.dkim is None:
        return []
    try:
        signer = load_signer(settings.dkim, settings.directory)
    except OutboxError as error:
        return [problem_of("dkim", error)]
    found = f'publish {settings.dkim.record_name} TXT "{signer.record}", if it is not there yet'
    domain = sender.rpartition("@")[2]
    if domain != settings.dkim.domain and not domain.endswith(f".{settings.dkim.domain}"):
        fix = "sign with the domain of sender, or DMARC does not count it (RFC 7489 §3.1.1)"
        return [note("dkim", f"the sender is of {domain}, and {settings.dkim.domain} signs ({found})", fix)]
    return [ok("dkim", f"{settings.dkim.domain} signs; {found}")]


def look_at_redirect(settings: Settings) -> list[Finding]:
    """Return a note if all emails are redirected, which must not be forgotten."""
    if settings.redirect_to is None:
        return []
    found = f"every email goes to {settings.redirect_to}, and none to its recipient"
    return [note("redirect_to", found, "take redirect_to out where people are to get their mail")]


def look_at_doubt(settings: Settings) -> Finding:
    """Return the policy for emails in doubt; check that its resolver, if any, can be loaded."""
    match settings.in_doubt:
        case WhenInDoubt.HOLD:
            return ok("in_doubt", "hold: a person decides, with `outbox resolve`")
        case WhenInDoubt.RESEND:
            return ok("in_doubt", "resend: the same bytes go out again, and may arrive twice")
        case WhenInDoubt.ASK:
            assert settings.resolver is not None
            try:
                load_resolver(settings.resolver, settings.directory)
            except OutboxError as error:
                return problem_of("in_doubt", error)
            return ok("in_doubt", f"ask: {settings.resolver} can be asked")
        case _:
            assert_never(settings.in_doubt)


def look_at_limits(settings: Settings) -> Finding:
    """Check that this process may open as many connections as the relay would."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sum(settings.on_route(name).connections_max for name in ("", *settings.routes))
    return judge_limits(soft if soft != resource.RLIM_INFINITY else None, most)


def judge_limits(files_max: int | None, connections_max: int) -> Finding:
    """Judge the limit on open files; None is no limit."""
    needed = connections_max + FILES_BESIDE
    if files_max is not None and files_max < needed:
        found = f"a process may open {files_max} files, and connections_max = {connections_max} needs {needed}"
        return problem("limits", found, "raise it (ulimit -n, or LimitNOFILE= for systemd), or lower connections_max")
    files = "any number of" if files_max is None else str(files_max)
    return ok("limits", f"a process may open {files} files, connections_max = {connections_max} needs {needed}")
