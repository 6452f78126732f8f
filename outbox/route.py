"""The way to the mail server: connections that are set up, each with the conversation to attach to it.

aiosmtplib sets up SMTP, `lmtp` LMTP; `maildir` stands for a server where there is none.
"""

import asyncio
import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiosmtplib

from outbox import maildir
from outbox.address import SmtpAddress
from outbox.conversation import Conversation, Desk, transport_of
from outbox.esmtp import Offers
from outbox.letterhead import Letterhead
from outbox.lmtp import LmtpError, open_lmtp
from outbox.settings import Settings, StartTls

# What EHLO says. Not getfqdn(): it asks the resolver, which may take long or not answer.
LOCAL_HOSTNAME: Final = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.") or "localhost"


def why_tls(address: SmtpAddress) -> str:
    """Return why TLS is required of a server that does not offer it, and the fix."""
    if address.username:
        return "a login is never sent in the clear; use smtps://, or no login"
    return 'starttls is "always", so nothing is sent; turn STARTTLS on in the mail server, or use smtps://'


class RouteTroubleError(Exception):
    """The server cannot be used now: no connection, or no EHLO, TLS or AUTH. No message is to blame."""


@dataclass(slots=True)
class Route:
    """Opens connections to one mail server. ConfigurationError if what it adds to emails cannot be made."""

    address: SmtpAddress
    settings: Settings
    talk: type[Conversation] | None = None  # another kind, for who wants to hear more
    named: str = ""  # as the settings name it
    letterhead: Letterhead | None = field(init=False)
    _tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self.letterhead = Letterhead.of(self.settings)

    @property
    def name(self) -> str:
        """What the fleet calls this way, in pauses, paces and allowances: its name in the settings, else host and port.

        Two routes may lead to one server, with a login and limits of their own each.
        """
        return self.named or self.address.name

    async def connect(self, desk: Desk) -> tuple[Conversation, asyncio.Transport]:
        """A connection that is set up, and the conversation to attach to it.

        Raises:
            RouteTroubleError: one line that says at which step and why, without credentials.

        """
        opening = {"lmtp": self._open_lmtp, "file": self._open_maildir}.get(self.address.scheme, self._open_smtp)
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                offers, transport = await opening()
        except RouteTroubleError:
            raise
        except (aiosmtplib.SMTPException, LmtpError, OSError, TimeoutError, ValueError) as error:
            raise RouteTroubleError(self._explain(error)) from error
        conversation = (self.talk or Conversation)(
            desk,
            offers=offers,
            command_timeout_s=self.settings.command_timeout_s,
            data_done_timeout_s=self.settings.data_done_timeout_s,
            messages_max=self.settings.messages_per_connection_max,
            clock=time.monotonic,
            redirect_to=self.settings.redirect_to,
            letterhead=self.letterhead,
            dsn=self.settings.dsn,
            redact=self.address.redact,
        )
        return conversation, transport

    async def _open_smtp(self) -> tuple[Offers, asyncio.Transport]:
        smtp = aiosmtplib.SMTP(
            hostname=self.address.host,
            port=self.address.port,
            username=self.address.username,
            password=self.address.password,
            use_tls=self.address.implicit_tls,
            start_tls=self._start_tls(),
            tls_context=self._tls_context(),
            local_hostname=LOCAL_HOSTNAME,
            timeout=self.settings.connect_timeout_s,
        )
        try:
            await smtp.connect()
            if smtp.is_ehlo_or_helo_needed:  # after STARTTLS, and with implicit TLS and no AUTH
                await smtp.ehlo()
            self._require_tls(smtp)
        except BaseException:
            smtp.close()
            raise
        return Offers.of(smtp.esmtp_extensions), transport_of(smtp.transport)

    def _require_tls(self, smtp: aiosmtplib.SMTP) -> None:
        """Verify the encryption before the connection is used, whatever the library and the server made of STARTTLS."""
        if self.settings.wants_verified_tls and smtp.get_transport_info("ssl_object") is None:
            raise RouteTroubleError(f"{self.address.name}: the connection is not encrypted, so nothing is sent")

    def _start_tls(self) -> bool | None:
        """Return True if STARTTLS is used, False if not; None if it is used when the server offers it."""
        if self.address.implicit_tls or self.settings.starttls is StartTls.NEVER:
            return False
        return True if self.settings.wants_verified_tls else None

    async def _open_lmtp(self) -> tuple[Offers, asyncio.Transport]:
        return await open_lmtp(self.address, LOCAL_HOSTNAME)

    async def _open_maildir(self) -> tuple[Offers, asyncio.Transport]:
        assert self.address.path is not None
        directory = Path(self.address.path)
        await asyncio.to_thread(maildir.prepare, directory)
        return maildir.OFFERS, maildir.MaildirTransport(directory)

    def _tls_context(self) -> ssl.SSLContext:
        """Verified where a secret is sent or TLS was demanded; else opportunistic (RFC 7435)."""
        if self._tls is None:
            if self.settings.wants_verified_tls:
                self._tls = ssl.create_default_context()
            else:  # without the authorities, whose certificates take 50 ms to read
                self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        return self._tls

    def _explain(self, error: Exception) -> str:
        place = self.address.name
        if isinstance(error, TimeoutError) or not str(error):
            return f"{place}: no answer within {self.settings.connect_timeout_s:g} s"
        said = f"{error.code} {error.message}" if isinstance(error, aiosmtplib.SMTPResponseException) else str(error)
        if self.settings.wants_verified_tls and "STARTTLS extension not supported" in said:
            return f"{place}: it offers no STARTTLS, and {why_tls(self.address)}"
        # A server may say what neither Postgres can hold nor a terminal should obey.
        shown = re.sub(r"[\ud800-\udfff\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", said).replace("\n", " ")
        return f"{place}: {self.address.without_login(shown)}"[:300]
