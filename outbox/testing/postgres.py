"""Database for each test, copied from a template, and a real relay that empties it."""

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import asyncpg

from outbox.database import schema
from outbox.sandbox.postgres import Server
from outbox.testing.loop_thread import Background
from outbox.testing.mail import Stored
from outbox.testing.smtp import SmtpServer

if TYPE_CHECKING:
    from outbox.settings import Settings

# Commits need not survive a power cut of the machine that runs the tests; crashes of Postgres they do survive.
FAST: Final = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
TEMPLATE: Final = "outbox_template"
LOOK_S: Final = 0.02
SOON_S: Final = 2.0  # what a relay of a test puts off, with the pauses of PATIENCE, is due again within this

# A relay of a test waits for no server for minutes, and tries again at once.
PATIENCE: Final[dict[str, Any]] = {
    "retry": {"base_s": 0.05, "max_s": 0.2, "attempts_max": 4},
    "connect_timeout_s": 5.0, "command_timeout_s": 2.0, "data_done_timeout_s": 2.0, "drain_s": 5.0, "poll_max_s": 0.2,
}  # fmt: skip

EMAILS: Final = """
SELECT m.key, m.sender, m.recipient, d.state, d.attempt AS attempts, d.due_at, r.html AS page, m.message AS raw,
       coalesce((SELECT a.reply FROM outbox.attempt a WHERE a.email = m.id
                  ORDER BY a.settled_at DESC, a.attempt DESC LIMIT 1), '') AS reply
  FROM outbox.email m JOIN outbox.delivery d ON d.email = m.id LEFT JOIN outbox.report r ON r.id = m.report
 ORDER BY m.id
"""

OPEN: Final = """
SELECT m.key, d.state, d.due_at FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
 WHERE d.settled_at IS NULL AND (d.state = 'sending' OR d.state = 'pending' AND d.due_at <= now() + $1 * interval '1 s')
 ORDER BY m.id
"""

_numbers = itertools.count(1)


async def make_template(server: Server) -> str:
    """Make a database with the schema of outbox in it, and return its URL."""
    await _administer(server, f"CREATE DATABASE {TEMPLATE}")
    url = server.database_url(TEMPLATE)
    connection = await asyncpg.connect(url)
    await schema.initialise(connection)
    await connection.close()
    return url


@contextmanager
def copied(server: Server, template: str, background: Background) -> "Iterator[Database]":
    """Copy the template's database; at the end the copy is dropped, even if sessions are still connected to it."""
    origin, name = unquote(urlsplit(template).path.lstrip("/")), f"test_{next(_numbers)}"
    background.run(_administer(server, f'CREATE DATABASE {name} TEMPLATE "{origin}" STRATEGY file_copy'))
    try:
        yield Database(server.database_url(name), background)
    finally:
        background.run(_administer(server, f"DROP DATABASE {name} WITH (FORCE)"))


async def _administer(server: Server, statement: str) -> None:
    connection = await asyncpg.connect(server.url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


class Database:
    """Database of one test. `url` is for asyncpg and psycopg: `postgresql://postgres@/test_1?host=/tmp/pg-…`."""

    def __init__(self, url: str, background: Background) -> None:
        self.url = url
        self._background = background

    def url_for(self, driver: str) -> str:
        """Return the URL for SQLAlchemy, with `psycopg` or `asyncpg`: `postgresql+psycopg://…`."""
        return self.url.replace("postgresql://", f"postgresql+{driver}://", 1)

    def emails(self) -> list[Stored]:
        """Return the committed emails in the order in which they were put in; one for each recipient."""
        return [Stored(**row) for row in self._background.run(self.fetch(EMAILS))]

    def execute(self, statement: str, *arguments: Any) -> None:
        """Run a statement of a test's own, with `$1` for its arguments, in a transaction of its own."""
        self._background.run(self.fetch(statement, *arguments))

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """Return the rows of a statement, over a connection of its own; for a coroutine."""
        connection = await asyncpg.connect(self.url)
        try:
            rows: list[Any] = await connection.fetch(statement, *arguments)
            return rows
        finally:
            await connection.close()

    def deliver(self, smtp: SmtpServer, *, within_s: float = 30.0, **settings: Any) -> list[Stored]:
        """Run a real relay until nothing is due; return what `emails` returns then. Blocks.

        The relay is `outbox relay` but for the process: it claims, marks, sends and settles. It waits for what is put
        off by a 4xx, with short pauses and 4 tries at most; what has a `send_at` later on, or is paused, stays. Further
        `settings` are those of outbox.toml, such as `in_doubt="resend"` or `retry={"attempts_max": 1}`.

        Raises:
            AssertionError: something is still due after `within_s`; it says what.
            OutboxError: the settings or the database cannot be used.

        """
        from outbox.settings import Settings

        whole = {**PATIENCE, **settings, "database_url": self.url, "smtp_url": smtp.url}
        whole["retry"] = {**PATIENCE["retry"], **settings.get("retry", {})}
        with ThreadPoolExecutor(1, "outbox relay") as thread:  # a loop of its own, which ends with the relay
            thread.submit(asyncio.run, self._deliver(Settings.model_validate(whole), within_s)).result()
        return self.emails()

    async def _deliver(self, settings: "Settings", within_s: float) -> None:
        from outbox.relay.relay import Relay

        relay = Relay(settings)
        running = asyncio.create_task(relay.run())
        looking = asyncio.create_task(self._until_nothing_is_due(within_s))
        await asyncio.wait({running, looking}, return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        relay.stop()
        await running  # which raises what ended it before it was told to
        if left := looking.result():
            raise AssertionError(f"not delivered within {within_s:g} s: " + ", ".join(left))

    async def _until_nothing_is_due(self, within_s: float) -> list[str]:
        """Return what is still due in the end: nothing, unless that takes longer than `within_s`."""
        end = asyncio.get_running_loop().time() + within_s
        connection = await asyncpg.connect(self.url)
        try:
            while left := await connection.fetch(OPEN, SOON_S):
                if asyncio.get_running_loop().time() > end:
                    return [f"{row['key']} ({row['state']})" for row in left]
                await asyncio.sleep(LOOK_S)
        finally:
            await connection.close()
        return []
