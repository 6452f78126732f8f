"""The doctor's look at the mail server: a conversation as far as RCPT, taken back with RSET. Nothing is sent.

aiosmtplib's own steps serve here, one at a time, so that each can be told apart when it fails.
"""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiosmtplib

from outbox.address import SmtpAddress
from outbox.esmtp import size_limit
from outbox.finding import Finding, Grade, fault, not_checked, note, ok
from outbox.route import LOCAL_HOSTNAME
from outbox.settings import Settings

EXPIRES_SOON_D: Final = 14
SIZE_USUAL: Final = 100_000  # bytes of a mail, if none is known
PORT_PLAIN: Final = 25
PORT_TLS: Final = 465
DAY_S: Final = 86_400

CHECKS: Final = ("smtp.tls", "smtp.login", "smtp.pipelining", "smtp.size", "smtp.sender")
TROUBLE = (aiosmtplib.SMTPException, OSError, TimeoutError, ValueError)


@dataclass(slots=True)
class Visit:
    """One visit to the server, and what it has taught so far."""

    settings: Settings
    address: SmtpAddress
    sender: str
    recipient: str
    largest_bytes: int
    findings: list[Finding] = field(default_factory=list)

    def leave(self, why: str) -> list[Finding]:
        """Look no further: what was not looked at says why."""
        seen = {finding.check for finding in self.findings}
        return [*self.findings, *not_checked([check for check in CHECKS if check not in seen], why)]

    def said(self, error: BaseException) -> str:
        """An error in words, without the login."""
        if isinstance(error, TimeoutError) or not str(error):
            return f"no answer within {self.settings.connect_timeout_s:g} s"
        if isinstance(error, aiosmtplib.SMTPResponseException):
            return self.without_login(f"{error.code} {error.message}")
        return self.without_login(str(error))

    def without_login(self, text: str) -> str:
        """What a server said, in one line and without what it should not have repeated."""
        return " ".join(self.address.without_login(text).split())[:300].rstrip(".")


async def examine_smtp(settings: Settings, *, sender: str, recipient: str, largest_bytes: int) -> list[Finding]:
    """All that can be said of the mail server; never raises for what is wrong with it.

    `sender` and `recipient` are addresses to ask for, `largest_bytes` is the largest message known, or 0.
    """
    assert settings.smtp_url is not None
    visit = Visit(settings, settings.smtp_url, sender, recipient, largest_bytes)
    try:
        async with asyncio.timeout(4 * settings.connect_timeout_s):
            return await _examine(visit)
    except TROUBLE as error:  # in the middle of a step that has no line of its own
        visit.findings = [finding for finding in visit.findings if finding.check != "smtp.server"]
        found = f"{visit.address} breaks off ({visit.said(error)})"
        visit.findings.insert(0, fault("smtp.server", found, "see the mail server's log"))
        return visit.leave("the mail server broke off")


async def _examine(visit: Visit) -> list[Finding]:
    async with _connected(visit, verified=True) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        trouble = await _encrypt(visit, smtp)
        if trouble is None:
            return await _converse(visit, smtp)
    if not _is_distrust(trouble):
        visit.findings.append(_no_tls(visit, trouble))
    elif visit.address.username:
        visit.findings.append(_distrusted(visit, trouble))
    else:
        return await _examine_distrusted(visit, trouble)
    return visit.leave("TLS fails")


async def _examine_distrusted(visit: Visit, trouble: BaseException) -> list[Finding]:
    """Come again as the relay does where no login is sent: any certificate is better than clear text (RFC 7435)."""
    async with _connected(visit, verified=False) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        again = await _encrypt(visit, smtp)
        if again is not None:
            visit.findings.append(_no_tls(visit, again))
            return visit.leave("TLS fails")
        visit.findings.append(
            note(
                "smtp.tls",
                f"{_cipher(smtp)}, certificate not verified ({_why(trouble)}): without a login that is no fault, "
                "and it keeps out who listens, not who stands in between",
                "give the mail server a certificate for its name if that must not be",
            )
        )
        return await _converse(visit, smtp)


@asynccontextmanager
async def _connected(visit: Visit, *, verified: bool) -> AsyncIterator[aiosmtplib.SMTP | None]:
    """A connection after EHLO, in TLS if that comes first; None, with the finding, if there is none to be had."""
    address = visit.address
    context = ssl.create_default_context()
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    smtp = aiosmtplib.SMTP(
        hostname=address.host,
        port=address.port,
        use_tls=address.implicit_tls,
        start_tls=False,
        tls_context=context,
        local_hostname=LOCAL_HOSTNAME,
        timeout=visit.settings.connect_timeout_s,
    )
    try:
        try:
            await smtp.connect()
            await smtp.ehlo()
        except TROUBLE as error:
            visit.findings.append(_unreachable(visit, error))
            yield None
        else:
            if not any(finding.check == "smtp.server" for finding in visit.findings):
                visit.findings.append(ok("smtp.server", f"{address} answers"))
            yield smtp
    finally:
        smtp.close()


def _unreachable(visit: Visit, error: BaseException) -> Finding:
    address = visit.address
    refusal = _tls_error(error)
    if _is_distrust(error):
        return _distrusted(visit, error)
    found = f"{address} does not answer as a mail server ({visit.said(error)})"
    mend = "start it or correct smtp_url"
    if refusal is not None:
        mend = f"if it begins without TLS, write smtp://…:{address.port} in smtp_url; STARTTLS is used where offered"
    elif address.port == PORT_TLS and not address.implicit_tls:
        mend = "port 465 begins with TLS: write smtps:// in smtp_url"
    elif address.port == PORT_PLAIN and isinstance(error, TimeoutError):
        mend = "many hosters block port 25: use the provider's port 587 or 465, or correct smtp_url"
    return fault("smtp.server", found, mend)


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """The TLS error in an error's causes."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_distrust(error: BaseException) -> bool:
    """Whether TLS would be had, were its certificate believed."""
    return isinstance(_tls_error(error), ssl.SSLCertVerificationError)


def _why(error: BaseException) -> str:
    return str(getattr(_tls_error(error), "verify_message", error)).rstrip(".")


def _no_tls(visit: Visit, error: BaseException) -> Finding:
    found = f"STARTTLS is offered and fails ({visit.said(error)}), so nothing is sent there"
    return fault("smtp.tls", found, "mend TLS in the mail server (TLS 1.2 or later is needed)")


def _distrusted(visit: Visit, error: BaseException) -> Finding:
    return fault(
        "smtp.tls",
        f"the certificate of {visit.address.host} does not hold ({_why(error)}), so nothing is sent there",
        "correct the host in smtp_url, renew the certificate, or name its authority in SSL_CERT_FILE",
    )


async def _encrypt(visit: Visit, smtp: aiosmtplib.SMTP) -> BaseException | None:
    """Make the connection TLS as the relay would, with its finding; gives the error if that fails."""
    if not visit.address.implicit_tls:
        if not smtp.supports_extension("starttls"):
            if not visit.address.username:
                found = "no TLS is offered: emails go in the clear"
                visit.findings.append(note("smtp.tls", found, "turn STARTTLS on in the mail server if that matters"))
            return None
        try:
            await smtp.starttls()
        except TROUBLE as error:
            return error
        await smtp.ehlo()  # what was said before TLS does not count (RFC 3207 §4.2)
    certificate: Any = smtp.get_transport_info("peercert")
    if certificate:
        visit.findings.append(judge_certificate(certificate, _cipher(smtp), time.time()))
    return None


def _cipher(smtp: aiosmtplib.SMTP) -> str:
    name, version, bits = smtp.get_transport_info("cipher")
    return f"{version} ({name}, {bits} bits)"


def judge_certificate(certificate: dict[str, Any], cipher: str, now_s: float) -> Finding:
    """A certificate that was verified: whose it is, and whether it will hold for a while."""
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    until = certificate["notAfter"]
    left_d = (ssl.cert_time_to_seconds(until) - now_s) / DAY_S
    found = f"{cipher}, certificate of {', '.join(names[:3]) or 'nobody'} verified, until {until}"
    if left_d < EXPIRES_SOON_D:
        return note("smtp.tls", f"{found}: {left_d:.0f} days", "renew it, or see that it renews itself")
    return ok("smtp.tls", found)


async def _converse(visit: Visit, smtp: aiosmtplib.SMTP) -> list[Finding]:
    if visit.address.username and not (visit.address.implicit_tls or smtp.get_transport_info("sslcontext")):
        visit.findings.append(
            fault(
                "smtp.tls",
                "it offers no STARTTLS, and a login is never sent in the clear",
                "use smtps://, or no login",
            )
        )
        return visit.leave("a login is never sent in the clear")
    login = await _log_in(visit, smtp)
    visit.findings += [
        login,
        _pipelining(visit, smtp),
        judge_size(smtp.esmtp_extensions.get("size"), visit.largest_bytes),
    ]
    if login.grade is Grade.FAULT:
        return visit.leave("the login was refused")
    visit.findings.append(await _ask_for_sender(visit, smtp))
    try:
        await smtp.quit()
    except TROUBLE:  # nothing was left to say
        smtp.close()
    return visit.findings


async def _log_in(visit: Visit, smtp: aiosmtplib.SMTP) -> Finding:
    offered = ", ".join(smtp.server_auth_methods).upper() or "none"
    if visit.address.username is None or visit.address.password is None:
        return ok("smtp.login", f"smtp_url has no login (offered: {offered})")
    try:
        await smtp.login(visit.address.username, visit.address.password)
    except aiosmtplib.SMTPAuthenticationError as error:
        found = f"the login of smtp_url is refused ({visit.said(error)}; offered: {offered})"
        return fault("smtp.login", found, "correct user and password there")
    except TROUBLE as error:
        found = f"the login of smtp_url cannot be given ({visit.said(error)}; offered: {offered})"
        return fault(
            "smtp.login", found, "ask the server's operator for PLAIN, LOGIN or CRAM-MD5, or take the login out"
        )
    return ok("smtp.login", f"accepted (offered: {offered})")


def _pipelining(visit: Visit, smtp: aiosmtplib.SMTP) -> Finding:
    if smtp.supports_extension("pipelining"):
        return ok("smtp.pipelining", "offered: a message takes one round trip")
    found = f"not offered: a message takes four round trips on each of {visit.settings.connections_max} connections"
    return note("smtp.pipelining", found, "raise connections_max if that is too slow")


def judge_size(offered: str | None, largest_bytes: int) -> Finding:
    """Whether the largest message fits what EHLO says about SIZE (RFC 1870: none or 0 is no limit that is known)."""
    limit = size_limit(offered or "")
    if not limit:
        return ok("smtp.size", "the server names no limit")
    needed = largest_bytes or SIZE_USUAL
    what = f"the largest message known has {largest_bytes}" if largest_bytes else f"messages of {SIZE_USUAL} are usual"
    if needed > limit:
        mend = "ask the server's operator for more, or say less in the email and more on the page"
        return fault("smtp.size", f"the server takes at most {limit} bytes, {what}", mend)
    return ok("smtp.size", f"the server takes up to {limit} bytes, {what}")


async def _ask_for_sender(visit: Visit, smtp: aiosmtplib.SMTP) -> Finding:
    """MAIL, RCPT, RSET: would a message of the sender be taken? No DATA, so there is none."""
    size = f" SIZE={visit.largest_bytes or SIZE_USUAL}" if smtp.supports_extension("size") else ""
    is_utf8 = not (visit.sender + visit.recipient).isascii() and smtp.supports_extension("smtputf8")
    for command in (
        f"MAIL FROM:<{visit.sender}>{size}{' SMTPUTF8' if is_utf8 else ''}",
        f"RCPT TO:<{visit.recipient}>",
    ):
        reply = await smtp.execute_command(command.encode())
        finding = judge_envelope(
            command, reply.code, visit.without_login(reply.message), login=bool(visit.address.username)
        )
        if finding is not None:
            return finding
    await smtp.execute_command(b"RSET")
    return ok(
        "smtp.sender", f"{visit.sender} may write to {visit.recipient}; asked with MAIL and RCPT, taken back with RSET"
    )


def judge_envelope(command: str, code: int, text: str, *, login: bool) -> Finding | None:
    """What a reply to MAIL or RCPT means for what will be sent; None if it is good."""
    if code // 100 == 2:  # noqa: PLR2004 - positive completion, RFC 5321 §4.2.1
        return None
    found = f"the server says {code} {text} to {command}"
    if code // 100 == 4:  # noqa: PLR2004 - transient, RFC 5321 §4.2.1
        return note("smtp.sender", f"{found}: it asks to be tried again later, as greylisting does, and the relay does")
    if command.startswith("RCPT"):
        mend = "correct the address, or ask the server's operator to relay for this host"
    elif login:
        mend = "correct sender, or ask the server's operator which senders this login may use"
    else:
        mend = "correct sender, or give smtp_url the login that the server wants"
    return fault("smtp.sender", found, mend)
