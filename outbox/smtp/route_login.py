"""Login of a route: sent by one connection first, not tried for a while after a refusal, renewed from its file."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import aiosmtplib

from outbox.log import Events
from outbox.settings import Settings
from outbox.settings.secret_files import LoginSource
from outbox.settings.urls import SmtpAddress
from outbox.smtp.login import LOGIN_PAUSE_FIRST_S, LoginError, log_in, login_pause_s
from outbox.smtp.refusal import Stage
from outbox.smtp.route_trouble import LoginRefusedError, RouteTroubleError

log = Events("outbox.relay")

PROVEN_S: Final = 60.0  # for which a login that succeeded may be given by several connections at once
LOST_LOGINS_MAX: Final = 3  # in a row: a server may hang up instead of refusing
SHOWN_MAX: Final = 300

T = TypeVar("T")


@dataclass(slots=True)
class LoginPause:
    """Pause after a refused login, doubled with each refusal in a row."""

    refusals: int = 0
    lost: int = 0
    error: LoginRefusedError | None = None
    passed: set[str] = field(default_factory=set)
    """Mechanisms with which this login was refused."""

    def is_judged(self, error: LoginError) -> bool:
        """Count a login that failed; return True if the server has judged it.

        `LOST_LOGINS_MAX` lost connections in a row are a judgement, too.
        """
        self.lost += error.is_lost
        if not error.is_judged and self.lost < LOST_LOGINS_MAX:
            return False
        self.lost = 0
        return True

    def begin(self, mechanism: str) -> float:
        """Count a refusal by this mechanism; return for how many seconds the login is not tried."""
        self.refusals += 1
        self.passed.add(mechanism)
        return login_pause_s(self.refusals)

    def hold(self, error: LoginRefusedError) -> LoginRefusedError:
        """Return the error after keeping it: it is the answer to every connection until the pause is over."""
        self.error = error
        return error

    def end(self) -> None:
        """Forget all: the login succeeded, or there is a new one."""
        self.refusals = self.lost = 0
        self.error = None
        self.passed.clear()


@dataclass(slots=True)
class RouteLogin:
    """Login of one route, with the address and the settings that hold it, as they are now.

    `named` is the route's name in the settings.
    """

    address: SmtpAddress
    settings: Settings
    named: str = ""
    pause: LoginPause = field(default_factory=LoginPause)
    _source: LoginSource[SmtpAddress] = field(init=False)
    _proving: asyncio.Future[RouteTroubleError | None] | None = None
    _proven_until: float = 0.0
    _refused_at: float | None = None  # the login, here or to another relay
    _made_at: float = field(default_factory=time.monotonic)
    _is_compared: bool = False

    def __post_init__(self) -> None:
        self._source = self.settings.smtp_login(self.named)

    @property
    def route(self) -> str:
        """Return the name of the route, in the settings, else host:port."""
        return self.named or self.address.name

    def shown(self, reply: str) -> str:
        """Return a reply without the login, and without what Postgres cannot hold or a terminal obeys."""
        shown = re.sub(r"[\ud800-\udfff\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", reply).replace("\n", " ")
        return self.address.without_login(shown)[:SHOWN_MAX]

    async def prove(self, connect: Callable[[], Awaitable[T]]) -> T:
        """Return a connection; while the login is not proven the others wait for the first one's outcome.

        So a wrong password is sent once, and not by each of them.

        Raises:
            LoginRefusedError: the server refused the login, just now or so recently that it is not tried.
            RouteTroubleError: the connection could not be opened.

        """
        while self._proving is not None:
            if (trouble := await asyncio.shield(self._proving)) is not None:
                raise trouble
        error = self.pause.error
        if error is not None and not self.has_new_login() and time.monotonic() < error.until:
            raise error
        if self.address.username is None or time.monotonic() < self._proven_until:
            return await connect()
        self._proving = asyncio.get_running_loop().create_future()
        outcome: RouteTroubleError | None = None
        try:
            connected = await connect()
        except RouteTroubleError as trouble:
            outcome = trouble
            raise
        finally:
            self._proving.set_result(outcome)
            self._proving = None
        self._proven_until = time.monotonic() + PROVEN_S
        return connected

    async def log_in(self, smtp: aiosmtplib.SMTP, ends_at: float) -> None:
        """Log in, until `ends_at` of the loop's clock, if the route has a login.

        Raises:
            RouteTroubleError: the login failed.

        """
        username, password = self.address.username, self.address.password
        if username is None or password is None:
            return
        try:
            async with asyncio.timeout_at(ends_at):
                await log_in(smtp, username, password, passed=self.pause.passed)
        except LoginError as error:
            raise self._trouble(error) from error
        except TimeoutError as error:
            lost = LoginError(f"no answer to AUTH within {self.settings.connect_timeout_s:g} s", is_lost=True)
            raise self._trouble(lost) from error
        self.pause.end()

    def has_new_login(self) -> bool:
        """Return True once if the settings' files have changed since a login was refused, here or to another relay.

        The same login is tried again, too, since a person who writes the file wants that, but not within the first
        pause, since programs also write files.
        """
        if not self._source.has_changed():
            return False
        now = time.monotonic()
        if self._refused_at is None:  # it was refused to another relay
            self._refused_at = now
        is_early = now < self._refused_at + LOGIN_PAUSE_FIRST_S
        if not self._renew() and (is_early or self._source.problem):
            return False
        self.pause.end()
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

    def _renew(self) -> bool:
        """Take a new login from the files of the settings; return True if there is one."""
        address = self._source.renew()
        if address is None:
            return False
        self.address = address
        self.settings = self.settings.model_copy(update={"smtp_url": address})
        log.info("login_changed", "the login of {route} was read again", route=self.route)
        return True

    def _trouble(self, error: LoginError) -> RouteTroubleError:
        """Return the error for a login that failed, and begin a pause if the server has judged it."""
        self._proven_until = 0.0
        message, text = f"{self.address.name}: {self.shown(str(error))}", self.shown(error.text)
        if not self.pause.is_judged(error):
            return RouteTroubleError(message, code=error.code, text=text, stage=Stage.AUTH)
        self._refused_at = time.monotonic()
        if self._renew():  # rotated before it was refused
            self.pause.end()
            return RouteTroubleError(message, code=error.code, text=text, stage=Stage.AUTH)
        unread = f"; its file cannot be used: {self._source.problem}" if self._source.problem else ""
        pause_s = self.pause.begin(error.mechanism)
        reason = f"{message} (the login is tried again in {pause_s / 60:g} min, or once its file changes{unread})"
        return self.pause.hold(LoginRefusedError(reason, code=error.code, text=text, until=time.monotonic() + pause_s))
