"""Proxy between relays and a mail server: it passes every byte on and counts the server's refusals."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.neighbours.neighbour import Neighbour
from tests.support.fleet import until


class Wire:
    """The replies of 4xx and 5xx, how many connections there were, and how many at once."""

    def __init__(self, server: Neighbour) -> None:
        self.server = server
        self.refusals: Counter[str] = Counter()
        self.connections = self.open_max = 0
        self.url = ""
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def asks_to_slow_down(self) -> int:
        """How many replies were 4xx."""
        return sum(n for reply, n in self.refusals.items() if reply.startswith("4"))

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        self.open_max = max(self.open_max, len(self._open))
        try:
            with contextlib.suppress(OSError):
                from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server.port)
                await asyncio.gather(_pass_on(reader, to_server), self._listen(from_server, writer))
        finally:
            self._open.remove(writer)
            writer.close()

    async def end(self) -> None:
        """Close every connection."""
        for writer in self._open:
            writer.transport.abort()
        await until(lambda: not self._open, "the wire has closed its connections")

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for line in reader:
                if line[:1] in b"45" and line[3:4] == b" ":
                    self.refusals[line.decode(errors="replace").strip()] += 1
                writer.write(line)
        finally:
            writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(2**16):
            writer.write(data)
    finally:
        writer.close()


@asynccontextmanager
async def wire(server: Neighbour) -> AsyncIterator[Wire]:
    """Yield a listener in front of the server, until the end of the test."""
    found = Wire(server)
    async with await asyncio.start_server(found._visit, "127.0.0.1", 0) as listening:
        found.url = f"smtp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield found
        listening.close()
        await found.end()
