"""The way to the SMTP server: connections set up by aiosmtplib, and a breaker for when the server is the trouble."""

import asyncio
import random
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Final, Literal

import aiosmtplib

from outbox.address import SmtpAddress
from outbox.conversation import Conversation, Desk, transport_of
from outbox.settings import Settings

PAUSE_FIRST_S: Final = 0.5
PAUSE_MAX_S: Final = 3.5  # with the jitter and a connect this finds a server within 5 s of its return
PROBE_LEASE_S: Final = 4.0  # then another relay may probe as well: one that hangs must not keep the fleet waiting
CUTS_IN_A_ROW_MAX: Final = 3

# What EHLO says. Not getfqdn(): it asks the resolver, which may take long or not answer.
LOCAL_HOSTNAME: Final = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.") or "localhost"


class RouteTroubleError(Exception):
    """The server cannot be used now: no connection, or no EHLO, TLS or AUTH. No message is to blame."""


@dataclass(slots=True)
class Breaker:
    """Whether the server may be bothered, by this relay and by the fleet. Decides only; `now` is any steady clock.

    Closed: connect at will. Open after trouble: no new connection until the pause is over, then one probe at a time,
    each failure doubling the pause up to `PAUSE_MAX_S`; the first success after it closes the breaker. Connections
    that stand go on all the while: a server that takes no more connections is not a server in trouble.

    `retry_at` ends this relay's own pause, `fleet_retry_at` everybody's, as the database says. While the fleet's is in
    force only the relay that is `probing` connects. `news` is what the fleet has to be told.
    """

    retry_at: float | None = None
    fleet_retry_at: float | None = None
    reason: str = ""
    cuts: int = 0
    probing: bool = False
    news: Literal["pause", "resume"] | None = None
    _pause_s: float = PAUSE_FIRST_S

    @property
    def is_open(self) -> bool:
        """Whether the server was last known to be in trouble."""
        return self.retry_at is not None or self.fleet_retry_at is not None

    @property
    def next_at(self) -> float:
        """When the pauses that are known are over."""
        return max(self.retry_at or 0.0, self.fleet_retry_at or 0.0)

    def may_connect(self, now: float) -> bool:
        """Whether no pause is in force for this relay."""
        return self._rested(now) and (self.fleet_retry_at is None or self.probing)

    def wants_probe(self, now: float) -> bool:
        """Whether it is time to ask the database for the turn to probe."""
        return self.fleet_retry_at is not None and not self.probing and now >= self.next_at

    def trip(self, reason: str, now: float, uniform: float | None = None) -> None:
        """The server was in trouble: pause, for longer than the last time."""
        if not self.is_open or self.probing:
            self.news = "pause"
        self.probing = False
        jitter = 0.8 + 0.4 * (random.random() if uniform is None else uniform)  # noqa: S311 - jitter, not a secret
        self.retry_at = now + self._pause_s * jitter
        self.reason = reason
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    def cut(self, reason: str, now: float) -> None:
        """A connection ended in the middle of a dialogue; a few in a row without a verdict are trouble."""
        self.cuts += 1
        if self.cuts >= CUTS_IN_A_ROW_MAX and self._rested(now):
            self.trip(reason, now)

    def succeed(self, now: float) -> None:
        """The server has judged a message, so it works; a pause that was ordered is kept to its end."""
        self.cuts = 0
        if not self.is_open or not self._rested(now):
            return
        self.retry_at = None
        self._pause_s = PAUSE_FIRST_S
        if self.fleet_retry_at is not None and (self.probing or now >= self.fleet_retry_at):
            self.fleet_retry_at = None
            self.probing = False
            self.news = "resume"

    def adopt(self, reason: str | None, wait_s: float, now: float) -> None:
        """Take over what the fleet knows: a pause with its reason, or None. A server that works for others may still
        not work from here, so this relay's own pause stays.
        """
        if self.news is not None:
            return  # what was read is older than what is about to be said
        if reason is None:
            self.fleet_retry_at = None
            self.probing = False
        else:
            self.fleet_retry_at = now + wait_s
            if self.retry_at is None:
                self.reason = reason

    def _rested(self, now: float) -> bool:
        return self.retry_at is None or now >= self.retry_at


@dataclass(slots=True)
class Route:
    """Opens connections to one SMTP server."""

    address: SmtpAddress
    settings: Settings
    _tls: ssl.SSLContext | None = None

    @property
    def name(self) -> str:
        """What the fleet calls this way: host and port."""
        return f"{self.address.host}:{self.address.port}"

    async def connect(self, desk: Desk) -> tuple[Conversation, asyncio.Transport]:
        """A connection that is set up, and the conversation to attach to it.

        Raises:
            RouteTroubleError: one line that says at which step and why, without credentials.

        """
        smtp = aiosmtplib.SMTP(
            hostname=self.address.host,
            port=self.address.port,
            username=self.address.username,
            password=self.address.password,
            use_tls=self.address.implicit_tls,
            # With credentials they must not cross the wire in the clear; without, TLS when offered.
            start_tls=None if self.address.username is None or self.address.implicit_tls else True,
            tls_context=self._tls_context(),
            local_hostname=LOCAL_HOSTNAME,
            timeout=self.settings.connect_timeout_s,
        )
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                await smtp.connect()
                if smtp.is_ehlo_or_helo_needed:  # after STARTTLS, and with implicit TLS and no AUTH
                    await smtp.ehlo()
        except (aiosmtplib.SMTPException, OSError, TimeoutError, ValueError) as error:
            smtp.close()
            raise RouteTroubleError(self._explain(error)) from error
        except asyncio.CancelledError:
            smtp.close()
            raise
        conversation = Conversation(
            desk,
            pipelining=smtp.supports_extension("pipelining"),
            size=smtp.supports_extension("size"),
            command_timeout_s=self.settings.command_timeout_s,
            data_done_timeout_s=self.settings.data_done_timeout_s,
            messages_max=self.settings.messages_per_connection_max,
            clock=time.monotonic,
        )
        return conversation, transport_of(smtp.transport)

    def _tls_context(self) -> ssl.SSLContext:
        """Verified where a secret is sent or TLS was demanded; else opportunistic (RFC 7435)."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
            if not self.address.implicit_tls and self.address.username is None:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        return self._tls

    def _explain(self, error: Exception) -> str:
        place = self.name
        if isinstance(error, TimeoutError) or not str(error):
            return f"{place}: no answer within {self.settings.connect_timeout_s:g} s"
        said = f"{error.code} {error.message}" if isinstance(error, aiosmtplib.SMTPResponseException) else str(error)
        reason = f"{place}: {said}".replace("\n", " ")
        if self.address.username and "STARTTLS extension not supported" in reason:
            return f"{place}: it offers no STARTTLS, and a login is never sent in the clear; use smtps://, or no login"
        if self.address.password:
            reason = reason.replace(self.address.password, "***")
        # A server may say what neither Postgres can hold nor a terminal should obey.
        return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", reason.encode("utf-8", "replace").decode())[:300]
