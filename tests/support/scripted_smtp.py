"""SMTP server that a test scripts line by line, for behaviour that neither a real server here nor `Sink` shows."""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Self


class Peer:
    """One client: `hear` its lines, `say` ours."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.heard: list[str] = []

    async def hear(self) -> str:
        """Return its next line; end the connection if there is none."""
        line = (await self.reader.readuntil(b"\r\n")).decode(errors="replace").rstrip("\r\n")
        self.heard.append(line)
        return line

    async def say(self, *lines: str) -> None:
        self.writer.write("".join(f"{line}\r\n" for line in lines).encode())
        await self.writer.drain()

    async def silence(self) -> None:
        """Say nothing until the client hangs up."""
        while await self.reader.read(4096):
            pass


Act = Callable[[Peer], Awaitable[None]]


class Scripted:
    """Plays one act per connection, and the last one for all further connections."""

    def __init__(self, *acts: Act, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.acts, self.host, self.port, self.tls = acts, host, port, tls
        self.visits: list[Peer] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._meet, self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for visit in self.visits:
            visit.writer.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        act = self.acts[min(len(self.visits), len(self.acts) - 1)]
        self.visits.append(peer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await act(peer)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            writer.close()
            await writer.wait_closed()

    @property
    def heard(self) -> list[str]:
        """All lines of all connections."""
        return [line for visit in self.visits for line in visit.heard]
