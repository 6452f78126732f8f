"""`outbox web` as a process: one uvicorn server around the application.

`connections` bounds the connections and their time, uvicorn a head that comes in pieces
(`h11_max_incomplete_event_size`), `guard` a head that comes whole, and bodies.
"""

import asyncio
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette

from outbox.database.refusal import DatabaseRefusedError
from outbox.errors import ConfigurationError, DatabaseUnavailableError
from outbox.log import Events
from outbox.settings import Settings
from outbox.settings.urls import parse_listen
from outbox.web.application import create
from outbox.web.board import Live
from outbox.web.connections import Connections, protocol
from outbox.web.queries import Store
from outbox.web.security import HEAD_MAX, Callers

log = Events("outbox.web")

IDLE_MAX_S: Final = 15  # between two requests
LINK_TOKEN_SIZE: Final = 24  # random bytes
WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not listened on


class _Server(uvicorn.Server):
    """Server that ends on SIGTERM when all requests are answered, and the process with 0.

    Live streams have no end of their own, and are ended at once.
    """

    def __init__(self, config: uvicorn.Config, live: Live | None = None) -> None:
        super().__init__(config)
        self._live = live

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals on the loop; uvicorn itself would end the process by the signal."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # the second signal
        self.should_exit = True
        if self._live is not None:
            self._live.end()


async def serve(settings: Settings) -> None:
    """Serve at `web.http` until SIGTERM or SIGINT, then answer the requests in progress within `drain_s`.

    If the settings have no sign-in, the board gets a random token for this run, in a link for the operator.

    Raises:
        ConfigurationError: cannot listen there.
        SchemaError, DatabaseRefusedError: a person must act; a database that is away is waited for.
    """
    web = settings.web
    listening = _listen(web.http)
    link_token = secrets.token_urlsafe(LINK_TOKEN_SIZE) if web.board and not web.has_sign_in else None
    app = create(settings, link_token=link_token)
    await _require_schema(app.state.store)
    _announce(settings, _place(listening), link_token)
    await _Server(_config(app, settings), app.state.live).serve(sockets=[listening])
    log.info("web_stopped", "all requests are answered")


def _announce(settings: Settings, place: str, link_token: str | None) -> None:
    """Log the address of the pages. The link is for a person at the terminal: it is printed if the log is quiet."""
    if link_token is None:
        board = " and the board" if settings.web.board else ""
        log.info("web_listening", "report pages{board} are at http://{place}/", board=board, place=place)
        return
    host, _, port = place.rpartition(":")
    local = f"127.0.0.1:{port}" if host.strip("[]") in WILDCARDS else place
    reached = settings.web.url or f"http://{local}/"
    sentence = (
        "report pages are at {place}, and the board is behind this link: {reached}?token={token} "
        "(valid until this process ends; set board_token or board_header in [web] for a permanent sign-in)"
    )
    fields = {"place": place, "reached": reached, "token": link_token}
    if log.says(logging.INFO):
        log.info("web_listening", sentence, **fields)
    else:
        print(f"outbox: {sentence.format_map(fields)}", file=sys.stderr, flush=True)  # noqa: T201


def _config(app: Starlette, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol(Connections(Callers(settings.web.proxies))),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # its warnings report errors of clients, without a limit
        access_log=False,  # paths hold tokens
        proxy_headers=False,  # it would trust every client of this machine; `Callers` trusts those in the settings
        server_header=False,
        h11_max_incomplete_event_size=HEAD_MAX,
        timeout_keep_alive=IDLE_MAX_S,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )


async def _require_schema(store: Store) -> None:
    try:
        await store.check()
    except DatabaseRefusedError:
        raise
    except DatabaseUnavailableError as error:
        log.warning("database_away", "{reason} Pages say so until it answers.", reason=str(error))
    finally:
        await store.close()


def _listen(place: str) -> socket.socket:
    host, port = parse_listen(place)
    try:
        family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, ValueError) as error:  # getaddrinfo raises UnicodeError for what cannot be a name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"web.http: cannot listen on {place} ({reason}); write an address of this server and a free port, "
            'such as "127.0.0.1:8025".'
        ) from None
    # Connections inherit it. asyncio sets it only on sockets whose protocol is named, and without it the body of an
    # answer waits until the client has acknowledged its head: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _place(listening: socket.socket) -> str:
    found: tuple[Any, ...] = listening.getsockname()
    return f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}"
