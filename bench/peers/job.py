"""Job of every peer: its settings, its queue and its mails; knows no peer. Runs in the peers' venv and in ours."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import uvloop

from bench.harness.die_with_parent import die_with_parent

SENDER: Final = "reports@example.com"
READY: Final = Path("message.eml")
"""The RFC 5322 bytes that every worker is handed, in the directory in which all run."""
_PREFIX: Final = "PEER_"


@dataclass(frozen=True, slots=True)
class Job:
    """Job, as environment variables carry it."""

    database: str
    smtp: str
    redis: str
    emails: int
    size: int
    workers: int
    connections: int
    """SMTP connections per worker, where a worker can hold more than one."""
    ready: bool
    """Whether the worker is handed ready bytes, or builds the mail."""

    def settings(self) -> dict[str, str]:
        """Return the variables for a peer."""
        return {_PREFIX + name.upper(): str(getattr(self, name)) for name in self.__slots__}

    @property
    def host(self) -> str:
        """The mail server's."""
        return urlsplit(self.smtp).hostname or ""

    @property
    def port(self) -> int:
        """The mail server's."""
        return urlsplit(self.smtp).port or 25

    @property
    def database_parts(self) -> tuple[str, str, str, str]:
        """Return name, user, socket directory and port, for peers that take no URL."""
        url = urlsplit(self.database)
        query = parse_qs(url.query)
        return url.path.removeprefix("/"), url.username or "", query["host"][0], query["port"][0]

    def payloads(self) -> Iterator[dict[str, Any]]:
        """Yield one for each recipient, as the queue carries it; without a message the worker builds it."""
        message = READY.read_text("ascii") if self.ready else None
        return ({"number": number, "message": message} for number in range(1, self.emails + 1))


def told() -> Job:
    """Return the job of this process."""
    said = {name: os.environ[_PREFIX + name.upper()] for name in Job.__slots__}
    return Job(
        database=said["database"],
        smtp=said["smtp"],
        redis=said["redis"],
        emails=int(said["emails"]),
        size=int(said["size"]),
        workers=int(said["workers"]),
        connections=int(said["connections"]),
        ready=said["ready"] == "True",
    )


def address(number: int) -> str:
    """Return the recipient with that number."""
    return f"p{number}@example.com"


def body_of(size: int) -> str:
    """Return about `size` characters of plain text."""
    return ("y" * 70 + "\n") * max(size // 71, 1)


def build(number: int, size: int) -> EmailMessage:
    """Build the mail as the standard library's documentation does."""
    message = EmailMessage()
    message["From"] = SENDER
    message["To"] = address(number)
    message["Subject"] = "Progress"
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain="example.com")
    message.set_content(body_of(size))
    return message


def until_told_to_stop(stop: Callable[[], Any]) -> None:
    """Call `stop` on SIGTERM."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


def play(put: Callable[[], Any], work: Callable[[], Any]) -> None:
    """Do what the command line says: `put` the emails into the queue, or `work` until told to stop.

    Coroutines run on uvloop. Processes that a peer forks die with it.
    """
    os.register_at_fork(after_in_child=die_with_parent)
    outcome = {"put": put, "work": work}[sys.argv[1]]()
    if isinstance(outcome, Coroutine):
        uvloop.run(outcome)
