"""Server of a fault run: its two networks, and the processes that run on it."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.fault_proxy import Proxy


@dataclass(eq=False)
class ServerProcess:
    """Process from start to end. `ended_by` is the fault that ended it; None while it runs or if it ended by itself."""

    number: int
    what: str
    host: int
    child: asyncio.subprocess.Process
    over: asyncio.Task[Any]
    began_at: float
    ended_at: float | None = None
    ended_by: str | None = None

    @property
    def is_alive(self) -> bool:
        """Return True if it has not been seen to end."""
        return self.child.returncode is None

    @property
    def is_running(self) -> bool:
        """Return True if it is alive, and no fault has ended it."""
        return self.is_alive and self.ended_by is None

    def send(self, signum: int) -> None:
        """Send a signal, if it still exists."""
        with suppress(ProcessLookupError):
            self.child.send_signal(signum)

    def end(self, fault: str, signum: int) -> None:
        """Send a signal that ends it."""
        if self.is_alive and self.ended_by is None:
            self.ended_by, self.ended_at = fault, time.time()
        self.send(signum)

    async def ended(self) -> int:
        """Wait for its end and return the exit code."""
        await asyncio.shield(self.over)
        assert self.child.returncode is not None
        self.ended_at = self.ended_at or time.time()
        return self.child.returncode


@dataclass(eq=False)
class Host:
    """Server with its two networks and its processes."""

    number: int
    directory: Path
    package: Path
    database: Proxy
    smtp: Proxy
    relay: ServerProcess | None = None
    cron: ServerProcess | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of the faults that end its processes, so that each ends one of its own."""

    def owns(self, port: int) -> bool:
        """Return True if a connection to the mail server from this port is this server's."""
        return any(
            link.server is not None and link.server.get_extra_info("sockname")[1] == port for link in self.smtp.links
        )
