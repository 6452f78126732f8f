"""The network between a relay or a generate and Postgres, and between a relay and SMTP: cut, lost, slow, at every step.

A fault falls behind the k-th byte of a connection, in one direction. The k's come from an undisturbed run: the end of
each portion that went that way, and its middle. Each fault has a database and a mail server of its own.
"""

import asyncio
import itertools
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import asyncpg
import pytest
import uvloop

from bench.harness.fault_proxy import Link, Proxy
from outbox.database import failover_barrier
from outbox.database import opening as database
from outbox.errors import DatabaseUnavailableError
from outbox.generate import run as rooms
from outbox.relay.relay import Relay
from outbox.sandbox.smtp_sink import Hold, Sink, Stage
from outbox.settings import Settings, load
from tests.support.fault_levers import (
    SLOW,
    At,
    all_sent,
    balance,
    by_port,
    delivery,
    post,
    socket_of,
    terminate_session,
    trail,
)
from tests.support.fleet import Fleet, Process, until

_numbers = itertools.count(1)

AT_ONCE = 10  # worlds of a grid
SESSION = 3  # a relay's first two connections prove that locks hold, the third is its session

KEEPALIVE_S = 3.0  # longer than a lease

FAULTS: dict[str, Callable[[Link], object]] = {
    "cut": Link.cut,
    "reset": lambda link: link.cut(reset=True),
    # The direction is dead from there on. In the end the server's kernel gives up; the client is never told.
    "lost": lambda link: asyncio.get_running_loop().call_later(KEEPALIVE_S, link.vanish),
}
# A cut tells most; the others go with `-m slow`.
faults = pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault == "cut" else pytest.mark.slow) for fault in FAULTS]
)
directions = pytest.mark.parametrize("direction", ["up", "down"])


@dataclass
class World:
    """A database with its mail server; ways through a proxy to one of the two are laid anew for each fault."""

    fleet: Fleet
    mails: int = 0

    def settings(self, **changes: str) -> Settings:
        return load(self.fleet.write_settings(), {f"OUTBOX_{key.upper()}": value for key, value in changes.items()})

    async def relay_one_mail(self, **changes: str) -> None:
        """One more mail, and a relay in this process that ends when it is sent or in doubt."""
        self.mails += 1
        await self.fleet.put_emails(1, first=self.mails)
        await self.relay_again(**changes)

    async def relay_again(self, **changes: str) -> None:
        async with asyncio.timeout(20):
            await Relay(self.settings(**changes), until_empty=True).run()


@pytest.fixture
def worlds(postgres_server, forks, tmp_path):
    """Makes worlds: `async with worlds(pipelining=…) as world`."""

    @asynccontextmanager
    async def make(*, pipelining: bool = True) -> AsyncIterator[World]:
        name = f"network_{next(_numbers)}"
        (directory := tmp_path / name).mkdir()
        url = postgres_server.database_url(name)
        async with AsyncExitStack() as stack:
            admin = await asyncpg.connect(postgres_server.url)
            stack.callback(admin.terminate)
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
            connection = await asyncpg.connect(url)
            stack.callback(connection.terminate)
            sink = await stack.enter_async_context(Sink(pipelining=pipelining))
            yield World(Fleet(url, connection, sink, directory, top=SLOW, forks=forks))
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    return make


@dataclass
class Steps:
    """How far a connection had come with each portion that it carried."""

    number: int
    counts: set[tuple[int, int]] = field(default_factory=set)

    def __call__(self, link: Link) -> None:
        if link.number == self.number:
            self.counts.add((link.up, link.down))

    def grid(self, direction: str) -> list[int]:
        """The end of each portion of that direction, and its middle."""
        ends = sorted({up if direction == "up" else down for up, down in self.counts} | {0})
        middles = [(a + b) // 2 for a, b in itertools.pairwise(ends)]
        return sorted({*ends, *middles})


def thinned(grid: list[int], fault: str) -> list[int]:
    """A part of the grid, another one for each fault; all of it where NETWORK_GRID=all (minutes)."""
    assert len(grid) >= 8
    least = {"cut": 2, "reset": 4, "lost": 5}[fault]
    stride = max(least, len(grid) // 24)
    return grid if os.environ.get("NETWORK_GRID") == "all" else grid[stride - 1 :: stride]


def fail_once(proxy: Proxy, fault: str, direction: str, k: int, *, number: int) -> list[Link]:
    """Let connection `number` fail behind its k-th byte; what comes after it works. Gives the links that failed."""
    failed: list[Link] = []

    def at_limit(link: Link) -> None:
        failed.append(link)
        proxy.heal()
        FAULTS[fault](link)

    proxy.limited_from, proxy.at_limit = number, at_limit
    if direction == "up":
        proxy.up_max = k
    else:
        proxy.down_max = k
    return failed


async def each(
    ks: Sequence[int],
    law: Callable[[World, int], Awaitable[bool]],
    make: Callable[[], AbstractAsyncContextManager[World]],
) -> int:
    """The law for every k, in several worlds at once; gives in how many cases the fault did happen."""
    ahead = iter(ks)

    async def work() -> int:
        happened = 0
        async with make() as world:
            for k in ahead:
                try:
                    happened += await law(world, k)
                except BaseException as error:
                    error.add_note(f"the fault fell behind byte {k} of {ks}")
                    raise
        return happened

    async with asyncio.TaskGroup() as group:
        working = [group.create_task(work()) for _ in range(min(AT_ONCE, len(ks)))]
    return sum(task.result() for task in working)


# ── a relay and Postgres ─────────────────────────────────────────────────────────────────────────────────────────────


def to_postgres(world: World, proxy: Proxy) -> dict[str, str]:
    return {"database_url": by_port(world.fleet.database, proxy.port)}


@faults
@directions
@pytest.mark.parametrize("number", [1, SESSION], ids=["a proof of locks", "the session"])
async def test_a_network_to_postgres_that_fails_at_any_byte_sends_each_mail_once(worlds, fault, direction, number):
    async with worlds() as world, Proxy(socket_of(world.fleet.database)) as proxy:
        proxy.on_portion = steps = Steps(number)
        await world.relay_one_mail(**to_postgres(world, proxy))
    grid = thinned(steps.grid(direction), fault)

    async def law(world: World, k: int) -> bool:
        async with Proxy(socket_of(world.fleet.database)) as proxy:
            failed = fail_once(proxy, fault, direction, k, number=number)
            try:
                await world.relay_one_mail(**to_postgres(world, proxy))
            except DatabaseUnavailableError:
                # A start into a silent network is given up after a lease, in one sentence; its supervisor's next works.
                assert fault == "lost"
                assert world.fleet.sink.messages == world.mails - 1
                await world.relay_again(**to_postgres(world, proxy))
            assert await world.fleet.states() == {"sent": world.mails}
            assert await balance(world.fleet, world.mails) == set()
            return bool(failed)

    happened = await each(grid, law, worlds)
    assert happened >= len(grid) * 2 / 3, "the faults must happen"


async def test_a_relay_whose_next_session_opens_into_silence_opens_another(fleet):
    """The answer to its registration is lost, with the end of that connection: a cancel alone would wait for ever."""
    fleet.top = SLOW
    async with Proxy(socket_of(fleet.database)) as proxy:
        relay = await fleet.relay(environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        holder = await asyncpg.connect(fleet.database)
        await holder.execute("BEGIN; LOCK TABLE outbox.relay IN SHARE MODE")
        await terminate_session(fleet)
        await until(lambda: waits(fleet, "outbox relay"), "its registration waits")
        proxy.at_limit = lambda _: proxy.heal()
        proxy.down_max = 0
        await holder.close()
        await post(fleet, 1)
        await all_sent(fleet, 1)
        await relay.says("no session yet")
        assert relay.process.returncode is None


async def waits(fleet: Fleet, application: str) -> bool:
    return bool(
        await fleet.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
            " AND datname = current_database() AND wait_event_type = 'Lock'",
            application,
        )
    )


async def identities(fleet: Fleet) -> int:
    return int(await fleet.connection.fetchval("SELECT count(*) FROM outbox.relay"))


async def test_a_relay_that_never_hears_from_postgres_again_leaves_its_mail_to_another_and_can_be_stopped(fleet):
    fleet.top = SLOW + "\nconnections_max = 1\ndrain_s = 5"  # for news that it cannot bring any more
    go_ahead = asyncio.Event()
    fleet.sink.script = script = At(Stage.DATA, Hold(go_ahead), times=1)
    await fleet.put_emails(20)
    async with Proxy(socket_of(fleet.database)) as proxy:
        cut_off = await fleet.relay(environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        await script.reached()
        pulse = asyncio.Event()
        proxy.on_portion = lambda _: pulse.set()
        await pulse.wait()
        await asyncio.sleep(0.1)  # nothing is on its way then, and the next that is will be the mark
        proxy.black_hole = True
        go_ahead.set()
        await fleet.relay()
        await all_sent(fleet, 20)
        await cut_off.says("did not answer within 2 s")
        await cut_off.says("no session yet")
        assert cut_off.process.returncode is None
        cut_off.send(signal.SIGTERM)
        ended = await cut_off.ended()
        assert ended.code == 1, ended.err
        assert "mail1" in ended.err, "what it could not tell is named"
    await balance(fleet, 20)


async def test_a_slow_network_to_postgres_makes_mail_late_and_nothing_else(fleet):
    fleet.top = "connections_max = 4"
    async with Proxy(socket_of(fleet.database), delay_s=0.05) as proxy:
        relay = await fleet.relay(environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        await post(fleet, 40)
        await all_sent(fleet, 40)
        assert await balance(fleet, 40) == set()
        assert await identities(fleet) == 1
        relay.send(signal.SIGTERM)
        assert (await relay.ended()).code == 0


async def test_a_mark_that_is_confirmed_later_than_the_guard_allows_is_not_sent(fleet):
    fleet.top = "lease_s = 4\nguard_s = 0.5"
    async with Proxy(socket_of(fleet.database)) as proxy:
        relay = await fleet.relay(environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        proxy.delay_s = 0.4  # there and back again
        await post(fleet, 1)
        await relay.says("the guard stopped it")
        assert fleet.sink.messages == 0
        proxy.heal()
        await all_sent(fleet, 1)
        assert {*await trail(fleet)} == {"withdrawn", "accepted"}
        assert (await delivery(fleet))["tries"] == 1
        assert await identities(fleet) == 1
    assert fleet.twice == {}


# ── a relay and SMTP ─────────────────────────────────────────────────────────────────────────────────────────────────

IMPATIENT = {"connections_max": "1", "connect_timeout_s": "1", "command_timeout_s": "1", "data_done_timeout_s": "1"}


def to_smtp(proxy: Proxy) -> dict[str, str]:
    return {"smtp_url": f"smtp://127.0.0.1:{proxy.port}", **IMPATIENT}


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@faults
@directions
async def test_a_network_to_smtp_that_fails_at_any_byte_leaves_doubt_only_behind_the_dot(
    worlds, fault, direction, pipelining
):
    make = partial(worlds, pipelining=pipelining)
    async with make() as world, Proxy(("127.0.0.1", world.fleet.sink.port)) as proxy:
        proxy.on_portion = steps = Steps(1)
        await world.relay_one_mail(**to_smtp(proxy))
    grid = steps.grid(direction)
    outcomes: dict[int, str] = {}

    async def law(world: World, k: int) -> bool:
        sink = world.fleet.sink
        async with Proxy(("127.0.0.1", sink.port)) as proxy:
            failed = fail_once(proxy, fault, direction, k, number=1)
            await world.relay_one_mail(**to_smtp(proxy))
        in_doubt = await balance(world.fleet, world.mails)
        address = f"p{world.mails}@example.com"
        outcomes[k] = "in doubt" if address in in_doubt else "sent"
        if outcomes[k] == "in doubt":
            assert failed, "doubt without a fault"
        return bool(failed)

    happened = await each(grid, law, make)
    assert happened >= len(grid) * 2 / 3, "the faults must happen"
    assert set(outcomes.values()) == {"sent", "in doubt"}


# ── a generate and Postgres ──────────────────────────────────────────────────────────────────────────────────────────

PEOPLE = 5


async def made(fleet: Fleet) -> tuple[int, int, int]:
    """Reports, emails and deliveries, each recipient of an edition once, whatever the unique keys say."""
    return tuple(
        await fleet.connection.fetchrow(
            "SELECT (SELECT count(DISTINCT (edition, recipient_key)) FROM outbox.report),"
            " (SELECT count(DISTINCT report) FROM outbox.email), (SELECT count(*) FROM outbox.delivery)"
        )
    )


async def generate_once(world: World, proxy: Proxy, period: str) -> bool:
    """Whether it says that all is made."""
    try:
        async with asyncio.timeout(20):
            result = await rooms.generate(world.settings(**to_postgres(world, proxy)), "progress", period_key=period)
    except DatabaseUnavailableError:
        return False
    assert result.failed == {}
    assert result.made + result.elsewhere == result.expected == PEOPLE
    return True


@faults
@directions
async def test_a_network_that_fails_at_any_byte_of_generate_leaves_each_report_once_and_a_true_exit(
    worlds, fault, direction
):
    async with worlds() as world, Proxy(socket_of(world.fleet.database)) as proxy:
        await world.fleet.hire(PEOPLE)
        proxy.on_portion = steps = Steps(1)
        assert await generate_once(world, proxy, "2026-W01")
    grid = thinned(steps.grid(direction), fault)

    async def law(world: World, k: int) -> bool:
        if world.mails == 0:
            await world.fleet.hire(PEOPLE)
        world.mails += PEOPLE
        period = f"2026-W{world.mails // PEOPLE:02}"
        async with Proxy(socket_of(world.fleet.database)) as proxy:
            failed = fail_once(proxy, fault, direction, k, number=1)
            if not await generate_once(world, proxy, period):
                assert fault == "lost", "a cut connection is replaced"
                assert await generate_once(world, proxy, period)
        assert await made(world.fleet) == (world.mails,) * 3
        return bool(failed)

    happened = await each(grid, law, worlds)
    assert happened >= len(grid) * 2 / 3, "the faults must happen"


# One person's query waits for a lock that the test holds.
WAITING_DATA = "select case when :key = '3' then pg_advisory_xact_lock_shared(7)::text end as waited"


@asynccontextmanager
async def query_under_way(fleet: Fleet, proxy: Proxy) -> AsyncIterator[tuple[Process, asyncpg.Connection]]:
    """A generate behind the proxy stands in a user's query, until the session that comes with it is closed."""
    fleet.top, fleet.data = SLOW, WAITING_DATA
    await fleet.hire(PEOPLE)
    holder = await asyncpg.connect(fleet.database)
    try:
        await holder.execute("SELECT pg_advisory_lock(7)")
        cron = await fleet.start("generate", environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        await until(lambda: waits(fleet, "outbox generate"), "a query of the user's runs")
        yield cron, holder
    finally:
        await holder.close()


async def test_a_users_query_may_take_many_leases(fleet):
    async with Proxy(socket_of(fleet.database)) as proxy, query_under_way(fleet, proxy) as (cron, holder):
        await until(lambda: proxy.connections >= 5, "it has looked four times, a lease apart")
        await holder.close()
        ended = await cron.ended()
        assert (ended.code, ended.err) == (0, "")
        assert await made(fleet) == (PEOPLE,) * 3


async def test_a_generate_whose_query_has_no_answer_for_the_network_begins_again(fleet):
    """The proxy acknowledges every byte, so no keepalive notices; another connection shows that nobody is at work."""
    async with Proxy(socket_of(fleet.database)) as proxy, query_under_way(fleet, proxy) as (cron, holder):
        proxy.at_limit = lambda _: proxy.heal()
        proxy.down_max = 0
        await holder.close()
        ended = await cron.ended()
        assert ended.code == 0
        (sentence,) = ended.sentences
        assert "a query has no answer, and Postgres does not work on it" in sentence
        assert await made(fleet) == (PEOPLE,) * 3


async def test_a_generate_that_never_hears_from_postgres_again_ends_with_one_sentence(fleet, monkeypatch):
    monkeypatch.setattr(rooms, "PATIENCE_S", 1.0)
    fleet.top = SLOW
    await fleet.hire(PEOPLE)
    async with Proxy(socket_of(fleet.database)) as proxy:
        reached: list[None] = []

        def silence(_: object) -> None:
            reached.append(None)
            proxy.black_hole = True

        settings = load(fleet.write_settings(), {"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        async with asyncio.timeout(20):
            with pytest.raises(DatabaseUnavailableError, match=r"Postgres at .* (was lost|does not answer) \("):
                await rooms.generate(settings, "progress", progress=silence)
        assert reached
        assert (await fleet.run("generate")).code == 0
        assert await made(fleet) == (PEOPLE,) * 3


async def test_a_generate_whose_network_heals_after_some_leases_finishes(fleet):
    fleet.top = SLOW
    fleet.data = "select pg_sleep(0.02) is null as slept, :key as person"
    await fleet.hire(60)
    async with Proxy(socket_of(fleet.database)) as proxy:
        cron = await fleet.start("generate", environment={"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})

        async def begun() -> bool:
            return (await made(fleet))[0] > 0

        await until(begun, "it has made some reports")
        proxy.black_hole = True
        await cron.says("was lost")
        proxy.heal()
        ended = await cron.ended()
        assert ended.code == 0, ended
        assert "0 failed, of 60 recipients." in ended.out
        assert await made(fleet) == (60,) * 3


def test_the_kernel_is_asked_to_probe_the_server():
    """Both loops; where this platform has the option at all."""
    listener = socket.create_server(("127.0.0.1", 0))
    for new_loop in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(probed(listener.getsockname()[1])) == (1, 3, 1, 3, 5000)
    listener.close()


async def probed(port: int) -> tuple[int, ...]:
    """The options of a connection's socket, as `connect` leaves them."""
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port)
    try:
        database._watch_peer(SimpleNamespace(_transport=transport))
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as found:
            return (
                found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                *(found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in database._PEER_WATCH),
            )
    finally:
        transport.abort()


async def test_a_generate_to_which_postgres_falls_silent_at_the_barrier_ends(fleet, monkeypatch):
    monkeypatch.setattr(rooms, "PATIENCE_S", 1.0)
    fleet.top = SLOW
    await fleet.hire(3)
    async with Proxy(socket_of(fleet.database)) as proxy:
        ask = failover_barrier.holds_generate

        async def ask_in_silence(connection):
            proxy.black_hole = True
            return await ask(connection)

        monkeypatch.setattr(failover_barrier, "holds_generate", ask_in_silence)
        settings = load(fleet.write_settings(), {"OUTBOX_DATABASE_URL": by_port(fleet.database, proxy.port)})
        running = asyncio.create_task(rooms.generate(settings, "progress"))
        await asyncio.wait([running], timeout=20)
        ended = running.done()
        proxy.cut(reset=True)  # else not even its cancellation would end
        await asyncio.gather(running, return_exceptions=True)
        assert ended
        assert isinstance(running.exception(), DatabaseUnavailableError)
