"""Route to one mail server: opens connections, each with the transport to attach it to.

`smtp_opening` and `smtp_login` set up SMTP, `lmtp` LMTP; `maildir` replaces a server where there is none. What is
learned about the server while the relay runs is kept here: addresses that do not answer, STARTTLS that does not work,
and a login that was refused.
"""

import asyncio
import math
import re
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiosmtplib

from outbox.log import Events
from outbox.settings import Settings, StartTls
from outbox.settings.secret_files import LoginSource
from outbox.settings.urls import SmtpAddress
from outbox.smtp import maildir
from outbox.smtp.commands import Commands
from outbox.smtp.connection import Limits, SmtpConnection, transport_of
from outbox.smtp.connection_owner import ConnectionOwner
from outbox.smtp.dialing import AllFailedError, Attempt, Dialer
from outbox.smtp.extensions import Offers
from outbox.smtp.lmtp import LmtpError, open_lmtp
from outbox.smtp.login import LOGIN_PAUSE_FIRST_S, LoginError, log_in, login_pause_s
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

log = Events("outbox.relay")

PROVEN_S: Final = 60.0  # for which a login that succeeded may be given by several connections at once
LOST_LOGINS_MAX: Final = 3  # in a row: a server may hang up instead of refusing
CLEAR_S: Final = 300.0  # for which a route without a login stays in clear text after TLS failed
TLS_PATIENCE_S: Final = 10.0  # for each step of STARTTLS, where clear text can follow
SHOWN_MAX: Final = 300


def why_tls(address: SmtpAddress) -> str:
    """Return why TLS is required of a server that does not offer it, and the fix."""
    if address.username:
        return "a login is never sent in the clear; use smtps://, or no login"
    return 'starttls is "always", so nothing is sent; turn STARTTLS on in the mail server, or use smtps://'


class RouteTroubleError(Exception):
    """The server cannot be used now: no connection, or no EHLO, TLS or AUTH. No message is to blame.

    `code` and `text` are the server's reply, and `stage` is what it answers (`refusal.Stage`); 0 and "" if the
    trouble is not about a reply.
    """

    def __init__(self, message: str, *, code: int = 0, text: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.code, self.text, self.stage = code, text, stage


class LoginRefusedError(RouteTroubleError):
    """The server refused user and password. Another try before `until` (monotonic clock) may lock the account."""

    def __init__(self, message: str, *, code: int = 0, text: str = "", until: float) -> None:
        super().__init__(message, code=code, text=text, stage=Stage.AUTH)
        self.until = until


@dataclass(slots=True)
class ClearText:
    """Memory of a route that may send in clear text: why TLS failed, and for how long it is not tried again."""

    reason: str | None = None
    until: float = 0.0

    def wants_tls(self, now: float) -> bool:
        """Return True if STARTTLS is tried where the server offers it."""
        return now >= self.until


@dataclass(slots=True)
class LoginPause:
    """Pause after a refused login, doubled with each refusal in a row."""

    refusals: int = 0
    lost: int = 0
    error: LoginRefusedError | None = None
    passed: set[str] = field(default_factory=set)
    """Mechanisms with which this login was refused."""

    def end(self) -> None:
        """Forget all: the login succeeded, or there is a new one."""
        self.refusals = self.lost = 0
        self.error = None
        self.passed.clear()


@dataclass(slots=True)
class Route:
    """Opens connections to one mail server. ConfigurationError if what it adds to emails cannot be made."""

    address: SmtpAddress
    settings: Settings
    connection_class: type[SmtpConnection] = SmtpConnection
    named: str = ""  # as the settings name it
    headers: RouteHeaders | None = field(init=False)
    clear: ClearText = field(default_factory=ClearText)
    login_pause: LoginPause = field(default_factory=LoginPause)
    _tls: ssl.SSLContext | None = None
    _dialer: Dialer = field(init=False)
    _login: LoginSource[SmtpAddress] = field(init=False)
    _proving: asyncio.Future[RouteTroubleError | None] | None = None
    _proven_until: float = 0.0
    _refused_at: float | None = None  # the login, here or to another relay
    _made_at: float = field(default_factory=time.monotonic)
    _is_compared: bool = False

    def __post_init__(self) -> None:
        self.headers = RouteHeaders.of(self.settings)
        self._dialer = Dialer(self.address.host, self.address.port)
        self._login = self.settings.smtp_login(self.named)

    @property
    def name(self) -> str:
        """Name of this route in pauses, rate limits and daily sums of the fleet: that in the settings, else host:port.

        Two routes may lead to one server, with a login and limits of their own each.
        """
        return self.named or self.address.name

    async def connect(self, owner: ConnectionOwner) -> tuple[SmtpConnection, asyncio.Transport]:
        """Return a connection, and the transport to attach it to, which is set up.

        Raises:
            LoginRefusedError: the server refused the login, just now or so recently that it is not tried.
            RouteTroubleError: one line that says at which step and why, without credentials.

        """
        while self._proving is not None:
            if (trouble := await asyncio.shield(self._proving)) is not None:
                raise trouble
        self._heed_login_pause()
        if self.address.username is None or time.monotonic() < self._proven_until:
            return await self._connect(owner)
        return await self._prove_login(owner)

    async def _prove_login(self, owner: ConnectionOwner) -> tuple[SmtpConnection, asyncio.Transport]:
        """Connect while others wait for the outcome, so that a wrong password is sent once and not by each of them."""
        self._proving = asyncio.get_running_loop().create_future()
        outcome: RouteTroubleError | None = None
        try:
            connected = await self._connect(owner)
        except RouteTroubleError as trouble:
            outcome = trouble
            raise
        finally:
            self._proving.set_result(outcome)
            self._proving = None
        self._proven_until = time.monotonic() + PROVEN_S
        return connected

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
        connection = self.connection_class(
            owner,
            Commands(offers, self.headers, settings.redirect_to, asks_bounces=settings.dsn),
            Limits(settings.command_timeout_s, settings.data_done_timeout_s, settings.messages_per_connection_max),
            clock=time.monotonic,
            redact=self.address.redact,
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
            await self._log_in(smtp, ends_at)
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
        reason = self._shown(reason)
        if self.clear.reason is None:
            log.warning(
                "starttls_failed",
                "STARTTLS of {route} fails, so emails are sent there in clear text: {reason}",
                route=self.name,
                reason=reason,
            )
        self.clear.reason, self.clear.until = reason, time.monotonic() + for_s

    def _note_tls(self) -> None:
        if self.clear.reason is not None:
            log.info("starttls_works", "STARTTLS of {route} works again", route=self.name)
            self.clear.reason = None

    def _require_tls(self, smtp: aiosmtplib.SMTP) -> None:
        """Verify the encryption before the connection is used, whatever the library and the server made of STARTTLS."""
        if self.settings.wants_verified_tls and not is_encrypted(smtp):
            raise RouteTroubleError(f"{self.address.name}: the connection is not encrypted, so nothing is sent")

    def has_new_login(self) -> bool:
        """Return True once if the settings' files have changed since a login was refused, here or to another relay.

        The same login is tried again, too, since a person who writes the file wants that, but not within the first
        pause, since programs also write files.
        """
        if not self._login.has_changed():
            return False
        now = time.monotonic()
        if self._refused_at is None:  # it was refused to another relay
            self._refused_at = now
        is_early = now < self._refused_at + LOGIN_PAUSE_FIRST_S
        if not self._renew_login() and (is_early or self._login.problem):
            return False
        self.login_pause.end()
        return True

    def is_newer_than_refusal(self, refused_s: float) -> bool:
        """Return True once if the login is newer than the refusal of so many seconds ago that the fleet knows of.

        A relay that starts with a corrected password need not wait until the pause is over. A login from the
        environment is as old as this relay.
        """
        if self._is_compared or self._refused_at is not None:
            return False
        self._is_compared = True
        age_s = self.settings.smtp_login_age_s(self.named)
        return (time.monotonic() - self._made_at if age_s is None else age_s) < refused_s

    def _heed_login_pause(self) -> None:
        """Raise the last refusal while its pause lasts."""
        error = self.login_pause.error
        if error is not None and not self.has_new_login() and time.monotonic() < error.until:
            raise error

    def _renew_login(self) -> bool:
        """Take a new login from the files of the settings; return True if there is one."""
        address = self._login.renew()
        if address is None:
            return False
        self.address = address
        self.settings = self.settings.model_copy(update={"smtp_url": address})
        log.info("login_changed", "the login of {route} was read again", route=self.name)
        return True

    async def _log_in(self, smtp: aiosmtplib.SMTP, ends_at: float) -> None:
        username, password = self.address.username, self.address.password
        if username is None or password is None:
            return
        try:
            async with asyncio.timeout_at(ends_at):
                await log_in(smtp, username, password, passed=self.login_pause.passed)
        except LoginError as error:
            raise self._login_trouble(error) from error
        except TimeoutError as error:
            lost = LoginError(f"no answer to AUTH within {self.settings.connect_timeout_s:g} s", is_lost=True)
            raise self._login_trouble(lost) from error
        self.login_pause.end()

    def _login_trouble(self, error: LoginError) -> RouteTroubleError:
        """Return the error for a login that failed, and begin a pause if the server has judged it."""
        self._proven_until = 0.0
        pause = self.login_pause
        message, text = f"{self.address.name}: {self._shown(str(error))}", self._shown(error.text)
        pause.lost += error.is_lost
        if not error.is_judged and pause.lost < LOST_LOGINS_MAX:
            return RouteTroubleError(message, code=error.code, text=text, stage=Stage.AUTH)
        pause.lost = 0
        self._refused_at = time.monotonic()
        if self._renew_login():  # rotated before it was refused
            pause.end()
            return RouteTroubleError(message, code=error.code, text=text, stage=Stage.AUTH)
        unread = f"; its file cannot be used: {self._login.problem}" if self._login.problem else ""

        pause.refusals += 1
        pause.passed.add(error.mechanism)
        pause_s = login_pause_s(pause.refusals)
        told = f"{message} (the login is tried again in {pause_s / 60:g} min, or once its file changes{unread})"
        pause.error = LoginRefusedError(told, code=error.code, text=text, until=time.monotonic() + pause_s)
        return pause.error

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
        """Verified where a secret is sent or TLS was demanded; else opportunistic (RFC 7435)."""
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
        each = ", ".join(f"{endpoint}: {self._said(error)}" for endpoint, error in failed.failures)
        message = f"{self.address.name}: {self._shown(each)}"
        return RouteTroubleError(message, code=trouble.code, text=trouble.text, stage=trouble.stage)

    def _trouble(self, error: Exception) -> RouteTroubleError:
        if isinstance(error, RouteTroubleError):
            return error
        code, text = reply_of(error) or (0, "")
        message = f"{self.address.name}: {self._shown(self._said(error))}"
        return RouteTroubleError(message, code=code, text=self._shown(text), stage=_stage_of(error) if code else "")

    def _said(self, error: BaseException) -> str:
        if isinstance(error, RouteTroubleError):
            return str(error).removeprefix(f"{self.address.name}: ")
        if isinstance(error, HelloRefusedError):
            return f"{describe(error)} (to EHLO {error.name})"
        if isinstance(error, LmtpError) and error.command:
            return f"{describe(error)} (to {error.command})"
        return describe(error) or f"no answer within {self.settings.connect_timeout_s:g} s"

    def _shown(self, said: str) -> str:
        """Return what a server said without the login, and without what Postgres cannot hold or a terminal obeys."""
        shown = re.sub(r"[\ud800-\udfff\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", said).replace("\n", " ")
        return self.address.without_login(shown)[:SHOWN_MAX]


def _most_telling(failed: AllFailedError) -> Exception:
    """Return an error with a reply if there is one, 4xx before 5xx: one address that works later will do."""
    errors = [error for _, error in failed.failures]
    return min(errors, key=lambda error: reply_of(error) or (math.inf, ""))


def _stage_of(error: Exception) -> Stage:
    if isinstance(error, aiosmtplib.SMTPHeloError) or (isinstance(error, LmtpError) and error.command):
        return Stage.EHLO
    is_greeting = isinstance(error, (aiosmtplib.SMTPConnectResponseError, LmtpError))
    return Stage.CONNECT if is_greeting else Stage.STARTTLS
