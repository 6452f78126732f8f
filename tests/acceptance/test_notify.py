"""What systemd hears of a relay: ready, watchdog, stopping. The socket is a real one, the signals are real."""

import asyncio
import signal
import socket
import time

import pytest

from outbox.monitoring.health import Health
from outbox.monitoring.systemd import Notifier
from outbox.relay.supervisor import Relays
from outbox.settings import Settings
from tests.support.fleet import until

WATCHDOG_S = 0.6


class Manager:
    """A service manager: hears what it is told."""

    def __init__(self, listening, place):
        self.socket = listening
        self.socket.bind("\0" + place[1:] if place.startswith("@") else place)
        self.socket.setblocking(False)
        self.heard = []

    def hears(self, words):
        while True:
            try:
                self.heard.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return any(line.startswith(words) for line in self.heard)

    async def silence_s(self, at_most_s):
        """For how long it hears nothing, from now on, looked at for so long."""
        self.hears("")
        self.heard.clear()
        began_at = time.monotonic()
        while not self.hears("") and time.monotonic() - began_at < at_most_s:
            await asyncio.sleep(0.02)
        return time.monotonic() - began_at


@pytest.fixture
def listening():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        yield made


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_systemd_hears_when_it_is_ready_makes_progress_and_stops(fleet, tmp_path, listening, kind):
    place = f"@outbox-{tmp_path.name}-{time.time_ns()}" if kind == "abstract" else str(tmp_path / "notify")
    manager = Manager(listening, place)
    environment = {"NOTIFY_SOCKET": place, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    relay = await fleet.relay(environment=environment)
    await until(lambda: manager.hears("READY=1"), "it is ready")
    await until(lambda: manager.hears("STATUS=relaying"), "it says how it goes")
    assert await manager.silence_s(WATCHDOG_S) < WATCHDOG_S
    assert manager.heard == ["WATCHDOG=1"]
    relay.send(signal.SIGSTOP)
    await manager.silence_s(0.05)  # what was under way
    assert await manager.silence_s(2 * WATCHDOG_S) >= 2 * WATCHDOG_S, "who is stopped does not ping"
    relay.send(signal.SIGCONT)
    await until(lambda: manager.hears("WATCHDOG=1"), "who goes on does")
    relay.send(signal.SIGTERM)
    assert (await relay.ended()).code == 0
    assert manager.hears("STOPPING=1")
    assert manager.heard.count("READY=1") <= 1


async def test_a_relay_whose_corridor_hangs_does_not_ping_though_its_loop_turns(tmp_path, listening):
    place = str(tmp_path / "notify")
    manager = Manager(listening, place)
    settings = {"database_url": "postgresql://nobody@127.0.0.1:1/none", "smtp_url": "smtp://127.0.0.1:1"}
    relays = Relays(Settings.model_validate(settings))
    (relay,) = relays.each
    relay.sessions.turned_at -= 41  # more than four leases ago
    notifier = Notifier({"NOTIFY_SOCKET": place, "WATCHDOG_USEC": "90000"})
    watching = asyncio.create_task(Health(relays, notifier).watch())
    await until(lambda: manager.hears("STATUS=it holds no session"), "it looks at the relay")
    assert await manager.silence_s(0.3) >= 0.3
    relay.sessions.turned_at = time.monotonic()
    await until(lambda: manager.hears("WATCHDOG=1"), "it pings")
    watching.cancel()
    notifier.close()


async def test_a_manager_that_does_not_listen_or_watches_another_is_no_trouble(fleet, tmp_path):
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "10", "WATCHDOG_PID": "1"}
    ended = await fleet.run("relay", "--until-empty", environment=environment)
    assert ended.code == 0
    assert ended.err.count("notify_failed") == 1
