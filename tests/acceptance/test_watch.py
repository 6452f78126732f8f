"""`outbox watch` on a real terminal: it shows what happens, outlives Postgres, and leaves the terminal as it was."""

import asyncio
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from pathlib import Path

import asyncpg
import pytest

from outbox.sandbox.smtp_sink import Reply, Stage
from tests.support.fleet import until

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"


CUT_OFF = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE application_name LIKE 'outbox%' AND datname = current_database()"""


class Terminal:
    """A command on a terminal of 120 columns and 50 lines; `text` is the latest screen, `written` all that came."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.written = ""
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
        self.before = termios.tcgetattr(self.theirs)

    async def start(self, *arguments, **environment):
        self.fleet.write_settings()
        asyncio.get_running_loop().add_reader(self.ours, self._read)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "outbox", *arguments,
            cwd=self.fleet.directory,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd()), "TERM": "xterm-256color", **environment},
            stdin=self.theirs, stdout=self.theirs, stderr=self.theirs,
        )  # fmt: skip

    def _read(self):
        self.written += os.read(self.ours, 65536).decode(errors="replace")

    @property
    def text(self):
        return CONTROL.sub("", self.written.rpartition("\x1b[H")[2])

    async def shows(self, *words, deadline_s=20.0):
        try:
            await until(lambda: all(word in self.text for word in words), f"{words}", deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    async def ended(self):
        async with asyncio.timeout(10):
            code = await self.process.wait()
        await until(lambda: NORMAL in self.written or ALTERNATE not in self.written, "the normal screen")
        assert termios.tcgetattr(self.theirs) == self.before
        return code

    def close(self):
        asyncio.get_running_loop().remove_reader(self.ours)
        if self.process.returncode is None:
            self.process.kill()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
async def terminal(fleet):
    opened = Terminal(fleet)
    yield opened
    opened.close()


async def test_the_screen_follows_an_edition_through_trouble_and_an_outage_of_postgres(
    fleet, terminal, outbox_postgres
):
    await fleet.hire(20)
    fleet.top = 'redirect_to = "staging@example.com"'
    fleet.sink.script = lambda at, _: Reply("550 5.1.1 no\x1b[2J") if at is Stage.DOT and fleet.sink.accepted else None
    await terminal.start("watch", "--interval", "0.1")
    await terminal.shows("Nothing needs a person.")
    await terminal.shows("REDIRECTED: every email goes to staging@example.com", "editions: none yet", "nothing waits")
    assert (await fleet.run("generate")).code == 0
    await fleet.connection.execute("UPDATE outbox.delivery SET due_at = now() + interval '1 day' WHERE email <= 2")
    await terminal.shows("0 of 20 sent, 20 waiting", "18 due, the oldest for", "2 put off", "relays alive: none")
    relay = await fleet.relay()
    await terminal.shows("1 of 20 sent, 2 waiting, 17 failed", "relays alive: 1", str(relay.pid), "1 sent, 17 dead")
    await terminal.shows("Needs a person: 17 emails failed.")
    await terminal.shows("redirected to staging@example.com: 550 5.1.1 no\N{REPLACEMENT CHARACTER}[2J")

    name = await fleet.connection.fetchval("SELECT current_database()")
    admin = await asyncpg.connect(outbox_postgres.url)
    try:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await fleet.connection.execute(CUT_OFF)
        await terminal.shows("No answer:", "Asking again.", "1 of 20 sent")
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    finally:
        await admin.close()
    await until(lambda: "No answer:" not in terminal.text and "1 of 20 sent" in terminal.text, "it looks again")
    await relay.says("relay 2 holds its lock")
    told = "SELECT sum(sent) FROM outbox.relay WHERE last_reply IS NOT NULL HAVING count(*) = 2"
    assert await until(lambda: fleet.connection.fetchval(told), "both sessions told how it went") == 1
    os.write(terminal.ours, b"q")
    assert await terminal.ended() == 0
    assert terminal.written.count(ALTERNATE) == 1


async def test_a_look_that_waits_for_a_lock_says_so_and_ctrl_c_ends_it(fleet, terminal):
    await terminal.start("watch", "--interval", "0.1")
    await terminal.shows("nothing waits")
    async with fleet.connection.transaction():
        await fleet.connection.execute("LOCK outbox.attempt, outbox.email IN ACCESS EXCLUSIVE MODE")
        await terminal.shows("Postgres is slow to answer; this is 4 s old.")
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.ended() == 0


@pytest.mark.parametrize(
    ("columns", "lines"),
    [("400", "200"), ("120", "5000"), ("0", "0"), ("-1", "-1"), ("wide", "\N{ARABIC-INDIC DIGIT FIVE}"), ("1", "1")],
)
async def test_the_screen_has_the_size_of_the_terminal_whatever_the_environment_says(terminal, columns, lines):
    await terminal.start("watch", "--interval", "0.1", COLUMNS=columns, LINES=lines)
    await terminal.shows("Nothing needs a person.", "editions: none yet", "nothing waits")
    rows = terminal.text.split("\r\n")
    assert len(rows) <= 50
    assert max(map(len, rows)) <= 120
    os.write(terminal.ours, b"q")
    assert await terminal.ended() == 0


@pytest.mark.parametrize(("lines", "columns", "environment"), [
    (0, 0, {}), (0, 0, {"COLUMNS": "100", "LINES": "40"}), (0, 0, {"COLUMNS": "0", "LINES": "99999999"}),
    (3, 10, {}), (1, 1, {}),
])  # fmt: skip
async def test_the_screen_is_drawn_on_a_terminal_of_any_size(terminal, lines, columns, environment):
    fcntl.ioctl(terminal.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    await terminal.start("watch", "--interval", "0.1", **environment)
    await terminal.shows(*(["Nothing needs a person."] if not lines else []), "o")
    os.write(terminal.ours, b"q")
    assert await terminal.ended() == 0


async def test_without_a_terminal_it_names_what_serves_there(fleet):
    ended = await fleet.run("watch")
    assert (ended.code, ended.out) == (2, "")
    assert ended.sentences == [
        "watch: this is no terminal to draw on; use `outbox status`, or in scripts `outbox status --json`."
    ]
