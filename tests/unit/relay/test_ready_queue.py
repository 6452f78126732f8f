import asyncio
import threading

from outbox.relay.ready_queue import ReadyQueue
from outbox.smtp.route_headers import Prepared
from tests.support.sending import a_try


class SlowHeaders:
    """Headers of a route that signs, with a signer that takes as long as it is held."""

    is_slow = True

    def __init__(self):
        self.go_on, self.threads = threading.Event(), set()

    def prepare(self, outgoing):
        self.threads.add(threading.current_thread())
        assert self.go_on.wait(10)
        return Prepared(outgoing.message, len(outgoing.message), b"DKIM-Signature: x\r\n")


def queue(headers=None, on_signed=lambda: None):
    return ReadyQueue(headers, on_signed=on_signed, on_done=lambda _: None)


def test_suspects_wait_in_front_then_urgent_tries_then_the_others_each_in_their_order():
    ready = queue()
    a, b, c = a_try(), a_try(), a_try()
    u, v = a_try(urgent=True), a_try(urgent=True)
    s = a_try(suspect=True, urgent=True)
    ready.add([a, b])
    ready.add([c, u, s, v])
    assert list(ready) == [s, u, v, a, b, c]


async def test_what_is_to_be_signed_is_signed_off_the_loop_and_started_only_then():
    headers, started = SlowHeaders(), []
    tries = [a_try(), a_try()]

    def start():
        while ready.has_next:
            started.append(ready.pop(0.0))

    ready = queue(headers, on_signed=start)
    ready.add(tries)
    assert not ready.has_next
    await asyncio.sleep(0)
    assert not started, "the loop goes on meanwhile, and what is not signed waits"
    headers.go_on.set()
    async with asyncio.timeout(10):
        while len(started) < 2:
            await asyncio.sleep(0.001)
    assert started == tries
    assert all(tried.prepared.head for tried in tries)
    assert threading.main_thread() not in headers.threads
    await ready.end()


async def test_a_large_email_is_prepared_in_a_thread():
    ready = queue()
    email = a_try().outgoing
    (tried,) = await ready.prepare_large([email])
    assert tried.outgoing is email
    assert tried.prepared.wire_bytes == len(email.message)
    await ready.end()
