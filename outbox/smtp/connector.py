"""Connector of one route: it opens connections to the mail server, each with the transport to attach it to.

`opening` and `route_login` set up SMTP, `lmtp` LMTP; `maildir` replaces a server where there is none. What is learned
about the server while the relay runs is kept here: addresses that do not answer, and STARTTLS that does not work.
"""

import asyncio
import math
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import aiosmtplib

from outbox.log import Events
from outbox.settings import Settings, StartTls
from outbox.settings.urls import SmtpAddress
from outbox.smtp import maildir
from outbox.smtp.commands import Commands
from outbox.smtp.connection import Limits, OnReply, SmtpConnection, transport_of
from outbox.smtp.connection_owner import ConnectionOwner
from outbox.smtp.dialing import AllFailedError, Attempt, Dialer
from outbox.smtp.extensions import Offers
from outbox.smtp.lmtp import LmtpError, open_lmtp
from outbox.smtp.opening import (
    ERRORS,
    HelloRefusedError,
    Opening,
    TlsBrokenError,
    describe,
    goes_on,
    is_encrypted,
    reply_of,
    say_hello,
    start_tls,
)
from outbox.smtp.refusal import Stage
from outbox.smtp.route_headers import RouteHeaders
from outbox.smtp.route_login import RouteLogin
from outbox.smtp.route_trouble import RouteTroubleError

log = Events("outbox.relay")

CLEAR_S: Final = 300.0  # for which a route without a login stays in clear text after TLS failed
TLS_PATIENCE_S: Final = 10.0  # for each step of STARTTLS, where clear text can follow


def why_tls(address: SmtpAddress) -> str:
    """Return why TLS is required of a server that does not offer it, and the fix."""
    if address.username:
        return "a login is never sent in the clear; use smtps://, or no login"
    return 'starttls is "always", so nothing is sent; turn STARTTLS on in the mail server, or use smtps://'


@dataclass(slots=True)
class ClearText:
    """Memory of a route that may send in clear text: why TLS failed, and for how long it is not tried again."""

    reason: str | None = None
    until: float = 0.0

    def wants_tls(self, now: float) -> bool:
        """Return True if STARTTLS is tried where the server offers it."""
        return now >= self.until

    def begin(self, reason: str, until: float) -> bool:
        """Note that STARTTLS failed; return True if it worked before, as far as it was tried."""
        is_new = self.reason is None
        self.reason, self.until = reason, until
        return is_new

    def end(self) -> bool:
        """Note that STARTTLS works; return True if it failed before."""
        had_failed = self.reason is not None
        self.reason = None
        return had_failed


@dataclass(slots=True)
class Connector:
    """Opener of a route's connections to its mail server; `on_reply` is given every reply that comes over them.

    Raises:
        ConfigurationError: what the route adds to emails cannot be made.

    """

    login: RouteLogin
    on_reply: OnReply | None = None
    headers: RouteHeaders | None = field(init=False)
    clear: ClearText = field(default_factory=ClearText)
    _tls: ssl.SSLContext | None = None
    _dialer: Dialer = field(init=False)

    def __post_init__(self) -> None:
        self.headers = RouteHeaders.of(self.settings)
        self._dialer = Dialer(self.address.host, self.address.port)

    @classmethod
    def of(
        cls,
        address: SmtpAddress,
        settings: Settings,
        *,
        named: str = "",
        on_reply: OnReply | None = None,
    ) -> Self:
        """Return the connector of the route to this address, which the settings name so."""
        return cls(RouteLogin(address, settings, named), on_reply)

    @property
    def address(self) -> SmtpAddress:
        """Return the address, with the login as it is now."""
        return self.login.address

    @property
    def settings(self) -> Settings:
        """Return the settings, with the login as it is now."""
        return self.login.settings

    @property
    def name(self) -> str:
        """Name of this route in pauses, rate limits and daily sums of the fleet: that in the settings, else host:port.

        Two routes may lead to one server, with a login and limits of their own each.
        """
        return self.login.route

    async def connect(self, owner: ConnectionOwner) -> tuple[SmtpConnection, asyncio.Transport]:
        """Return a connection, and the transport to attach it to, which is set up.

        Raises:
            LoginRefusedError: the server refused the login, just now or so recently that it is not tried.
            RouteTroubleError: one line that says at which step and why, without credentials.

        """
        return await self.login.prove(lambda: self._connect(owner))

    async def _connect(self, owner: ConnectionOwner) -> tuple[SmtpConnection, asyncio.Transport]:
        opening = {"lmtp": self._open_lmtp, "file": self._open_maildir}.get(self.address.scheme, self._open_smtp)
        try:
            offers, transport = await opening()
        except RouteTroubleError:
            raise
        except AllFailedError as failed:
            error = _most_telling(failed)
            raise self._trouble_of_all(failed, error) from error
        except (LmtpError, *ERRORS) as error:
            raise self._trouble(error) from error
        # aiosmtplib has no transport any more once it knows of the end; a greeter of ours is not heard any more.
        if transport is None or transport.is_closing():
            raise RouteTroubleError(f"{self.address.name}: it closed the connection before any email")
        settings = self.settings
        connection = SmtpConnection(
            owner,
            Commands(offers, self.headers, settings.redirect_to, asks_bounces=settings.dsn),
            Limits(settings.command_timeout_s, settings.data_done_timeout_s, settings.messages_per_connection_max),
            clock=time.monotonic,
            redact=self.address.redact,
            on_reply=self.on_reply,
        )
        return connection, transport

    async def _open_smtp(self) -> tuple[Offers, asyncio.Transport | None]:
        timeout_s = self.settings.connect_timeout_s
        ends_at = asyncio.get_running_loop().time() + timeout_s
        opening = Opening(self.address, self._tls_context(), self.settings.helo_name, timeout_s)
        smtp = await self._dialer.open(
            lambda attempt: self._set_up(opening, attempt), within_s=timeout_s, discard=aiosmtplib.SMTP.close
        )
        try:
            self._require_tls(smtp)
            await self.login.log_in(smtp, ends_at)
        except BaseException:
            smtp.close()
            raise
        return Offers.of(smtp.esmtp_extensions), transport_of(smtp.transport)

    async def _set_up(self, opening: Opening, attempt: Attempt) -> aiosmtplib.SMTP:
        """Return a connection to one address after EHLO, in TLS if that is used.

        Without a login clear text is better than no mail (RFC 7435 §3): where TLS breaks the connection, the next one
        does without.
        """
        must = self.settings.wants_verified_tls
        wants = self.settings.starttls is not StartTls.NEVER and not self.address.implicit_tls
        if wants and not must:
            wants = self.clear.wants_tls(time.monotonic())
        try:
            return await self._greet(opening, attempt, starttls=wants)
        except TlsBrokenError as broken:
            if must:
                raise
            reason = describe(broken) or f"no answer within {TLS_PATIENCE_S:g} s"
            smtp = await self._greet(opening, attempt, starttls=False)
            self._note_clear_text(reason, for_s=CLEAR_S)
            return smtp

    async def _greet(self, opening: Opening, attempt: Attempt, *, starttls: bool) -> aiosmtplib.SMTP:
        """Connect and say EHLO. Raises `ERRORS`, or TlsBrokenError if STARTTLS broke the connection."""
        smtp = await opening.greet(attempt)
        try:
            await say_hello(smtp)
            if starttls:
                await self._start_tls(smtp, opening.timeout_s)
        except BaseException:
            smtp.close()
            raise
        return smtp

    async def _start_tls(self, smtp: aiosmtplib.SMTP, timeout_s: float) -> None:
        if not smtp.supports_extension("starttls"):
            if self.settings.wants_verified_tls:
                raise RouteTroubleError(f"{self.address.name}: it offers no STARTTLS, and {why_tls(self.address)}")
            return
        if self.settings.wants_verified_tls:
            if (refused := await start_tls(smtp, timeout_s=timeout_s)) is not None:
                raise refused
            return
        patience_s = min(TLS_PATIENCE_S, timeout_s / 3)
        refused = await start_tls(smtp, timeout_s=patience_s)
        if refused is None:
            self._note_tls()
        elif await goes_on(smtp):
            self._note_clear_text(describe(refused), for_s=0.0)  # costs little, so it is tried each time
        else:
            raise TlsBrokenError from refused

    def _note_clear_text(self, reason: str, *, for_s: float) -> None:
        reason = self.login.shown(reason)
        if self.clear.begin(reason, time.monotonic() + for_s):
            log.warning(
                "starttls_failed",
                "STARTTLS of {route} fails, so emails are sent there in clear text: {reason}",
                route=self.name,
                reason=reason,
            )

    def _note_tls(self) -> None:
        if self.clear.end():
            log.info("starttls_works", "STARTTLS of {route} works again", route=self.name)

    def _require_tls(self, smtp: aiosmtplib.SMTP) -> None:
        """Verify the encryption before the connection is used, whatever the library and the server made of STARTTLS."""
        if self.settings.wants_verified_tls and not is_encrypted(smtp):
            raise RouteTroubleError(f"{self.address.name}: the connection is not encrypted, so nothing is sent")

    async def _open_lmtp(self) -> tuple[Offers, asyncio.Transport | None]:
        within_s = self.settings.connect_timeout_s
        return await open_lmtp(self.address, self.settings.helo_name, dialer=self._dialer, within_s=within_s)

    async def _open_maildir(self) -> tuple[Offers, asyncio.Transport | None]:
        assert self.address.path is not None
        directory = Path(self.address.path)
        async with asyncio.timeout(self.settings.connect_timeout_s):
            await asyncio.to_thread(maildir.prepare, directory)
        return maildir.OFFERS, maildir.MaildirTransport(directory)

    def _tls_context(self) -> ssl.SSLContext:
        """Return the context: verified where a secret is sent or TLS was demanded, else opportunistic (RFC 7435)."""
        if self._tls is None:
            if self.settings.wants_verified_tls:
                self._tls = ssl.create_default_context()
            else:  # without the authorities, whose certificates take 50 ms to read
                self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        return self._tls

    def _trouble_of_all(self, failed: AllFailedError, telling: Exception) -> RouteTroubleError:
        """Return the error for a server none of whose addresses can be used; it has the reply of the most telling."""
        trouble = self._trouble(telling)
        if len(failed.failures) == 1:
            return trouble
        each = ", ".join(f"{endpoint}: {self._described(error)}" for endpoint, error in failed.failures)
        message = f"{self.address.name}: {self.login.shown(each)}"
        return RouteTroubleError(message, code=trouble.code, text=trouble.text, stage=trouble.stage)

    def _trouble(self, error: Exception) -> RouteTroubleError:
        if isinstance(error, RouteTroubleError):
            return error
        code, text = reply_of(error) or (0, "")
        message = f"{self.address.name}: {self.login.shown(self._described(error))}"
        return RouteTroubleError(
            message, code=code, text=self.login.shown(text), stage=_stage_of(error) if code else ""
        )

    def _described(self, error: BaseException) -> str:
        if isinstance(error, RouteTroubleError):
            return str(error).removeprefix(f"{self.address.name}: ")
        if isinstance(error, HelloRefusedError):
            return f"{describe(error)} (to EHLO {error.name})"
        if isinstance(error, LmtpError) and error.command:
            return f"{describe(error)} (to {error.command})"
        return describe(error) or f"no answer within {self.settings.connect_timeout_s:g} s"


def _most_telling(failed: AllFailedError) -> Exception:
    """Return an error with a reply if there is one, 4xx before 5xx: one address that works later will do."""
    errors = [error for _, error in failed.failures]
    return min(errors, key=lambda error: reply_of(error) or (math.inf, ""))


def _stage_of(error: Exception) -> Stage:
    if isinstance(error, aiosmtplib.SMTPHeloError) or (isinstance(error, LmtpError) and error.command):
        return Stage.EHLO
    is_greeting = isinstance(error, (aiosmtplib.SMTPConnectResponseError, LmtpError))
    return Stage.CONNECT if is_greeting else Stage.STARTTLS
