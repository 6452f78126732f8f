"""The dead man's switch: a GET to a URL of the settings, which says that an edition is complete."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Final

from outbox import __version__

CALL_TIMEOUT_S: Final = 10.0
CALL_PAUSES_S: Final = (1.0,)  # between the tries of one call


async def call(url: str, pauses_s: Sequence[float] = CALL_PAUSES_S) -> str | None:
    """Send a GET, repeated after each of the pauses if it fails; return None for 2xx, else the last problem."""
    problem: str | None = None
    for pause_s in (*pauses_s, None):
        problem = await _in_thread(url)
        if problem is None or pause_s is None:
            break
        await asyncio.sleep(pause_s)
    return problem


async def _in_thread(url: str) -> str | None:
    """Send one GET in a daemon thread, since a server may keep it longer than `CALL_TIMEOUT_S`."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str | None] = loop.create_future()

    def settle(problem: str | None) -> None:
        if not answer.done():
            answer.set_result(problem)

    def get() -> None:
        problem = _get(url)
        try:
            loop.call_soon_threadsafe(settle, problem)
        except RuntimeError:
            return  # the loop is closed: the relay has ended

    threading.Thread(target=get, name="dead man", daemon=True).start()
    try:
        async with asyncio.timeout(2 * CALL_TIMEOUT_S):
            return await answer
    except TimeoutError:
        return "no answer"


def _get(url: str) -> str | None:
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": f"outbox-mail/{__version__}"})  # noqa: S310 - checked
    try:
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:  # noqa: S310 - http or https: settings
            answer.read(1024)
    except Exception as error:  # noqa: BLE001 - urllib lets through whatever sockets, TLS and its parsers raise
        return str(error) or type(error).__name__
    return None
