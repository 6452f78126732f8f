"""`outbox watch`: a live screen, drawn from one connection, until q or a signal ends it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outbox.cli.app import ConfigOption, app, awaited, settings_of
from outbox.cli.output import console
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio

    from outbox.operations.watch import Watcher
    from outbox.settings import Settings

DRAW_S = 1.0  # ages on the screen go on although nothing new is read


@app.command()
def watch(
    context: typer.Context,
    config: ConfigOption = None,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between looks.", metavar="SECONDS")] = 1.0,
) -> None:
    """Show live what is going on; q or Ctrl-C ends it.

    Editions as bars, relays with their rates and last replies, what waits and why. Changes nothing.
    """
    settings = settings_of(context, config)
    settings.require("database_url")
    terminal = console(highlight=False)
    if not terminal.is_terminal or terminal.is_dumb_terminal:
        raise ConfigurationError(
            "watch: this is no terminal to draw on; use `outbox status`, or in scripts `outbox status --json`."
        )
    awaited(_watch(settings, terminal, interval))


async def _watch(settings: "Settings", terminal: Any, interval_s: float) -> None:
    import asyncio
    import signal
    import time

    from rich.live import Live

    from outbox.operations.watch import Watcher
    from outbox.operations.watch_view import draw
    from outbox.operations.wording import Frame

    watcher, frame = Watcher(settings), Frame.of(settings)
    await watcher.open()  # the screen is of use also without Postgres, which may come back
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end.set)
    looking = loop.create_task(_look_on(watcher, interval_s))
    looking.add_done_callback(lambda _: end.set())
    try:
        with _keys(loop, end), Live(console=terminal, screen=True, auto_refresh=False) as live:
            while not end.is_set():
                now = time.monotonic()
                screen = draw(
                    watcher.snapshot, watcher.rates, frame,
                    age_s=now - watcher.looked_at, waited_s=watcher.waited_s(now), trouble=watcher.trouble,
                )  # fmt: skip
                live.update(screen, refresh=True)
                await _woken(watcher.seen, end, min(interval_s, DRAW_S))
    finally:
        if looking.done() and not looking.cancelled():
            looking.result()  # a bug of outbox, to be shown with its traceback
        looking.cancel()
        watcher.close()  # before the wait, since a look that is cancelled would wait for its rollback
        await asyncio.gather(looking, return_exceptions=True)


async def _look_on(watcher: "Watcher", interval_s: float) -> None:
    """Read the state for ever, `interval_s` after the last reading ended."""
    import asyncio

    while True:
        await watcher.look_again()
        await asyncio.sleep(interval_s)


async def _woken(seen: "asyncio.Event", end: "asyncio.Event", at_most_s: float) -> None:
    """Return when something new is read, when it is to end, or after `at_most_s`."""
    import asyncio

    waits = [asyncio.ensure_future(event.wait()) for event in (seen, end)]
    await asyncio.wait(waits, timeout=at_most_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    seen.clear()


@contextmanager
def _keys(loop: "asyncio.AbstractEventLoop", end: "asyncio.Event") -> Iterator[None]:
    """Set `end` once q is typed; restore the terminal afterwards. Without a keyboard only Ctrl-C is left."""
    if not sys.stdin.isatty():
        yield
        return
    import os
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def read() -> None:
        typed = os.read(keyboard, 64)
        if not typed:
            loop.remove_reader(keyboard)
        if b"q" in typed.lower():
            end.set()

    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
