"""The relay's HTTP endpoints under clients that mean no good: real sockets, no relay, and a database that hangs."""

import contextlib
import re
import resource
import selectors
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from outbox.monitoring import endpoints, http_server
from outbox.monitoring.endpoints import Endpoints
from outbox.monitoring.fleet import FleetReader
from outbox.monitoring.health import Health
from outbox.monitoring.systemd import Notifier
from outbox.relay.supervisor import Relays
from outbox.settings import Settings
from tests.support.fleet import DEADLINE_S

QUICK_S = 1.5  # an orchestrator's probe waits a second or more


def health_of_a_relay():
    settings = Settings.model_validate(
        {"database_url": "postgresql://nobody@127.0.0.1:1/none", "smtp_url": "smtp://127.0.0.1:1"}
    )
    health = Health(Relays(settings), Notifier({}))
    health._beat_at = time.monotonic() + 3600
    return health


class _NoDatabase(FleetReader):
    def schema_fault(self):
        return None


@pytest.fixture(name="place")
def _place(request):
    """The endpoints' address; a parameter is what gives the metrics."""
    metrics = getattr(request, "param", None) or (lambda _accept: ("text/plain", b"outbox_build_info 1\n"))
    health = health_of_a_relay()
    with Endpoints("127.0.0.1:0") as opened:
        opened.serve(metrics, health, _NoDatabase(health.relays.database_url))
        host, port = opened.address.split(":")
        yield host, int(port)


def ask(place, sent=b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", timeout=QUICK_S, source=None):
    """All that is answered to these bytes, until the server closes."""
    with socket.create_connection(place, timeout, source_address=source and (source, 0)) as client:
        client.settimeout(timeout)
        client.sendall(sent)
        said = b""
        while piece := client.recv(65536):
            said += piece
        return said


def is_alive(place, **how):
    return ask(place, **how).startswith(b"HTTP/1.1 200 OK\r\n")


def crowd(place, count, sent=b"", source=None):
    """So many connections that stay open on our side."""
    clients = []
    for _ in range(count):
        client = socket.create_connection(place, DEADLINE_S, source_address=source and (source, 0))
        clients.append(client)
        if sent:
            with contextlib.suppress(OSError):  # it was cut already
                client.sendall(sent)
    return clients


@contextlib.contextmanager
def crowded(place, count, **how):
    clients = crowd(place, count, **how)
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


@pytest.fixture(autouse=True)
def _files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
    ],
)
@pytest.mark.parametrize("count", [16, 1000])
def test_connections_that_say_nothing_or_read_nothing_never_keep_a_probe_out(place, count, sent):
    with crowded(place, count, sent=sent):
        for _ in range(5):
            assert is_alive(place)
        assert ask(place, b"GET /metrics HTTP/1.1\r\n\r\n").endswith(b"outbox_build_info 1\n")


def test_who_sends_a_byte_now_and_then_has_a_deadline_for_the_whole_head(place, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_MAX_S", 1.0)
    with socket.create_connection(place, DEADLINE_S) as client:
        client.settimeout(0.1)
        began_at = time.monotonic()
        is_open = True
        while is_open:  # it would go on for as long as it is let
            assert time.monotonic() - began_at < 5.0
            with contextlib.suppress(TimeoutError):
                try:
                    client.sendall(b"G")
                    is_open = client.recv(1) != b""
                except ConnectionError:
                    is_open = False


def test_many_that_send_a_byte_now_and_then_never_keep_a_probe_out(place):
    stop = threading.Event()
    with crowded(place, 300, sent=b"GET /livez HTTP/1.1\r\n") as clients:

        def drip():
            while not stop.wait(0.05):
                for client in clients:
                    with contextlib.suppress(OSError):
                        client.send(b"X")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            for _ in range(20):
                assert is_alive(place)
        finally:
            stop.set()
            dripping.join()


def test_a_client_is_cut_for_those_of_its_own_address_first(place):
    with crowded(place, 3, sent=b"GET /", source="127.0.0.2") as patient, crowded(place, 400, source="127.0.0.3"):
        assert is_alive(place)
        for client in patient:  # begun before 400 others, and still served
            client.sendall(b"livez HTTP/1.1\r\n\r\n")
            client.settimeout(QUICK_S)
            assert client.recv(15) == b"HTTP/1.1 200 OK"


def test_an_answer_that_is_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_server, "ANSWER_MAX_S", 0.5)
    health = health_of_a_relay()
    with Endpoints("127.0.0.1:0") as opened:
        opened.serve(lambda _: ("text/plain", b"x" * 50_000_000), health, _NoDatabase(health.relays.database_url))
        host, port = opened.address.split(":")
        with socket.create_connection((host, int(port)), DEADLINE_S) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            waiting = opened._server._slots[http_server._Stage.ANSWERED].connections
            end = time.monotonic() + DEADLINE_S
            seen = False
            while not seen or waiting:
                seen = seen or bool(waiting)
                assert time.monotonic() < end
                time.sleep(0.01)


@pytest.mark.parametrize("place", [lambda _accept: threading.Event().wait()], indirect=True)
def test_metrics_that_hang_delay_no_probe_and_are_a_503_in_time(place, monkeypatch):
    monkeypatch.setattr(endpoints, "METRICS_MAX_S", 1.0)
    before = threading.active_count()
    with crowded(place, 200, sent=b"GET /metrics HTTP/1.1\r\n\r\n"):
        for _ in range(5):
            assert is_alive(place)
            assert is_alive(place, sent=b"HEAD /livez HTTP/1.0\r\n\r\n")
        assert b" 503 " in ask(place, b"GET /metrics HTTP/1.1\r\n\r\n", timeout=5)
        assert threading.active_count() <= before + 1  # one thread hangs, not one for each


def test_a_schema_that_cannot_be_looked_at_delays_neither_live_nor_ready(monkeypatch):
    monkeypatch.setattr(endpoints, "READY_MAX_S", 0.3)
    health = health_of_a_relay()
    health._hindrances = {"": []}

    class Hanging(FleetReader):
        def schema_fault(self):
            threading.Event().wait()

    with Endpoints("127.0.0.1:0") as opened:
        opened.serve(lambda _: ("text/plain", b""), health, Hanging(health.relays.database_url))
        host, port = opened.address.split(":")
        place = host, int(port)
        for _ in range(3):
            assert is_alive(place)
            assert is_alive(place, sent=b"GET /readyz HTTP/1.1\r\n\r\n")


def test_metrics_that_fail_are_a_500_and_the_next_ones_are_computed_again():
    health = health_of_a_relay()
    fails = iter([True])

    def metrics(_accept):
        if next(fails, False):
            raise RuntimeError("broken once")
        return "text/plain", b"fine\n"

    with Endpoints("127.0.0.1:0") as opened:
        opened.serve(metrics, health, _NoDatabase(health.relays.database_url))
        host, port = opened.address.split(":")
        place = host, int(port)
        assert b" 500 " in ask(place, b"GET /metrics HTTP/1.1\r\n\r\n")
        end = time.monotonic() + DEADLINE_S
        while not ask(place, b"GET /metrics HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\nfine\n"):
            assert time.monotonic() < end
        assert is_alive(place)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", 200),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"\r\n\r\nGET /livez?a=b HTTP/1.1\n\n", 200),
        (b"GET http://localhost:9464/livez HTTP/1.1\r\n\r\n", 200),
        (b"HEAD /livez HTTP/1.1\r\n\r\n", 200),
        (b"POST /livez HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000, 405),
        (b"OPTIONS /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"GET /livez/../metrics HTTP/1.1\r\n\r\n", 404),
        (b"GET /livez\r\n\r\n", 400),
        (b"GET  /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/2.0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"\x00\xff\xfe\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", 431),
        (b"a" * 200_000, 431),
    ],
)
def test_each_request_has_one_answer_whatever_its_bytes(place, sent, status):
    said = ask(place, sent, timeout=DEADLINE_S)
    assert said.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close\r\n" in said
    head, _, body = said.partition(b"\r\n\r\n")
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    assert len(body) == (0 if sent.startswith(b"HEAD") else length)
    assert is_alive(place)


def test_of_requests_in_one_write_the_first_is_answered_and_the_connection_ends(place):
    said = ask(place, b"GET /livez HTTP/1.1\r\n\r\n" * 500)
    assert said.count(b"HTTP/1.1 ") == 1
    assert is_alive(place)


def test_a_head_in_single_bytes_is_read(place):
    with socket.create_connection(place, QUICK_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n":
            client.sendall(bytes([byte]))
        assert client.recv(15) == b"HTTP/1.1 200 OK"


def test_who_closes_its_side_after_the_request_is_answered(place):
    for path in (b"/livez", b"/readyz", b"/metrics"):
        with socket.create_connection(place, QUICK_S) as client:
            client.sendall(b"GET %s HTTP/1.1\r\n\r\n" % path)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(9) == b"HTTP/1.1 "


def test_the_connections_never_take_more_than_a_part_of_the_file_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, places in ((64, 8), (256, 32), (1024, 128), (4096, 128)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        assert http_server._slots() == places
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# In a process of its own, since it takes each file descriptor that there is.
WITHOUT_FILES = """
import os, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.path.insert(0, {root!r})
from tests.unit.monitoring.test_endpoints import Endpoints, _NoDatabase, health_of_a_relay
health = health_of_a_relay()
with Endpoints("127.0.0.1:0") as opened:
    opened.serve(lambda _: ("text/plain", b""), health, _NoDatabase(health.relays.database_url))
    print(opened.address, flush=True)
    sys.stdin.readline()
    try:
        while True:
            os.open("/dev/null", os.O_RDONLY)
    except OSError:
        pass
    print("none left", flush=True)
    sys.stdin.readline()
"""


def test_a_process_without_a_file_descriptor_left_is_still_alive():
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_FILES.format(root=root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    with process:
        host, port = process.stdout.readline().strip().split(":")
        place = host, int(port)
        assert is_alive(place)
        with crowded(place, 100):
            assert is_alive(place)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "none left\n"
            for _ in range(20):
                assert is_alive(place, timeout=5)
        process.stdin.write("\n")


def test_the_port_is_free_again_and_the_thread_gone_once_it_is_closed():
    health = health_of_a_relay()
    with Endpoints("127.0.0.1:0") as opened:
        opened.serve(lambda _: ("text/plain", b""), health, _NoDatabase(health.relays.database_url))
        host, port = opened.address.split(":")
        with crowded((host, int(port)), 10, sent=b"GET /metrics HTTP/1.1\r\n\r\n") as clients:
            assert is_alive((host, int(port)))
            opened._server.close()
            assert not any(thread.name == "http" for thread in threading.enumerate())
            with selectors.DefaultSelector() as selector:
                for client in clients:
                    selector.register(client, selectors.EVENT_READ)
                assert selector.select(QUICK_S)
    with Endpoints(f"{host}:{port}"):
        pass
