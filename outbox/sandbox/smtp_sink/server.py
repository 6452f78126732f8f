"""The sink: a listener, its open connections and what they have brought."""

import asyncio
import ssl
from collections.abc import Callable, Collection, Coroutine
from types import TracebackType
from typing import Final, Self

from outbox.sandbox.smtp_sink.commands import Offer
from outbox.sandbox.smtp_sink.protocol import Connection
from outbox.sandbox.smtp_sink.record import Accepted, Record
from outbox.sandbox.smtp_sink.script import Script

SIZE_MAX: Final = 32 * 1024 * 1024
_BACKLOG: Final = 1024


class Sink:
    """SMTP server: starts, keeps what it accepts, can be gone for a while, stops.

    `login` makes AUTH mandatory; with `tls` and not `implicit_tls` it is offered after STARTTLS only.
    `extensions` (of `EXTENSIONS`) are offered beside the usual ones. With `lmtp` its URL is that of an LMTP server
    (RFC 2033). `keep_messages` off keeps envelopes without bodies; `keep_accepted` off keeps only the counts.
    A change of these attributes, or of the script, is seen by later connections.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        pipelining: bool = True,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        login: tuple[str, str] | None = None,
        size_max: int = SIZE_MAX,
        eight_bit: bool = True,
        extensions: Collection[str] = (),
        lmtp: bool = False,
        keep_messages: bool = True,
        keep_accepted: bool = True,
        on_accepted: Callable[[Accepted], None] | None = None,
    ) -> None:
        self.script = script
        self.pipelining = pipelining
        self.tls = tls
        self.implicit_tls = implicit_tls
        self.login = login
        self.size_max = size_max
        self.eight_bit = eight_bit
        self.extensions = extensions
        self.lmtp = lmtp
        self.host = ""
        self.port = 0
        self.record = Record(on_accepted, keep_messages=keep_messages, keep_accepted=keep_accepted)
        self.accepted = self.record.accepted
        self.addresses = self.record.addresses
        """How many messages each recipient was sent."""
        self.visits = self.record.visits
        self.events = self.record.events
        """Unix time, visit number and stage of every question to the script."""
        self.connections: set[Connection] = set()
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def messages(self) -> int:
        """Number of messages accepted."""
        return self.record.messages

    @property
    def refused_logins(self) -> int:
        """Number of logins with wrong credentials."""
        return sum(visit.refused_logins for visit in self.visits)

    @property
    def url(self) -> str:
        """URL of the sink, without credentials."""
        scheme = "lmtp" if self.lmtp else "smtps" if self.implicit_tls else "smtp"
        return f"{scheme}://{self.host}:{self.port}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on a TCP port, 0 for a free one."""
        self.host, self.port = host, port
        await self.reopen()

    async def reopen(self) -> None:
        """Listen again on the port that `close_listener()` closed."""
        self._listener = await asyncio.get_running_loop().create_server(
            self.connection,
            self.host,
            self.port,
            ssl=self.tls if self.implicit_tls else None,
            backlog=_BACKLOG,
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def connection(self) -> Connection:
        """Return the protocol of a new connection, with what the sink offers now."""
        offer = Offer(
            pipelining=self.pipelining,
            tls=self.tls,
            login=self.login,
            size_max=self.size_max,
            eight_bit=self.eight_bit,
            extensions=self.extensions,
        )
        return Connection(self, offer, self.script, tls_active=self.implicit_tls)

    async def close_listener(self) -> None:
        """Refuse new connections from now on; those that are open stay."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def drop_connections(self) -> None:
        """Reset all open connections."""
        for connection in tuple(self.connections):
            connection.reset()

    async def stop(self) -> None:
        """Refuse new connections, drop the open ones and cancel their waits; what was accepted stays readable."""
        await self.close_listener()
        for task in self._tasks:
            task.cancel()
        self.drop_connections()
        gone = [connection.gone for connection in self.connections]
        await asyncio.gather(*gone, *self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def opened(self, connection: Connection) -> None:
        """Add a connection to the open ones."""
        self.connections.add(connection)

    def closed(self, connection: Connection) -> None:
        """Remove a connection from the open ones."""
        self.connections.discard(connection)

    def in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run what a stage waits for; `stop()` cancels it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
