"""Patroni changes the leader: by a person's wish, after a kill, and around a freeze after which the old one goes on."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest

from outbox.database import schema
from tests.faults.test_failover import PEOPLE, accepted
from tests.support.fault_levers import all_sent
from tests.support.fleet import Fleet, until
from tests.support.patroni import IS_THERE, TTL_S, Cluster, cluster, promoted_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_THERE, reason="patroni, etcd-server, haproxy and postgresql-15 are not installed"),
]

EMAILS = 900
RATE = 30
SOON_S = 5.0
SLACK_S = 10.0  # of a machine that does more than this test


async def switchover(patroni: Cluster) -> float:
    """Change the leader in order; return when the next one was promoted."""
    leader = await patroni.leader()
    roles = {name: role for name, (role, _) in (await patroni.state()).items()}
    others = [node for node in patroni.nodes if node is not leader]
    candidate = next((node for node in others if roles[node.name] == "sync_standby"), others[0])
    asking = asyncio.create_task(patroni.switch_over(leader, candidate))
    at = await promoted_at(candidate)
    await asking
    return at


async def kill(patroni: Cluster) -> float:
    """Kill the leader's host; return when another one was promoted."""
    leader = await patroni.leader()
    leader.signal(signal.SIGKILL)
    return await first_promoted(patroni, but=leader.name)


async def freeze_and_thaw(patroni: Cluster) -> float:
    """Freeze the leader until another one is promoted, and a while longer; return when it was promoted.

    The old one then sees that it has lost its lock, or takes it back.
    """
    leader = await patroni.leader()
    leader.signal(signal.SIGSTOP)
    try:
        at = await first_promoted(patroni, but=leader.name)
        await asyncio.sleep(4)
    finally:
        leader.signal(signal.SIGCONT)
    return at


async def freeze_at_the_brink(patroni: Cluster) -> float:
    """Freeze the leader for about as long as its lock lasts: it is replaced, or takes the lock back, or both."""
    leader = await patroni.leader()
    leader.signal(signal.SIGSTOP)
    await asyncio.sleep(TTL_S + 0.5)
    leader.signal(signal.SIGCONT)
    await asyncio.sleep(1)
    await patroni.leader()
    return time.time()


async def first_promoted(patroni: Cluster, *, but: str) -> float:
    others = [asyncio.create_task(promoted_at(node)) for node in patroni.nodes if node.name != but]
    done, waiting = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()
    return done.pop().result()


@pytest.fixture
def company(sink, tmp_path) -> Callable[[Cluster, str], Awaitable[Fleet]]:
    async def make(patroni: Cluster, url: str) -> Fleet:
        connection = await asyncpg.connect((await patroni.leader()).url)
        await schema.initialise(connection)
        await connection.execute(PEOPLE)
        return Fleet(url, connection, sink, tmp_path, top=f'rate = "{RATE}/s"')

    return make


@pytest.fixture
async def running(company) -> AsyncIterator[list[Fleet]]:
    fleets: list[Fleet] = []
    yield fleets
    for fleet in fleets:
        await fleet.stop_all()
        fleet.connection.terminate()


@pytest.mark.parametrize("way", ["hosts", "proxy"])
@pytest.mark.parametrize("synchronous", [False, True], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("change", [switchover, kill, freeze_and_thaw, freeze_at_the_brink], ids=lambda c: c.__name__)
async def test_none_is_sent_twice_and_none_is_lost(company, running, change, synchronous, way, record_property):
    async with cluster(nodes=3 if synchronous else 2, synchronous=synchronous) as patroni:
        fleet = await company(patroni, patroni.hosts_url if way == "hosts" else patroni.proxy_url)
        running.append(fleet)
        relays = [await fleet.relay() for _ in range(3)]
        await fleet.put_emails(EMAILS)
        await fleet.connection.execute("NOTIFY outbox")
        await accepted(fleet, 100)
        await until(lambda: follow(patroni), "all standbys follow", 30)
        at = await change(patroni)
        after = await next_accepted(fleet, at)
        record_property("sending_again_s", round(after - at, 2))
        print(f"{change.__name__}, {way}, synchronous={synchronous}: sending again {after - at:.2f} s after")  # noqa: T201
        fleet.connection.terminate()
        fleet.connection = await asyncpg.connect((await patroni.leader()).url)
        await all_sent(fleet, EMAILS, 120)
        assert fleet.twice == {}
        assert len(fleet.sink.addresses) == EMAILS
        assert all(relay.process.returncode is None for relay in relays)
        assert after - at < SOON_S + SLACK_S


async def follow(patroni: Cluster) -> bool:
    """Return True if each node has the emails: a standby that is only being made has nothing to take over with."""
    for node in patroni.nodes:
        connection = await asyncpg.connect(node.url)
        try:
            if not await connection.fetchval("SELECT to_regclass('outbox.email') IS NOT NULL"):
                return False
        finally:
            await connection.close()
    return True


async def next_accepted(fleet: Fleet, at: float) -> float:
    """Wait for the first email that is accepted after that time; return when it was."""
    deadline = time.monotonic() + 60
    while True:
        after = [one.at for one in fleet.sink.accepted if one.at > at]
        if after:
            return min(after)
        assert time.monotonic() < deadline, "nothing is sent after the promotion"
        await asyncio.sleep(0.05)
