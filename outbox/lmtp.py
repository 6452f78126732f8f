"""LMTP (RFC 2033), as a mail store on this machine or beside it speaks it: a connection that said LHLO.

What follows is SMTP's dialogue. There is one recipient to a transaction, so there is one reply to the dot here too.
aiosmtplib speaks no LMTP, hence these few lines.
"""

import asyncio
from typing import Final

from outbox.address import SmtpAddress
from outbox.esmtp import Offers
from outbox.replies import CODES, LINE_BYTES_MAX

_LINES_MAX: Final = 200
_GREETING: Final = 220
_OK: Final = 250


class LmtpError(Exception):
    """The server does not begin as an LMTP server does; says what it said."""


async def open_lmtp(address: SmtpAddress, local_hostname: str) -> tuple[Offers, asyncio.Transport]:
    """What the server offers, and the connection to it.

    Raises:
        LmtpError: it refuses, or speaks something else.
        OSError: there is no connection to be had.

    """
    loop = asyncio.get_running_loop()
    greeter = _Greeter(local_hostname)
    if address.path is not None:
        await loop.create_unix_connection(lambda: greeter, address.path)
    else:
        await loop.create_connection(lambda: greeter, address.host, address.port)
    transport = greeter.transport
    assert transport is not None
    try:
        return Offers.of(await greeter.extensions), transport
    except BaseException:
        transport.abort()
        raise


class _Greeter(asyncio.Protocol):
    """Hears the greeting, says LHLO, and hears the extensions."""

    def __init__(self, local_hostname: str) -> None:
        self.local_hostname = local_hostname
        self.transport: asyncio.Transport | None = None
        self.extensions: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._buffer = b""
        self._lines: list[str] = []
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport, and behaves like one

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            for line in lines:
                self._take(line.rstrip(b"\r"))
        except LmtpError as error:
            self._end(error)
        if len(self._buffer) > LINE_BYTES_MAX:
            self._end(LmtpError("it says a line without an end"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or LmtpError("it closed the connection before it said what it offers"))

    def _end(self, error: Exception) -> None:
        if not self.extensions.done():
            self.extensions.set_exception(error)

    def _take(self, line: bytes) -> None:
        code, text = CODES.get(line[:3]), line[4:].decode("utf-8", "replace")
        wanted = _OK if self._greeted else _GREETING
        if code != wanted or len(self._lines) > _LINES_MAX:
            raise LmtpError(
                f"it says {line[:80].decode('utf-8', 'replace')!r} {'to LHLO' if self._greeted else 'at first'}"
            )
        self._lines.append(text)
        if line[3:4] == b"-":
            return
        if self._greeted:
            words = [said.partition(" ") for said in self._lines[1:]]
            if not self.extensions.done():
                self.extensions.set_result({name.lower(): parameters for name, _, parameters in words})
            return
        self._greeted, self._lines = True, []
        assert self.transport is not None
        self.transport.write(f"LHLO {self.local_hostname}\r\n".encode())
