"""Back to the old primary: it froze, its standby took over, and then it is in charge again with what it knew."""

import asyncio

import asyncpg
import pytest

from bench.arena import socket_of
from bench.freeze import freeze, kill, thaw
from bench.proxy import Proxy
from tests.faults.levers import SLOW, all_sent
from tests.faults.test_failover import Pair, accepted, company, pair, servers
from tests.fleet import Fleet, Process, until

__all__ = ["company", "pair", "servers"]  # fixtures


async def forward(pair: Pair) -> None:
    """The primary freezes, its standby is promoted, and the address leads there."""
    freeze(pair.primary)
    await asyncio.to_thread(pair.standby.promote)
    pair.front.target = socket_of(pair.standby)
    pair.front.cut(reset=True)


async def back(pair: Pair, company: Fleet) -> None:
    """The old primary thaws, the new one is lost, and the address leads to the old one again."""
    thaw(pair.primary)
    await asyncio.to_thread(kill, pair.standby)
    pair.front.target = socket_of(pair.primary)
    pair.front.cut(reset=True)
    company.connection.terminate()  # it may have been idle for too long, or cut
    company.connection = await asyncpg.connect(pair.primary.url)


async def scenario(pair: Pair, company: Fleet, emails: int, first: int, more: int, *, relays: int = 3) -> None:
    for _ in range(relays):
        await company.relay()
    await company.put_emails(emails)
    await pair.caught_up()
    await company.connection.execute("NOTIFY outbox")
    await accepted(company, first)
    await forward(pair)
    await accepted(company, len(company.sink.accepted) + more)
    await back(pair, company)
    await all_sent(company, emails, 60)
    assert company.twice == {}
    assert all(process.process.returncode is None for process in company.processes)


async def test_none_is_sent_twice_when_the_old_primary_comes_back(pair, company):
    company.top += '\nrate = "100/s"\nfailover_grace_s = 10'
    await scenario(pair, company, 300, 50, 150)


@pytest.mark.slow
async def test_none_of_900_is_sent_twice_when_the_old_primary_comes_back(pair, company):
    company.top = company.top.replace(SLOW, "") + '\nrate = "60/s"'
    await scenario(pair, company, 900, 100, 250)


async def test_nobody_claims_on_the_old_primary_before_a_relay_that_comes_late_has_said_what_it_sent(pair, company):
    """Both sent on the new primary; one finds the way back at once, the other some seconds later."""
    company.top += "\nfailover_grace_s = 20"
    async with Proxy(socket_of(pair.primary)) as way:
        own = {"OUTBOX_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{way.port}/postgres"}
        late = await company.relay(environment=own)
        early = await company.relay()
        await company.put_emails(40)
        await company.connection.execute("UPDATE outbox.delivery SET due_at = now() + interval '3 seconds'")
        await pair.caught_up()
        await forward(pair)
        way.target = socket_of(pair.standby)
        way.cut(reset=True)
        await accepted(company, 40)
        way.black_hole = True
        await back(pair, company)
        way.target = socket_of(pair.primary)
        way.cut(reset=True)
        await sessions(early, 3)
        await asyncio.sleep(3)
        assert len(company.sink.accepted) == 40, "claims wait for the one that comes late"
        way.heal()
        await all_sent(company, 40)
    assert company.twice == {}
    assert late.process.returncode is None


async def sessions(relay: Process, count: int) -> None:
    await until(lambda: "".join(relay.log).count("holds its lock") >= count, f"the relay has had {count} sessions")
