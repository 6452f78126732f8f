"""A server of the company: its two ways out, and the processes that run on it."""

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
        """Whether it has not been seen to end."""
        return self.child.returncode is None

    @property
    def is_running(self) -> bool:
        """Whether it processes, and no fault has told it to end."""
        return self.is_alive and self.ended_by is None

    def send(self, signum: int) -> None:
        """A signal, if it is still there."""
        with suppress(ProcessLookupError):
            self.child.send_signal(signum)

    def end(self, fault: str, signum: int) -> None:
        """A signal that ends it."""
        if self.is_alive and self.ended_by is None:
            self.ended_by, self.ended_at = fault, time.time()
        self.send(signum)

    async def ended(self) -> int:
        """Wait for its end; gives its exit code."""
        await asyncio.shield(self.over)
        assert self.child.returncode is not None
        self.ended_at = self.ended_at or time.time()
        return self.child.returncode


@dataclass(eq=False)
class Host:
    """One server of the company: its two ways out, and what runs on it."""

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
        """Whether a connection that comes from this port to the mail server is this server's."""
        return any(
            link.server is not None and link.server.get_extra_info("sockname")[1] == port for link in self.smtp.links
        )
