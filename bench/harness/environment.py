"""Environment of a benchmark: Postgres (fsync on), a sink in a process of its own, people and settings."""

import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from bench.harness.die_with_parent import die_with_parent
from outbox.database import schema
from outbox.sandbox.postgres import Server, postgres

RESULTS = Path(__file__).parents[1] / "results"
HOUSE = Path(__file__).parents[2]

SETTINGS = """
database_url = "{database}"
smtp_url = "{smtp}"
sender = "Progress reports <reports@example.com>"
connections_max = {connections}
{further}
[reports.progress]
recipients = "select id::text as key, email, name from people"
data = '''select person_id::text as key, day::date as day, done from progress
           where person_id = any (cast(:keys as int[])) and day >= :starts_at and day < :ends_at order by day'''
link = "https://reports.example.com/r/{{token}}"
"""

PEOPLE = """
DROP SCHEMA IF EXISTS outbox CASCADE;
DROP TABLE IF EXISTS people, progress;
CREATE TABLE people (id int PRIMARY KEY, email text NOT NULL, name text NOT NULL);
CREATE TABLE progress (person_id int NOT NULL, day timestamptz NOT NULL, done int NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Acceptance, from the sink's journal."""

    at: float
    port: int
    """The client's end of the connection that it came on."""
    address: str
    message_id: str


@dataclass
class Environment:
    """Parts of a benchmark's run."""

    directory: Path
    database: str
    smtp: str
    journal: Path
    connection: Any
    connections: int
    further: str = ""
    """Lines of outbox.toml: top-level settings besides the usual ones."""

    async def reset(self, people: int) -> None:
        """Make an empty outbox, and people with two weeks of progress."""
        await self.connection.execute(PEOPLE)
        await schema.initialise(self.connection)
        await self.connection.execute(
            "INSERT INTO people SELECT n, 'p' || n || '@example.com', 'Person ' || n"
            " FROM generate_series(1, $1::int) n",
            people,
        )
        await self.connection.execute(
            "INSERT INTO progress SELECT n, now() - d * interval '1 day', d"
            " FROM generate_series(1, $1::int) n, generate_series(0, 13) d",
            people,
        )
        await self.connection.execute("CREATE INDEX ON progress (person_id, day)")
        await self.connection.execute("ANALYZE")
        await self.connection.execute("CHECKPOINT")
        self.write_settings()

    def write_settings(self) -> None:
        """Write outbox.toml of this environment."""
        (self.directory / "outbox.toml").write_text(
            SETTINGS.format(database=self.database, smtp=self.smtp, connections=self.connections, further=self.further)
        )

    async def put_emails(self, count: int, message: bytes) -> None:
        """Put pre-built emails in, pending and due."""
        await self.connection.execute(
            """WITH made AS (
                 INSERT INTO outbox.email (key, sender, recipient, message_id, message)
                 SELECT 'mail' || n, 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@example.com>', $2
                   FROM generate_series(1, $1) n RETURNING id)
               INSERT INTO outbox.delivery (email) SELECT id FROM made""",
            count,
            message,
        )
        await self.connection.execute("ANALYZE outbox.email, outbox.delivery")
        await self.connection.execute("CHECKPOINT")

    async def start(
        self, *command: str, python: str = sys.executable, settings: Mapping[str, str] = {}
    ) -> asyncio.subprocess.Process:
        """Start a Python module in this environment's directory."""
        return await start(*command, directory=self.directory, python=python, settings=settings)

    @asynccontextmanager
    async def relaying(self, count: int) -> AsyncIterator[list[asyncio.subprocess.Process]]:
        """Run further relays, which have their locks and listen; at the end they get SIGTERM and must obey."""
        standing = "SELECT count(*) FROM outbox.relay WHERE ended_at IS NULL"
        wanted = count + await self.connection.fetchval(standing)
        running = [await self.start("outbox", "relay") for _ in range(count)]
        try:
            while await self.connection.fetchval(standing) < wanted:
                if any(relay.returncode is not None for relay in running):
                    raise SystemExit(f"bench: a relay ended: {self.log_tail()}")
                await asyncio.sleep(0.02)
            yield running
        finally:
            for relay in running:
                if relay.returncode is None:
                    relay.send_signal(signal.SIGTERM)
            for relay in running:
                await relay.communicate()
        if any(relay.returncode for relay in running):
            raise SystemExit(f"bench: a relay did not stop in order: {self.log_tail()}")

    def log_tail(self) -> str:
        """Return the end of the commands' log."""
        return (self.directory / "log").read_text()[-2000:]

    def mark(self) -> int:
        """Return the end of the journal, for `lines`."""
        return self.journal.stat().st_size if self.journal.exists() else 0

    def lines(self, since: int) -> list[Line]:
        """Return what was accepted since a mark."""
        with self.journal.open("rb") as journal:
            journal.seek(since)
            rows = (line.decode().rstrip("\n").split("\t") for line in journal)
            return [Line(float(at), int(port), address, message_id) for at, port, address, message_id in rows]

    async def accepted(self, count: int, since: int, deadline_s: float) -> list[Line]:
        """Wait until this many were accepted, or the deadline; return the lines.

        Nothing is read twice meanwhile: on a small machine that would be taken from those who are measured.
        """
        end = time.monotonic() + deadline_s
        with self.journal.open("rb") as journal:
            journal.seek(since)
            seen = 0
            while seen < count and time.monotonic() < end:
                seen += journal.read().count(b"\n")
                if seen < count:
                    await asyncio.sleep(0.05)
        return self.lines(since)


def process_env(package: Path = HOUSE) -> dict[str, str]:
    """Return our variables without OUTBOX_* settings, with the `outbox` of that directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return {**kept, "PYTHONPATH": str(package)}


async def start(
    *command: str,
    directory: Path,
    package: Path = HOUSE,
    python: str = sys.executable,
    settings: Mapping[str, str] = {},
) -> asyncio.subprocess.Process:
    """Start a Python module in a directory that holds its settings; its stderr is added to `log`.

    `settings` are added to its environment.

    It dies with us: a relay left alone would look for its database for ever.
    """
    with (directory / "log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            python,
            "-m",
            *command,
            cwd=directory,
            env={**process_env(package), **settings},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            preexec_fn=die_with_parent,
        )


@contextmanager
def server() -> Iterator[Server]:
    """Run a Postgres with every durability setting at its default."""
    with postgres(settings={"max_connections": "300", "shared_buffers": "512MB", "max_wal_size": "4GB"}) as started:
        yield started


@asynccontextmanager
async def open_environment(
    url: str, *, connections: int, further: str = "", sink: Sequence[str] = ("outbox.sandbox.smtp_sink",)
) -> AsyncIterator[Environment]:
    """Run a sink (the module of that name) and connect to the database for one run."""
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as name:
        directory = Path(name)
        journal = directory / "journal"
        mailserver = await start(*sink, "--journal", str(journal), directory=directory)
        assert mailserver.stdout is not None
        address = (await mailserver.stdout.readline()).decode().split()[1]
        connection = await asyncpg.connect(url)
        try:
            yield Environment(directory, url, f"smtp://{address}", journal, connection, connections, further)
        finally:
            await connection.close()
            mailserver.send_signal(signal.SIGTERM)
            await mailserver.communicate()


def run(main: Callable[[str], Coroutine[Any, Any, None]]) -> None:
    """Run a benchmark on a database of its own."""
    with server() as started:
        asyncio.run(main(started.url))


def median(values: Sequence[float]) -> float:
    """Return the median; 0 of none."""
    return statistics.median(values) if values else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def duplicates(lines: Sequence[Line]) -> int:
    """Count addresses that were accepted more than once."""
    return sum(1 for n in Counter(line.address for line in lines).values() if n > 1)


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result as JSON below bench/results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
