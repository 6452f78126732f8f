"""Setting up SMTP on one address: connection, greeting, EHLO and TLS, up to the login.

aiosmtplib does the steps, one at a time, so that each failure is told apart and keeps the server's reply.
"""

import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final

import aiosmtplib

from outbox.settings.urls import SmtpAddress
from outbox.smtp.dialing import Attempt, connect_to
from outbox.smtp.helo import helo_name

ERRORS: Final = (aiosmtplib.SMTPException, OSError, TimeoutError, ValueError)
"""Everything that a step raises if something is wrong with the server or the network."""

_CLOSING: Final = 421
_READY_MIN, _REFUSALS_MIN, _CODES_END = 200, 400, 600


class TlsBrokenError(Exception):
    """STARTTLS was offered and failed; the connection cannot be used any more. `__cause__` has the error."""


class HelloRefusedError(aiosmtplib.SMTPHeloError):
    """The server refused EHLO with this name."""

    def __init__(self, code: int, message: str, name: str) -> None:
        super().__init__(code, message)
        self.name = name


def reply_of(error: BaseException) -> tuple[int, str] | None:
    """Return the reply that an error is about; None if there is none, or it is not an SMTP reply."""
    code, text = getattr(error, "code", None), getattr(error, "message", "")
    if not isinstance(code, int) or not _READY_MIN <= code < _CODES_END:
        return None
    return code, str(text)


def describe(error: BaseException) -> str:
    """Return an error in words, with the server's reply where there is one; empty for a timeout."""
    if (reply := reply_of(error)) is not None:
        return f"{reply[0]} {reply[1]}"
    if isinstance(error, aiosmtplib.SMTPResponseException):  # what came is not a reply
        return error.message
    if isinstance(error, TimeoutError):
        return ""
    if isinstance(error, (aiosmtplib.SMTPConnectError, TlsBrokenError)) and error.__cause__ is not None:
        return describe(error.__cause__)
    return _describe_system_error(error) if isinstance(error, OSError) else str(error)


def _describe_system_error(error: OSError) -> str:
    if isinstance(error, aiosmtplib.SMTPServerDisconnected):
        return "the server closed the connection"
    if isinstance(error, socket.gaierror):
        return f"the name has no address ({error.strerror})"
    return str(error) if isinstance(error, ssl.SSLError) or not error.errno else os.strerror(error.errno).lower()


@dataclass(frozen=True, slots=True)
class Opening:
    """Set-up of connections to a mail server."""

    address: SmtpAddress
    context: ssl.SSLContext
    helo_name: str | None
    timeout_s: float

    async def greet(self, attempt: Attempt) -> aiosmtplib.SMTP:
        """Return a connection on which the server has said 220, in TLS for smtps://.

        Raises:
            aiosmtplib.SMTPConnectResponseError: the greeting refuses.
            Exception: the others of `ERRORS`.

        """
        sock = await connect_to(attempt.endpoint)
        attempt.is_connected()
        try:
            smtp = aiosmtplib.SMTP(
                hostname=self.address.host,
                sock=sock,
                use_tls=self.address.implicit_tls,
                start_tls=False,
                tls_context=self.context,
                local_hostname=helo_name(self.helo_name, sock.getsockname()),
                timeout=self.timeout_s,
            )
        except BaseException:
            sock.close()
            raise
        try:
            await smtp.connect()
        except BaseException:
            smtp.close()
            raise
        return smtp


async def say_hello(smtp: aiosmtplib.SMTP) -> HelloRefusedError | None:
    """Say EHLO, and HELO to a server that does not know EHLO (RFC 5321 §3.2); then return the refusal of EHLO.

    Raises:
        HelloRefusedError: both are refused, or EHLO with a 4xx reply; it has the reply to EHLO.

    """
    try:
        await smtp.ehlo()
    except aiosmtplib.SMTPHeloError as error:
        refused = HelloRefusedError(error.code, error.message, smtp.local_hostname or "")
        if not smtp.is_connected or refused.code // 100 != 5:  # noqa: PLR2004 - permanent, RFC 5321 §4.2.1
            raise refused from None
        try:
            await smtp.helo()
        except ERRORS:
            raise refused from None
        return refused
    return None


async def start_tls(smtp: aiosmtplib.SMTP, *, timeout_s: float) -> aiosmtplib.SMTPResponseException | None:
    """Begin TLS with STARTTLS, then say EHLO again; return None, or the refusal if the connection stays usable.

    In TLS 1.3 a rejected certificate or an alert may show only at the first reply, so that reply belongs to this step.

    Raises:
        TlsBrokenError: the connection is lost, silent or out of step.
        aiosmtplib.SMTPHeloError: TLS works, and EHLO is refused in it.

    """
    try:
        await smtp.starttls(timeout=timeout_s)
    except aiosmtplib.SMTPResponseException as refused:
        is_refusal = _REFUSALS_MIN <= refused.code < _CODES_END and refused.code != _CLOSING
        if is_refusal and smtp.is_connected:  # RFC 3207 §4: the session goes on as if STARTTLS had not been said
            return refused
        raise TlsBrokenError from refused
    except ERRORS as error:
        raise TlsBrokenError from error
    try:
        await smtp.ehlo(timeout=timeout_s)
    except aiosmtplib.SMTPHeloError as refused:
        if reply_of(refused) is None or refused.code == _CLOSING:
            raise TlsBrokenError from refused
        raise
    except ERRORS as error:
        raise TlsBrokenError from error
    return None


async def goes_on(smtp: aiosmtplib.SMTP) -> bool:
    """Return True if the server takes further commands; some hang up after refusing STARTTLS."""
    try:
        await smtp.noop()
    except ERRORS:
        smtp.close()
        return False
    return True


def is_encrypted(smtp: aiosmtplib.SMTP) -> bool:
    """Return True if the connection is in TLS, whatever the library and the server made of STARTTLS."""
    transport: Any = smtp.transport
    return transport is not None and transport.get_extra_info("ssl_object") is not None
