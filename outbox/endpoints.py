"""Where a relay answers over HTTP: /metrics, /livez and /readyz, from threads of their own, so that it answers hung.

It is for the machines that watch, on an address that only they reach: there is no login, and nothing can be changed.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from outbox.address import parse_listen
from outbox.errors import ConfigurationError
from outbox.fleet import FleetReader
from outbox.health import Health
from outbox.log import Events

log = Events("outbox.relay")

REQUESTS_MAX: Final = 16  # at once; who comes then is turned away
CLIENT_SILENT_MAX_S: Final = 10.0

Respond = Callable[..., Any]
App = Callable[[dict[str, Any], Respond], Iterable[bytes]]


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SILENT_MAX_S

    def log_message(self, *_: object) -> None:
        """Say nothing: probes come all the time."""

    def address_string(self) -> str:
        """The client's address; its name would have to be looked up."""
        return str(self.client_address[0])


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, family: socket.AddressFamily, place: tuple[str, int]) -> None:
        self.address_family = family
        self._places = threading.BoundedSemaphore(REQUESTS_MAX)
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        """Bind, without asking a name server for this host's name as the standard library does."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there are not too many already."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client went away or was too slow."""
        del request
        log.debug("http_failed", "no answer to {client}: {reason}", client=client_address[0], reason=sys.exception())


class Endpoints:
    """A place to listen at. Open it before the relay: a place that is taken is a fault of the settings."""

    def __init__(self, place: str) -> None:
        """Listen at `host:port`.

        Raises:
            ConfigurationError: nobody can listen there.

        """
        try:
            host, port = parse_listen(place)
        except ValueError as error:
            raise ConfigurationError(f"--http: {error}.") from None
        try:
            family, *_, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, (str(address[0]), int(address[1])))
        except (OSError, ValueError) as error:  # of a name that is none, getaddrinfo says UnicodeError
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"http: nobody can listen at {place} ({reason}); write an address of this server and a free port, "
                'such as "127.0.0.1:9464".'
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def serve(self, metrics: App, health: Health, reader: FleetReader) -> None:
        """Answer from now on, until the process ends."""
        self._server.set_app(_app(metrics, health, reader))
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()
        host, port = self._server.server_address[:2]
        place = f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"
        log.info("http_listening", "metrics and health are at http://{place}/metrics, /livez, /readyz", place=place)


def _app(metrics: App, health: Health, reader: FleetReader) -> App:
    def live() -> list[str]:
        return health.faults()

    def ready() -> list[str]:
        hindrances = health.hindrances()
        return hindrances or [fault for fault in (reader.schema_fault(),) if fault]

    checks = {"/livez": ("live", live), "/readyz": ("ready", ready)}

    def answer(environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        path, is_head = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"] == "HEAD"
        if environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
            return _say(respond, "405 Method Not Allowed", {"error": "use GET"}, allow="GET, HEAD")
        if path == "/metrics":
            try:
                found = metrics({**environ, "REQUEST_METHOD": "GET"}, respond)
            except Exception:
                log.exception("http_fault", "a fault of outbox itself while it measured")
                return _say(respond, "500 Internal Server Error", {"error": "see the log"}, is_head=is_head)
            return [] if is_head else found
        if path in checks:
            name, check = checks[path]
            reasons = check()
            status = "503 Service Unavailable" if reasons else "200 OK"
            return _say(respond, status, {name: not reasons, "reasons": reasons}, is_head=is_head)
        said = {"error": "there are /metrics, /livez and /readyz"}
        return _say(respond, "404 Not Found", said, is_head=is_head)

    return answer


def _say(
    respond: Respond, status: str, said: dict[str, Any], *, is_head: bool = False, allow: str | None = None
) -> Iterable[bytes]:
    body = json.dumps(said).encode() + b"\n"
    headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store"), ("Content-Length", str(len(body)))]
    respond(status, [*headers, *([("Allow", allow)] if allow else [])])
    return [] if is_head else [body]
