"""Child process whose output is logged line by line; it ends with its parent."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

STOP_S: Final = 5.0  # for the child to end after SIGTERM, and again after SIGKILL
LINES_MAX: Final = 20  # of one child that are logged
LINE_MAX: Final = 1000  # characters


async def run_child(command: Sequence[str], on_line: Callable[[int, str], None]) -> str | None:
    """Run a command to its end; return None if it exits with 0, else its last line on stderr, or a sentence.

    `on_line` gets its lines as they come, with a level of `logging`. A cancelled call ends the child. The child gets no
    Ctrl-C of ours, and does not outlive us (Linux).

    Raises:
        OSError: it cannot be started.

    """
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_leash(os.getpid()),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    errors: list[str] = []
    try:
        await asyncio.gather(
            _listen(child.stdout, partial(on_line, logging.INFO), []),
            _listen(child.stderr, partial(on_line, logging.WARNING), errors),
        )
        code = await child.wait()
    finally:
        await asyncio.shield(_end(child))
    if code == 0:
        return None
    if code < 0:
        return f"outbox was ended by {_name(-code)}"
    return errors[-1] if errors else f"outbox ended with {code} and said nothing"


async def _listen(stream: asyncio.StreamReader, on_line: Callable[[str], None], last: list[str]) -> None:
    """Pass on the first lines of a stream as they come, and keep the last one in `last`."""
    count = 0
    async for line in _lines(stream):
        count += 1
        last[:] = [line]
        if count <= LINES_MAX:
            on_line(line)
    if count > LINES_MAX:
        on_line(f"… and {count - LINES_MAX} more lines")


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream without the program's name; each is cut at `LINE_MAX` characters."""
    rest = b""
    while piece := await stream.read(65_536):
        *whole, rest = (rest + piece).split(b"\n")
        for line in _decoded(whole):
            yield line
        rest = rest[: 4 * LINE_MAX]
    for line in _decoded([rest]):
        yield line


def _decoded(lines: Iterable[bytes]) -> list[str]:
    texts = [line.decode(errors="replace").strip().removeprefix("outbox: ") for line in lines]
    return [text[:LINE_MAX] for text in texts if text]


async def _end(child: asyncio.subprocess.Process) -> None:
    """End a child that still runs."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if child.returncode is not None:
            return
        with suppress(ProcessLookupError):
            child.send_signal(signum)
        with suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), STOP_S)


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _leash(parent: int) -> Callable[[], None] | None:
    """Return what a child runs before its program, so that it is ended when we die, of whatever cause (prctl(2))."""
    if sys.platform != "linux":
        return None
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    set_parent_death_signal = 1

    def leash() -> None:
        libc.prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # we died in between
            os._exit(1)

    return leash
