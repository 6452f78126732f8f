"""Readers of Postgres that meet a network which falls silent: each wait has an end, also that for a rollback."""

import asyncio
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from bench.harness.fault_proxy import Proxy
from outbox.monitoring import completion
from outbox.monitoring import fleet as fleet_numbers
from outbox.operations import route_rules, watch
from outbox.operations.watch import Watcher
from outbox.settings import Settings
from outbox.settings.urls import DatabaseUrl
from tests.support.fault_levers import by_port, socket_of

SILENCE_S = 1.0
ENDED_S = 10.0  # far less than a wait without an end


@pytest.fixture
async def proxy(database):
    async with Proxy(socket_of(database)) as proxy:
        yield proxy


@pytest.fixture
def url(database, proxy):
    return DatabaseUrl.parse(by_port(database, proxy.port))


def silent_from(monkeypatch, proxy, module, name):
    """Let the network fall silent when a module calls one of its functions."""
    former = getattr(module, name)

    async def call(*values, **named):
        proxy.black_hole = True
        return await former(*values, **named)

    monkeypatch.setattr(module, name, call)


async def ended(proxy, doing):
    """Return the result, or fail if there is none within `ENDED_S`."""
    running = asyncio.ensure_future(doing)
    await asyncio.wait([running], timeout=ENDED_S)
    is_ended = running.done()
    proxy.cut(reset=True)  # otherwise not even its cancellation would end
    running.cancel()
    (result,) = await asyncio.gather(running, return_exceptions=True)
    assert is_ended
    return result


async def test_a_look_at_a_postgres_that_falls_silent_ends_and_says_why(monkeypatch, proxy, url):
    watcher = Watcher(Settings(database_url=url))
    await watcher.look_again()
    assert watcher.trouble is None
    with monkeypatch.context() as patch:
        silent_from(patch, proxy, watch, "read_snapshot")
        patch.setattr(watch, "SILENCE_MAX_S", SILENCE_S)
        await ended(proxy, watcher.look_again())
    assert watcher.trouble == "Postgres did not answer within 1 s"
    proxy.heal()
    await watcher.look_again()
    assert watcher.trouble is None
    watcher.close()


async def test_a_look_in_progress_ends_with_its_watcher(monkeypatch, proxy, url):
    watcher = Watcher(Settings(database_url=url))
    await watcher.look_again()
    silent_from(monkeypatch, proxy, watch, "read_snapshot")
    looking = asyncio.create_task(watcher.look_again())
    await asyncio.sleep(0.1)
    began_at = time.monotonic()
    looking.cancel()
    watcher.close()
    result = await ended(proxy, looking)
    assert isinstance(result, asyncio.CancelledError)
    assert time.monotonic() < began_at + ENDED_S / 2


async def test_the_numbers_of_the_fleet_end_when_postgres_falls_silent(monkeypatch, proxy, url):
    monkeypatch.setattr(fleet_numbers, "LOOK_MAX_S", SILENCE_S)
    silent_from(monkeypatch, proxy, fleet_numbers, "read_snapshot")
    found = await ended(proxy, fleet_numbers.FleetReader(url)._look())
    assert found.trouble
    assert found.schema_fits


async def test_the_look_at_the_rules_ends_when_postgres_falls_silent(monkeypatch, proxy, url):
    monkeypatch.setattr(route_rules, "LOOK_MAX_S", SILENCE_S)
    monkeypatch.setattr(route_rules, "LOOK_EVERY_S", 0.1)
    looks = []
    silent_from(monkeypatch, proxy, route_rules, "read_unserved")
    read = route_rules.read_unserved

    async def counted(connection):
        looks.append(connection)
        return await read(connection)

    monkeypatch.setattr(route_rules, "read_unserved", counted)
    watching = asyncio.create_task(route_rules.watch_rules(Settings(database_url=url)))

    async def second_look():
        while not looks or not looks[0].is_closed():
            await asyncio.sleep(0.05)

    try:
        assert await ended(proxy, second_look()) is None
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert looks[0].is_closed()


async def test_the_look_for_complete_editions_ends_when_postgres_falls_silent(monkeypatch, proxy, url, connection):
    monkeypatch.setattr(completion, "SILENCE_MAX_S", SILENCE_S)
    await connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)"
        " VALUES ('progress', '2026-W48', '2026-11-23', '2026-11-30', 1)"
    )
    silent_from(monkeypatch, proxy, completion, "is_complete")
    looking = completion.Completion.__new__(completion.Completion)
    looking.database_url, looking.dead_man_url = url, None
    assert isinstance(await ended(proxy, looking._look()), completion.LOST_SESSION)


async def stopped(proxy, watching):
    """Cancel a task that Postgres does not answer, as the end of a relay does, and return how it ended."""
    while not proxy.black_hole:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    watching.cancel()
    return await ended(proxy, watching)


async def test_a_look_for_complete_editions_that_is_cancelled_ends(monkeypatch, proxy, url, connection):
    await connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)"
        " VALUES ('progress', '2026-W48', '2026-11-23', '2026-11-30', 1)"
    )
    silent_from(monkeypatch, proxy, completion, "is_complete")
    relays = SimpleNamespace(
        database_url=url, settings=Settings(), counts=Counter(), holds_session=True, alive=1, each=[None]
    )
    watching = asyncio.create_task(completion.Completion(relays).watch())
    assert isinstance(await stopped(proxy, watching), asyncio.CancelledError)


async def test_a_look_at_the_rules_that_is_cancelled_ends(monkeypatch, proxy, url):
    monkeypatch.setattr(route_rules, "LOOK_MAX_S", 3.0)
    silent_from(monkeypatch, proxy, route_rules, "read_unserved")
    watching = asyncio.create_task(route_rules.watch_rules(Settings(database_url=url)))
    assert isinstance(await stopped(proxy, watching), asyncio.CancelledError)


async def test_the_numbers_of_the_fleet_come_before_metrics_are_given_up(monkeypatch, url):
    """/metrics waits for 8 s, and a database may take its time to connect and then to answer."""
    monkeypatch.setattr(fleet_numbers, "LOOK_MAX_S", SILENCE_S)
    connect, read = fleet_numbers.connect, fleet_numbers.read_snapshot

    async def slow_connect(*values, **named):
        await asyncio.sleep(0.8 * SILENCE_S)
        return await connect(*values, **named)

    async def slow_read(connection):
        await connection.execute(f"SELECT pg_sleep({0.8 * SILENCE_S})")
        return await read(connection)

    monkeypatch.setattr(fleet_numbers, "connect", slow_connect)
    monkeypatch.setattr(fleet_numbers, "read_snapshot", slow_read)
    began_at = time.monotonic()
    found = await fleet_numbers.FleetReader(url)._look()
    assert found.trouble
    assert time.monotonic() < began_at + 1.4 * SILENCE_S
