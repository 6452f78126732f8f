"""Judgements of a mail server's replies, offers, TLS errors and certificate; pure, but for the lookup of a name."""

import asyncio
import re
import ssl
from typing import Any, Final

from outbox.doctor.finding import Finding, note, ok, problem
from outbox.mail.host_name import is_literal
from outbox.smtp.extensions import size_limit
from outbox.smtp.helo import name_of_host

EXPIRES_SOON_D: Final = 14
SIZE_USUAL: Final = 100_000  # bytes of a mail, if none is known
DAY_S: Final = 86_400
RESOLVER_S: Final = 5.0
# Two kinds of refusal for which correcting the sender would not help.
_LIMIT: Final = re.compile(r"limit|quota|exceed", re.IGNORECASE)
_BLOCKED_HOST: Final = re.compile(r"client host|(block|black|deny) ?list|rbl|spamhaus", re.IGNORECASE)


def judge_refusal(code: int, reply: str, *, to: str) -> tuple[str, str]:
    """Return what a server says that refuses in its greeting or in its reply to EHLO, and the fix."""
    found = f"answers {to} with {reply}" if to else f"greets with {reply}"
    if code // 100 == 4:  # noqa: PLR2004 - transient, RFC 5321 §4.2.1
        return found, "it takes no mail for now: see its log, and lower connections_max if it has too many connections"
    if to:
        return found, "set helo_name to a name that it accepts, or ask its operator to allow this host"
    return found, "it takes no mail from this host: ask its operator to allow it, or correct smtp_url"


def tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """Return the TLS error among an error's causes."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_distrust(error: BaseException) -> bool:
    """Return True if TLS fails only because the certificate cannot be verified."""
    return isinstance(tls_error(error), ssl.SSLCertVerificationError)


def distrust_reason(error: BaseException) -> str:
    """Return why the certificate cannot be verified."""
    return str(getattr(tls_error(error), "verify_message", error)).rstrip(".")


def judge_distrust(host: str, error: BaseException) -> Finding:
    """Judge a certificate that cannot be verified, where it has to be."""
    return problem(
        "smtp.tls",
        f"the certificate of {host} does not hold ({distrust_reason(error)}), so nothing is sent there",
        "correct the host in smtp_url, renew the certificate, or name its authority in SSL_CERT_FILE",
    )


def judge_certificate(certificate: dict[str, Any], cipher: str, now_s: float) -> Finding:
    """Judge a certificate that was verified: its names, and the days until it expires."""
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    until = certificate["notAfter"]
    left_d = (ssl.cert_time_to_seconds(until) - now_s) / DAY_S
    found = f"{cipher}, certificate of {', '.join(names[:3]) or 'nobody'} verified, until {until}"
    if left_d < EXPIRES_SOON_D:
        return note("smtp.tls", f"{found}: {left_d:.0f} days", "renew it, or see that it renews itself")
    return ok("smtp.tls", found)


def judge_size(offered: str | None, largest_bytes: int) -> Finding:
    """Judge the limit that EHLO names (SIZE) by the largest message; none or 0 is no limit that is known (RFC 1870)."""
    limit = size_limit(offered or "")
    if not limit:
        return ok("smtp.size", "the server names no limit")
    needed = largest_bytes or SIZE_USUAL
    what = f"the largest message known has {largest_bytes}" if largest_bytes else f"messages of {SIZE_USUAL} are usual"
    if needed > limit:
        fix = "ask the server's operator for more, or say less in the email and more on the page"
        return problem("smtp.size", f"the server takes at most {limit} bytes, {what}", fix)
    return ok("smtp.size", f"the server takes up to {limit} bytes, {what}")


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
    """Judge a reply to MAIL or RCPT; None if it accepts."""
    if code // 100 == 2:  # noqa: PLR2004 - positive completion, RFC 5321 §4.2.1
        return None
    found = f"the server says {code} {text} to {command}"
    if code // 100 == 4:  # noqa: PLR2004 - transient, RFC 5321 §4.2.1
        return note("smtp.sender", f"{found}: it asks to be tried again later, as greylisting does, and the relay does")
    if _LIMIT.search(text) and not command.startswith("RCPT"):
        fix = "wait until the limit ends (the relay keeps trying), or ask the server's operator for a higher one"
    elif _BLOCKED_HOST.search(text):
        fix = "ask the server's operator to allow this host, and see why its address is on the list"
    elif command.startswith("RCPT"):
        fix = "correct the address, or ask the server's operator to relay for this host"
    elif login:
        fix = "correct sender, or ask the server's operator which senders this login may use"
    else:
        fix = "correct sender, or give smtp_url the login that the server wants"
    return problem("smtp.sender", found, fix)
