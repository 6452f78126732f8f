"""The application: its commands in their order, and what each of them needs: settings, a connection, an event loop."""

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from outbox.database.connection import Connection
    from outbox.settings import Settings

_T = TypeVar("_T")

ORDER: Final = (
    *("init", "doctor", "preview", "test-send", "generate", "digest", "schedule", "mark-done", "relay"),
    *("status", "watch", "list", "show", "audit"),
    *("retry", "cancel", "resolve", "waive", "pause", "resume", "suppress", "bounce", "prune", "web", "demo"),
)
"""Commands as `outbox --help` lists them: in the order in which a user meets them."""


class _InOrder(TyperGroup):
    """Group of the commands in ORDER."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in ORDER."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    help="One report, one email per person and period, however many servers run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file; else OUTBOX_CONFIG, else ./outbox.toml.", show_default=False),
]


@app.callback(invoke_without_command=True)
def outbox(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One report, one email per person and period, however many servers run it."""
    if version:
        from outbox import __version__

        typer.echo(f"outbox-mail {__version__}")
        raise typer.Exit
    context.obj = config


def settings_of(context: typer.Context, config: Path | None) -> "Settings":
    """Return the settings of `config`, which may be given before the command or after it; else of where `load` looks.

    Raises:
        ConfigurationError: they cannot be used.

    """
    from outbox.settings import load

    return load(config or context.obj)


def log_warnings() -> None:
    """Log warnings to standard error, each as a sentence of outbox."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="outbox: %(message)s")


def awaited(main: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a coroutine.

    Raises:
        KeyboardInterrupt: SIGINT ended it, whatever the cancelled code raised.

    """
    import asyncio

    async def interruptible() -> _T:
        try:
            return await main
        except Exception as error:
            # asyncio cancels the task on SIGINT. What is cancelled in mid-statement may report a lost session instead.
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError from error
            raise

    return asyncio.run(interruptible())


@asynccontextmanager
async def connected(settings: "Settings", application: str) -> "AsyncIterator[Connection]":
    """Yield a connection to a database whose schema is this code's."""
    from outbox.database.lock_wait import lock_waits
    from outbox.database.opening import connect
    from outbox.database.schema import require_current

    assert settings.database_url is not None
    connection = await connect(settings.database_url, application=application)
    try:
        async with lock_waits(settings.database_url, connection, f"`{application}`"):
            await require_current(connection)
            yield connection
    finally:
        await connection.close()
