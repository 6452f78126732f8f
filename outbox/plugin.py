"""The user's own code: found by its name, `module:attribute`, and run where it may block without stopping the pulse."""

import asyncio
import importlib
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any


def load(reference: str, directory: Path) -> Any:
    """What the reference names; modules beside the settings are found too.

    Raises whatever the import raises: the caller knows which setting it was.
    """
    module_name, _, attribute = reference.partition(":")
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    return getattr(importlib.import_module(module_name), attribute)


def said(error: BaseException) -> str:
    """What an error of the user's code says, on one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


class ExitedError(Exception):
    """The user's code wanted to end the process, which is not its to end."""


class Aside:
    """Runs the user's code off our event loop, which keeps a session alive: it may block for as long as it likes.

    Plain calls run in a thread, awaitables on one event loop in another thread, so that what one of them opened there
    (a client, a pool) the next one can use. That thread dies with the process.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives or raises; `ExitedError` in place of a SystemExit."""
        return await asyncio.to_thread(called, function, *arguments)

    async def wait_for(self, given: Awaitable[Any]) -> Any:
        """What the awaitable gives or raises; `ExitedError` in place of a SystemExit."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="user code", daemon=True).start()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(awaited(given), self._loop))


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives or raises; `ExitedError` in place of a SystemExit."""
    try:
        return function(*arguments)
    except SystemExit as error:
        raise ExitedError(f"it called exit({error.code})") from error


async def awaited(given: Awaitable[Any]) -> Any:
    """What it gives or raises; `ExitedError` in place of a SystemExit."""
    try:
        return await given
    except SystemExit as error:
        raise ExitedError(f"it called exit({error.code})") from error
