"""Slow network: a TCP proxy, a process of its own, that delivers everything half a round trip later, in order.

usage: python -m bench.harness.latency_proxy HOST PORT ROUND_TRIP_S JOURNAL

Portions do not wait for each other, so any number of them is under way at once: that is latency, and no limit of
throughput (`bench.proxy` sleeps per portion). The loops of asyncio and uvloop wake up on whole milliseconds, as epoll
does; this one waits for its epoll in select, whose timeout is as good as the kernel's timers. Setting a connection up
costs no round trip here. The journal gets a line per connection and end: Unix time, 1 or -1.
"""

import asyncio
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from select import select
from typing import Final, TextIO

from bench.harness.environment import Environment, start

PORTION: Final = 65_536
BACKLOG: Final = 1024
AT_ONCE: Final = 0.0
LATE_S: Final = 0.0002  # so late a sleeper may wake up: the last bit of a delay is spent awake


@dataclass(eq=False, slots=True)
class Way:
    """Direction of a connection; `back` is the other one."""

    source: socket.socket
    drain: socket.socket
    over: bool = False
    back: "Way | None" = None


@dataclass(eq=False)
class Slow:
    """Proxy. Its data lies in one queue: all of it is delayed alike, so it leaves in its order."""

    target: tuple[str, int]
    delay_s: float
    journal: TextIO
    listener: socket.socket = field(default_factory=socket.socket)
    _selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    _under_way: deque[tuple[float, Way, bytes]] = field(default_factory=deque)

    def listen(self) -> tuple[str, int]:
        """Listen on a free port and return the address."""
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(BACKLOG)
        self._selector.register(self.listener, selectors.EVENT_READ)
        host, port = self.listener.getsockname()
        return host, port

    def run(self) -> None:
        """Serve until the process ends."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait until something arrives or is due; read the one, deliver the other."""
        wait_s = None
        if self._under_way:
            wait_s = max(self._under_way[0][0] - time.monotonic() - LATE_S, AT_ONCE)
        ready, _, _ = select([self._selector], (), (), wait_s)
        if ready:
            for key, _ in self._selector.select(AT_ONCE):
                if key.data is None:
                    self._accept()
                else:
                    self._take(key.data)
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, way, data = self._under_way.popleft()
            self._deliver(way, data)

    def _accept(self) -> None:
        client, _ = self.listener.accept()
        server = socket.create_connection(self.target)
        up, down = Way(client, server), Way(server, client)
        up.back, down.back = down, up
        for way in (up, down):
            way.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(way.source, selectors.EVENT_READ, way)
        self._note(1)

    def _take(self, way: Way) -> None:
        data = b""
        with suppress(OSError):  # a reset is an end
            data = way.source.recv(PORTION)
        if not data:
            self._selector.unregister(way.source)
        self._under_way.append((time.monotonic() + self.delay_s, way, data))

    def _deliver(self, way: Way, data: bytes) -> None:
        """Write to the other end, which always reads, so that this does not block. An empty portion is the end."""
        with suppress(OSError):  # who does not listen any more misses it
            if data:
                way.drain.sendall(data)
            else:
                way.drain.shutdown(socket.SHUT_WR)
        if data:
            return
        way.over = True
        if way.back is not None and way.back.over:
            way.source.close()
            way.drain.close()
            self._note(-1)

    def _note(self, change: int) -> None:
        self.journal.write(f"{time.time():.6f}\t{change}\n")
        self.journal.flush()


@dataclass(frozen=True, slots=True)
class Opened:
    """Connections that went through: Unix times at which one came or ended."""

    changes: list[tuple[float, int]]

    @property
    def total(self) -> int:
        """Return the number of connections."""
        return sum(change > 0 for _, change in self.changes)

    def over_time(self) -> list[tuple[float, int]]:
        """Return seconds from the first one, and the number of open connections then."""
        found, standing = [], 0
        for at, change in self.changes:
            standing += change
            found.append((round(at - self.changes[0][0], 4), standing))
        return found


@asynccontextmanager
async def slowed(environment: Environment, round_trip_s: float) -> AsyncIterator[tuple[Environment, Path]]:
    """Put a slow network before the mail server of an environment; yield the new one, and the journal for `opened`."""
    journal = environment.directory / f"connections-{time.monotonic_ns()}"
    host, port = environment.smtp.removeprefix("smtp://").rsplit(":", 1)
    proxy = await start(
        "bench.harness.latency_proxy", host, port, str(round_trip_s), str(journal), directory=environment.directory
    )
    assert proxy.stdout is not None
    try:
        address = (await proxy.stdout.readline()).decode().split()[1]
        yield replace(environment, smtp=f"smtp://{address}"), journal
    finally:
        proxy.send_signal(signal.SIGTERM)
        await proxy.communicate()


def opened(journal: Path) -> Opened:
    """Read the journal of a slow network."""
    rows = (line.split("\t") for line in journal.read_text().splitlines())
    return Opened([(float(at), int(change)) for at, change in rows])


async def round_trip_s(smtp: str, pings: int) -> list[float]:
    """Measure replies to NOOP, so many times one after the other."""
    return await asyncio.to_thread(_ping, smtp.removeprefix("smtp://").rsplit(":", 1), pings)


def _ping(address: list[str], pings: int) -> list[float]:
    took = []
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.recv(PORTION)
        for _ in range(pings):
            began = time.perf_counter()
            connection.sendall(b"NOOP\r\n")
            connection.recv(PORTION)
            took.append(time.perf_counter() - began)
    return took


def main() -> None:
    """Listen, say where, and serve until a signal ends it."""
    host, port, seconds, journal = sys.argv[1:]
    with Path(journal).open("a") as lines:
        proxy = Slow((host, int(port)), float(seconds) / 2, lines)
        here, where = proxy.listen()
        sys.stdout.write(f"listening {here}:{where}\n")
        sys.stdout.flush()
        proxy.run()


if __name__ == "__main__":
    main()
