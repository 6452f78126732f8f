"""Checks of routes without SMTP: an LMTP server, asked as far as RCPT, or a Maildir."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outbox.doctor.finding import Finding, not_checked, note, ok, problem
from outbox.doctor.smtp_judgements import judge_envelope, judge_refusal, judge_size
from outbox.smtp import maildir
from outbox.smtp.dialing import AllFailedError, Dialer
from outbox.smtp.lmtp import LmtpError, open_lmtp
from outbox.smtp.opening import describe
from outbox.smtp.replies import GarbageError, Reply, ReplyReader

if TYPE_CHECKING:
    from outbox.settings import Settings
    from outbox.settings.urls import SmtpAddress
    from outbox.smtp.dialing import Endpoint

TROUBLE = (LmtpError, GarbageError, OSError, TimeoutError)


def examine_maildir(address: "SmtpAddress") -> list[Finding]:
    """Check that the directory can be written to. It is made if it is not there, as the relay would."""
    assert address.path is not None
    try:
        maildir.prepare(Path(address.path))
    except OSError as error:
        found = f"{address} cannot be written to ({error.filename}: {error.strerror})"
        return [problem("smtp.server", found, "name a directory of this user's in smtp_url")]
    found = f"{address} is a Maildir: emails lie there and go nowhere else"
    return [note("smtp.server", found, "write smtp:// in smtp_url where people are to get their mail")]


async def examine_lmtp(settings: "Settings", *, sender: str, recipient: str, largest_bytes: int) -> list[Finding]:
    """Return all findings about an LMTP server; never raises for what is wrong with it."""
    address = settings.smtp_url
    assert address is not None
    findings: list[Finding] = []
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            dialer = Dialer(address.host, address.port)
            within_s = settings.connect_timeout_s
            offers, transport = await open_lmtp(address, settings.helo_name, dialer=dialer, within_s=within_s)
            findings += [
                ok("smtp.server", f"{address} answers"),
                judge_size(str(offers.size_max), largest_bytes),
            ]
            try:
                findings.append(await _ask(transport, sender, recipient))
            finally:
                transport.abort()
    except AllFailedError as failed:
        return [_unusable(address, failed.failures, settings.connect_timeout_s), *_unchecked()]
    except TROUBLE as error:
        if not findings:
            return [_unusable(address, [(None, error)], settings.connect_timeout_s), *_unchecked()]
        why = describe(error) or f"no answer within {settings.connect_timeout_s:g} s"
        findings.append(problem("smtp.sender", f"{address} breaks off ({why})", "see the mail server's log"))
    return findings


def _unchecked() -> list[Finding]:
    return not_checked(("smtp.size", "smtp.sender"), "the mail server cannot be reached")


def _unusable(
    address: "SmtpAddress", failures: "Sequence[tuple[Endpoint | None, Exception]]", timeout_s: float
) -> Finding:
    """Return the finding for a server none of whose addresses can be used."""
    reasons = {
        endpoint: " ".join((describe(error) or f"no answer within {timeout_s:g} s").split())
        for endpoint, error in failures
    }
    error = failures[0][1]
    if len(reasons) > 1:
        each = ", ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())
        return problem(
            "smtp.server", f"{address} answers at none of its addresses: {each}", "see the mail server's log"
        )
    (reason,) = reasons.values()
    if isinstance(error, LmtpError) and error.code:
        found, fix = judge_refusal(error.code, reason, to=error.command)
        return problem("smtp.server", f"{address} {found}", fix)
    return problem(
        "smtp.server", f"{address} does not answer as an LMTP server ({reason})", "start it or correct smtp_url"
    )


async def _ask(transport: asyncio.Transport, sender: str, recipient: str) -> Finding:
    """Ask with MAIL, RCPT and RSET. Without DATA there is no message."""
    asking = _Asking()
    transport.set_protocol(asking)
    for command in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>"):
        reply = await asking.ask(transport, command)
        finding = judge_envelope(command, reply.code, reply.text, login=False)
        if finding is not None:
            return finding
    await asking.ask(transport, "RSET")
    found = f"{sender} may write to {recipient}; asked with MAIL and RCPT, taken back with RSET"
    return ok("smtp.sender", found)


class _Asking(asyncio.Protocol):
    """Protocol that sends one command at a time and waits for its reply."""

    def __init__(self) -> None:
        self._reader = ReplyReader()
        self._replies: asyncio.Queue[Reply | Exception] = asyncio.Queue()

    async def ask(self, transport: asyncio.Transport, command: str) -> Reply:
        transport.write(f"{command}\r\n".encode())
        reply = await self._replies.get()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def data_received(self, data: bytes) -> None:
        try:
            for reply in self._reader.feed(data):
                self._replies.put_nowait(reply)
        except GarbageError as error:
            self._replies.put_nowait(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._replies.put_nowait(exc or ConnectionError("it closed the connection"))
