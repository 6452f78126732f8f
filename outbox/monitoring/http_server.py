"""HTTP server for probes and scrapers, with a thread and an event loop of its own.

A connection carries one request, GET or HEAD. Every stage of a connection has a deadline and a limited number of slots:

    reading    the head of the request arrives            HEAD_MAX_S
    waiting    the answer is computed elsewhere           the handler's own deadline
    answered   the client reads the answer, then closes   ANSWER_MAX_S

A new connection is always accepted. If a stage is full, the server closes the oldest connection of the address that has
the most connections, so slow clients compete with each other and not with the rest.
"""

import asyncio
import errno
import os
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from ipaddress import IPv6Address
from typing import Any, Final, cast

from outbox.log import Events

log = Events("outbox.relay")

HEAD_MAX_S: Final = 3.0
HEAD_BYTES_MAX: Final = 8 * 1024
ANSWER_MAX_S: Final = 5.0
CLOSE_MAX_S: Final = 1.0
DISCARDED_BYTES_MAX: Final = 256 * 1024  # sent by a client after the head of its request
CONNECTIONS_MAX: Final = 128
CONNECTIONS_MIN: Final = 8
BACKLOG: Final = 512
# After this many new connections the open ones are read first: a request that arrives in a flood of connections is
# answered before the flood can evict it. The pause also bounds the CPU time that a flood costs.
ACCEPTED_AT_ONCE: Final = 16
ACCEPT_PAUSE_S: Final = 0.01

_NO_FILES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,20}) ((?:https?://[^/ ]*)?/[!-~]*) HTTP/1\.[01]")
_ACCEPT: Final = re.compile(rb"\r?\naccept:[ \t]*([ -~]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Request:
    """Request without its body, which is discarded. `path` has no query."""

    method: str
    path: str
    accept: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Complete answer; HEAD gets it without its body."""

    status: HTTPStatus
    content_type: str
    body: bytes
    allow: str | None = None

    def encode(self, *, is_head: bool) -> bytes:
        """Return the bytes of the answer. The connection is closed after them."""
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *([f"Allow: {self.allow}"] if self.allow else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + (b"" if is_head else self.body)


def text(status: HTTPStatus, line: str) -> Answer:
    """Return an answer of one line."""
    return Answer(status, "text/plain; charset=utf-8", f"{line}\n".encode())


_FAILED: Final = text(HTTPStatus.INTERNAL_SERVER_ERROR, "see the log")

# Returns the answer, or a coroutine for one that takes longer. Runs on the server's loop, so it must not block.
Handler = Callable[[Request], "Answer | Coroutine[Any, Any, Answer]"]


class _Stage(Enum):
    READING = auto()
    WAITING = auto()
    ANSWERED = auto()


class HttpServer:
    """Server on a listening socket. `serve` returns at once; `close` ends the thread."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._loop = asyncio.SelectorEventLoop()  # not uvloop, which has no way to accept by hand
        self._loop.set_exception_handler(_note)
        self._thread: threading.Thread | None = None
        self._handler: Handler | None = None
        self._is_closing = False
        slots = _slots()
        self._slots: dict[_Stage, _Slots] = {
            _Stage.READING: _Slots(slots // 2),
            _Stage.WAITING: _Slots(slots // 4),
            _Stage.ANSWERED: _Slots(slots // 4),
        }
        # A file descriptor that is released when there is none left, so that probes are still answered one by one.
        self._spare: int | None = None
        self._open: set[_Connection] = set()  # including those that were cut and are not closed yet
        self._tasks: set[asyncio.Task[Any]] = set()

    def serve(self, handler: Handler) -> None:
        """Answer from now on, in a thread of its own."""
        self._handler = handler
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and cut the open connections."""
        if self._thread is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(ANSWER_MAX_S)
        else:
            self._loop.close()
        self._listener.close()

    def _run(self) -> None:
        self._reserve()
        self._resume_accepting()
        try:
            self._loop.run_forever()
        finally:
            self._is_closing = True
            self._loop.remove_reader(self._listener)
            self._loop.run_until_complete(self._cut_all())
            self._release()
            self._loop.close()

    async def _cut_all(self) -> None:
        """Cut every connection, and wait until their sockets are closed."""
        for connection in list(self._open):
            connection.cut()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_MAX_S):
                while self._open or self._tasks:
                    await asyncio.sleep(0)

    def _resume_accepting(self) -> None:
        if not self._is_closing:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Accept the connections that wait, a few at a time."""
        self._loop.remove_reader(self._listener)
        self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _NO_FILES:
                    continue  # the client has disconnected
                if self._cut_any() or not self._release():
                    return  # the connection that was cut is closed by the next call
                continue
            self._begin(accepted, address)

    def _begin(self, accepted: socket.socket, address: Any) -> None:
        connection = _Connection(self, _group_of(address))
        self._open.add(connection)
        self.move(connection, _Stage.READING)
        self.beside(self._attach(connection, accepted))

    async def _attach(self, connection: "_Connection", accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:
            accepted.close()
            self.forget(connection)

    def beside(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run the work as a task, with a reference until it ends."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def move(self, connection: "_Connection", stage: _Stage) -> None:
        """Put a connection into a stage, and evict another one if the stage is full."""
        self._slots[connection.stage].connections.pop(connection, None)
        connection.stage = stage
        self._slots[stage].add(connection)

    def forget(self, connection: "_Connection") -> None:
        """Forget a connection that has ended."""
        self._open.discard(connection)
        self._slots[connection.stage].connections.pop(connection, None)
        if self._spare is None:
            self._loop.call_soon(self._reserve)  # after its socket was closed

    def answer(self, request: Request) -> "Answer | Coroutine[Any, Any, Answer]":
        """Return the answer of the handler, or a 500 if it raises."""
        assert self._handler is not None
        try:
            return self._handler(request)
        except Exception:  # the outermost handler of this thread: the next request must still be answered
            log.exception("http_fault", "an answer over HTTP could not be computed; this is a bug in outbox")
            return _FAILED

    def _cut_any(self) -> bool:
        """Cut one connection of the least useful stage; return False if there is none."""
        for stage in (_Stage.ANSWERED, _Stage.READING, _Stage.WAITING):
            if self._slots[stage].connections:
                self._slots[stage].evict()
                return True
        return False

    def _reserve(self) -> None:
        if self._spare is None and not self._loop.is_closed():
            with suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY)

    def _release(self) -> bool:
        """Close the spare file descriptor; return False if it is closed already."""
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)
        return spare is not None


@dataclass(slots=True)
class _Slots:
    """Connections in one stage, at most `most`, the oldest first."""

    most: int
    connections: dict["_Connection", None] = field(default_factory=dict)

    def add(self, connection: "_Connection") -> None:
        while len(self.connections) >= self.most:
            self.evict()
        self.connections[connection] = None

    def evict(self) -> None:
        """Cut the oldest connection of the address that has most of them."""
        held = Counter(one.group for one in self.connections)
        largest = max(held.values())
        victim = next(one for one in self.connections if held[one.group] == largest)
        del self.connections[victim]
        victim.cut()


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: HttpServer, group: str) -> None:
        self.server = server
        self.group = group
        self.stage = _Stage.READING
        self._loop = server._loop  # noqa: SLF001 - server and connection share one loop
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._discarded = 0
        self._is_cut = False
        self._is_at_eof = False
        self._is_head = False
        self._task: asyncio.Task[None] | None = None
        self._deadline = self._loop.call_later(HEAD_MAX_S, self.cut)

    def cut(self) -> None:
        """Close the connection at once, even if an answer is pending."""
        self._is_cut = True
        self._deadline.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._is_cut:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._deadline.cancel()
        if self._task is not None:
            self._task.cancel()
        self.server.forget(self)

    def eof_received(self) -> bool:
        """Keep the connection of a client that has sent everything and waits for the answer."""
        self._is_at_eof = True
        return self.stage is _Stage.WAITING

    def data_received(self, data: bytes) -> None:
        if self._is_cut:
            return
        if self.stage is not _Stage.READING:
            self._discarded += len(data)
            if self._discarded > DISCARDED_BYTES_MAX:
                self.cut()
            return
        looked_at = max(len(self._buffer) - len(b"\r\n\r"), 0)
        self._buffer += data
        if not self._buffer.strip(b"\r\n"):
            del self._buffer[:]  # RFC 9112 §2.2: an empty line or two before the request
            return
        begin = len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))
        end = _HEAD_END.search(self._buffer, max(begin, looked_at))
        if len(self._buffer if end is None else self._buffer[: end.start()]) > HEAD_BYTES_MAX:
            self._say(
                text(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the head has more than {HEAD_BYTES_MAX} bytes")
            )
        elif end is not None:
            head = bytes(self._buffer[begin : end.start()])
            del self._buffer[:]
            self._take(head)

    def _take(self, head: bytes) -> None:
        line = re.split(rb"\r?\n", head, maxsplit=1)[0]
        found = _REQUEST_LINE.fullmatch(line)
        if found is None:
            self._say(text(HTTPStatus.BAD_REQUEST, "this is not an HTTP/1.1 request"))
            return
        method, target = found[1].decode(), found[2].decode()
        self._is_head = method == "HEAD"
        path = re.sub(r"^https?://[^/]*", "", target).partition("?")[0]
        accept = _ACCEPT.search(head)
        given = self.server.answer(Request(method, path, accept[1].decode() if accept else ""))
        if isinstance(given, Answer):
            self._say(given)
        else:
            self._deadline.cancel()
            self.server.move(self, _Stage.WAITING)
            self._task = self.server.beside(self._wait_for(given))

    async def _wait_for(self, given: Coroutine[Any, Any, Answer]) -> None:
        try:
            answer = await given
        except Exception:  # as in `answer`
            log.exception("http_fault", "an answer over HTTP could not be computed; this is a bug in outbox")
            answer = _FAILED
        self._task = None
        self._say(answer)

    def _say(self, answer: Answer) -> None:
        """Write the answer, then discard further input until the client closes.

        To close at once would reset the connection if there are unread bytes, and the answer could be lost.
        """
        if self._is_cut or self._transport is None or self._transport.is_closing():
            return
        self._deadline.cancel()
        self._deadline = self._loop.call_later(ANSWER_MAX_S, self.cut)
        self.server.move(self, _Stage.ANSWERED)
        self._transport.write(answer.encode(is_head=self._is_head))
        if self._is_at_eof:
            self._transport.close()
        elif self._transport.can_write_eof():
            self._transport.write_eof()


def _slots() -> int:
    """Return the largest number of connections: a small part of the file descriptors, since mail needs the others."""
    if sys.platform == "win32":
        return CONNECTIONS_MAX
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return min(max(limit // 8, CONNECTIONS_MIN), CONNECTIONS_MAX)


def _group_of(address: Any) -> str:
    """Return the client of a connection: its IPv4 address, or the /64 of its IPv6 address, which one host may own."""
    host = str(address[0]).partition("%")[0]
    if ":" not in host:
        return host
    parsed = IPv6Address(host)
    return str(parsed.ipv4_mapped or (int(parsed) >> 64))


def _note(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    reason = context.get("exception") or context["message"]
    log.debug("http_failed", "a client was not answered: {reason}", reason=reason)
