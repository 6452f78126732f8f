"""The tests' fleet: `outbox` commands as real processes, with people to write to. Faults come from outside only."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outbox.sandbox.smtp_sink import Sink
from tests.support.fork_server import ForkedProcess, ForkServer

DEADLINE_S = 20.0

SETTINGS = """
database_url = "{database}"
smtp_url = "{smtp}"
sender = "Progress reports <reports@example.com>"
{top}
[retry]
base_s = 0.1
max_s = 1.0
attempts_max = 4
[reports.progress]
timezone = "{timezone}"
{source}
link = "https://reports.example.com/r/{{token}}"
{report}
"""

RECIPIENTS = "select id::text as key, email, name from people where active order by id"

DATA = """select day, done from progress
 where person_id = cast(:key as int) and day >= :starts_at and day < :ends_at"""

# Counts its builds in the database, so that a test can show that nothing was computed twice.
COUNTING_DATA = """with counted as (insert into build (key) values (:key) returning key)
 select key as person, 1 as done from counted"""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """What stderr says, without the program's name; a line that is not for people (a traceback) fails the test."""
        lines = self.err.splitlines()
        assert all(line.startswith("outbox: ") for line in lines), self.err
        return [line.removeprefix("outbox: ") for line in lines]


@dataclass
class Process:
    """A running `outbox` command; its stderr is read as it comes."""

    process: asyncio.subprocess.Process | ForkedProcess
    log: list[str] = field(default_factory=list)
    _reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signum)

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await self.process.wait()

    async def ended(self, deadline_s: float = DEADLINE_S) -> Ended:
        async with asyncio.timeout(deadline_s):
            out = await self.process.stdout.read() if self.process.stdout else b""
            code = await self.process.wait()
            if self._reader is not None:
                await self._reader
        return Ended(code, out.decode(), "".join(self.log))

    async def says(self, words: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait until its log has these words."""
        await until(lambda: any(words in line for line in self.log), f"log says {words!r}", deadline_s)


def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(
    fact: Callable[[], Any] | Callable[[], Awaitable[Any]], what: str, deadline_s: float = DEADLINE_S
) -> Any:
    """Wait for a fact; fails, saying `what`, if it is not true by the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        found = fact()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass
class Fleet:
    """Commands, people and facts. Settings can be changed before a command is started."""

    database: str
    connection: Any
    sink: Sink
    directory: Path
    top: str = ""
    report: str = ""
    recipients: str = RECIPIENTS
    data: str = DATA
    source: str | None = None  # "module:Class" instead of the two queries
    timezone: str = "America/New_York"
    settings: str | None = None  # the whole of outbox.toml, instead of all of these
    smtp: str | None = None
    forks: ForkServer | None = None  # starts commands quickly; None: each reads its libraries by itself
    processes: list[Process] = field(default_factory=list)

    def write_settings(self) -> Path:
        path = self.directory / "outbox.toml"
        written = path.with_suffix(".new")
        written.write_text(self.settings if self.settings is not None else self._settings())
        written.rename(path)  # whole, for a process that started before and reads it now
        return path

    def _settings(self) -> str:
        source = f"recipients = '''{self.recipients}'''\ndata = '''{self.data}'''"
        if self.source is not None:
            source = f'source = "{self.source}"'
        return SETTINGS.format(
            database=self.database,
            smtp=self.smtp or self.sink.url,
            top=self.top,
            timezone=self.timezone,
            source=source,
            report=self.report,
        )

    async def hire(self, people: int, *, first: int = 1) -> None:
        """People number `first` and on, with two weeks of progress each."""
        await self.connection.execute(
            "INSERT INTO people (id, email, name) SELECT n, 'p' || n || '@example.com', 'Person ' || n"
            " FROM generate_series($1::int, $2::int) n",
            first,
            first + people - 1,
        )
        await self.connection.execute(
            "INSERT INTO progress SELECT n, now() - d * interval '1 day', d FROM generate_series($1::int, $2::int) n,"
            " generate_series(1, 14) d",
            first,
            first + people - 1,
        )

    async def put_emails(self, count: int, *, first: int = 1, size: int = 200) -> None:
        """Emails in the outbox without generating reports: `mail1` … for p1@example.com …, pending and due."""
        body = b"Subject: hello\r\n\r\n" + (b"x" * 70 + b"\r\n") * max(size // 72, 1)
        await self.connection.execute(
            """WITH made AS (
                 INSERT INTO outbox.email (key, sender, recipient, message_id, message)
                 SELECT 'mail' || n, 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@example.com>', $2
                   FROM generate_series($1::int, $3::int) n RETURNING id)
               INSERT INTO outbox.delivery (email) SELECT id FROM made""",
            first,
            body,
            first + count - 1,
        )

    async def start(
        self, *arguments: str, environment: dict[str, str] | None = None, within: Sequence[str] = ()
    ) -> Process:
        """Start `outbox …` in the directory of the settings; `within` is a command that runs another."""
        self.write_settings()
        environment = environment or {}
        env = {**_clean_environment(), **environment}
        if self.forks is not None and not within and all(name.startswith("OUTBOX_") for name in environment):
            process = await self.forks.start(arguments, cwd=self.directory, env=env)
        else:
            process = await asyncio.create_subprocess_exec(
                *within, sys.executable, "-m", "outbox", *arguments,
                cwd=self.directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
                limit=2**20,
            )  # fmt: skip
        started = Process(process)
        started._reader = asyncio.create_task(_read(process, started.log))
        self.processes.append(started)
        return started

    async def run(self, *arguments: str, environment: dict[str, str] | None = None, deadline_s: float = 60) -> Ended:
        """Run `outbox …` to its end."""
        return await (await self.start(*arguments, environment=environment)).ended(deadline_s)

    async def relay(self, *arguments: str, environment: dict[str, str] | None = None) -> Process:
        """A relay that holds its lock and listens."""
        process = await self.start("relay", *arguments, environment=environment)
        await process.says("holds its lock")
        return process

    async def states(self) -> dict[str, int]:
        rows = await self.connection.fetch("SELECT state, count(*) AS n FROM outbox.delivery GROUP BY state")
        return {row["state"]: row["n"] for row in rows}

    async def settled(self, deadline_s: float = DEADLINE_S) -> dict[str, int]:
        """Wait until nothing is pending or being sent; gives the states."""

        async def nothing_open() -> bool:
            return not {"pending", "sending"} & set(await self.states())

        await until(nothing_open, "nothing is pending or sending", deadline_s)
        return await self.states()

    async def stop_all(self) -> None:
        for process in self.processes:
            if process.process.returncode is None:
                process.send(signal.SIGCONT)
                await process.kill()
            await process.ended()

    @property
    def twice(self) -> dict[str, int]:
        """Addresses that the server accepted mail for more than once."""
        return {address: n for address, n in self.sink.addresses.items() if n > 1}


async def _read(process: asyncio.subprocess.Process | ForkedProcess, log: list[str]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        log.append(line.decode(errors="replace"))  # noqa: PERF401 - each line is seen as it comes


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
