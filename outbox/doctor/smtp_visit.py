"""Visit to a mail server: its connections, and the findings so far."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiosmtplib

from outbox.doctor.finding import Finding, not_checked, note, ok, problem
from outbox.doctor.smtp_judgements import is_distrust, judge_distrust, judge_refusal, tls_error
from outbox.settings import Settings
from outbox.settings.urls import SmtpAddress
from outbox.smtp.dialing import AllFailedError, Attempt, Dialer, Endpoint, resolve
from outbox.smtp.opening import ERRORS, HelloRefusedError, Opening, describe, reply_of, say_hello

PORT_PLAIN: Final = 25
PORT_TLS: Final = 465
CHECKS: Final = ("smtp.tls", "smtp.login", "smtp.pipelining", "smtp.size", "smtp.helo", "smtp.sender")
SERVER: Final = "smtp.server"


class Visit:
    """Visit to one mail server. `sender` and `recipient` are the addresses to ask for."""

    def __init__(
        self, settings: Settings, address: SmtpAddress, *, sender: str, recipient: str, largest_bytes: int
    ) -> None:
        self.settings = settings
        self.address = address
        self.sender = sender
        self.recipient = recipient
        self.largest_bytes = largest_bytes
        """Size of the largest message that is known, or 0."""
        self._findings: list[Finding] = []
        self._dialer = Dialer(address.host, address.port)
        self._ehlo_refused: HelloRefusedError | None = None
        """Refusal of EHLO by a server that takes HELO."""

    @property
    def findings(self) -> list[Finding]:
        """Return the findings so far, that of the server itself first."""
        return sorted(self._findings, key=lambda finding: finding.check != SERVER)

    def add(self, *findings: Finding) -> None:
        """Add findings. A later one about the server itself replaces the former."""
        if any(finding.check == SERVER for finding in findings):
            self._forget_server()
        self._findings += findings

    def _forget_server(self) -> None:
        self._findings = [finding for finding in self._findings if finding.check != SERVER]

    def leave(self, why: str) -> list[Finding]:
        """Return all findings; those checks that were not made say why."""
        seen = {finding.check for finding in self._findings}
        return [*self.findings, *not_checked([check for check in CHECKS if check not in seen], why)]

    def describe(self, error: BaseException) -> str:
        """Return an error in words, without the login."""
        text = describe(error) or f"no answer within {self.settings.connect_timeout_s:g} s"
        return self.without_login(text)

    def without_login(self, text: str) -> str:
        """Return a reply of the server on one line, without the login that it may repeat."""
        return " ".join(self.address.without_login(text).split())[:300].rstrip(".")

    def _opening(self, *, verified: bool) -> Opening:
        context = ssl.create_default_context()
        if not verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return Opening(self.address, context, self.settings.helo_name, self.settings.connect_timeout_s)

    async def _greeted(self, opening: Opening, attempt: Attempt) -> aiosmtplib.SMTP:
        """Return a connection to one address after EHLO. Raises `ERRORS`."""
        smtp = await opening.greet(attempt)
        try:
            self._ehlo_refused = await say_hello(smtp) or self._ehlo_refused
        except BaseException:
            smtp.close()
            raise
        return smtp

    @asynccontextmanager
    async def connected(self, *, verified: bool) -> AsyncIterator[aiosmtplib.SMTP | None]:
        """Yield a connection after EHLO, in TLS for smtps://; None, with the finding, if the server cannot be used."""
        opening = self._opening(verified=verified)
        try:
            smtp = await self._dialer.open(
                lambda attempt: self._greeted(opening, attempt),
                within_s=self.settings.connect_timeout_s,
                discard=aiosmtplib.SMTP.close,
            )
        except (AllFailedError, *ERRORS) as error:
            self._forget_server()
            self.add(self._unreachable(error))
            yield None
            return
        try:
            if not any(finding.check == SERVER for finding in self._findings):
                self.add(self._answers())
            yield smtp
        finally:
            smtp.close()

    def _answers(self) -> Finding:
        if (refused := self._ehlo_refused) is None:
            return ok(SERVER, f"{self.address} answers")
        reply = self.describe(refused)
        found = f"{self.address} answers EHLO {refused.name} with {reply} and takes HELO: it offers nothing"
        return note(SERVER, found, "set helo_name to a name that it accepts, or see its log")

    async def survey(self) -> None:
        """Ask each address of a host that has several. If none of them works, `connected` reports it."""
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                endpoints = await resolve(self.address.host, self.address.port)
        except ERRORS:
            return
        if len(endpoints) == 1:
            return
        opening = self._opening(verified=self.settings.wants_verified_tls)
        errors = await asyncio.gather(*(self._ask_address(opening, endpoint) for endpoint in endpoints))
        asked = list(zip(endpoints, errors, strict=True))
        failed = [f"{endpoint}: {self.describe(error)}" for endpoint, error in asked if error]
        works = [str(endpoint) for endpoint, error in asked if error is None]
        if not works:
            return
        if not failed:
            self.add(ok(SERVER, f"{self.address} answers at each address: {', '.join(works)}"))
            return
        found = f"{self.address} answers at {', '.join(works)}, and not at every address: {', '.join(failed)}"
        fix = "correct the name's addresses in the DNS, the network or the mail server"
        fix += "; the relay uses the others meanwhile"
        self.add(note(SERVER, found, fix))

    async def _ask_address(self, opening: Opening, endpoint: Endpoint) -> Exception | None:
        """Return why one address cannot be used; None if it can."""
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                smtp = await self._greeted(opening, Attempt(endpoint, 0.0))
        except ERRORS as error:
            return error
        try:
            await smtp.quit()
        except ERRORS:  # it answered, and that is what was asked
            smtp.close()
        return None

    def _unreachable(self, error: Exception) -> Finding:
        """Return the finding for a server none of whose addresses can be used."""
        failures = error.failures if isinstance(error, AllFailedError) else []
        if len(failures) > 1:
            worst = max(
                (one for _, one in failures), key=lambda one: reply_of(one) is not None
            )  # a reply is most specific
            each = ", ".join(f"{endpoint}: {self.describe(one)}" for endpoint, one in failures)
            fix = self._unusable(worst).fix
            return problem(SERVER, f"{self.address} answers at none of its addresses: {each}", fix)
        return self._unusable(failures[0][1] if failures else error)

    def _unusable(self, error: Exception) -> Finding:
        address = self.address
        if (reply := reply_of(error)) is not None:
            to = f"EHLO {error.name}" if isinstance(error, HelloRefusedError) else ""
            found, fix = judge_refusal(reply[0], self.describe(error), to=to)
            return problem(SERVER, f"{address} {found}", fix)
        refusal = tls_error(error)
        if is_distrust(error):
            return judge_distrust(address.host, error)
        found = f"{address} does not answer as a mail server ({self.describe(error)})"
        fix = "start it or correct smtp_url"
        if refusal is not None:
            fix = f"if it begins without TLS, write smtp://…:{address.port} in smtp_url; STARTTLS is used where offered"
        elif address.port == PORT_TLS and not address.implicit_tls:
            fix = "port 465 begins with TLS: write smtps:// in smtp_url"
        elif address.port == PORT_PLAIN and isinstance(error, TimeoutError):
            fix = "many hosters block port 25: use the provider's port 587 or 465, or correct smtp_url"
        elif _is_hang_up(error):
            fix = "see the mail server's log: it may refuse this host, or have too many connections"
        return problem(SERVER, found, fix)


def _is_hang_up(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (aiosmtplib.SMTPServerDisconnected, ConnectionResetError)):
            return True
        error = error.__cause__
    return False
