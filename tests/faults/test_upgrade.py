"""Two versions at once: servers are upgraded one by one while mail flows, and the schema before the last of them.

The next version is a copy of this package whose schema has one more column, which programs of this version may do
without.
"""

import asyncio
import json
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

import outbox
from outbox.database import schema
from tests.support.fault_levers import all_sent, balance, terminate_session
from tests.support.fleet import Fleet, Process, until

NEXT = "99.0.0"
COLUMN = "ALTER TABLE outbox.delivery ADD COLUMN weight integer"


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory to start the next version from: `python -m outbox` finds its copy there."""
    directory = tmp_path_factory.mktemp("next")
    package = directory / "outbox"
    shutil.copytree(Path(outbox.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    version = schema.VERSION + 1
    change(package / "__init__.py", r'__version__ = ".*"', f'__version__ = "{NEXT}"')
    change(package / "database" / "schema.py", r"VERSION: Final = \d+", f"VERSION: Final = {version}", count=1)
    change(package / "database" / "upgrades.py", r"(UPGRADES: .* = \{\n)", rf'\1    {version}: "{COLUMN}",\n')
    whole = schema.schema_sql().replace(
        "    state       text not null default 'pending',", "    state text not null default 'pending', weight int,"
    )
    last = f"({schema.VERSION}, {schema.COMPATIBLE});"
    assert last in whole
    (package / "schema.sql").write_text(whole.replace(last, f"({version}, {schema.COMPATIBLE});"))
    return directory


def change(path: Path, pattern: str, replacement: str, *, count: int = 0) -> None:
    text, changes = re.subn(pattern, replacement, path.read_text(), count=count)
    assert changes == 1, f"{path.name} has {changes} of {pattern}"
    path.write_text(text)


def of(version: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(version), "PYTHONSAFEPATH": "1"}


async def relays(fleet: Fleet) -> dict[str, int]:
    """How many relays of each version hold their locks."""
    ended = await fleet.run("status", "--json")
    assert ended.code == 0, ended
    found: dict[str, int] = {}
    for relay in json.loads(ended.out)["relays"]:
        found[relay["version"]] = found.get(relay["version"], 0) + 1
    return found


async def stopped(relay: Process) -> None:
    relay.send(signal.SIGTERM)
    ended = await relay.ended()
    assert ended.code == 0, ended


async def version_in_database(fleet: Fleet) -> int:
    return int(await fleet.connection.fetchval("SELECT max(version) FROM outbox.schema_version"))


@asynccontextmanager
async def mail_flowing(fleet: Fleet) -> AsyncIterator[list[int]]:
    """Emails are put in all the while; gives their number, in a list of one."""
    count = [0]
    enough = asyncio.Event()

    async def put() -> None:
        connection = await asyncpg.connect(fleet.database)
        try:
            putting = replace(fleet, connection=connection)
            while not enough.is_set():
                await putting.put_emails(5, first=count[0] + 1)
                count[0] += 5
                await asyncio.sleep(0.05)
        finally:
            await connection.close()

    task = asyncio.create_task(put())
    try:
        yield count
    finally:
        enough.set()  # not cancelled: a put may be committed and not yet counted
        await task


async def more_is_sent(fleet: Fleet) -> None:
    at = fleet.sink.messages
    await until(lambda: fleet.sink.messages > at + 10, "mail flows", deadline_s=60)


async def test_a_fleet_is_upgraded_server_by_server_while_mail_flows(fleet, next_version):
    old = [await fleet.relay() for _ in range(2)]
    assert await relays(fleet) == {outbox.__version__: 2}
    async with mail_flowing(fleet) as count:
        await more_is_sent(fleet)
        inits = [await fleet.start("init", environment=of(next_version)) for _ in range(2)]
        for init in inits:
            ended = await init.ended(60)
            assert ended.code == 0, ended
        assert await version_in_database(fleet) == schema.VERSION + 1
        assert (await fleet.run("init")).code == 0, "an older server's init finds nothing to do"
        assert await version_in_database(fleet) == schema.VERSION + 1
        await more_is_sent(fleet)

        await terminate_session(fleet)
        for relay in old:
            await until(
                lambda relay=relay: sum("holds its lock" in line for line in relay.log) >= 2, "it reconnects", 60
            )
        await more_is_sent(fleet)

        for number, relay in enumerate(old, 1):
            await fleet.relay(environment=of(next_version))
            assert (await relays(fleet)).get(NEXT) == number
            await stopped(relay)
        assert await relays(fleet) == {NEXT: 2}
        await more_is_sent(fleet)
    await all_sent(fleet, count[0], deadline_s=60)
    assert await balance(fleet, count[0]) == set()
    versions = await fleet.connection.fetch(
        "SELECT DISTINCT r.version FROM outbox.attempt a JOIN outbox.relay r ON r.id = a.relay"
    )
    assert {row["version"] for row in versions} == {outbox.__version__, NEXT}


async def test_crons_of_both_versions_at_once_write_once_per_person(fleet, next_version):
    fleet.data = "select pg_sleep(0.01)::text as slept, :key as person"
    await fleet.hire(100)
    crons = [await fleet.start("generate")]
    await until(lambda: fleet.connection.fetchval("SELECT count(*) FROM outbox.report"), "the first is at work")
    assert (await fleet.run("init", environment=of(next_version))).code == 0
    crons += [
        await fleet.start("generate", environment=environment) for environment in (of(next_version), {}) for _ in "12"
    ]
    for cron in crons:
        ended = await cron.ended(60)
        assert (ended.code, ended.err) == (0, ""), ended
        assert "0 failed, of 100 recipients." in ended.out
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 100
    await fleet.relay()
    await fleet.relay(environment=of(next_version))
    await all_sent(fleet, 100)
    assert await balance(fleet, 100) == set()


async def test_the_next_version_is_really_another_program(fleet, next_version):
    """Before the schema is upgraded it says so; this is what shows that the copy runs, and not this package."""
    ended = await fleet.run("relay", environment=of(next_version))
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert f"older (version {schema.VERSION}) than this program (version {schema.VERSION + 1})" in sentence
    assert "outbox init" in sentence
