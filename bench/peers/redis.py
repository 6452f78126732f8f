"""redis-server of our own, append-only, in a temporary directory."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.harness.die_with_parent import die_with_parent


def is_there() -> bool:
    """Return True if redis-server is on PATH."""
    return shutil.which("redis-server") is not None


@asynccontextmanager
async def redis(directory: Path) -> AsyncIterator[str]:
    """Run it and yield its URL; durable as its documentation advises: `appendonly yes`, synced every second."""
    port = _free_port()
    place = directory / f"redis-{port}"
    place.mkdir()
    settings = {"port": str(port), "bind": "127.0.0.1", "dir": str(place), "appendonly": "yes", "save": ""}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    server = await asyncio.create_subprocess_exec(
        "redis-server", *words, stdout=asyncio.subprocess.DEVNULL, preexec_fn=die_with_parent
    )
    try:
        await _until_it_answers(server, port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()
        shutil.rmtree(place)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port: int = held.getsockname()[1]
        return port


async def _until_it_answers(server: asyncio.subprocess.Process, port: int) -> None:
    async with asyncio.timeout(10):
        while server.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
    raise RuntimeError(f"redis-server exited {server.returncode}.")
