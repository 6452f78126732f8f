"""`outbox web`: report pages and the operators' board."""

from typing import Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, settings_of
from outbox.errors import OutboxError


@app.command()
def web(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    http: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; else [web] http, 127.0.0.1:8025.", metavar="HOST:PORT", show_default=False
        ),
    ] = None,
    pages_only: Annotated[
        bool, typer.Option("--pages-only", help="Serve the report pages, without the board.")
    ] = False,
) -> None:
    """Serve the report pages and the operators' board. SIGTERM ends it after requests in progress.

    Without a sign-in in [web] it prints a link with a random token, which is valid until the process ends.
    """
    settings = settings_of(context, config)
    settings.require("database_url")
    given = {**({"http": http} if http is not None else {}), **({"board": False} if pages_only else {})}
    if http is not None:
        _require_address(http)
    settings = settings.model_copy(update={"web": settings.web.model_copy(update=given)})
    try:
        from outbox.web.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "outbox":
            raise
        raise OutboxError(
            f"outbox web needs the extra `web`, since {error.name} is not installed; "
            "run: pip install 'outbox-mail[web]'."
        ) from None
    from outbox.log import configure

    configure(settings.log_format, settings.log_level, addresses=settings.log_addresses)
    awaited(serve(settings))


def _require_address(http: str) -> None:
    from outbox.errors import ConfigurationError
    from outbox.settings.urls import parse_listen

    try:
        parse_listen(http)
    except ValueError as error:
        raise ConfigurationError(f"--http: {error}.") from None
