"""Mail server of one test: its process, which is started, stopped and killed, and the mail that it accepted."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from tests.support.fleet import free_port, until


@dataclass(frozen=True)
class Received:
    """One message that the server accepted: its envelope recipient and its bytes, with CRLF."""

    recipient: str
    message: bytes


class Neighbour(ABC):
    """One mail server, with configuration, spool and mail in one directory, on a port of the loopback interface.

    `options` are written into its configuration, in the server's own language. `limits` says which limits of its own
    a sender meets with its defaults, and with which replies.
    """

    name: ClassVar[str]
    limits: ClassVar[str]

    def __init__(self, base: Path, port: int, options: str = "") -> None:
        self.base, self.port, self.options = base, port, options
        self.process: asyncio.subprocess.Process | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Return why this server cannot run here, in one sentence that says what to install; None if it can."""
        return None

    @classmethod
    @asynccontextmanager
    async def running(cls, options: str = "") -> AsyncIterator[Self]:
        """Yield a server that listens; remove it with all that it wrote."""
        server = cls(_directory(cls.name), free_port(), options)
        try:
            server.prepare()
            await server.start()
            yield server
        finally:
            await server.kill()
            shutil.rmtree(server.base)

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    @abstractmethod
    def prepare(self) -> None:
        """Write the configuration and make the directories."""

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Return the command that runs the server in the foreground."""

    def environment(self) -> dict[str, str]:
        """Return what the server's environment holds besides PATH."""
        return {}

    @abstractmethod
    def received(self) -> list[Received]:
        """Return every message that the server has accepted, twice if it accepted it twice."""

    def undelivered(self) -> list[Path]:
        """Return the files of mail that was accepted and that `received` does not find yet."""
        return []

    async def delivered(self, deadline_s: float = 30) -> list[Received]:
        """Wait until `received` finds all that was accepted, and return it."""
        await until(lambda: not self.undelivered(), f"{self.name} has delivered all\n{self.log()}", deadline_s)
        return self.received()

    async def start(self) -> None:
        """Start the server and wait until it listens."""
        with (self.base / "log").open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.command(),
                cwd=self.base,
                env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", **self.environment()},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        await until(lambda: self._listens() or self.process.returncode is not None, f"{self.name} listens")
        assert self.process.returncode is None, self.log()

    async def stop(self) -> None:
        """End the server as a service manager does, with SIGTERM."""
        os.kill(self._main_pid(), signal.SIGTERM)
        async with asyncio.timeout(40):
            await self.process.wait()
        await self.kill()  # processes that it left

    async def kill(self) -> None:
        """End all processes of the server at once."""
        if self.process is not None:
            for group in self._groups():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            await self.process.wait()
            await until(lambda: not self._listens(), f"{self.name} listens no more")

    def _main_pid(self) -> int:
        return self.process.pid

    def _groups(self) -> list[int]:
        return [self.process.pid]

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        """Return the end of the server's log."""
        path = self.base / "log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-40:]) if path.exists() else ""


class KeepsFiles(Neighbour):
    """A server whose plugin keeps each message in a file of its own, with the recipient in the first line."""

    def prepare(self) -> None:
        (self.base / "kept").mkdir()

    def received(self) -> list[Received]:
        found = []
        for path in (self.base / "kept").iterdir():
            if not path.name.startswith("."):
                recipient, _, message = path.read_bytes().partition(b"\n")
                found.append(Received(recipient.decode(), crlf(message)))
        return found


def maildir(mail: Path, identity: re.Pattern[bytes]) -> list[Received]:
    """Return the messages of a maildir; their recipients stand in `Delivered-To`.

    A server that ends while it delivers may leave a part of a message, and deliver it again. What `identity` finds in
    the header is the server's own number of a message: files with the same number are one acceptance.
    """
    found: dict[bytes, Received] = {}
    for path in (mail / "new").glob("*"):
        message = path.read_bytes()
        number, recipient = re.search(identity, message), re.search(rb"^Delivered-To: (.*)", message, re.MULTILINE)
        if number is not None and recipient is not None:
            last = found.get(number[1])
            if last is None or len(last.message) < len(message):
                found[number[1]] = Received(recipient[1].decode(), crlf(message))
    return list(found.values())


def crlf(message: bytes) -> bytes:
    return re.sub(rb"\r?\n", b"\r\n", message)


def _directory(name: str) -> Path:
    # In /tmp whatever TMPDIR says, since a socket's path has at most 107 bytes.
    base = Path(tempfile.mkdtemp(prefix=f"outbox-{name}-", dir="/tmp"))
    base.chmod(0o755)  # servers give up root, and must still get there
    return base


def with_users(base: Path, *users: str) -> None:
    """Write copies of /etc/passwd and /etc/group that have these users as well."""
    passwd, group = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
    for number, user in enumerate(users, 64_501):
        passwd += f"{user}:x:{number}:{number}::/nonexistent:/usr/sbin/nologin\n"
        group += f"{user}:x:{number}:\n"
    (base / "passwd").write_text(passwd)
    (base / "group").write_text(group)
