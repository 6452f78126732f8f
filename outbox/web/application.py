"""The ASGI application: routes of the pages and the board over one store, and the answers to errors."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from outbox.errors import DatabaseUnavailableError
from outbox.log import Events
from outbox.settings import Settings
from outbox.web.board import Live, board_routes
from outbox.web.board.auth import Authenticator
from outbox.web.board.emails import TooLargeMessageError, too_large_message
from outbox.web.queries import Store
from outbox.web.report_pages import Pages
from outbox.web.responses import NO_PAGE, NOT_FOUND, notice
from outbox.web.security import Callers, Guarded, TooLargeError, TooManyLookupsError
from outbox.web.sub_path import SubPath

log = Events("outbox.web")

RETRY_AFTER_S = "5"


def create(settings: Settings, *, link_token: str | None = None) -> Starlette:
    """Return the application. It opens no connection before the first request.

    There is a board only with a sign-in: the settings' own, or `link_token`, a random secret of the caller's, with
    which `GET /?token=…` signs in. Without either there are the report pages alone, and a warning.

    Raises:
        ConfigurationError: the settings lack `database_url`, or name a file that cannot be used.
    """
    settings.require("database_url")
    assert settings.database_url is not None
    web = settings.web
    store, callers = Store(settings.database_url), Callers(web.proxies)
    routes = Pages(web, store, callers, settings.editions).routes()
    live = None
    if web.board and not web.has_sign_in and not link_token:
        log.warning(
            "board_left_out",
            "there is no board, only report pages: [web] has no sign-in; write board_token or board_header, "
            "or board = false",
        )
    elif web.board:
        live = Live(settings, store)
        routes += board_routes(settings, store, Authenticator(web, store, callers, link_token=link_token), live)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(store.close)
            if live is not None:
                await stack.enter_async_context(live.running())
            yield

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guarded), *([Middleware(SubPath, web.url)] if web.url else [])],
        exception_handlers={
            HTTPException: _refused,
            TooLargeError: _too_large,
            TooLargeMessageError: too_large_message,
            TooManyLookupsError: _busy,
            DatabaseUnavailableError: _away,
            asyncpg.InsufficientPrivilegeError: _forbidden,
            asyncpg.ReadOnlySQLTransactionError: _read_only,
        },
    )
    app.state.store = store
    app.state.live = live  # a server that stops ends it first, and with it the streams, which do not end by themselves
    app.router.redirect_slashes = False
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: NO_PAGE}
    titles = {404: NOT_FOUND, 405: "Method not allowed"}
    return notice(
        request,
        error.status_code,
        titles.get(error.status_code, "Not done"),
        words.get(error.status_code, "This address does not accept such a request."),
        **{name.replace("-", "_"): value for name, value in (error.headers or {}).items()},
    )


async def _too_large(request: Request, _: Exception) -> Response:
    return notice(request, 413, "Too large", "The request is too large.", Connection="close")


async def _busy(request: Request, _: Exception) -> Response:
    return _unavailable(request, "Your network sends too many requests. Load this page again in a moment.")


async def _away(request: Request, error: Exception) -> Response:
    log.warning("database_away", "a page could not be shown: {reason}", reason=str(error))
    return _unavailable(request, "The database does not answer. Load this page again in a moment.")


async def _read_only(request: Request, error: Exception) -> Response:
    log.warning("database_refuses", "the database is read-only: {reason}", reason=str(error))
    return _unavailable(
        request, "The database of this server is read-only, as on a standby. Signing in and deciding need the primary."
    )


async def _forbidden(request: Request, error: Exception) -> Response:
    log.warning("database_refuses", "the database role of outbox web lacks a right: {reason}", reason=str(error))
    words = "The database role of this server may not read or change that; docs/roles.md lists what it needs."
    return notice(request, 403, "Not allowed", words)


def _unavailable(request: Request, words: str) -> Response:
    return notice(request, 503, "Not available right now", words, Retry_After=RETRY_AFTER_S)
