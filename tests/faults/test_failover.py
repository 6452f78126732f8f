"""A primary is lost and its standby takes over, with and without the last commits. Real servers, real replication."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from bench.faults.environment import socket_of
from bench.harness.fault_proxy import Proxy
from outbox.database import schema
from outbox.sandbox.postgres import Server, postgres, standby
from outbox.sandbox.smtp_sink import Hold, Stage, Trickle
from outbox.testing.postgres import FAST
from tests.support.fault_levers import SLOW, At, balance, post
from tests.support.fleet import Fleet, Process, until

PEOPLE = """
CREATE TABLE people (id int PRIMARY KEY, email text, name text, active boolean NOT NULL DEFAULT true);
CREATE TABLE progress (person_id int NOT NULL, day timestamptz NOT NULL, done int NOT NULL);
"""


@dataclass
class Pair:
    """A primary, its standby, and the address that leads to whichever of them is in charge."""

    primary: Server
    standby: Server
    front: Proxy

    async def cut_replication(self) -> None:
        """From now on what is committed is on the primary alone."""
        follower = await asyncpg.connect(self.standby.url)
        await follower.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await follower.execute("SELECT pg_reload_conf()")
        await until(lambda: self._followers(0), "nobody follows the primary")
        await follower.close()

    async def caught_up(self) -> None:
        """Until the standby has all that was committed so far."""
        leader, follower = await asyncpg.connect(self.primary.url), await asyncpg.connect(self.standby.url)
        lsn = await leader.fetchval("SELECT pg_current_wal_lsn()")

        async def is_there() -> bool:
            return bool(await follower.fetchval("SELECT pg_last_wal_replay_lsn() >= $1", lsn))

        await until(is_there, "the standby has caught up")
        await leader.close()
        await follower.close()

    async def synchronise(self) -> None:
        """From now on a commit is on both."""
        leader = await asyncpg.connect(self.primary.url)
        await leader.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        await leader.execute("SELECT pg_reload_conf()")

        async def is_sync() -> bool:
            return await leader.fetchval("SELECT sync_state FROM pg_stat_replication") == "sync"

        await until(is_sync, "the standby is synchronous")
        await leader.close()

    async def _followers(self, count: int) -> bool:
        leader = await asyncpg.connect(self.primary.url)
        found = await leader.fetchval("SELECT count(*) FROM pg_stat_replication")
        await leader.close()
        return bool(found == count)

    async def lose_primary(self) -> Any:
        """The primary's host is gone and the standby is promoted; gives a connection to it."""
        await asyncio.to_thread(self.primary.stop, "immediate")
        await asyncio.to_thread(self.standby.promote)
        self.front.target = socket_of(self.standby)
        self.front.cut(reset=True)
        return await asyncpg.connect(self.standby.url)


@pytest.fixture
def servers():
    with postgres(settings=FAST) as primary, standby(primary) as follower:
        yield primary, follower


@pytest.fixture
async def pair(servers) -> AsyncIterator[Pair]:
    primary, follower = servers
    async with Proxy(socket_of(primary)) as front:
        yield Pair(primary, follower, front)


@pytest.fixture
async def company(pair: Pair, sink, forks, tmp_path: Path) -> AsyncIterator[Fleet]:
    leader = await asyncpg.connect(pair.primary.url)
    await schema.initialise(leader)
    await leader.execute(PEOPLE)
    fleet = Fleet(
        f"postgresql://postgres@127.0.0.1:{pair.front.port}/postgres", leader, sink, tmp_path, top=SLOW, forks=forks
    )
    yield fleet
    await fleet.stop_all()
    for connection in {leader, fleet.connection}:
        connection.terminate()  # its server may be the one that is gone
    await asyncio.sleep(0)


async def accepted(fleet: Fleet, count: int) -> None:
    await until(lambda: len(fleet.sink.accepted) >= count, f"{count} emails are accepted")


async def serve(pair: Pair, fleet: Fleet, relays: list[Process]) -> None:
    """The fleet's facts come from the new primary, where each relay has a session by now."""
    fleet.connection = await pair.lose_primary()
    for relay in relays:
        await until(lambda relay=relay: "".join(relay.log).count("holds its lock") == 2, "the relay has a new session")


async def test_what_an_asynchronous_standby_forgot_is_not_sent_again(pair, company):
    """Marks and verdicts are lost, and the last emails altogether."""
    relays = [await company.relay() for _ in range(2)]
    await post(company, 60)
    await accepted(company, 60)
    await company.settled()
    await company.put_emails(60, first=61)  # written, and not announced: the relays look a little later
    await pair.caught_up()
    await pair.cut_replication()
    await post(company, 40, first=121)
    await accepted(company, 160)
    await company.settled()
    await serve(pair, company, relays)
    assert await company.connection.fetchval("SELECT count(*) FROM outbox.email") >= 120
    await post(company, 10, first=161)
    await accepted(company, 170)
    await until(lambda: _all_sent(company, 170), "all is sent, says the new primary too")
    assert company.twice == {}


async def _all_sent(fleet: Fleet, count: int) -> bool:
    return await fleet.states() == {"sent": count}


async def test_an_answer_that_was_waited_for_during_the_failover_counts(pair, company):
    """The dot is written, the mark is lost with the primary, and the 250 comes after the promotion."""
    answer = asyncio.Event()
    script = At(Stage.DOT, Hold(answer), times=1)
    company.sink.script = script
    relay = await company.relay()
    await company.put_emails(1)
    await pair.caught_up()
    await pair.cut_replication()
    await script.reached()
    await serve(pair, company, [relay])
    await until(lambda: _all_in_doubt(company), "it is in doubt on the new primary")
    answer.set()
    await until(lambda: _all_sent(company, 1), "the late 250 ends the doubt")
    assert company.twice == {}


async def _all_in_doubt(fleet: Fleet) -> bool:
    return await fleet.states() == {"in_doubt": 1}


async def test_nobody_claims_before_a_relay_that_comes_late_has_said_what_it_sent(pair, company, tmp_path):
    """One relay finds the new primary at once, the other, which knows, some seconds later."""
    company.top += "\nfailover_grace_s = 20"
    async with Proxy(socket_of(pair.primary)) as way:
        knows = await company.relay(
            environment={"OUTBOX_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{way.port}/postgres"}
        )
        await company.put_emails(20)
        await pair.caught_up()
        await pair.cut_replication()
        await company.connection.execute("NOTIFY outbox")
        await accepted(company, 20)
        await company.settled()
        other = await company.relay()
        way.black_hole = True
        company.connection = await pair.lose_primary()
        way.target = socket_of(pair.standby)
        await until(lambda: "".join(other.log).count("holds its lock") == 2, "the other has a session")
        await asyncio.sleep(4)
        assert await company.states() == {"pending": 20}, "claims wait for the one that comes late"
        way.cut(reset=True)
        way.heal()
        await until(lambda: _all_sent(company, 20), "told, and not sent again")
    assert company.twice == {}
    assert knows.process.returncode is None


async def test_who_never_comes_back_holds_the_fleet_up_for_the_grace_only(pair, company):
    company.top += "\nfailover_grace_s = 5"
    dead = await company.relay()
    relay = await company.relay()
    await pair.caught_up()
    await dead.kill()
    company.connection = await pair.lose_primary()
    await post(company, 5)
    await until(lambda: _all_sent(company, 5), "sent after the grace", 15)
    assert relay.process.returncode is None


async def test_with_a_synchronous_standby_nothing_is_forgotten_whoever_dies(pair, company):
    """All relays and the primary are lost at the same moment."""
    company.top += "\nfailover_grace_s = 3"
    await pair.synchronise()
    company.sink.script = At(Stage.DOT, Trickle(delay_s=0.005))  # a tenth of a second for each answer
    relays = [await company.relay() for _ in range(3)]
    await post(company, 400)
    await accepted(company, 100)
    for relay in relays:
        await relay.kill()
    company.connection = await pair.lose_primary()
    before = len(company.sink.accepted)
    assert before < 400, "too late to lose anything"
    [await company.relay() for _ in range(2)]
    await company.settled(60)
    await balance(company, 400)


async def test_generate_does_not_make_an_email_again_that_only_a_relay_remembers(pair, company):
    """Reports and emails are lost with the primary after they were sent: the report comes back, the email does not."""
    company.top += "\nfailover_grace_s = 5"
    await company.hire(10)
    await pair.caught_up()
    relay = await company.relay()
    await pair.caught_up()
    await pair.cut_replication()
    assert (await company.run("generate")).code == 0
    await accepted(company, 10)
    await company.settled()
    company.connection = await pair.lose_primary()
    ended = await company.run("generate")
    assert ended.code == 0, ended
    await until(lambda: _all_sent(company, 10), "all is sent")
    assert await company.connection.fetchval("SELECT count(*) FROM outbox.report") == 10
    unlinked = "SELECT count(*) FROM outbox.email WHERE report IS NULL"
    assert await company.connection.fetchval(unlinked) == 0
    assert company.twice == {}
    assert relay.process.returncode is None


async def replication(company: Fleet) -> dict[str, Any]:
    """The doctor's line about it."""
    found = json.loads((await company.run("doctor", "--json")).out)["checks"]
    return next(line for line in found if line["check"] == "database.replication")


async def test_the_doctor_tells_what_the_replication_that_is_there_means_for_the_promise(pair, company):
    line = await replication(company)
    assert (line["grade"], "asynchronous" in line["found"]) == ("note", True)
    await pair.synchronise()
    assert (await replication(company))["grade"] == "ok"
    await asyncio.to_thread(pair.standby.stop, "immediate")
    await until(lambda: pair._followers(0), "nobody follows the primary")
    line = await replication(company)
    assert (line["grade"], "every commit waits" in line["found"]) == ("fault", True)
