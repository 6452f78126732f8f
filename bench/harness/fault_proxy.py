"""Network for faults: a TCP proxy that forwards, delays, cuts, loses and stops at the k-th byte.

Between a relay and Postgres, or a relay and the mail server. Both sides are real sockets; nothing is parsed.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

CHUNK: Final = 65_536

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Target = tuple[str, int] | Path
"""A host and a port, or the path of a Unix socket."""


@dataclass(eq=False)
class Link:
    """Proxied connection. `up` counts bytes from the client to the server, `down` those back."""

    number: int
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    up: int = 0
    down: int = 0
    vanished: bool = False

    def vanish(self) -> None:
        """End the server's side, without a sign to the client."""
        self.vanished = True
        if self.server is not None:
            self.server.transport.abort()

    def cut(self, *, reset: bool = False) -> None:
        """End both sides: with a FIN, or with a RST."""
        for writer in (self.client, self.server):
            if writer is None:
                continue
            if reset and (sock := writer.get_extra_info("socket")) is not None:
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if reset:
                writer.transport.abort()
            else:
                writer.close()


@dataclass(eq=False)
class Proxy:
    """Proxy that forwards to `target`. Faults can be set and removed at any time.

    `black_hole`: nothing goes through, in either direction, and no end is told (a pulled cable: no FIN).
    `delay_s`: each portion waits so long, in each direction.
    `refuse`: new connections are reset at once.
    `up_max`, `down_max`: only the first so many bytes of each connection go that way; `at_limit` happens then. Of
    each connection from the `limited_from`-th on, that is.
    `on_portion` hears of whatever was passed on; a link's `up` and `down` then say how far it has come.
    """

    target: Target
    black_hole: bool = False
    refuse: bool = False
    delay_s: float = 0.0
    up_max: int | None = None
    down_max: int | None = None
    limited_from: int = 1
    at_limit: Callable[[Link], None] = Link.cut
    on_portion: Callable[[Link], None] = lambda _: None
    links: set[Link] = field(default_factory=set)
    connections: int = 0
    port: int = 0
    _healed: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and cut everything."""
        assert self._server is not None
        self._server.close()
        self.cut(reset=True)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self, *, reset: bool = False) -> None:
        """End all open connections."""
        for link in list(self.links):
            link.cut(reset=reset)

    def heal(self) -> None:
        """Remove every fault; what a black hole swallowed is delivered, as by a network's retransmissions."""
        self.black_hole = self.refuse = False
        self.delay_s = 0.0
        self.up_max = self.down_max = None
        self._healed.set()
        self._healed = asyncio.Event()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = Link(self.connections, writer)
        self.links.add(link)
        task = asyncio.get_running_loop().create_task(self._carry(link, reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, link: Link, reader: asyncio.StreamReader) -> None:
        try:
            if self.refuse:
                link.cut(reset=True)
                return
            await self._through()
            server_reader, link.server = await self._connect()
            await asyncio.gather(
                self._forward(link, reader, link.server, upwards=True),
                self._forward(link, server_reader, link.client, upwards=False),
            )
        except OSError:
            link.cut(reset=True)
        finally:
            if not link.vanished:
                link.cut()
                self.links.discard(link)

    async def _connect(self) -> Streams:
        if isinstance(self.target, Path):
            return await asyncio.open_unix_connection(self.target)
        return await asyncio.open_connection(*self.target)

    async def _through(self) -> None:
        """Wait while the hole is there."""
        while self.black_hole:
            await self._healed.wait()

    async def _forward(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upwards: bool
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._through()
                most, gone = (self.up_max, link.up) if upwards else (self.down_max, link.down)
                if link.number < self.limited_from:
                    most = None
                passed = data if most is None else data[: max(most - gone, 0)]
                if upwards:
                    link.up += len(passed)
                else:
                    link.down += len(passed)
                writer.write(passed)
                await writer.drain()
                self.on_portion(link)
                if len(passed) < len(data):
                    self.at_limit(link)
                    return
        await self._through()  # an end is news, too, and a hole swallows it
        if not link.vanished:
            writer.close()
