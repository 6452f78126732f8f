"""Code of the user's: loaded by its name, `module:attribute`, and run where it may block without stopping the pulse."""

import asyncio
import importlib
import os
import queue
import sys
import sysconfig
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from outbox.errors import ConfigurationError
from outbox.trust import distrust_of


class UntrustedCodeError(ConfigurationError):
    """A module beside the settings can be changed by others than this user and root, so it was not run."""


def load(reference: str, directory: Path) -> Any:
    """Return what the reference names; modules beside the settings are found too.

    Raises whatever the import raises: the caller knows which setting it was.

    Raises:
        UntrustedCodeError: others can write the module, or one that it imports from beside the settings.

    """
    module_name, _, attribute = reference.partition(":")
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    _check_imports_from(directory)
    return getattr(importlib.import_module(module_name), attribute)


def _check_imports_from(directory: Path) -> None:
    """Check each module that is imported from this directory from now on before it runs."""
    if any(isinstance(finder, _Checked) and finder.directory == str(directory) for finder in sys.meta_path):
        return
    before = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
    sys.meta_path.insert(before, _Checked(directory))


class _Checked:
    """Finder that finds nothing, and refuses modules in a directory that others can write.

    A cached .pyc file runs in place of its source, so it is checked, too.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self._inside = tuple({f"{one}{os.sep}" for one in (self.directory, os.path.realpath(directory))})
        paths = sysconfig.get_paths()
        self._installed = tuple(f"{paths[name]}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib"))

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Return None, so that the next finder loads the module (importlib.abc.MetaPathFinder).

        Raises:
            UntrustedCodeError: others can write it.

        """
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            return
        places = [spec.origin] if spec.has_location and spec.origin else []
        places += spec.submodule_search_locations or []
        if spec.cached:
            places += [os.path.dirname(spec.cached), spec.cached]  # noqa: PTH120
        for place in places:
            if self._is_inside(place) and os.path.lexists(place) and (distrust := distrust_of(Path(place))) is not None:
                raise UntrustedCodeError(f"{place}: not run, since {distrust}.")

    def _is_inside(self, place: str) -> bool:
        """Return True for the user's own code, and False for installed packages, as in a .venv beside it."""
        whole = os.path.abspath(place)  # noqa: PTH100 - without following links
        return (f"{whole}{os.sep}".startswith(self._inside) or os.path.realpath(whole).startswith(self._inside)) and (
            not whole.startswith(self._installed)
        )


def said(error: BaseException) -> str:
    """Return an error of the user's code on one line."""
    if isinstance(error, UserCodeError):
        return str(error)
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


class UserCodeError(Exception):
    """The user's code raised what ends more than itself: a process, a task or an iteration of ours."""


class UserCodeRunner:
    """Runner of the user's code off our event loop, which keeps a session alive: the code may block for any time.

    Plain calls run in one thread, one after another, awaitables on one event loop in another thread, so that what one
    of them opened there (a client, a pool) the next one can use. Both threads die with the process, so code that hangs
    does not prevent its end.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return or raise what the function does, as `called`."""
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="user code", daemon=True).start()
        future: Future[Any] = Future()
        self._calls.put((future, lambda: called(function, *arguments)))
        return await asyncio.wrap_future(future)

    async def wait_for(self, given: Awaitable[Any]) -> Any:
        """Return or raise what the awaitable does, as `awaited`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="user code, async", daemon=True).start()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(awaited(given), self._loop))


def _serve(calls: "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]") -> None:
    while True:
        future, call = calls.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the call is waited for
                future.set_exception(error)


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return or raise what the function does; `UserCodeError` in place of an exception that would end more than it."""
    try:
        return function(*arguments)
    except (SystemExit, StopIteration, asyncio.CancelledError) as error:  # a future takes no StopIteration
        raise UserCodeError(said(error)) from error


async def awaited(given: Awaitable[Any]) -> Any:
    """Return or raise what the awaitable does; `UserCodeError` in place of what would end more than it."""
    try:
        return await given
    except SystemExit as error:
        raise UserCodeError(said(error)) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # the cancellation is ours
        raise UserCodeError(said(error)) from error
