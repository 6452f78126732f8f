"""The barrier's row: who raises, waits and lifts, and that no statement claims or marks behind it."""

import asyncpg
import pytest

from outbox.database import failover_barrier, failover_rules
from outbox.database.connection import CHANNEL
from outbox.database.failover_barrier import Barrier
from outbox.database.failover_rules import Kind, Presence
from outbox.relay.boot_clock import boot_clock_s
from outbox.relay.isolate import claim_one
from outbox.relay.lease_connection import PLANS
from outbox.relay.session import Session, SessionEvents
from outbox.relay.settlement import Settlement
from outbox.relay.tick import TickRequest, tick
from outbox.settings.urls import DatabaseUrl
from outbox.smtp.verdict import Outcome

GRACE_S = 30.0
ELSEWHERE = (7, None)
SENT = Outcome("sent", "accepted", "250 ok")


class Member:
    """A relay with a name instead of a process."""

    def __init__(self, url, name):
        self.url, self.name = DatabaseUrl.parse(url), name * 32
        self.presence = Presence(self.name, failover_rules.blind_s(5, 10))
        self.session = None
        self.heard = []

    async def open(self, *, last=None, silent_s=0.0):
        self.presence.answered_s = boot_clock_s() - silent_s
        former, self.session = self.session, None
        self.session = await Session.open(
            self.url,
            lease_s=10,
            former=former,
            statements=(),
            standing=self.presence.standing(last, grace_s=GRACE_S),
            events=SessionEvents(heard=self.heard.append),
        )
        self.barrier = Barrier(self.session.barrier.epoch, GRACE_S, up=not self.session.barrier.is_lifted)
        self.presence.arrive(self.session.server, boot_clock_s(), self.session.met)
        return self

    async def look(self, now=100.0):
        await self.barrier.look(self.session.connection, self.session.relay, now, CHANNEL)
        return self.barrier.up


@pytest.fixture
async def member(database):
    members = []

    def make(name):
        members.append(Member(database, name))
        return members[-1]

    yield make
    for one in members:
        if one.session is not None:
            one.session.connection.terminate()


async def pass_the_least_wait(connection):
    await connection.execute("UPDATE outbox.failover SET lift_after = now()")


async def test_a_first_relay_and_one_that_reconnects_soon_raise_no_barrier(connection, member):
    one = await member("a").open()
    assert one.session.barrier.is_lifted
    await one.open(last=one.session.server)
    assert one.session.barrier.is_lifted
    assert (await failover_barrier.read(connection)).epoch == 0


@pytest.mark.parametrize("last", [ELSEWHERE, (1, None)], ids=["a later timeline", "another start"])
async def test_a_relay_from_another_server_waits_for_all_that_may_live_here(connection, member, last):
    other = await member("b").open()
    one = await member("a").open(last=last)
    assert one.session.barrier.kind is Kind.MOVE
    assert await one.look()
    await pass_the_least_wait(connection)
    assert await one.look(), "the other has said nothing"
    other.session.connection.terminate()
    await other.open(last=other.session.server)
    assert other.barrier.up
    assert not await other.look(), "the last one that was waited for lifts it"
    assert not await one.look()


async def test_a_relay_after_a_long_silence_waits_until_one_that_was_at_work_all_the_time_lifts_the_barrier(
    connection, member
):
    other = await member("b").open()
    one = await member("a").open()
    await one.open(last=one.session.server, silent_s=6)
    assert one.session.barrier.kind is Kind.GAP
    assert await one.look()
    row = await failover_barrier.read(connection)
    assert failover_rules.answer_of(row, other.barrier.epoch, has_gap=False) is failover_rules.Answer.VOUCH
    await failover_barrier.lift(other.session.connection, row.epoch, CHANNEL)
    assert not await one.look()


async def test_a_new_relay_waits_a_little_where_all_that_are_known_are_lost(connection, member):
    lost = await member("b").open()
    pid = lost.session.connection.get_server_pid()
    await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    one = await member("a").open()
    assert one.session.barrier.kind is Kind.START
    assert one.session.barrier.until_s <= failover_rules.UNHEARD_S
    assert await one.look()
    two = await member("c").open()
    assert two.barrier.up, "it is no reason to go on that another one waits"


async def test_a_new_relay_waits_for_an_answer_of_one_that_was_at_work_here_all_the_time(connection, member):
    """That a session holds its lock is no such word: it may have been frozen with the server."""
    other = await member("b").open()
    one = await member("a").open()
    assert await one.look()
    row = await failover_barrier.read(connection)
    assert failover_rules.answer_of(row, other.barrier.epoch, has_gap=False) is failover_rules.Answer.VOUCH
    await failover_barrier.lift(other.session.connection, row.epoch, CHANNEL)
    assert not await one.look()


async def test_a_relay_that_stopped_in_order_is_not_waited_for(connection, member):
    other = await member("b").open()
    await failover_barrier.leave(other.session.connection, other.session.relay, other.name, CHANNEL)
    other.session.connection.terminate()
    one = await member("a").open(last=ELSEWHERE)
    await one.look()
    await pass_the_least_wait(connection)
    assert not await one.look()


async def test_a_relay_that_stops_in_order_while_the_barrier_stands_is_waited_for_no_more(connection, member):
    """It has told all that it knew, and its row no longer says whose that was."""
    other = await member("b").open()
    one = await member("a").open(last=ELSEWHERE)
    assert await one.look()
    assert await other.look()
    await failover_barrier.leave(other.session.connection, other.session.relay, other.name, CHANNEL)
    await pass_the_least_wait(connection)
    assert not await one.look()


async def test_a_relay_seen_alive_on_another_server_is_waited_for_though_this_server_does_not_know_it(
    connection, member
):
    one = member("a")
    one.presence.hear(failover_rules.JOINED + "d" * 32, boot_clock_s())
    await one.open(last=ELSEWHERE)
    await pass_the_least_wait(connection)
    assert await one.look()
    joined = await member("d").open(last=ELSEWHERE)
    await pass_the_least_wait(connection)
    await one.look()
    assert not await joined.look()


async def test_a_barrier_ends_by_the_servers_clock_and_by_the_relays_own(connection, member):
    lost = member("b")
    await lost.open()
    one = await member("a").open(last=ELSEWHERE)
    assert await one.look(100.0)
    await connection.execute("UPDATE outbox.failover SET until = now() + interval '1 hour'")  # its clock was set back
    assert await one.look(100.0 + GRACE_S - 0.1)
    assert not await one.look(100.0 + GRACE_S)
    two = await member("c").open(last=ELSEWHERE)
    assert await two.look(100.0)
    await connection.execute("UPDATE outbox.failover SET until = now()")
    assert not await two.look(100.1)


async def test_the_time_that_it_waited_behind_an_earlier_barrier_does_not_count(connection, member):
    one = await member("a").open(last=ELSEWHERE)
    await member("b").open(last=ELSEWHERE)
    assert await one.look(100.0)
    await failover_barrier.lift(connection, (await failover_barrier.read(connection)).epoch, CHANNEL)
    assert not await one.look(101.0)
    await member("c").open(last=ELSEWHERE)
    assert await one.look(101.0 + 2 * GRACE_S)


async def test_nothing_is_claimed_or_marked_behind_a_barrier_and_verdicts_are_written(fleet, member):
    await fleet.put_emails(3)
    one = await member("a").open()
    relay, connection = one.session.relay, one.session.connection
    first = await tick(connection, relay, TickRequest(claims_max=2, epoch=0))
    marked = await tick(connection, relay, TickRequest(marks=[first.claims[0].email], epoch=0))
    assert len(marked.marked) == 1
    await fleet.put_emails(2, first=4)
    await fleet.connection.execute("UPDATE outbox.delivery SET priority = 1 WHERE email = 4")
    await fleet.connection.execute("UPDATE outbox.delivery SET orphaned = 3 WHERE email = 5")
    await (member("b")).open(last=ELSEWHERE)
    (email, attempt), *_ = marked.marked.items()
    settlement = Settlement(relay, email, "mail1", attempt, marked=True, outcome=SENT)
    done = await tick(
        connection,
        relay,
        TickRequest(settlements=[settlement], marks=[first.claims[1].email], claims_max=5, suspects_max=1, epoch=0),
    )
    assert (done.is_open, done.marked, done.claims) == (False, {}, [])
    assert done.settled == {(email, attempt)}
    found = await claim_one(connection, relay, 3, budget=100, bytes_max=1000, epoch=0)
    assert found.claims == []
    row = await failover_barrier.read(fleet.connection)
    assert not (await tick(connection, relay, TickRequest(claims_max=5, epoch=row.epoch))).is_open, (
        "to know it is not enough"
    )
    await failover_barrier.lift(fleet.connection, row.epoch, CHANNEL)
    still = await tick(connection, relay, TickRequest(marks=[first.claims[1].email], claims_max=5, epoch=0))
    assert not still.is_open, "what was claimed before it was raised is not marked after it is lifted"
    done = await tick(connection, relay, TickRequest(claims_max=5, suspects_max=1, epoch=row.epoch))
    assert done.is_open
    assert {claim.email for claim in done.claims} == {3, 4, 5}, "an ordinary, an urgent and a suspect one"


async def test_a_barrier_whose_row_is_gone_is_made_anew_and_until_then_lifted(fleet, member):
    await fleet.put_emails(1)
    await fleet.connection.execute("DELETE FROM outbox.failover")
    one = await member("a").open()
    assert len((await tick(one.session.connection, one.session.relay, TickRequest(claims_max=1, epoch=0))).claims) == 1
    await member("b").open(last=ELSEWHERE)
    assert not (await tick(one.session.connection, one.session.relay, TickRequest(epoch=0))).is_open


async def test_the_row_refuses_a_second_one(connection):
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute("INSERT INTO outbox.failover DEFAULT VALUES")


async def test_a_relay_that_registers_is_heard_of_by_the_others(member):
    from tests.support.fleet import until

    one = await member("a").open()
    await member("b").open()
    await until(lambda: failover_rules.JOINED + "b" * 32 in one.heard, "it is heard of")


async def test_after_a_gap_one_that_lived_when_it_began_is_waited_for_though_a_sweep_has_ended_it(connection, member):
    """The sweep was under way when the server froze, and ended the other's session once the server went on."""
    one = await member("a").open()
    other = await member("b").open()
    one.presence.see(["b" * 32], boot_clock_s())
    other.session.connection.terminate()
    await connection.execute("UPDATE outbox.relay SET ended_at = now() WHERE instance = $1", "b" * 32)
    await one.open(last=one.session.server, silent_s=6)
    assert one.session.barrier.awaited == {"a" * 32, "b" * 32}


async def test_one_that_registered_here_is_waited_for_on_the_old_server_though_no_sweep_has_seen_it(member):
    """The barrier stood until the connection was cut, and relays do not sweep behind it."""
    await member("b").open()
    one = await member("a").open(last=ELSEWHERE)
    standing = one.presence.standing(one.session.server, grace_s=GRACE_S)
    assert failover_rules.awaited_by(Kind.MOVE, failover_rules.Here((0, None)), standing) == {"a" * 32, "b" * 32}


async def test_what_was_told_before_the_row_was_deleted_lifts_no_barrier_of_the_new_row(connection, member):
    other = await member("b").open()
    await member("a").open(last=ELSEWHERE)
    await other.look()
    await connection.execute("DELETE FROM outbox.failover")
    await member("c").open(last=ELSEWHERE)
    row = await failover_barrier.read(connection)
    assert "b" * 32 in row.awaited
    assert await connection.fetch(failover_barrier.TOLD, row.epoch) == []


@pytest.mark.parametrize("last", [None, 7], ids=["a first session", "a session before"])
async def test_what_is_asked_of_all_relays_that_ever_were_goes_by_index(connection, last):
    await connection.execute(
        "INSERT INTO outbox.relay (host, pid, backend_pid, version, timeline, ended_at, told_epoch)"
        " SELECT 'h', 1, 1, 'v', 1, now(), CASE WHEN n % 10 = 0 THEN n END FROM generate_series(1, 20000) n"
    )
    await connection.execute("ANALYZE outbox.relay")
    for name, value in PLANS.items():
        await connection.execute(f"SET {name} = {value}")
    for statement, arguments in {
        failover_barrier.TOLD: "3",
        failover_barrier.LAST_TOLD: None,
        failover_barrier.HISTORY: f"{last or 'NULL'}, 'a', 1, 20001",
    }.items():
        await connection.execute(f"PREPARE asked AS {statement}")
        plan = await connection.fetch(f"EXPLAIN EXECUTE asked{f'({arguments})' if arguments else ''}")
        await connection.execute("DEALLOCATE asked")
        assert not [line for (line,) in plan if "Seq Scan" in line], plan
