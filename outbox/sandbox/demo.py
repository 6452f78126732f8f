"""Demo: several servers, one cron, one server killed, one email per person.

Everything in it is real: Postgres and the mail server are embedded, the servers are `outbox` processes, the kill is a
SIGKILL, and what is shown at the end is what the mail server received.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
from rich.console import Console
from rich.table import Table

from outbox.database import schema
from outbox.database.driver import DriverConnection
from outbox.errors import ConfigurationError, OutboxError
from outbox.sandbox.postgres import postgres
from outbox.sandbox.smtp_sink import Action, Hold, Sink, Stage, Visit

SMTP_DELAY_S: Final = 0.12  # a mail server takes a while to accept a mail; here also long enough to be killed in
DEADLINE_S: Final = 60.0

SETTINGS: Final = """\
database_url = "{database}"
smtp_url     = "{smtp}"
sender       = "Progress reports <reports@example.com>"
connections_max = 2

[reports.progress]
cadence    = "weekly"
covers     = "previous"
timezone   = "America/New_York"
recipients = "select id::text as key, email, name from people where active"
data       = '''select day::date as day, done, minutes from progress
                 where person_id = cast(:key as int) and day >= :starts_at and day < :ends_at order by day'''
link       = "https://reports.example.com/r/{{token}}"
"""

PEOPLE: Final = """
CREATE TABLE people (id int PRIMARY KEY, email text NOT NULL, name text NOT NULL, active boolean NOT NULL DEFAULT true);
CREATE TABLE progress (person_id int NOT NULL REFERENCES people, day timestamptz NOT NULL, done int, minutes int);
"""

FILL: Final = """
WITH names AS (SELECT ARRAY['Ada','Grace','Edsger','Barbara','Donald','Radia','Tony','Frances','Ken','Adele'] AS first,
                      ARRAY['Okafor','Lindqvist','Marín','Tanaka','Novák','Haddad','Silva','Ó Briain'] AS last)
INSERT INTO people SELECT n, lower(replace(first[1 + n % 10], ' ', '')) || n || '@example.com',
                          first[1 + n % 10] || ' ' || last[1 + n % 8] FROM names, generate_series(1, $1::int) n
"""

FILL_PROGRESS: Final = """
INSERT INTO progress SELECT p.id, date_trunc('day', now()) - d * interval '1 day' + interval '15 hours',
                            2 + (p.id * 7 + d * 5) % 9, 20 + (p.id * 13 + d * 29) % 90
  FROM people p, generate_series(0, 20) d
"""


@dataclass(slots=True)
class Story:
    """Printer of events, with the seconds since the cron fired."""

    console: Console
    began_at: float = field(default_factory=time.monotonic)

    def tell(self, text: str, style: str = "") -> None:
        """Print one line."""
        self.console.print(f"[dim]{time.monotonic() - self.began_at:6.2f} s[/dim]  {text}", style=style)

    def head(self, text: str) -> None:
        """Print a heading."""
        self.console.print(f"\n[bold]{text}[/bold]")


@dataclass(slots=True)
class Server:
    """Server of the demo: a relay that always runs, and a cron that fires."""

    name: str
    relay: asyncio.subprocess.Process
    killed: bool = False


def tell(*, people: int, servers: int, keep: Path | None, console: Console | None = None) -> int:
    """Play the story and print it; return 0 if every person got exactly one email, else 1."""
    directory = _make_directory(keep)
    console = console or Console(highlight=False)
    with postgres() as server:
        return asyncio.run(_play(server.url, people, servers, directory, console))


def _make_directory(keep: Path | None) -> Path:
    """Return `keep`, made if it is new, or else a new temporary directory.

    Raises:
        OutboxError: it cannot be written to.

    """
    try:
        directory = keep or Path(tempfile.mkdtemp(prefix="outbox-demo-"))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "outbox.toml").touch()
    except OSError as error:
        if keep is None:
            says = f"No temporary directory can be written to ({error.strerror}); name one with --keep DIR."
            raise OutboxError(says) from error
        says = f"--keep: {keep} cannot be written to ({error.strerror}); name another directory."
        raise ConfigurationError(says) from error
    return directory


def _slowly(_stage: Stage, _visit: Visit) -> Action | None:
    """Delay each 250 for a moment."""
    if _stage is not Stage.DOT:
        return None
    thought = asyncio.Event()
    asyncio.get_running_loop().call_later(SMTP_DELAY_S, thought.set)
    return Hold(thought)


async def _play(database: str, people: int, servers: int, directory: Path, console: Console) -> int:
    console.print(f"[bold]outbox demo[/bold]: {people} people, {servers} servers, one weekly report")
    console.print("[dim]PostgreSQL and a mail server are embedded; the servers are real processes.[/dim]")
    connection = await asyncpg.connect(database)
    await schema.initialise(connection)
    await connection.execute(PEOPLE)
    await connection.execute(FILL, people)
    await connection.execute(FILL_PROGRESS)
    async with Sink(_slowly) as sink:
        config = directory / "outbox.toml"
        config.write_text(SETTINGS.format(database=database, smtp=sink.url), encoding="utf-8")
        fleet = [Server(f"server-{n}", await _start(directory, "relay")) for n in range(1, servers + 1)]
        try:
            await _until_alive(connection, servers)
            story = Story(console)
            await _monday(story, fleet, directory, people, connection, sink)
            return await _ending(story, fleet, people, directory, connection, sink)
        finally:
            for server in fleet:
                await _stop(server)
            await connection.close()


async def _start(directory: Path, *arguments: str) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    log = (directory / f"{arguments[0]}.log").open("ab")
    with contextlib.closing(log):
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "outbox",
            *arguments,
            cwd=directory,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )


async def _stop(server: Server) -> None:
    if server.relay.returncode is None:
        server.relay.send_signal(signal.SIGTERM)
    await server.relay.communicate()


async def _until_alive(connection: DriverConnection, servers: int) -> None:
    alive = "SELECT count(*) FROM outbox.relay WHERE ended_at IS NULL"
    end = time.monotonic() + DEADLINE_S
    while await connection.fetchval(alive) < servers:
        if time.monotonic() > end:
            raise OutboxError("The relays did not start; their log is beside the demo's outbox.toml.")
        await asyncio.sleep(0.05)


async def _monday(
    story: Story, fleet: list[Server], directory: Path, people: int, connection: DriverConnection, sink: Sink
) -> None:
    story.head("Monday, 06:00. Cron fires on every server at once.")
    crons = [await _start(directory, "generate") for _ in fleet]
    killing = asyncio.create_task(_kill_one(story, fleet, people, connection, sink))
    await asyncio.gather(*(_report_cron(story, server, cron) for server, cron in zip(fleet, crons, strict=True)))
    await killing
    await _until_quiet(connection)


async def _report_cron(story: Story, server: Server, cron: asyncio.subprocess.Process) -> None:
    out, _ = await cron.communicate()
    made, *others = re.findall(r"(\d+) (?:made here|elsewhere|already made)", out.decode()) or ["?"]
    elsewhere = sum(map(int, others))
    story.tell(f"{server.name}: cron made {made} reports, found {elsewhere} made elsewhere, exit {cron.returncode}")


async def _kill_one(story: Story, fleet: list[Server], people: int, connection: DriverConnection, sink: Sink) -> None:
    """SIGKILL a relay that is in the middle of sending, when about a third has been accepted."""
    end = time.monotonic() + DEADLINE_S
    while sink.messages < people / 3 and time.monotonic() < end:
        await asyncio.sleep(0.005)
    if len(fleet) == 1:
        story.tell("with one server there is nobody to take over, so none is killed")
        return
    victim = fleet[1]
    victim.relay.kill()
    victim.killed = True
    story.tell(
        f"{victim.name}: [red]SIGKILL[/red], {sink.messages} of {people} emails are accepted, the others take over",
    )
    in_hand = await connection.fetchval(
        "SELECT count(*) FROM outbox.delivery d JOIN outbox.relay r ON r.id = d.relay"
        " WHERE r.pid = $1 AND d.settled_at IS NULL",
        victim.relay.pid,
    )
    if in_hand:
        story.tell(f"{victim.name}: had {in_hand} emails in hand")


async def _until_quiet(connection: DriverConnection) -> None:
    end = time.monotonic() + DEADLINE_S
    while await connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE state IN ('pending', 'sending')"):
        if time.monotonic() > end:
            raise OutboxError("The emails were not sent within a minute; the relays' log is beside outbox.toml.")
        await asyncio.sleep(0.02)


async def _ending(
    story: Story, fleet: list[Server], people: int, directory: Path, connection: DriverConnection, sink: Sink
) -> int:
    senders = await connection.fetch(
        "SELECT r.pid, count(*) FILTER (WHERE d.state = 'sent') AS sent,"
        "       count(*) FILTER (WHERE d.state = 'in_doubt') AS in_doubt"
        "  FROM outbox.relay r LEFT JOIN outbox.delivery d ON d.relay = r.id GROUP BY r.pid"
    )
    for server in fleet:
        sent, doubts = next((r["sent"], r["in_doubt"]) for r in senders if r["pid"] == server.relay.pid)
        story.tell(
            f"{server.name}: relay sent {sent} emails{f', {doubts} in doubt' if doubts else ''}"
            f"{' [red](killed)[/red]' if server.killed else ''}"
        )
    await _settle_doubts(story, directory, connection, sink)

    story.head("What the mail server received")
    addresses = sink.addresses
    twice = sum(1 for n in addresses.values() if n > 1)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_row(str(len(addresses)), f"people with an email, of {people}")
    table.add_row(str(twice), "people with more than one")
    table.add_row(str(people - len(addresses)), "people without")
    table.add_row(str(len(fleet) * people), f"emails that a plain cron on {len(fleet)} servers would have sent")
    story.console.print(table)
    await _show_one(story, directory, connection, sink)
    good = twice == 0 and len(addresses) == people
    story.console.print(
        "[bold green]One email per person.[/bold green]" if good else "[bold red]Not as promised.[/bold red]"
    )
    return 0 if good else 1


async def _settle_doubts(story: Story, directory: Path, connection: DriverConnection, sink: Sink) -> None:
    """Resolve the emails in doubt as a person would, by the mail server's own record."""
    doubts = await connection.fetch(
        "SELECT m.key, m.recipient, m.message_id FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email"
        " WHERE d.state = 'in_doubt'"
    )
    if not doubts:
        return
    await asyncio.sleep(2 * SMTP_DELAY_S)  # the mail server finishes what it had begun to think about
    arrived = {accepted.message_id.strip("<>") for accepted in sink.accepted}
    story.head(
        f"In doubt: {len(doubts)}, killed between the final dot and its 250. Outbox does not guess; a person looks."
    )
    for doubt in doubts:
        found = doubt["message_id"].strip("<>") in arrived
        decision = "--sent" if found else "--resend"
        seen = "the mail server has it" if found else "the mail server does not have it"
        story.tell(f"{seen}:  [bold]outbox resolve {doubt['key']} {decision}[/bold]")
        await (await _start(directory, "resolve", doubt["key"], decision)).communicate()
    await _until_quiet(connection)


async def _show_one(story: Story, directory: Path, connection: DriverConnection, sink: Sink) -> None:
    accepted = sink.accepted[0]
    report = await connection.fetchrow(
        "SELECT m.key, r.html FROM outbox.email m JOIN outbox.report r ON r.id = m.report WHERE m.recipient = $1",
        accepted.recipients[0],
    )
    email_path, report_path = directory / "email.eml", directory / "report.html"
    email_path.write_bytes(accepted.message)
    report_path.write_text(report["html"], encoding="utf-8")
    story.head(f"One of them: {report['key']}, to {accepted.recipients[0]}")
    story.console.print(f"  the email   {email_path}", soft_wrap=True)
    story.console.print(f"  the report  {report_path}\n", soft_wrap=True)
