import asyncio
import smtplib
import socket

import pytest
import uvloop

from outbox.sandbox.smtp_sink import Accepted, Sink
from tests.support.sink_client import (
    BANNER,
    DEADLINE_S,
    ENVELOPE,
    GO_AHEAD,
    MESSAGE,
    OK,
    session,
)


async def test_smtplib_delivers_and_the_sink_keeps_everything():
    def send(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, timeout=DEADLINE_S) as client:
            client.ehlo()
            assert client.has_extn("pipelining")
            assert client.has_extn("8bitmime")
            assert not client.has_extn("auth")
            assert not client.has_extn("starttls")
            assert client.verify("b@example.com")[0] == 252
            refused = client.sendmail("a@example.com", ["b@example.com", "c@example.com"], MESSAGE)
            assert refused == {}

    async with Sink() as sink:
        await asyncio.to_thread(send, sink.port)
    (accepted,) = sink.accepted
    assert accepted.message == MESSAGE
    assert accepted.message_id == "<1@example.com>"
    assert accepted.sender == "a@example.com"
    assert accepted.recipients == ("b@example.com", "c@example.com")
    assert sink.addresses == {"b@example.com": 1, "c@example.com": 1}
    assert sink.visits[0].accepted == sink.messages == 1
    assert accepted.peer_port == sink.visits[0].peer[1]


async def test_each_message_is_told_to_the_callback_with_or_without_bodies():
    told: list[Accepted] = []
    counting = Sink(on_accepted=told.append, keep_messages=False, keep_accepted=False)
    async with counting as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert [(one.message, one.message_id) for one in told] == [(b"", "<1@example.com>")]
    assert sink.accepted == []
    assert sink.addresses == {"b@example.com": 1}


async def test_a_sink_can_be_gone_for_a_while():
    async with Sink() as sink:
        port = sink.port
        async with session(sink) as client:
            await sink.close_listener()
            with pytest.raises(ConnectionRefusedError):  # at once: without a round of the loop in between
                socket.create_connection(("127.0.0.1", port), DEADLINE_S)
            assert (await client.ask(b"NOOP"))[:4] == OK
            sink.drop_connections()
            with pytest.raises(ConnectionResetError):
                await client.rest()
        await sink.reopen()
        assert sink.port == port
        async with session(sink) as client:
            assert (await client.ask(b"NOOP"))[:4] == OK
        assert [one.number for one in sink.visits] == [1, 2]


def test_a_sink_on_uvloop_can_be_gone_for_a_while():
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_a_sink_can_be_gone_for_a_while())


async def test_a_sink_stops_in_the_middle_of_a_handshake(contexts):
    async with Sink(tls=contexts[0]) as sink, session(sink) as client:
        assert (await client.ask(b"STARTTLS"))[:4] == BANNER
        async with asyncio.timeout(DEADLINE_S):
            await sink.stop()
    assert not sink.connections
