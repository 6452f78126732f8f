"""Failover and failback: an old primary resumes with its old rows and is in charge again."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from bench.faults.environment import socket_of
from bench.harness.fault_proxy import Proxy
from bench.harness.freeze import freeze, kill, thaw
from outbox.sandbox.postgres import Server, standby
from tests.faults.test_failover import Pair, accepted, company, servers
from tests.support.fault_levers import SLOW, all_sent
from tests.support.fleet import Fleet, Process, until

__all__ = ["company", "servers"]  # fixtures

LATE_S = 4.0  # longer than those wait that know of no other relay
PATIENT = {"OUTBOX_FAILOVER_GRACE_S": "60"}


@pytest.fixture
async def pair(servers: tuple[Server, Server]) -> AsyncIterator[Pair]:
    primary, follower = servers
    async with Proxy(socket_of(primary)) as front:
        yield Pair(primary, follower, front)
        thaw(primary)  # it could not be stopped


async def forward(pair: Pair, company: Fleet, *, ways: tuple[Proxy, ...] = ()) -> None:
    """The primary freezes, its standby is promoted, and the addresses lead there."""
    freeze(pair.primary)
    await asyncio.to_thread(pair.standby.promote)
    await lead(pair.standby, company, pair.front, *ways)


async def back(pair: Pair, company: Fleet, *, ways: tuple[Proxy, ...] = ()) -> None:
    """The old primary thaws, the new one is lost, and the addresses lead to the old one again."""
    thaw(pair.primary)
    await asyncio.to_thread(kill, pair.standby)
    await lead(pair.primary, company, pair.front, *ways)


async def lead(server: Server, company: Fleet, *fronts: Proxy) -> None:
    for front in fronts:
        front.target = socket_of(server)
        front.cut(reset=True)
    company.connection.terminate()  # its server may be frozen, or have ended an idle session
    company.connection = await asyncpg.connect(server.url)


async def sessions(relay: Process, count: int) -> None:
    await until(lambda: "".join(relay.log).count("holds its lock") >= count, f"the relay has had {count} sessions")


@asynccontextmanager
async def way_of_its_own(pair: Pair) -> AsyncIterator[tuple[Proxy, dict[str, str]]]:
    """Yield a second address of the primary, and the environment of a relay that uses it."""
    async with Proxy(socket_of(pair.primary)) as way:
        yield way, {"OUTBOX_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{way.port}/postgres"}


async def due_soon(company: Fleet, count: int, *, first: int = 1) -> None:
    """Put in emails that are due once the servers have changed."""
    await company.put_emails(count, first=first)
    await company.connection.execute(
        "UPDATE outbox.delivery SET due_at = now() + interval '3 seconds' WHERE state = 'pending'"
    )


async def nothing_more_is_sent(company: Fleet) -> None:
    """Fail if an email is accepted while the relay that knows of it is still on its way."""
    before = len(company.sink.accepted)
    await asyncio.sleep(LATE_S)
    assert len(company.sink.accepted) == before, "claims wait for the relay that comes late"


async def all_are_sent_once(company: Fleet, emails: int, deadline_s: float = 60) -> None:
    await all_sent(company, emails, deadline_s)
    assert company.twice == {}
    assert all(process.process.returncode in (None, 0) for process in company.processes)


async def there_and_back(pair: Pair, company: Fleet, emails: int, first: int, more: int) -> None:
    """Three relays send; the servers change after `first` emails, and again after `more`."""
    for _ in range(3):
        await company.relay()
    await company.put_emails(emails)
    await pair.caught_up()
    await company.connection.execute("NOTIFY outbox")
    await accepted(company, first)
    await forward(pair, company)
    await accepted(company, len(company.sink.accepted) + more)
    await back(pair, company)


async def test_none_is_sent_twice_when_a_standby_takes_over_from_a_frozen_primary(pair, company):
    company.top += '\nrate = "100/s"\nfailover_grace_s = 10'
    for _ in range(3):
        await company.relay()
    await company.put_emails(200)
    await pair.caught_up()
    await company.connection.execute("NOTIFY outbox")
    await accepted(company, 50)
    await forward(pair, company)
    await all_are_sent_once(company, 200)


async def test_none_is_sent_twice_when_the_old_primary_comes_back(pair, company):
    company.top += '\nrate = "100/s"\nfailover_grace_s = 10'
    await there_and_back(pair, company, 300, 50, 150)
    await all_are_sent_once(company, 300)


@pytest.mark.slow
async def test_none_of_900_is_sent_twice_when_the_old_primary_comes_back(pair, company):
    company.top = company.top.replace(SLOW, "") + '\nrate = "60/s"'
    await there_and_back(pair, company, 900, 100, 250)
    await all_are_sent_once(company, 900)


async def test_none_is_sent_twice_on_the_way_forward_back_and_forward_again(pair, company):
    company.top += '\nrate = "100/s"\nfailover_grace_s = 10'
    await there_and_back(pair, company, 400, 50, 100)
    await accepted(company, len(company.sink.accepted) + 50)
    next_one = standby(pair.primary)
    pair.standby = await asyncio.to_thread(next_one.__enter__)
    try:
        await pair.caught_up()
        await forward(pair, company)
        await all_are_sent_once(company, 400)
    finally:
        thaw(pair.primary)
        await asyncio.to_thread(next_one.__exit__, None, None, None)


async def test_no_relay_claims_on_the_old_primary_before_one_that_comes_late_has_told_what_it_sent(pair, company):
    """Both sent on the new primary; one finds the way back at once, the other some seconds later."""
    company.top += "\nfailover_grace_s = 60"
    async with way_of_its_own(pair) as (way, own):
        await company.relay(environment=own)
        early = await company.relay()
        await due_soon(company, 40)
        await pair.caught_up()
        await forward(pair, company, ways=(way,))
        await accepted(company, 40)
        way.black_hole = True
        await back(pair, company, ways=(way,))
        await sessions(early, 3)
        await nothing_more_is_sent(company)
        way.heal()
        await all_are_sent_once(company, 40)


async def test_a_relay_that_joined_on_the_lost_server_is_waited_for_on_the_old_one(pair, company):
    """The old primary has never heard of it; those that met it on the other server have."""
    company.top += "\nfailover_grace_s = 60"
    async with way_of_its_own(pair) as (way, own):
        early = await company.relay()
        await pair.caught_up()
        await company.put_emails(1)
        await pair.caught_up()
        await forward(pair, company, ways=(way,))
        await sessions(early, 2)
        await company.relay(environment=own)
        await accepted(company, 1)
        early.send(signal.SIGSTOP)
        await due_soon(company, 40, first=2)
        await accepted(company, 41)  # by the one that joined
        early.send(signal.SIGCONT)
        await sessions(early, 3)
        way.black_hole = True
        await back(pair, company, ways=(way,))
        await company.put_emails(40, first=2)  # the application writes again what was lost
        await sessions(early, 4)
        await nothing_more_is_sent(company)
        way.heal()
        await all_are_sent_once(company, 41)


async def test_a_relay_that_slept_through_all_of_it_waits_for_those_that_did_not(pair, company):
    """For it nothing has changed: it knows this server, and no other."""
    company.top += "\nfailover_grace_s = 4"
    async with way_of_its_own(pair) as (way, own):
        sleeper = await company.relay(environment=PATIENT)
        await company.relay(environment=own)
        await due_soon(company, 40)
        await pair.caught_up()
        sleeper.send(signal.SIGSTOP)
        await forward(pair, company, ways=(way,))
        await accepted(company, 40)
        way.black_hole = True
        await back(pair, company, ways=(way,))
        sleeper.send(signal.SIGCONT)
        await sessions(sleeper, 2)
        await nothing_more_is_sent(company)
        way.heal()
        await all_are_sent_once(company, 40)


async def test_a_session_that_froze_with_the_old_primary_waits_when_both_go_on(pair, company):
    """Its connection is never cut, so no new session tells it that others were elsewhere."""
    company.top = "lease_s = 45\nguard_s = 1\nfailover_grace_s = 4"
    async with way_of_its_own(pair) as (_, own):
        stays = await company.relay(environment=own | PATIENT)
        late = await company.relay()
        await due_soon(company, 40)
        await pair.caught_up()
        noticed_at = time.monotonic() + 17  # a third of the lease, a second, and one to spare
        await forward(pair, company)
        await sessions(late, 2)
        await accepted(company, 40)
        await asyncio.sleep(max(noticed_at - time.monotonic(), 0))
        pair.front.black_hole = True
        await back(pair, company)
        await stays.says('"kind": "gap"')
        await nothing_more_is_sent(company)
        assert "".join(stays.log).count("holds its lock") == 1
        pair.front.heal()
        await all_are_sent_once(company, 40)


async def test_reports_that_are_generated_on_both_servers_are_mailed_once(pair, company):
    company.top += "\nfailover_grace_s = 60"
    await company.hire(20)
    await pair.caught_up()
    relays = [await company.relay() for _ in range(2)]
    await pair.caught_up()
    await forward(pair, company)
    assert (await company.run("generate")).code == 0
    await accepted(company, 20)
    await back(pair, company)
    again = await asyncio.gather(*(company.run("generate") for _ in range(2)))
    assert [ended.code for ended in again] == [0, 0], again
    for relay in relays:
        await sessions(relay, 3)
    await all_are_sent_once(company, 20)
    assert await company.connection.fetchval("SELECT count(*) FROM outbox.report") == 20
