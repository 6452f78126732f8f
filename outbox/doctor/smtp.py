"""Checks of the mail server: a conversation as far as RCPT, taken back with RSET. Nothing is sent.

aiosmtplib's own steps are used one at a time, so that the one that fails is known.
"""

import asyncio
import time
from typing import Any

import aiosmtplib

from outbox.doctor.finding import Finding, Grade, not_checked, note, ok, problem
from outbox.doctor.smtp_judgements import (
    SIZE_USUAL,
    distrust_reason,
    is_about_helo,
    is_distrust,
    judge_certificate,
    judge_distrust,
    judge_envelope,
    judge_helo,
    judge_size,
)
from outbox.doctor.smtp_visit import SERVER, Visit
from outbox.settings import Settings, StartTls
from outbox.smtp.connector import why_tls
from outbox.smtp.login import LoginError, log_in
from outbox.smtp.opening import ERRORS, TlsBrokenError, start_tls


async def examine_smtp(settings: Settings, *, sender: str, recipient: str, largest_bytes: int) -> list[Finding]:
    """Return all findings about the mail server; never raises for what is wrong with it.

    `sender` and `recipient` are addresses to ask for, `largest_bytes` is the largest message known, or 0.
    """
    assert settings.smtp_url is not None
    visit = Visit(settings, settings.smtp_url, sender=sender, recipient=recipient, largest_bytes=largest_bytes)
    try:
        async with asyncio.timeout(4 * settings.connect_timeout_s):
            return await _examine(visit)
    except ERRORS as error:  # in the middle of a step that has no line of its own
        found = f"{visit.address} breaks off ({visit.describe(error)})"
        visit.add(problem(SERVER, found, "see the mail server's log"))
        return visit.leave("the mail server broke off")


async def _examine(visit: Visit) -> list[Finding]:
    await visit.survey()
    async with visit.connected(verified=True) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        error = await _encrypt(visit, smtp)
        if error is None:
            return await _converse(visit, smtp)
    if not visit.settings.wants_verified_tls:
        return await _examine_unverified(visit, error)
    visit.add(judge_distrust(visit.address.host, error) if is_distrust(error) else _no_tls(visit, error))
    return visit.leave("TLS fails")


async def _examine_unverified(visit: Visit, error: BaseException) -> list[Finding]:
    """Come again as the relay does where no login is sent: any certificate is better than clear text (RFC 7435)."""
    if not is_distrust(error):
        return await _examine_in_the_clear(visit, error)
    async with visit.connected(verified=False) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        again = await _encrypt(visit, smtp)
        if again is None:
            found = (
                f"{_cipher(smtp)}, certificate not verified ({distrust_reason(error)}): without a login that is fine; "
                "it protects from passive eavesdroppers, not from an attacker in between"
            )
            visit.add(note("smtp.tls", found, "give the mail server a certificate for its name if that matters"))
            return await _converse(visit, smtp)
    return await _examine_in_the_clear(visit, again)


async def _examine_in_the_clear(visit: Visit, error: BaseException) -> list[Finding]:
    """Come again as the relay does where TLS fails and no login is sent: clear text is better than no mail."""
    async with visit.connected(verified=False) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        found = f"STARTTLS is offered and fails ({visit.describe(error)}), so emails go in clear text"
        fix = 'repair TLS in the mail server, or write starttls = "always" if nothing may be sent without TLS'
        visit.add(note("smtp.tls", found, fix))
        return await _converse(visit, smtp)


def _no_tls(visit: Visit, error: BaseException) -> Finding:
    found = f"STARTTLS is offered and fails ({visit.describe(error)}), so nothing is sent there"
    return problem("smtp.tls", found, "repair TLS in the mail server (TLS 1.2 or later is needed)")


async def _encrypt(visit: Visit, smtp: aiosmtplib.SMTP) -> BaseException | None:
    """Make the connection TLS as the relay would, with its finding; return the error if that fails."""
    if visit.settings.starttls is StartTls.NEVER and not visit.address.implicit_tls:
        found = 'starttls is "never": emails go in the clear'
        visit.add(note("smtp.tls", found, 'write starttls = "always" if that matters'))
        return None
    if not visit.address.implicit_tls:
        if not smtp.supports_extension("starttls"):
            if not visit.settings.wants_verified_tls:
                found = "no TLS is offered: emails go in the clear"
                visit.add(note("smtp.tls", found, "turn STARTTLS on in the mail server if that matters"))
            return None
        try:
            refused = await start_tls(smtp, timeout_s=visit.settings.connect_timeout_s)
        except TlsBrokenError as broken:
            return broken
        if refused is not None:
            return refused
    certificate: Any = smtp.get_transport_info("peercert")
    if certificate:
        visit.add(judge_certificate(certificate, _cipher(smtp), time.time()))
    return None


def _cipher(smtp: aiosmtplib.SMTP) -> str:
    name, version, bits = smtp.get_transport_info("cipher")
    return f"{version} ({name}, {bits} bits)"


async def _converse(visit: Visit, smtp: aiosmtplib.SMTP) -> list[Finding]:
    why, _, fix = why_tls(visit.address).partition("; ")
    if visit.settings.wants_verified_tls and not (visit.address.implicit_tls or smtp.get_transport_info("sslcontext")):
        visit.add(problem("smtp.tls", f"it offers no STARTTLS, and {why}", fix))
        return visit.leave("nothing is sent without TLS")
    login = await _log_in(visit, smtp)
    size = judge_size(smtp.esmtp_extensions.get("size"), visit.largest_bytes)
    visit.add(login, _pipelining(visit, smtp), size)
    if login.grade is Grade.PROBLEM:
        return visit.leave("the login was refused")
    visit.add(*await _ask_for_sender(visit, smtp))
    try:
        await smtp.quit()
    except ERRORS:  # nothing was left to say
        smtp.close()
    return visit.findings


async def _log_in(visit: Visit, smtp: aiosmtplib.SMTP) -> Finding:
    offered = visit.without_login(", ".join(smtp.server_auth_methods).upper()) or "none"
    if visit.address.username is None or visit.address.password is None:
        return ok("smtp.login", f"smtp_url has no login (offered: {offered})")
    try:
        await log_in(smtp, visit.address.username, visit.address.password)
    except LoginError as error:
        found = f"({visit.without_login(str(error))}; offered: {offered})"
        if error.is_judged:
            return problem("smtp.login", f"the login of smtp_url is refused {found}", "correct its user or password")
        fix = "ask the server's operator for PLAIN, LOGIN or CRAM-MD5, or take the login out"
        if error.is_lost or error.code:
            fix = "see the mail server's log"
        return problem("smtp.login", f"the login of smtp_url cannot be given {found}", fix)
    return ok("smtp.login", f"accepted (offered: {offered})")


def _pipelining(visit: Visit, smtp: aiosmtplib.SMTP) -> Finding:
    if smtp.supports_extension("pipelining"):
        return ok("smtp.pipelining", "offered: a message takes two round trips")
    found = f"not offered: a message takes four round trips on each of {visit.settings.connections_max} connections"
    return note("smtp.pipelining", found, "raise connections_max if that is too slow")


async def _ask_for_sender(visit: Visit, smtp: aiosmtplib.SMTP) -> list[Finding]:
    """Ask with MAIL, RCPT and RSET whether a message of the sender would be taken. Without DATA there is none."""
    name = smtp.local_hostname or ""
    helo = await judge_helo(name, visit.settings.helo_name)
    size = f" SIZE={visit.largest_bytes or SIZE_USUAL}" if smtp.supports_extension("size") else ""
    is_utf8 = not (visit.sender + visit.recipient).isascii() and smtp.supports_extension("smtputf8")
    for command in (
        f"MAIL FROM:<{visit.sender}>{size}{' SMTPUTF8' if is_utf8 else ''}",
        f"RCPT TO:<{visit.recipient}>",
    ):
        reply = await smtp.execute_command(command.encode())
        text = visit.without_login(reply.message)
        finding = judge_envelope(command, reply.code, text, login=bool(visit.address.username))
        if finding is None:
            continue
        if not is_about_helo(reply.code, text):
            return [helo, finding]
        found = f"the server refuses the name in EHLO, {name} ({reply.code} {text} to {command.partition(':')[0]})"
        fix = "set helo_name to the name of this host in the DNS, or ask the server's operator to allow this host"
        return [
            problem("smtp.helo", found, fix),
            *not_checked(["smtp.sender"], "the name in EHLO is refused"),
        ]
    await smtp.execute_command(b"RSET")
    found = f"{visit.sender} may write to {visit.recipient}; asked with MAIL and RCPT, taken back with RSET"
    return [helo, ok("smtp.sender", found)]
