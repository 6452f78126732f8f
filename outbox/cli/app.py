"""What every command shares: the settings that it reads, the connection that it asks, and how it prints."""

import re
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import typer
from typer.core import TyperGroup

from outbox.cli import streams
from outbox.database.connection import Connection

if TYPE_CHECKING:
    from rich.console import Console

    from outbox.settings import Settings


_T = TypeVar("_T")


# In which `outbox --help` names them: as one meets them.
ORDER = (
    *("init", "doctor", "preview", "test-send", "generate", "digest", "schedule", "mark-done", "relay"),
    *("status", "watch", "list", "show", "audit"),
    *("retry", "cancel", "resolve", "waive", "pause", "resume", "suppress", "bounce", "prune", "web", "demo"),
)


class _InOrder(TyperGroup):
    """The commands in the order in which one meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in ORDER."""
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


NAMES_SHOWN = 10


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
    """The settings of `config`, which stands before the command or after it, or of the place that `load` knows."""
    from outbox.settings import load

    return load(config or context.obj)


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
async def connected(settings: "Settings", application: str) -> AsyncIterator[Connection]:
    """A connection to a database whose schema is this code's."""
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


def to_json(found: Any) -> str:
    """Return one line for scripts, with times as ISO 8601 and terminal control characters escaped.

    Where standard output is not in a Unicode encoding, the line is in ASCII: it is the same JSON in any encoding.
    """
    import json

    made = json.dumps(found, default=lambda at: at.isoformat(), ensure_ascii=not streams.is_unicode())
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", made)


# Control characters, which json.dumps escapes only up to U+001F, and bidirectional controls, with which a line shows
# other words than it holds.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(line: str) -> str:
    """Return the line without terminal control characters: keys and replies are untrusted."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", line)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which the columns stand below each other, two spaces apart; the last one may be as long as it is."""
    whole = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in (columns, *whole)) for at in range(len(columns) - 1)]

    def line(row: Sequence[str]) -> str:
        return "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()

    return [typer.style(line(columns), dim=True), *map(line, whole)]


def redirected(address: str) -> str:
    """What nobody who looks may miss."""
    return f"REDIRECTED: every email goes to {address} (redirect_to), none to its recipient."


SIDE_MAX = 1000  # columns or lines; no terminal has more, and a screen of millions would fill the memory


def console(**options: Any) -> "Console":
    """Return a console that is as large as its terminal, whatever COLUMNS and LINES say.

    A shell that exports them exports the size of another moment, or of another terminal. They count where a terminal
    tells no size, if they are possible sizes, and where the output is no terminal.
    """
    import os

    from rich.console import Console

    environment = dict(os.environ)
    stream = sys.stderr if options.get("stderr") else sys.stdout
    if stream.isatty():
        try:
            is_sized = all(os.get_terminal_size(stream.fileno()))
        except OSError:
            is_sized = False
        for name in ("COLUMNS", "LINES"):
            said = environment.pop(name, "")
            if not is_sized and said.isascii() and said.isdigit() and 0 < int(said[:9]) <= SIDE_MAX:
                environment[name] = said
    return Console(_environ=environment, **options)


class Bar:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str, *, counted: bool) -> None:
        self.title = title
        self.counted = counted
        self.bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(),
                MofNCompleteColumn() if self.counted else TaskProgressColumn(), TimeElapsedColumn(),
                console=console(stderr=True), transient=True,
            )  # fmt: skip
            self.bar.start()
            self.line = self.bar.add_task(self.title, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, **how: Any) -> None:
        """Where it stands: `completed` of `total`."""
        if self.bar is not None:
            self.bar.update(self.line, **how)
