"""HTTP endpoints of a relay: /metrics, /livez and /readyz.

They are for monitoring, on an address that only it can reach: there is no login, and nothing can be changed. /livez is
answered on the server's own thread from memory, even if the relay's event loop hangs. Answers that may wait for the
database, /metrics and the schema check of /readyz, are computed in other threads and have a deadline.
"""

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, Generic, Self, TypeVar

from outbox.errors import ConfigurationError
from outbox.log import Events
from outbox.monitoring.fleet import FleetReader
from outbox.monitoring.health import Health
from outbox.monitoring.http_server import BACKLOG, Answer, HttpServer, Request
from outbox.settings.urls import parse_listen

log = Events("outbox.relay")

METRICS_MAX_S: Final = 8.0  # below the 10 s that Prometheus waits
READY_MAX_S: Final = 2.0
# A result is kept for this many times the CPU time that it took: a flood of scrapes costs at most a tenth of a core.
CPU_COST: Final = 10

OPENMETRICS: Final = "application/openmetrics-text"

T = TypeVar("T")
Metrics = Callable[[str], tuple[str, bytes]]
"""Function that returns content type and text of all metrics for an Accept header. It may block."""


class Endpoints:
    """Endpoints on one address.

    The address is opened before the relay, since one that is in use is an error in the settings.
    """

    def __init__(self, address: str) -> None:
        """Listen on `host:port`.

        Raises:
            ConfigurationError: the address is malformed, in use, or not of this machine.

        """
        try:
            host, port = parse_listen(address)
        except ValueError as error:
            raise ConfigurationError(f"--http: {error}.") from None
        try:
            listener = _listen(host, port)
        except (OSError, ValueError) as error:  # getaddrinfo raises UnicodeError for an invalid host name
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"http: cannot listen on {address} ({reason}); write an address of this server and a free port, "
                'such as "127.0.0.1:9464".'
            ) from None
        bound_host, bound_port = listener.getsockname()[:2]
        self.address = f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"
        self._server = HttpServer(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def serve(self, metrics: Metrics, health: Health, reader: FleetReader) -> None:
        """Answer from now on, until the `with` block ends."""
        self._server.serve(_Paths(metrics, health, reader).answer)
        log.info(
            "http_listening", "metrics and health are at http://{place}/metrics, /livez, /readyz", place=self.address
        )


def _listen(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # on Windows it would let another process take over the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class _Paths:
    """Handler of the requests; runs on the server's loop."""

    def __init__(self, metrics: Metrics, health: Health, reader: FleetReader) -> None:
        self.health = health
        self.reader = reader
        self._plain = _Shared(lambda: metrics(""))
        self._openmetrics = _Shared(lambda: metrics(OPENMETRICS))
        self._schema = _Shared(reader.schema_fault)

    def answer(self, request: Request) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer, or a coroutine that returns it later."""
        if request.method not in {"GET", "HEAD"}:
            return _json(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "use GET"}, allow="GET, HEAD")
        match request.path:
            case "/livez":
                return _check("live", self.health.faults())
            case "/readyz":
                reasons = self.health.hindrances()
                return _check("ready", reasons) if reasons else self._ready()
            case "/metrics":
                return self._measure(self._openmetrics if OPENMETRICS in request.accept.lower() else self._plain)
            case _:
                return _json(HTTPStatus.NOT_FOUND, {"error": "not found; use /metrics, /livez or /readyz"})

    async def _ready(self) -> Answer:
        try:
            found = await self._schema.result(READY_MAX_S)
        except TimeoutError:  # a database that hangs says nothing about the schema; the relay's own session does
            found = self.reader.last_schema_fault()
        return _check("ready", [] if found is None else [found])

    async def _measure(self, measured: "_Shared[tuple[str, bytes]]") -> Answer:
        try:
            content_type, body = await measured.result(METRICS_MAX_S)
        except TimeoutError:
            return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": f"no metrics within {METRICS_MAX_S:g} s"})
        return Answer(HTTPStatus.OK, content_type, body)


class _Shared(Generic[T]):
    """Computation that may block. It runs in a thread of its own, and concurrent callers share one run.

    A run that hangs holds one daemon thread, however many callers there are, and does not keep the process alive.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._running: asyncio.Future[T] | None = None
        self._last: asyncio.Future[T] | None = None
        self._fresh_until = 0.0

    async def result(self, within_s: float) -> T:
        """Return the result, or raise what the computation raised.

        Raises:
            TimeoutError: it takes longer than `within_s`; it goes on for later callers.

        """
        if self._running is None and self._last is not None and time.monotonic() < self._fresh_until:
            return self._last.result()
        if self._running is None:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[T] = loop.create_future()
            threading.Thread(target=self._run, args=(loop, future), name="http work", daemon=True).start()
            self._running = future
        return await asyncio.wait_for(asyncio.shield(self._running), within_s)

    def _run(self, loop: asyncio.AbstractEventLoop, future: "asyncio.Future[T]") -> None:
        began_s = time.thread_time()
        ended: Callable[[], None]
        try:
            found = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the callers
            raised = error
            ended = lambda: future.set_exception(raised)  # noqa: E731
        else:
            ended = lambda: future.set_result(found)  # noqa: E731
        cost_s = time.thread_time() - began_s
        with suppress(RuntimeError):  # the server was closed meanwhile
            loop.call_soon_threadsafe(self._end, future, ended, cost_s)

    def _end(self, future: "asyncio.Future[T]", ended: Callable[[], None], cost_s: float) -> None:
        ended()
        future.exception()  # marks it as retrieved, even if no caller waits any more
        self._running, self._last = None, future
        self._fresh_until = time.monotonic() + CPU_COST * cost_s


def _check(name: str, reasons: Iterable[str]) -> Answer:
    found = list(reasons)
    status = HTTPStatus.SERVICE_UNAVAILABLE if found else HTTPStatus.OK
    return _json(status, {name: not found, "reasons": found})


def _json(status: HTTPStatus, fields: dict[str, Any], *, allow: str | None = None) -> Answer:
    return Answer(status, "application/json", json.dumps(fields).encode() + b"\n", allow)
