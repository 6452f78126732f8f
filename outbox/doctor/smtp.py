"""The doctor's look at the mail server: a conversation as far as RCPT, taken back with RSET. Nothing is sent.

aiosmtplib's own steps serve here, one at a time, so that each can be told apart when it fails.
"""

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiosmtplib

from outbox.doctor.finding import Finding, Grade, fault, not_checked, note, ok
from outbox.mail.host_name import is_literal
from outbox.settings import Settings, StartTls
from outbox.settings.urls import SmtpAddress
from outbox.smtp.connector import why_tls
from outbox.smtp.dialing import AllFailedError, Attempt, Dialer, Endpoint, resolve
from outbox.smtp.extensions import size_limit
from outbox.smtp.helo import name_of_host
from outbox.smtp.login import LoginError, log_in
from outbox.smtp.opening import (
    ERRORS,
    HelloRefusedError,
    Opening,
    TlsBrokenError,
    describe,
    reply_of,
    say_hello,
    start_tls,
)

EXPIRES_SOON_D: Final = 14
SIZE_USUAL: Final = 100_000  # bytes of a mail, if none is known
PORT_PLAIN: Final = 25
PORT_TLS: Final = 465
DAY_S: Final = 86_400
RESOLVER_S: Final = 5.0
# Two kinds of refusal for which correcting the sender would not help.
_LIMIT: Final = re.compile(r"limit|quota|exceed", re.IGNORECASE)
_BLOCKED_HOST: Final = re.compile(r"client host|(block|black|deny) ?list|rbl|spamhaus", re.IGNORECASE)

CHECKS: Final = ("smtp.tls", "smtp.login", "smtp.pipelining", "smtp.size", "smtp.helo", "smtp.sender")
TROUBLE = ERRORS


@dataclass(slots=True)
class Visit:
    """One visit to the server, and what it has taught so far."""

    settings: Settings
    address: SmtpAddress
    sender: str
    recipient: str
    largest_bytes: int
    findings: list[Finding] = field(default_factory=list)
    dialer: Dialer = field(init=False)
    ehlo_refused: HelloRefusedError | None = None
    """Refusal of EHLO by a server that takes HELO."""

    def __post_init__(self) -> None:
        self.dialer = Dialer(self.address.host, self.address.port)

    def leave(self, why: str) -> list[Finding]:
        """Look no further: what was not looked at says why."""
        seen = {finding.check for finding in self.findings}
        return [*self.findings, *not_checked([check for check in CHECKS if check not in seen], why)]

    def said(self, error: BaseException) -> str:
        """Return an error in words, without the login."""
        text = describe(error) or f"no answer within {self.settings.connect_timeout_s:g} s"
        return self.without_login(text)

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
    await _survey(visit)
    async with _connected(visit, verified=True) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        trouble = await _encrypt(visit, smtp)
        if trouble is None:
            return await _converse(visit, smtp)
    if not visit.settings.wants_verified_tls:
        return await _examine_unverified(visit, trouble)
    visit.findings.append(_distrusted(visit, trouble) if _is_distrust(trouble) else _no_tls(visit, trouble))
    return visit.leave("TLS fails")


async def _examine_unverified(visit: Visit, trouble: BaseException) -> list[Finding]:
    """Come again as the relay does where no login is sent: any certificate is better than clear text (RFC 7435)."""
    if not _is_distrust(trouble):
        return await _examine_in_the_clear(visit, trouble)
    async with _connected(visit, verified=False) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        again = await _encrypt(visit, smtp)
        if again is None:
            visit.findings.append(
                note(
                    "smtp.tls",
                    f"{_cipher(smtp)}, certificate not verified ({_why(trouble)}): without a login that is fine; it "
                    "protects from passive eavesdroppers, not from an attacker in between",
                    "give the mail server a certificate for its name if that matters",
                )
            )
            return await _converse(visit, smtp)
    return await _examine_in_the_clear(visit, again)


async def _examine_in_the_clear(visit: Visit, trouble: BaseException) -> list[Finding]:
    """Come again as the relay does where TLS fails and no login is sent: clear text is better than no mail."""
    async with _connected(visit, verified=False) as smtp:
        if smtp is None:
            return visit.leave("the mail server cannot be reached")
        found = f"STARTTLS is offered and fails ({visit.said(trouble)}), so emails go in clear text"
        fix = 'repair TLS in the mail server, or write starttls = "always" if nothing may be sent without TLS'
        visit.findings.append(note("smtp.tls", found, fix))
        return await _converse(visit, smtp)


def _opening(visit: Visit, *, verified: bool) -> Opening:
    context = ssl.create_default_context()
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Opening(visit.address, context, visit.settings.helo_name, visit.settings.connect_timeout_s)


async def _greeted(visit: Visit, opening: Opening, attempt: Attempt) -> aiosmtplib.SMTP:
    """Return a connection to one address after EHLO. Raises `TROUBLE`."""
    smtp = await opening.greet(attempt)
    try:
        visit.ehlo_refused = await say_hello(smtp) or visit.ehlo_refused
    except BaseException:
        smtp.close()
        raise
    return smtp


async def _survey(visit: Visit) -> None:
    """Ask each address of a host that has several. If none of them works, `_connected` reports it."""
    try:
        async with asyncio.timeout(visit.settings.connect_timeout_s):
            endpoints = await resolve(visit.address.host, visit.address.port)
    except TROUBLE:
        return
    if len(endpoints) == 1:
        return
    opening = _opening(visit, verified=visit.settings.wants_verified_tls)
    errors = await asyncio.gather(*(_ask_address(visit, opening, endpoint) for endpoint in endpoints))
    failed = [f"{endpoint}: {visit.said(error)}" for endpoint, error in zip(endpoints, errors, strict=True) if error]
    works = [str(endpoint) for endpoint, error in zip(endpoints, errors, strict=True) if error is None]
    if not works:
        return
    if not failed:
        visit.findings.append(ok("smtp.server", f"{visit.address} answers at each address: {', '.join(works)}"))
        return
    found = f"{visit.address} answers at {', '.join(works)}, and not at every address: {', '.join(failed)}"
    fix = "correct the name's addresses in the DNS, the network or the mail server; the relay uses the others meanwhile"
    visit.findings.append(note("smtp.server", found, fix))


async def _ask_address(visit: Visit, opening: Opening, endpoint: Endpoint) -> Exception | None:
    """Return why one address cannot be used; None if it can."""
    try:
        async with asyncio.timeout(visit.settings.connect_timeout_s):
            smtp = await _greeted(visit, opening, Attempt(endpoint, 0.0))
    except TROUBLE as error:
        return error
    try:
        await smtp.quit()
    except TROUBLE:  # it answered, and that is what was asked
        smtp.close()
    return None


@asynccontextmanager
async def _connected(visit: Visit, *, verified: bool) -> AsyncIterator[aiosmtplib.SMTP | None]:
    """Yield a connection after EHLO, in TLS for smtps://; None, with the finding, if the server cannot be used."""
    opening = _opening(visit, verified=verified)
    try:
        smtp = await visit.dialer.open(
            lambda attempt: _greeted(visit, opening, attempt),
            within_s=visit.settings.connect_timeout_s,
            discard=aiosmtplib.SMTP.close,
        )
    except (AllFailedError, *TROUBLE) as error:
        visit.findings = [finding for finding in visit.findings if finding.check != "smtp.server"]
        visit.findings.append(_unreachable(visit, error))
        yield None
        return
    try:
        if not any(finding.check == "smtp.server" for finding in visit.findings):
            visit.findings.append(_answers(visit))
        yield smtp
    finally:
        smtp.close()


def _answers(visit: Visit) -> Finding:
    if (refused := visit.ehlo_refused) is None:
        return ok("smtp.server", f"{visit.address} answers")
    found = f"{visit.address} answers EHLO {refused.name} with {visit.said(refused)} and takes HELO: it offers nothing"
    return note("smtp.server", found, "set helo_name to a name that it accepts, or see its log")


def _unreachable(visit: Visit, error: Exception) -> Finding:
    """Return the finding for a server none of whose addresses can be used."""
    failures = error.failures if isinstance(error, AllFailedError) else []
    if len(failures) > 1:
        told = max((one for _, one in failures), key=lambda one: reply_of(one) is not None)  # a reply tells most
        each = ", ".join(f"{endpoint}: {visit.said(one)}" for endpoint, one in failures)
        mend = _unusable(visit, told).mend
        return fault("smtp.server", f"{visit.address} answers at none of its addresses: {each}", mend)
    return _unusable(visit, failures[0][1] if failures else error)


def _unusable(visit: Visit, error: Exception) -> Finding:
    address = visit.address
    if (reply := reply_of(error)) is not None:
        to = f"EHLO {error.name}" if isinstance(error, HelloRefusedError) else ""
        found, mend = judge_refusal(reply[0], visit.said(error), to=to)
        return fault("smtp.server", f"{address} {found}", mend)
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
    elif _is_hang_up(error):
        mend = "see the mail server's log: it may refuse this host, or have too many connections"
    return fault("smtp.server", found, mend)


def _is_hang_up(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (aiosmtplib.SMTPServerDisconnected, ConnectionResetError)):
            return True
        error = error.__cause__
    return False


def judge_refusal(code: int, said: str, *, to: str) -> tuple[str, str]:
    """Return what a server says that refuses in its greeting or in its reply to EHLO, and the fix."""
    found = f"answers {to} with {said}" if to else f"greets with {said}"
    if code // 100 == 4:  # noqa: PLR2004 - transient, RFC 5321 §4.2.1
        return found, "it takes no mail for now: see its log, and lower connections_max if it has too many connections"
    if to:
        return found, "set helo_name to a name that it accepts, or ask its operator to allow this host"
    return found, "it takes no mail from this host: ask its operator to allow it, or correct smtp_url"


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
    return fault("smtp.tls", found, "repair TLS in the mail server (TLS 1.2 or later is needed)")


def _distrusted(visit: Visit, error: BaseException) -> Finding:
    return fault(
        "smtp.tls",
        f"the certificate of {visit.address.host} does not hold ({_why(error)}), so nothing is sent there",
        "correct the host in smtp_url, renew the certificate, or name its authority in SSL_CERT_FILE",
    )


async def _encrypt(visit: Visit, smtp: aiosmtplib.SMTP) -> BaseException | None:
    """Make the connection TLS as the relay would, with its finding; gives the error if that fails."""
    if visit.settings.starttls is StartTls.NEVER and not visit.address.implicit_tls:
        found = 'starttls is "never": emails go in the clear'
        visit.findings.append(note("smtp.tls", found, 'write starttls = "always" if that matters'))
        return None
    if not visit.address.implicit_tls:
        if not smtp.supports_extension("starttls"):
            if not visit.settings.wants_verified_tls:
                found = "no TLS is offered: emails go in the clear"
                visit.findings.append(note("smtp.tls", found, "turn STARTTLS on in the mail server if that matters"))
            return None
        try:
            refused = await start_tls(smtp, timeout_s=visit.settings.connect_timeout_s)
        except TlsBrokenError as broken:
            return broken
        if refused is not None:
            return refused
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
    why, _, mend = why_tls(visit.address).partition("; ")
    if visit.settings.wants_verified_tls and not (visit.address.implicit_tls or smtp.get_transport_info("sslcontext")):
        visit.findings.append(
            fault(
                "smtp.tls",
                f"it offers no STARTTLS, and {why}",
                mend,
            )
        )
        return visit.leave("nothing is sent without TLS")
    login = await _log_in(visit, smtp)
    visit.findings += [
        login,
        _pipelining(visit, smtp),
        judge_size(smtp.esmtp_extensions.get("size"), visit.largest_bytes),
    ]
    if login.grade is Grade.FAULT:
        return visit.leave("the login was refused")
    visit.findings += await _ask_for_sender(visit, smtp)
    try:
        await smtp.quit()
    except TROUBLE:  # nothing was left to say
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
            return fault("smtp.login", f"the login of smtp_url is refused {found}", "correct its user or password")
        fix = "ask the server's operator for PLAIN, LOGIN or CRAM-MD5, or take the login out"
        if error.is_lost or error.code:
            fix = "see the mail server's log"
        return fault("smtp.login", f"the login of smtp_url cannot be given {found}", fix)
    return ok("smtp.login", f"accepted (offered: {offered})")


def _pipelining(visit: Visit, smtp: aiosmtplib.SMTP) -> Finding:
    if smtp.supports_extension("pipelining"):
        return ok("smtp.pipelining", "offered: a message takes two round trips")
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
            fault("smtp.helo", found, fix),
            *not_checked(["smtp.sender"], "the name in EHLO is refused"),
        ]
    await smtp.execute_command(b"RSET")
    found = f"{visit.sender} may write to {visit.recipient}; asked with MAIL and RCPT, taken back with RSET"
    return [helo, ok("smtp.sender", found)]


def is_about_helo(code: int, text: str) -> bool:
    """Return True for a refusal that names HELO: Postfix and Exim judge it only at RCPT."""
    return code >= 400 and re.search(r"\b(helo|ehlo|lhlo)\b", text, re.IGNORECASE) is not None  # noqa: PLR2004


async def judge_helo(name: str, wanted: str | None) -> Finding:
    """Judge the name in EHLO; `wanted` is the setting helo_name."""
    if is_literal(name):
        origin = "helo_name" if wanted else f"the host name, {name_of_host()}, is not fully qualified"
        return ok("smtp.helo", f"EHLO has the address literal {name} ({origin})")
    found = f"EHLO has the name {name} ({'helo_name' if wanted else 'the host name'})"
    try:
        async with asyncio.timeout(RESOLVER_S):
            await asyncio.get_running_loop().getaddrinfo(name, None)
    except (OSError, TimeoutError, UnicodeError):
        fix = "set helo_name to the name of this host in the DNS, or to an address literal such as [192.0.2.1]"
        return note("smtp.helo", f"{found}, which has no address in the DNS; some servers refuse that", fix)
    return ok("smtp.helo", found)


def judge_envelope(command: str, code: int, text: str, *, login: bool) -> Finding | None:
    """What a reply to MAIL or RCPT means for what will be sent; None if it is good."""
    if code // 100 == 2:  # noqa: PLR2004 - positive completion, RFC 5321 §4.2.1
        return None
    found = f"the server says {code} {text} to {command}"
    if code // 100 == 4:  # noqa: PLR2004 - transient, RFC 5321 §4.2.1
        return note("smtp.sender", f"{found}: it asks to be tried again later, as greylisting does, and the relay does")
    if _LIMIT.search(text) and not command.startswith("RCPT"):
        mend = "wait until the limit ends (the relay keeps trying), or ask the server's operator for a higher one"
    elif _BLOCKED_HOST.search(text):
        mend = "ask the server's operator to allow this host, and see why its address is on the list"
    elif command.startswith("RCPT"):
        mend = "correct the address, or ask the server's operator to relay for this host"
    elif login:
        mend = "correct sender, or ask the server's operator which senders this login may use"
    else:
        mend = "correct sender, or give smtp_url the login that the server wants"
    return fault("smtp.sender", found, mend)
