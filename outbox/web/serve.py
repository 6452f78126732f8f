"""`outbox web` as a process: one server around the application, which a slow or silent client cannot hold up.

uvicorn bounds how many connections there are, how long an idle one is kept, and a head that comes in pieces
(`h11_max_incomplete_event_size`). It bounds neither how long a client takes to say its request nor to read its answer,
which is `_Impatient`'s, nor a head that comes whole, nor a body: those are the guard's.
"""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from outbox.address import parse_listen
from outbox.database import DatabaseRefusedError
from outbox.errors import ConfigurationError, DatabaseUnavailableError
from outbox.log import Events
from outbox.settings import Settings
from outbox.web.application import create
from outbox.web.board import Live
from outbox.web.guard import HEAD_MAX
from outbox.web.store import Store

log = Events("outbox.web")

CONNECTIONS_MAX: Final = 500
REQUEST_MAX_S: Final = 10.0  # from the first byte of a request, or the connection, to its last
STALL_MAX_S: Final = 20.0  # in which nothing of an answer is taken
IDLE_MAX_S: Final = 15


class _Impatient(H11Protocol):
    """Ends a connection whose client takes too long to say its request, or takes nothing of its answer."""

    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here, and owes a request."""
        super().connection_made(transport)
        self._waiting = self.loop.call_later(REQUEST_MAX_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Some of a request, or all of it."""
        if self._waiting is None:
            self._waiting = self.loop.call_later(REQUEST_MAX_S, self.transport.abort)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            _cancel(self._waiting)
            self._waiting = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went, or was ended."""
        _cancel(self._waiting)
        _cancel(self._stalled)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not keep up with its answer."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_MAX_S, self._look, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has taken most of it."""
        _cancel(self._stalled)
        super().resume_writing()

    def _look(self, left_before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= left_before:
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(STALL_MAX_S, self._look, left)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Server(uvicorn.Server):
    """A server that ends by SIGTERM with what is in hand finished, and the process with 0.

    Who looks on live is never finished, and let go of at once.
    """

    def __init__(self, config: uvicorn.Config, live: Live | None = None) -> None:
        super().__init__(config)
        self._live = live

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear signals on the loop; uvicorn's own way ends the process by the signal itself."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # told twice
        self.should_exit = True
        if self._live is not None:
            self._live.end()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; an empty one is every address of it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def serve(settings: Settings) -> None:
    """Serve at `web.http` until SIGTERM or SIGINT, then finish what is in hand within `drain_s`.

    Raises:
        ConfigurationError: nobody can listen there, or more than this machine could reach a board without a sign-in.
        SchemaError, DatabaseRefusedError: what a person must mend; a database that is away is waited for.
    """
    web = settings.web
    host, _ = parse_listen(web.http)
    if web.board and not web.has_sign_in and not (is_loopback(host) and not web.trusted_proxies):
        raise ConfigurationError(
            f"web.http: {web.http} is reached from elsewhere, and the board has no sign-in; write board_token or "
            "board_header in [web], or serve the report pages alone with board = false (--pages-only)."
        )
    listening = _listen(web.http)
    app = create(settings, is_local=is_loopback(host))
    await _require_schema(app.state.store)
    place = _place(listening)
    log.info("web_listening", "report pages{board} are at http://{place}/", board=_and_board(settings), place=place)
    await _Server(_config(app, settings.drain_s), app.state.live).serve(sockets=[listening])
    log.info("web_stopped", "what was in hand is answered")


def _config(app: Starlette, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Impatient,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # its warnings name what clients did wrong, as often as they like
        access_log=False,  # a path has the token in it
        proxy_headers=False,  # it would believe all of this machine; `Callers` believes those whom the settings name
        server_header=False,
        limit_concurrency=CONNECTIONS_MAX,
        h11_max_incomplete_event_size=HEAD_MAX,
        timeout_keep_alive=IDLE_MAX_S,
        timeout_graceful_shutdown=max(1, int(drain_s)),
    )


def _and_board(settings: Settings) -> str:
    return " and the board" if settings.web.board else ""


async def _require_schema(store: Store) -> None:
    try:
        await store.check()
    except DatabaseRefusedError:
        raise
    except DatabaseUnavailableError as error:
        log.warning("database_away", "{reason} Pages say so until it is back.", reason=str(error))
    finally:
        await store.close()


def _listen(place: str) -> socket.socket:
    host, port = parse_listen(place)
    try:
        family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, ValueError) as error:  # of a name that is none, getaddrinfo says UnicodeError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"web.http: nobody can listen at {place} ({reason}); write an address of this server and a free port, "
            'such as "127.0.0.1:8025".'
        ) from None
    # Connections inherit it. asyncio sets it only where the protocol is named, and without it an answer's body waits
    # for the client to acknowledge its head: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _place(listening: socket.socket) -> str:
    found: tuple[Any, ...] = listening.getsockname()
    return f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}"
