"""The ASGI application: the routes of pages and board over one store, and what is said when something is wrong."""

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
from outbox.web.board.signing import Door
from outbox.web.guard import Callers, Guarded, Misses, TooLargeError
from outbox.web.looks import notice
from outbox.web.pages import Pages
from outbox.web.store import Store

log = Events("outbox.web")

RETRY_AFTER_S = "5"


def create(settings: Settings, *, is_local: bool = False) -> Starlette:
    """The application. Nothing is connected before its lifespan begins, and then only when it is asked for something.

    Without a sign-in there is a board only if the caller says `is_local`: that it listens on a loopback address.

    Raises:
        ConfigurationError: the settings lack `database_url`, or name a file that cannot be used.
    """
    settings.require("database_url")
    assert settings.database_url is not None
    web = settings.web
    store, callers, misses = Store(settings.database_url), Callers(web.proxies), Misses()
    routes = Pages(web, store, callers, misses).routes()
    live = None
    if web.board and (web.has_sign_in or is_local):
        live = Live(settings, store)
        door = Door(web, callers, misses, is_open=is_local and not web.has_sign_in)
        routes += board_routes(settings, store, door, live)

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
        middleware=[Middleware(Guarded)],
        exception_handlers={
            HTTPException: _refused,
            TooLargeError: _too_large,
            DatabaseUnavailableError: _away,
            asyncpg.InsufficientPrivilegeError: _forbidden,
        },
    )
    app.state.store = store
    app.state.live = live  # whoever stops the server ends it first, and with it what never ends by itself
    app.router.redirect_slashes = False
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "This link leads to no page: it is not whole, or its time is over."}
    titles = {404: "Nothing here", 405: "Not like this"}
    return notice(
        request,
        error.status_code,
        titles.get(error.status_code, "Not done"),
        words.get(error.status_code, "This address does not answer such a request."),
        **{name.replace("-", "_"): value for name, value in (error.headers or {}).items()},
    )


async def _too_large(request: Request, _: Exception) -> Response:
    return notice(request, 413, "Too large", "The request is too large.", Connection="close")


async def _away(request: Request, error: Exception) -> Response:
    log.warning("database_away", "a page could not be shown: {reason}", reason=str(error))
    return notice(
        request,
        503,
        "Not available right now",
        "The database does not answer. This page comes back by itself; load it again in a moment.",
        Retry_After=RETRY_AFTER_S,
    )


async def _forbidden(request: Request, error: Exception) -> Response:
    log.warning("database_refuses", "the role of outbox web may not: {reason}", reason=str(error))
    return notice(
        request,
        403,
        "Not allowed",
        "The database does not let this server read or change that; docs/roles.md says what its role needs.",
    )
