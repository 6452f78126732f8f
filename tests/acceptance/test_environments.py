"""The commands where servers and containers differ: encodings, users without a name, read-only disks, PID 1."""

import asyncio
import json
import os
import shutil
import signal
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from tests.support.fleet import until

# Runs one command after the other in one process, as `outbox …` would, and says how each ended.
EACH = """
import io, json, sys
from outbox.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    print("=ended=", json.dumps([arguments, code]))
    sys.stdout.flush()
"""
NAME = "Zoë \N{EN DASH} 漢字 … 😀"


async def each(fleet, *commands, within=(), **environment):
    """Run commands in an environment of their own; return for each its exit code and what it wrote to stdout."""
    fleet.write_settings()
    process = await asyncio.create_subprocess_exec(
        *within, sys.executable, "-c", EACH, json.dumps(commands),
        cwd=fleet.directory, env={**os.environ, "PYTHONPATH": str(Path.cwd()), **environment},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 90)
    found, written = [], []
    for line in out.splitlines(keepends=True):
        if line.startswith(b"=ended="):
            found.append((*json.loads(line.removeprefix(b"=ended=")), b"".join(written)))
            written = []
        else:
            written.append(line)
    return found, err


async def people_with_any_name(fleet):
    await fleet.hire(2)
    await fleet.connection.execute("UPDATE people SET name = $1", NAME)
    fleet.recipients = "select '…' || id as key, email, name from people order by id"
    fleet.data = "select '漢字' as day, 1 as done where :key <> ''"
    assert (await fleet.run("generate")).code == 0
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'dead', settled_at = now(), attempt = 1, marked_at = now()"
    )
    return await fleet.connection.fetchval("SELECT key FROM outbox.email ORDER BY key LIMIT 1")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252:strict"])
async def test_every_command_writes_any_text_in_any_encoding(fleet, encoding):
    key = await people_with_any_name(fleet)
    codec = encoding.partition(":")[0]
    found, err = await each(
        fleet,
        ["list"], ["list", "--json"], ["audit", "progress"], ["audit", "progress", "--json"], ["doctor"],
        ["preview", "progress", "--out", "here"], ["preview", "progress", "--text"], ["preview", "progress", "--json"],
        ["show", key], ["show", key, "--json"], ["show", key, "--text"], ["status"], ["status", "--json"],
        ["schedule"], ["suppress"], ["suppress", "ü@example.com", "--why", "…漢字"], ["suppress", "--json"],
        ["generate", "prögress…"], ["retry", "…", "--why", "…"], ["pause", "progress", "--why", NAME],
        ["resume", "all"],
        ["--help"], ["relay", "--help"], ["list", "--nö…"], ["relay", "--until-empty"], ["init"],
        PYTHONIOENCODING=encoding,
    )  # fmt: skip
    assert not [one for one in found if not isinstance(one[1], int)], found
    assert b"Traceback" not in err, err.decode(codec)
    by_command = {" ".join(arguments): out for arguments, _, out in found}
    for command, out in by_command.items():
        text = out.decode(codec)
        if "--json" in command:
            json.loads(text)
    assert json.loads(by_command["preview progress --json"])["recipient"]["name"] == NAME
    assert r"\u6f22\u5b57" in by_command["preview progress --text"].decode(codec)


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────

FIRST = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
"""Runs a command as PID 1 of a namespace of its own, as in a container."""


async def within_or_skip(within):
    if shutil.which(within[0]) is None:
        pytest.skip(f"{within[0]} is not installed")
    process = await asyncio.create_subprocess_exec(*within, "true", stderr=asyncio.subprocess.DEVNULL)
    if await process.wait() != 0:
        pytest.skip(f"{' '.join(within[:2])} is not permitted here")


def first_in(process):
    """Return the process that is PID 1 of the namespace."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


BLOCKED = {
    "outbox generate": ("generate",), "outbox audit": ("audit", "progress"), "outbox status": ("status",),
    "outbox list": ("list",), "outbox init": ("init",), "outbox pause": ("pause", "progress", "--why", "late"),
}  # fmt: skip
WAITING = """
SELECT array_agg(DISTINCT application_name) FROM pg_stat_activity
 WHERE wait_event_type = 'Lock' AND datname = current_database()
"""


@pytest.mark.parametrize(
    "within, signum, code",
    [(FIRST, signal.SIGTERM, 143), (FIRST, signal.SIGINT, 130), ((), signal.SIGINT, 130)],
)
async def test_a_signal_ends_every_command_at_once_with_its_usual_code(fleet, within, signum, code):
    if within:
        await within_or_skip(within)
    await fleet.hire(3)
    holder = await asyncpg.connect(fleet.database)
    async with holder.transaction():
        await holder.execute(
            "LOCK TABLE outbox.delivery, outbox.email, outbox.edition, outbox.definition, outbox.schema_version"
        )
        processes = [await fleet.start(*arguments, within=within) for arguments in BLOCKED.values()]

        async def all_wait():
            return set(BLOCKED) <= set(await fleet.connection.fetchval(WAITING) or ())

        await until(all_wait, "all wait for a lock")
        for process in processes:
            os.kill(first_in(process) if within else process.pid, signum)
        ended = [await process.ended(5) for process in processes]
    await holder.close()
    assert [one.code for one in ended] == [code] * len(BLOCKED), ended
    assert not any("Traceback" in one.err for one in ended)
    assert (await fleet.run("generate")).code == 0
    assert await fleet.states() == {"pending": 3}


@pytest.mark.parametrize("arguments, words", [
    (("relay",), "holds its lock"), (("web", "--http", "127.0.0.1:0"), "web_listening"),
])  # fmt: skip
async def test_as_the_first_process_of_a_container_services_drain_and_end_with_0(fleet, arguments, words):
    await within_or_skip(FIRST)
    process = await fleet.start(*arguments, within=FIRST)
    await process.says(words)
    os.kill(first_in(process), signal.SIGTERM)
    assert (await process.ended(10)).code == 0


async def test_the_first_process_of_a_container_ends_while_the_users_code_runs(fleet):
    await within_or_skip(FIRST)
    fleet.source = "slow:Slow"
    (fleet.directory / "slow.py").write_text(SLOW)
    path = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(fleet.directory)])}
    process = await fleet.start("generate", within=FIRST, environment=path)
    await until((fleet.directory / "began").exists, "the source is asked")
    os.kill(first_in(process), signal.SIGTERM)
    assert (await process.ended(5)).code == 143


SLOW = """
import pathlib, time
class Slow:
    def recipients(self, period):
        pathlib.Path("began").touch()
        time.sleep(600)
    def build(self, keys, period):
        return {}
"""


# ── users, directories and disks ─────────────────────────────────────────────────────────────────────────────────────

NAMELESS = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
"""Runs a command under a user id without an entry in /etc/passwd, as OpenShift does."""
READ_ONLY = (
    "unshare", "--mount", "sh", "-c",
    'set -e; for at in / /tmp /var/tmp /dev/shm; do mount -B $at $at; mount -o remount,bind,ro $at; done; exec "$@"',
    "sh",
)  # fmt: skip
"""Runs a command on a file system that cannot be written to, as with Kubernetes' readOnlyRootFilesystem."""


WORK = (
    ("init",), ("doctor",), ("generate",), ("preview", "progress", "--text"), ("relay", "--until-empty"), ("status",),
    ("list",), ("audit", "progress"), ("pause", "progress", "--why", "late"), ("resume", "progress"),
    ("suppress", "p1@example.com"), ("prune", "--keep", "400d"),
)  # fmt: skip


@asynccontextmanager
async def over_tcp(fleet):
    """The fleet's database through TCP: its socket is in a directory that only some users may enter."""
    directory = parse_qs(urlsplit(fleet.database).query)["host"][0]

    async def pump(reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader, writer):
        there, back = await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.5432")
        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    before, port = fleet.database, server.sockets[0].getsockname()[1]
    fleet.database = f"postgresql://postgres@127.0.0.1:{port}{urlsplit(before).path}"
    try:
        yield
    finally:
        fleet.database = before
        server.close()


def named(fleet):
    """Name the settings: none are looked up where `/` belongs to nobody, as in an ordinary user's own namespace."""
    return {"OUTBOX_CONFIG": str(fleet.directory / "outbox.toml")}


@pytest.mark.parametrize("within, who", [
    (NAMELESS, "uid54321@"), ((*NAMELESS, "env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME"), "uid54321@"),
    (READ_ONLY, ""),
])  # fmt: skip
async def test_all_works_without_a_name_a_home_or_a_disk_to_write_to(fleet, within, who):
    await within_or_skip(within)
    await fleet.hire(2)
    async with over_tcp(fleet):
        found, err = await each(fleet, *WORK, within=within, USER="", LOGNAME="", **named(fleet))
    assert b"Traceback" not in err, err.decode()
    assert {tuple(arguments): code for arguments, code, _ in found if code != 0 and arguments != ["doctor"]} == {}
    assert await fleet.states() == {"sent": 2}
    assert who in await fleet.connection.fetchval("SELECT who FROM outbox.operation LIMIT 1")


async def test_without_a_disk_to_write_to_preview_says_what_to_do(fleet):
    await within_or_skip(READ_ONLY)
    await fleet.hire(1)
    process = await fleet.start("preview", "progress", within=READ_ONLY)
    ended = await process.ended()
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert sentence.startswith("No temporary directory can be written to")
    assert "--out DIR" in sentence
    process = await fleet.start("preview", "progress", "--out", "here", within=READ_ONLY)
    (sentence,) = (await process.ended()).sentences
    assert "here cannot be written to (Read-only file system)" in sentence
    process = await fleet.start("demo", "--keep", "here", within=READ_ONLY)
    (sentence,) = (await process.ended()).sentences
    assert sentence == "--keep: here cannot be written to (Read-only file system); name another directory."
    process = await fleet.start("demo", within=READ_ONLY)
    assert "--keep DIR" in (await process.ended()).sentences[0]


async def test_a_user_id_without_a_name_is_asked_for_one_where_postgres_needs_it(fleet):
    within = (*NAMELESS, "env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "-u", "PGUSER")
    await within_or_skip(NAMELESS)
    fleet.database = "postgresql://localhost/try"
    found, err = await each(
        fleet, ["status"], ["preview", "progress"], ["doctor"], ["generate"], within=within, **named(fleet)
    )
    assert [code for _, code, _ in found] == [1, 1, 1, 1], err.decode()
    assert err.count(b"names no user, and the user id 54321 of this process") == 3
    assert b"names no user" in found[2][2]
    assert b"Traceback" not in err
    process = await fleet.start("demo", within=within)
    assert "has no entry in /etc/passwd" in (await process.ended()).sentences[0]


async def test_a_full_disk_is_one_sentence(fleet):
    process = await fleet.start("status", within=("sh", "-c", 'exec "$@" > /dev/full', "sh"))
    ended = await process.ended()
    assert (ended.code, ended.sentences) == (1, ["No space left on device."])
