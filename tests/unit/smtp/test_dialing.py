"""Which of a host's addresses is asked when, and which of them is used."""

import asyncio
import socket

import pytest

from outbox.smtp import dialing
from outbox.smtp.dialing import AllFailedError, Endpoint, connect_to, race, resolve

ONE, TWO, THREE = (Endpoint(socket.AF_INET, (f"192.0.2.{number}", 25)) for number in (1, 2, 3))


async def silent(_):
    await asyncio.Event().wait()


class Hosts:
    """What each endpoint does when it is asked."""

    def __init__(self, **does):
        self.does = does
        self.asked = []
        self.discarded = []

    async def __call__(self, attempt):
        name = str(attempt.endpoint).rpartition(".")[2]
        self.asked.append(name)
        return await self.does[f"host{name}"](attempt) or name

    async def race(self, *endpoints, within_s=2.0):
        return await race(endpoints, self, within_s=within_s, discard=self.discarded.append)


async def works(_):
    pass


async def refuses(attempt):
    raise ConnectionRefusedError(f"{attempt.endpoint} refuses")


async def takes_it_and_says_nothing(attempt):
    attempt.is_connected()
    await asyncio.Event().wait()


async def test_the_first_address_that_works_is_used_and_no_other_is_asked():
    hosts = Hosts(host1=works, host2=works)
    won = await hosts.race(ONE, TWO)
    assert (won.result, won.endpoint, won.passed, hosts.asked) == ("1", ONE, [], ["1"])


async def test_after_a_refusal_the_next_address_is_asked_at_once(monkeypatch):
    monkeypatch.setattr(dialing, "STAGGER_S", 60)
    hosts = Hosts(host1=refuses, host2=refuses, host3=works)
    won = await hosts.race(ONE, TWO, THREE, within_s=600)
    assert (won.endpoint, won.passed) == (THREE, [ONE, TWO])


async def test_an_address_that_goes_nowhere_does_not_keep_the_others_waiting():
    hosts = Hosts(host1=silent, host2=works)
    won = await hosts.race(ONE, TWO, within_s=60)
    assert (won.endpoint, won.passed, hosts.asked) == (TWO, [ONE], ["1", "2"])


async def test_an_address_that_takes_the_connection_gets_its_time_and_is_then_passed(monkeypatch):
    monkeypatch.setattr(dialing, "STAGGER_S", 0)
    monkeypatch.setattr(dialing, "SPEECH_S", 0.05)
    hosts = Hosts(host1=takes_it_and_says_nothing, host2=works)
    assert (await hosts.race(ONE, TWO, within_s=60)).endpoint == TWO


async def test_every_address_is_asked_before_the_time_is_over_and_each_has_its_share():
    hosts = Hosts(host1=takes_it_and_says_nothing, host2=takes_it_and_says_nothing, host3=refuses)
    with pytest.raises(AllFailedError) as failed:
        await hosts.race(ONE, TWO, THREE, within_s=0.3)
    assert hosts.asked == ["1", "2", "3"]
    assert [endpoint for endpoint, _ in failed.value.failures] == [ONE, TWO, THREE]
    assert [type(error) for _, error in failed.value.failures] == [TimeoutError, TimeoutError, ConnectionRefusedError]


async def test_a_slow_address_may_still_win_and_what_comes_out_of_both_is_closed():
    go_on = asyncio.Event()

    async def slow(_):
        await go_on.wait()

    async def slower(_):
        go_on.set()
        await asyncio.Event().wait()

    hosts = Hosts(host1=slow, host2=slower)
    assert (await hosts.race(ONE, TWO, within_s=60)).endpoint == ONE

    async def late(_):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return  # the connection stood in the moment in which it was no longer wanted

    hosts = Hosts(host1=late, host2=works)
    assert (await hosts.race(ONE, TWO, within_s=60)).endpoint == TWO
    assert hosts.discarded == ["1"]


async def test_families_take_turns(monkeypatch):
    infos = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 25, 0, 0)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::2", 25, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 25)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 25)),
    ]

    async def getaddrinfo(*_, **__):
        return infos

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert list(map(str, await resolve("mx", 25))) == ["[2001:db8::1]", "192.0.2.1", "[2001:db8::2]"]


async def test_a_real_connection_stands_or_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (endpoint,) = await resolve("127.0.0.1", listener.getsockname()[1])
        (await connect_to(endpoint)).close()
    with pytest.raises(ConnectionRefusedError):
        await connect_to(endpoint)
