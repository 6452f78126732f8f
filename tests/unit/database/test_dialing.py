import asyncio
import socket
import threading
import time

import asyncpg
import pytest

from outbox.database import dialing
from outbox.database.dialing import Dial, NoHostError, SilenceError, addresses_of
from outbox.settings.postgres_hosts import plan_of


@pytest.fixture(autouse=True)
def nothing_was_silent():
    dialing._silent.clear()


class Servers:
    """What hosts do when they are asked: an exception, a result, or silence. Keeps who was asked, and when."""

    def __init__(self, **does):
        self.does = does
        self.asked = []
        self.discarded = []
        self.ended = []

    async def open(self, host, _address, _attrs):
        self.asked.append(host.name)
        does = self.does[host.name]
        try:
            if does is None:
                await asyncio.Event().wait()
            if isinstance(does, float):
                await asyncio.sleep(does)
        finally:
            self.ended.append(host.name)
        if isinstance(does, Exception):
            raise does
        return host.name

    async def dial(self, dsn, timeout_s=5.0):
        return await Dial(
            plan_of(dsn, {}), self.open, discard=self.discarded.append,
            is_definite=lambda error: isinstance(error, asyncpg.InvalidPasswordError), timeout_s=timeout_s,
        ).run()  # fmt: skip


def sockets(*names, **parameters):
    """Sockets need no resolver: each host is its own address."""
    hosts = ",".join(names)
    return f"postgresql:///d?host={hosts}" + "".join(f"&{name}={value}" for name, value in parameters.items())


async def test_the_first_host_wins_if_it_answers():
    servers = Servers(**{"/a": "yes", "/b": "yes"})
    assert await servers.dial(sockets("/a", "/b")) == "/a"
    assert servers.asked == ["/a"]


async def test_a_host_that_refuses_gives_the_turn_to_the_next_at_once():
    servers = Servers(**{"/a": ConnectionRefusedError(111, "refused"), "/b": "yes"})
    began = time.monotonic()
    assert await servers.dial(sockets("/a", "/b"), timeout_s=60.0) == "/b"
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("parameters", [{}, {"target_session_attrs": "read-write"}, {"connect_timeout": "1"}])
async def test_a_silent_first_host_does_not_use_up_the_time_of_the_second(parameters):
    servers = Servers(**{"/a": None, "/b": "yes"})
    began = time.monotonic()
    assert await servers.dial(sockets("/a", "/b", **parameters), timeout_s=60.0) == "/b"
    assert time.monotonic() - began < 5.0
    assert sorted(servers.ended) == ["/a", "/b"]


async def test_a_slow_first_host_is_preferred_to_a_quick_second_one():
    servers = Servers(**{"/a": 1.0, "/b": "yes"})
    assert await servers.dial(sockets("/a", "/b")) == "/a"


async def test_a_host_that_was_silent_is_asked_last_the_next_time_and_still_asked():
    servers = Servers(**{"/a": None, "/b": "yes"})
    await servers.dial(sockets("/a", "/b", target_session_attrs="read-write"))
    servers.asked.clear()
    assert await servers.dial(sockets("/a", "/b", target_session_attrs="read-write")) == "/b"
    assert servers.asked == ["/b"]
    servers.does = {"/a": "yes", "/b": ConnectionRefusedError(111, "refused")}
    assert await servers.dial(sockets("/a", "/b")) == "/a"
    servers.does["/b"] = "yes"
    assert await servers.dial(sockets("/a", "/b")) == "/a"


async def test_all_hosts_are_asked_before_no_answer_is_said_and_each_is_named():
    names = [f"/h{number}" for number in range(6)]
    servers = Servers(**dict.fromkeys(names))
    with pytest.raises(NoHostError) as caught:
        await servers.dial(sockets(*names), timeout_s=1.0)
    assert servers.asked == names
    assert [label for label, _ in caught.value.failures] == [f"{name}:5432" for name in names]
    assert all(isinstance(error, SilenceError) for _, error in caught.value.failures)
    assert sorted(servers.ended) == names


async def test_a_refused_login_is_reported_soon_although_another_host_is_silent():
    servers = Servers(**{"/a": asyncpg.InvalidPasswordError("no"), "/b": None})
    began = time.monotonic()
    with pytest.raises(NoHostError) as caught:
        await servers.dial(sockets("/a", "/b"), timeout_s=60.0)
    assert time.monotonic() - began < 10.0
    assert [type(error) for _, error in caught.value.failures] == [asyncpg.InvalidPasswordError, SilenceError]


async def test_a_standby_that_is_promoted_while_the_leader_is_silent_is_found_within_seconds():
    class Cluster(Servers):
        async def open(self, host, _address, _attrs):
            self.asked.append(host.name)
            if host.name == "/a":
                await asyncio.Event().wait()
            if self.asked.count("/b") < 3:
                raise asyncpg.exceptions.TargetServerAttributeNotMatched("a standby")
            return host.name

    servers = Cluster()
    began = time.monotonic()
    assert await servers.dial(sockets("/a", "/b", target_session_attrs="read-write"), timeout_s=60.0) == "/b"
    assert time.monotonic() - began < 10.0
    assert servers.asked == ["/a", "/b", "/b", "/b"]


async def test_where_all_servers_refuse_each_is_asked_once():
    refused = ConnectionRefusedError(111, "refused")
    servers = Servers(**{"/a": refused, "/b": refused})
    with pytest.raises(NoHostError):
        await servers.dial(sockets("/a", "/b"))
    assert servers.asked == ["/a", "/b"]


async def test_a_session_that_lost_is_ended():
    """Both answer in the same turn of the event loop: one is used, the other is not left open."""
    gate = asyncio.Event()

    class Together(Servers):
        async def open(self, host, _address, _attrs):
            self.asked.append(host.name)
            await gate.wait()
            return host.name

    servers = Together()
    running = asyncio.ensure_future(servers.dial(sockets("/a", "/b", target_session_attrs="read-write")))
    while len(servers.asked) < 2:
        await asyncio.sleep(0.01)
    gate.set()
    won = await running
    await asyncio.sleep(0)
    assert [won, *servers.discarded] in (["/a", "/b"], ["/b", "/a"])


async def test_prefer_standby_takes_what_there_is():
    class Cluster(Servers):
        async def open(self, host, _address, attrs):
            self.asked.append((host.name, attrs))
            if attrs == "standby" and host.name != self.does.get("standby"):
                raise asyncpg.exceptions.TargetServerAttributeNotMatched("no standby")
            return host.name

    dsn = sockets("/a", "/b", target_session_attrs="prefer-standby")
    assert await Cluster(standby="/b").dial(dsn) == "/b"
    assert await Cluster().dial(dsn) == "/a"


async def test_a_resolver_that_hangs_uses_up_no_other_hosts_time(monkeypatch):
    released = threading.Event()
    real = socket.getaddrinfo

    def hang(name, *rest, **options):
        if name == "hangs.example":
            released.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "again")
        return real(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    servers = Servers(**{"hangs.example": "yes", "127.0.0.1": "yes"})
    try:
        assert await servers.dial("postgresql://hangs.example,127.0.0.1/d?target_session_attrs=primary") == "127.0.0.1"
        with pytest.raises(NoHostError, match=r"resolver of hangs\.example: no answer within"):
            await servers.dial("postgresql://hangs.example/d", timeout_s=0.3)
    finally:
        released.set()


async def test_a_name_without_addresses_is_named():
    servers = Servers()
    with pytest.raises(NoHostError, match=r"resolver of no\.invalid"):
        await servers.dial("postgresql://no.invalid/d")


async def test_each_address_of_a_name_is_asked(monkeypatch):
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 5432, 0, 3)),
             (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 5432))]  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert await addresses_of("db", 5432) == ["fe80::1%3", "10.0.0.1"]
    asked = []

    async def opening(host, address, attrs):
        asked.append((host.name, address))
        if address.startswith("fe80"):
            await asyncio.Event().wait()
        return address

    dial = Dial(plan_of("postgresql://db/d", {}), opening, discard=print, is_definite=bool, timeout_s=20.0)
    assert await dial.run() == "10.0.0.1"
    assert asked == [("db", "fe80::1%3"), ("db", "10.0.0.1")]
