"""PgBouncer between commands and an embedded Postgres."""

import asyncio
import os
import pwd
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

PGBOUNCER: Final = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
UP_S: Final = 10.0


@asynccontextmanager
async def pooler(url: str, *, mode: str, sessions: int, ignored: Sequence[str] = ()) -> AsyncIterator[str]:
    """Run a PgBouncer that has at most so many sessions with Postgres; yield the database's URL through it.

    `ignored` are settings that clients ask for at their start and do not get; others are refused (pgbouncer.ini(5)).
    """
    assert PGBOUNCER is not None, "pgbouncer is not installed"
    user = _account()
    with tempfile.TemporaryDirectory(prefix="outbox-pgbouncer-", dir="/tmp") as made:
        config, port = _configured(Path(made), url, mode, sessions, ignored)
        process = await asyncio.create_subprocess_exec(
            PGBOUNCER, "-q", str(config),
            cwd="/", user=user and user.pw_uid, group=user and user.pw_gid, extra_groups=[] if user else None,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await _up(process, port)
            yield f"postgresql://postgres@127.0.0.1:{port}{urlsplit(url).path}"
        finally:
            with suppress(ProcessLookupError):  # PgBouncer 1.18 sometimes exits when a request to cancel reaches it
                process.kill()
            await process.wait()


def _configured(directory: Path, url: str, mode: str, sessions: int, ignored: Sequence[str]) -> tuple[Path, int]:
    """Write its settings to a directory that its user may read; return them and its port."""
    parts = urlsplit(url)
    name, place = parts.path.removeprefix("/"), parse_qs(parts.query)
    directory.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (users := directory / "users.txt").write_text('"postgres" ""\n')
    (config := directory / "pgbouncer.ini").write_text(
        f"[databases]\n{name} = host={place['host'][0]} port={place['port'][0]} dbname={name} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"auth_file = {users}\npool_mode = {mode}\ndefault_pool_size = {sessions}\n"
        f"ignore_startup_parameters = {','.join(['extra_float_digits', *ignored])}\n"
    )
    return config, port


def _account() -> pwd.struct_passwd | None:
    """Return the user of the embedded Postgres: its socket admits no other, and PgBouncer refuses to run as root."""
    if os.geteuid():
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


async def _up(process: asyncio.subprocess.Process, port: int) -> None:
    deadline = time.monotonic() + UP_S
    while True:
        if process.returncode is not None:
            raise SystemExit(f"bench: pgbouncer exited {process.returncode}.")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)
        else:
            writer.close()
            await writer.wait_closed()
            return
