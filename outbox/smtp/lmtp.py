"""LMTP (RFC 2033): connections to a mail store, set up to the reply to LHLO.

The dialogue that follows is SMTP's. There is one recipient to a transaction, so there is one reply to the dot as well.
aiosmtplib does not speak LMTP, hence these few lines.
"""

import asyncio
import socket
from typing import Final

from outbox.settings.urls import SmtpAddress
from outbox.smtp.dialing import Attempt, Dialer, connect_to
from outbox.smtp.extensions import Offers
from outbox.smtp.helo import helo_name
from outbox.smtp.replies import CODES, LINE_BYTES_MAX

_LINES_MAX: Final = 200
_GREETING: Final = 220
_OK: Final = 250

Opened = tuple[Offers, asyncio.Transport]


class LmtpError(Exception):
    """The server refuses, or does not speak LMTP. `code` and `message` are its reply; 0 and "" if there is none.

    `command` is what it replied to: empty for the greeting.
    """

    def __init__(self, error: str, *, code: int = 0, message: str = "", command: str = "") -> None:
        super().__init__(error)
        self.code, self.message, self.command = code, message, command


async def open_lmtp(address: SmtpAddress, helo: str | None, *, dialer: Dialer, within_s: float) -> Opened:
    """Return what the server offers, and the connection to it; `helo` is the setting `helo_name`.

    Raises:
        LmtpError: the server at the socket refuses, or speaks something else.
        AllFailedError: the same at each address of the host.
        OSError: the name has no address, or nothing listens on the socket.
        TimeoutError: no answer within this time.

    """
    if address.path is None:

        async def attempt(attempt: Attempt) -> Opened:
            sock = await connect_to(attempt.endpoint)
            attempt.is_connected()
            return await _open(helo_name(helo, sock.getsockname()), sock=sock)

        return await dialer.open(attempt, within_s=within_s, discard=lambda opened: opened[1].abort())
    async with asyncio.timeout(within_s):
        return await _open(helo_name(helo, None), path=address.path)


async def _open(name: str, *, sock: socket.socket | None = None, path: str | None = None) -> Opened:
    loop = asyncio.get_running_loop()
    greeter = _Greeter(name)
    if sock is not None:
        await loop.create_connection(lambda: greeter, sock=sock)
    else:
        await loop.create_unix_connection(lambda: greeter, path)
    transport = greeter.transport
    assert transport is not None
    try:
        return Offers.of(await greeter.extensions), transport
    except BaseException:
        transport.abort()
        raise


class _Greeter(asyncio.Protocol):
    """Reads the greeting, says LHLO, and reads the extensions."""

    def __init__(self, name: str) -> None:
        self.name = name
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
        if code is None or line[3:4] not in (b" ", b"-", b"") or len(self._lines) > _LINES_MAX:
            raise LmtpError(f"it says {line[:80].decode('utf-8', 'replace')!r}, which is not a reply")
        self._lines.append(text)
        if line[3:4] == b"-":
            return
        if code != (_OK if self._greeted else _GREETING):
            said = " ".join(self._lines)
            raise LmtpError(
                f"{code} {said}", code=code, message=said, command=f"LHLO {self.name}" if self._greeted else ""
            )
        if self._greeted:
            words = [said.partition(" ") for said in self._lines[1:]]
            if not self.extensions.done():
                self.extensions.set_result({name.lower(): parameters for name, _, parameters in words})
            return
        self._greeted, self._lines = True, []
        assert self.transport is not None
        self.transport.write(f"LHLO {self.name}\r\n".encode())
