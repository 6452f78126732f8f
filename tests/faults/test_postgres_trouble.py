"""Postgres ends sessions, restarts, crashes and stays away while mail flows; and the network swallows its answers."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Self
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from outbox.sandbox.postgres import Server, StopMode, postgres
from outbox.sandbox.smtp_sink import Accept, Hold, Reply, Stage, Stall, Trickle
from outbox.testing.postgres import FAST
from tests.conftest import _make_template
from tests.support.fault_levers import (
    SLOW,
    At,
    all_sent,
    balance,
    delivery,
    in_state,
    mark_held,
    post,
    terminate_session,
    trail,
)
from tests.support.fleet import Fleet, until

_numbers = itertools.count(1)


async def test_a_relay_whose_session_is_ended_while_idle_goes_on_as_another(fleet):
    await fleet.put_emails(3)
    relay = await fleet.relay()
    await all_sent(fleet, 3)
    await terminate_session(fleet)
    await relay.says("lost its session")
    await post(fleet, 3, first=4)
    await all_sent(fleet, 6)
    assert relay.process.returncode is None
    by_relay = await fleet.connection.fetch("SELECT relay, count(*) FROM outbox.attempt GROUP BY relay ORDER BY relay")
    assert [tuple(row) for row in by_relay] == [(1, 3), (2, 3)]
    await balance(fleet, 6)


@pytest.mark.parametrize("judged_first", [True, False], ids=["in doubt by then", "at once"])
@pytest.mark.parametrize(
    "reply, verdict, state",
    [(None, "accepted", "sent"), ("451 4.0.0 later", "deferred", "sent"), ("554 5.0.0 never", "refused", "dead")],
    ids=["250", "451", "554"],
)
async def test_a_reply_that_comes_after_the_session_is_settled_through_the_next(
    fleet, reply: str | None, verdict: str, state: str, judged_first: bool
):
    answer = asyncio.Event()
    fleet.sink.script = script = At(Stage.DOT, Hold(answer, Reply(reply) if reply else None), times=1)
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await script.reached()
    await in_state(fleet, "sending")
    await terminate_session(fleet)
    await relay.says("lost its session")
    if judged_first:
        await in_state(fleet, "in_doubt")
    answer.set()
    await in_state(fleet, state)
    assert len(fleet.sink.accepted) == (state == "sent")
    told = [told for told in await trail(fleet) if told != "in_doubt"]
    assert told == ([verdict, "accepted"] if verdict == "deferred" else [verdict])
    assert relay.process.returncode is None


async def test_a_session_that_ends_while_the_mark_waits_costs_nothing(fleet):
    async with mark_held(fleet) as (relay, holder):
        await terminate_session(fleet)
        await relay.says("lost its session")
        assert fleet.sink.messages == 0
        await holder.close()
    await all_sent(fleet, 1)
    assert len(fleet.sink.accepted) == 1
    assert (await delivery(fleet))["tries"] == 1
    assert (await trail(fleet))[-1] == "accepted"
    assert relay.process.returncode is None


CHANGES = {
    "cancelled": ("state = 'cancelled', settled_at = now(), relay = NULL", {"cancelled": 1}, 0),
    "given to nobody": ("relay = NULL", {"sent": 1}, 1),
    "put off": ("relay = NULL, due_at = now() + interval '1 second'", {"sent": 1}, 1),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_delivery_that_somebody_takes_away_while_the_mark_waits_is_not_sent_by_it(fleet, change: str):
    assignments, states, accepted = CHANGES[change]
    async with mark_held(fleet) as (relay, holder):
        await holder.execute(f"UPDATE outbox.delivery SET {assignments}")
        await holder.execute("COMMIT")
        await relay.says("it was not sent")
    assert await fleet.settled() == states
    assert len(fleet.sink.accepted) == accepted
    assert (await delivery(fleet))["attempt"] == accepted
    await fleet.put_emails(5, first=2)
    assert (await fleet.settled())["sent"] == 5 + accepted
    assert fleet.twice == {}


class Wire:
    """The network between one relay and Postgres: each direction can be lost, as bytes into nowhere, and all cut.

    Without `ends` a connection's last words arrive, and its end does not.
    """

    def __init__(self, database: str) -> None:
        url = urlsplit(database)
        where = parse_qs(url.query)
        self.socket = f"{where['host'][0]}/.s.PGSQL.{where['port'][0]}"
        self.path = url.path
        self.requests = self.answers = self.ends = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        self.cut()
        await asyncio.gather(*self._pumps)

    @property
    def environment(self) -> dict[str, str]:
        port = self.server.sockets[0].getsockname()[1]
        return {"OUTBOX_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{port}{self.path}"}

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self.socket)
        self._writers |= {writer, far_writer}
        for pumping in (
            self._pump(reader, far_writer, lambda: self.requests),
            self._pump(far_reader, writer, lambda: self.answers),
        ):
            pump = asyncio.create_task(pumping)
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, carries: Callable[[], bool]
    ) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                if carries():
                    target.write(data)
        if carries() and self.ends:
            target.close()


async def test_a_mark_whose_commit_is_not_confirmed_is_not_sent_but_taken_back(fleet):
    async with Wire(fleet.database) as wire:
        async with mark_held(fleet, environment=wire.environment) as (relay, holder):
            wire.answers = False
            await holder.close()
            await in_state(fleet, "sending")
        wire.cut()
        wire.answers = True
        await relay.says("its mark was not confirmed")
        assert fleet.sink.messages == 0
        await all_sent(fleet, 1)
        row = await delivery(fleet)
        assert (row["attempt"], row["tries"]) == (2, 1)
        assert (await trail(fleet))[-2:] == ["withdrawn", "accepted"]
        await balance(fleet, 1)
        relay.send(signal.SIGTERM)
        assert (await relay.ended()).code == 0


async def test_a_farewell_of_postgres_is_enough_to_lose_a_session(fleet):
    """The FATAL message is there before the end of the connection, and a statement may fall in between."""
    fleet.top = SLOW
    async with Wire(fleet.database) as wire:
        relay = await fleet.relay(environment=wire.environment)
        await post(fleet, 1)
        await all_sent(fleet, 1)  # by now it rests most of the time, so the farewell meets no statement under way
        wire.ends = False
        await terminate_session(fleet)
        await relay.says("lost its session")
        wire.ends = True
        await post(fleet, 3, first=2)
        await all_sent(fleet, 4)
        assert relay.process.returncode is None
        relay.send(signal.SIGTERM)
        assert (await relay.ended()).code == 0


async def test_a_relay_cut_off_from_postgres_does_not_send_and_another_takes_over(fleet):
    fleet.top = SLOW
    go_ahead = asyncio.Event()
    fleet.sink.script = script = At(Stage.DATA, Hold(go_ahead), times=1)
    await fleet.put_emails(1)
    async with Wire(fleet.database) as wire:
        cut_off = await fleet.relay(environment=wire.environment)
        await script.reached()
        wire.requests = wire.answers = False
        go_ahead.set()  # it writes the content and asks for a mark that will not come
        await fleet.relay()
        await all_sent(fleet, 1)
        assert await trail(fleet) == ["accepted"]
        assert (await delivery(fleet))["relay"] == 2
        await cut_off.says("did not answer within 2 s")
        wire.requests = wire.answers = True
        wire.cut()  # what was said into the silence is lost
        await until(lambda: sum("holds its lock" in line for line in cut_off.log) == 2, "it is back as another")
        await balance(fleet, 1)
        cut_off.send(signal.SIGTERM)
        assert (await cut_off.ended()).code == 0


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A Postgres that these tests may stop."""
    with postgres(settings=FAST) as server:
        asyncio.run(_make_template(server))
        yield server


@pytest.fixture
async def company(own_server, sink, forks, tmp_path) -> AsyncIterator[Fleet]:
    """A fleet on that Postgres."""
    admin = await asyncpg.connect(own_server.url)
    name = f"own_{next(_numbers)}"
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
    await admin.close()
    url = own_server.database_url(name)
    fleet = Fleet(url, await asyncpg.connect(url), sink, tmp_path, forks=forks)
    yield fleet
    await fleet.stop_all()
    await fleet.connection.close()


async def start_again(company: Fleet, server: Server) -> None:
    server.start()  # in this thread: the kernel ends the server with the thread that started it
    company.connection.terminate()
    company.connection = await asyncpg.connect(company.database)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_restarts_of_postgres_while_mail_flows_cost_nothing(company, own_server, mode: StopMode):
    company.sink.script = At(Stage.DOT, Trickle(chunk=12, delay_s=0.1))
    await company.put_emails(600)
    relays = [await company.relay() for _ in range(2)]
    for enough in (100, 300):
        await until(lambda enough=enough: company.sink.messages >= enough, f"{enough} are accepted")
        await asyncio.to_thread(own_server.stop, mode)
        await start_again(company, own_server)
    assert company.sink.messages < 600
    await all_sent(company, 600)
    assert await balance(company, 600) == set()
    for relay in relays:
        assert sum("lost its session" in line for line in relay.log) >= 2
        assert relay.process.returncode is None


async def test_mail_flows_again_when_postgres_was_away_for_seconds(company, own_server):
    company.sink.script = At(Stage.DOT, Trickle(chunk=12, delay_s=0.1))
    await company.put_emails(300)
    relay = await company.relay()
    await until(lambda: company.sink.messages >= 100, "100 are accepted")
    await asyncio.to_thread(own_server.stop, "fast")
    await until(lambda: sum("no session yet" in line for line in relay.log) >= 7, "it has tried for seconds")
    await start_again(company, own_server)
    await all_sent(company, 300)
    assert await balance(company, 300) == set()
    assert relay.process.returncode is None


async def test_a_relay_that_starts_while_postgres_restarts_waits_for_it(company, own_server):
    await company.put_emails(3)
    own_server.stop("fast")
    relay = await company.start("relay")
    await relay.says("Trying again.")
    await start_again(company, own_server)
    await all_sent(company, 3)
    await balance(company, 3)


async def test_a_crash_of_postgres_and_a_kill_at_once_leave_doubt_and_nothing_twice(company, own_server):
    acts = itertools.cycle([None, Stall(), Accept(Stall())])
    company.sink.script = lambda stage, _: next(acts) if stage is Stage.DOT and len(company.sink.visits) <= 8 else None
    company.top = "connections_max = 8"
    await company.put_emails(100)
    relay = await company.relay()
    await until(lambda: len(company.sink.connections) == 8 == _at_the_dot(company), "eight wait for a reply")
    await asyncio.gather(relay.kill(), asyncio.to_thread(own_server.stop, "immediate"))
    await start_again(company, own_server)
    await company.relay()
    assert await company.settled() == {"sent": 92, "in_doubt": 8}
    await balance(company, 100)


def _at_the_dot(company: Fleet) -> int:
    last = {visit: stage for _, visit, stage in company.sink.events}
    return sum(stage is Stage.DOT for stage in last.values())
