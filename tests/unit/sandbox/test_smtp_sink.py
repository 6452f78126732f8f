import asyncio
import base64
import contextlib
import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import aiosmtplib
import pytest
import trustme
import uvloop

from outbox.sandbox import smtp_sink as sink_module
from outbox.sandbox.smtp_sink import (
    Accept,
    Action,
    Cut,
    Flood,
    Hold,
    Reply,
    Reset,
    Script,
    Sink,
    Stage,
    Stall,
    Trickle,
    Visit,
)
from tests.support.smuggling import ENDS, SECOND

DEADLINE_S = 5.0
ENVELOPE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
MESSAGE = b"Message-ID: <1@example.com>\r\nSubject: x\r\n\r\nhello\r\n"
BANNER, OK, GO_AHEAD = b"220 ", b"250 ", b"354 "


class Client:
    """A raw connection: writes bytes, reads reply lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def line(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), DEADLINE_S)

    async def codes(self, count: int) -> list[bytes]:
        return [(await self.line())[:4] for _ in range(count)]

    async def ask(self, command: bytes) -> bytes:
        self.write(command + b"\r\n")
        while (line := await self.line())[3:4] == b"-":
            pass
        return line

    async def silent(self) -> bool:
        """Nothing comes for a moment, and the connection stays open."""
        with contextlib.suppress(TimeoutError):
            return not await asyncio.wait_for(self.reader.read(1), 0.05)
        return True

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), DEADLINE_S)


@contextlib.asynccontextmanager
async def visit(sink: Sink) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", sink.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def session(sink: Sink) -> AsyncIterator[Client]:
    async with visit(sink) as client:
        assert await client.codes(1) == [BANNER]
        yield client


async def until(fact: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not fact():
            await asyncio.sleep(0.001)


def at(stage: Stage, action: Action | None, *, message: int | None = None) -> Script:
    """A script that does one thing at one stage, on every message or on one only."""

    def script(reached: Stage, visit: Visit) -> Action | None:
        return action if reached is stage and message in (None, visit.messages_begun) else None

    return script


def messages(sink: Sink) -> list[bytes]:
    return [accepted.message for accepted in sink.accepted]


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
    told: list[sink_module.Accepted] = []
    counting = Sink(on_accepted=told.append, keep_messages=False, keep_accepted=False)
    async with counting as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert [(one.message, one.message_id) for one in told] == [(b"", "<1@example.com>")]
    assert sink.accepted == []
    assert sink.addresses == {"b@example.com": 1}


async def test_a_dot_and_the_next_envelope_may_share_a_write():
    async with Sink() as sink, session(sink) as client:
        client.write(ENVELOPE)
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        for _ in range(3):
            client.write(MESSAGE + b".\r\n" + ENVELOPE)
            assert await client.codes(4) == [OK, OK, OK, GO_AHEAD]
        client.write(MESSAGE + b".\r\nQUIT\r\n")
        assert await client.codes(2) == [OK, b"221 "]
        assert await client.rest() == b""
    assert messages(sink) == [MESSAGE] * 4


SESSION = (
    b"EHLO x\r\nNOOP\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
    b"MAIL FROM:<a@example.com> SIZE=10\r\nMAIL FROM:<a@b>\r\nrcpt to: <b@example.com>\r\nRSET\r\n"
    b"mail from:<>\r\nDATA\r\nRCPT TO:<c@example.com>\r\nRCPT TO:<>\r\nData\r\n"
    b"..one\r\n.two\r\n...\r\n\r\n.\r\n"  # dots at the beginnings of lines
    + ENVELOPE
    + b".\r\n"  # a message of no lines
    + ENVELOPE
    + b"\r\n\r.\n.\r\n.\r\r\n.\r\n"  # what looks like an end and is none
    + b"BOGUS\r\nMAIL TO:<x>\r\nQUIT\r\n"
)


async def outcome(pieces: list[bytes], script: Script | None = None) -> tuple[bytes, list[bytes], list[Stage]]:
    async with Sink(script) as sink, visit(sink) as client:
        for piece in pieces:
            client.write(piece)
            await client.writer.drain()
            await until(lambda: sink.visits)
            for _ in range(3):  # rounds in which the sink reads the piece by itself
                await asyncio.sleep(0)
        replies = await client.rest()
    return replies, messages(sink), [stage for _, _, stage in sink.events]


@pytest.mark.parametrize("script", [None, lambda _stage, _visit: None], ids=["plain", "scripted"])
async def test_a_session_may_arrive_split_anywhere(script: Script | None):
    whole = await outcome([SESSION], script)
    assert whole[1] == [b".one\r\ntwo\r\n..\r\n\r\n", b"", b"\r\n\r.\n.\r\n\r\r\n"]
    for position in range(1, len(SESSION)):
        assert await outcome([SESSION[:position], SESSION[position:]], script) == whole, position
    assert await outcome([SESSION[i : i + 1] for i in range(len(SESSION))], script) == whole


def final_codes(replies: bytes) -> list[bytes]:
    return [line[:3] for line in replies.split(b"\r\n") if line[3:4] == b" "]


async def test_each_command_has_its_code():
    replies, _, _ = await outcome([SESSION])
    assert b" ".join(final_codes(replies)) == (
        b"220 250 250 503 503 250 503 250 250 250 503 250 501 354 250 250 250 354 250 250 250 354 250 500 501 221"
    )


@pytest.mark.parametrize(
    "sent, kept",
    [
        (b".", b""),
        (b"..\r\n.", b".\r\n"),
        (b".a\r\n.", b"a\r\n"),
        (b"a\r\n..\r\n...b\r\n.", b"a\r\n.\r\n..b\r\n"),
        (b"a.\r\nb\n.\n\r\n.", b"a.\r\nb\n.\n\r\n"),
        (b"\r\n.", b"\r\n"),
    ],
)
async def test_dots_are_unstuffed_at_the_beginning_of_lines_only(sent: bytes, kept: bytes):
    async with Sink() as sink, session(sink) as client:
        client.write(ENVELOPE + sent + b"\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert messages(sink) == [kept]


async def test_what_smtplib_stuffs_comes_back_as_it_was():
    text = b"Subject: x\r\n\r\n.\r\n..\r\n.hidden\r\nend.\r\n"

    def send(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, timeout=DEADLINE_S) as client:
            client.sendmail("a@example.com", "b@example.com", text)

    async with Sink() as sink:
        await asyncio.to_thread(send, sink.port)
    assert messages(sink) == [text]


async def test_a_large_message_in_small_pieces_is_kept_whole():
    large = MESSAGE + b"0123456789" * 300_000 + b"\r\n"
    async with Sink() as sink, session(sink) as client:
        client.write(ENVELOPE)
        for begin in range(0, len(large), 10_007):
            client.write(large[begin : begin + 10_007])
            await client.writer.drain()
        client.write(b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert messages(sink) == [large]


async def test_a_message_that_is_too_big_is_refused_and_the_next_one_is_not():
    async with Sink(size_max=100) as sink, session(sink) as client:
        assert (await client.ask(b"MAIL FROM:<a@b> BODY=8BITMIME SIZE=101"))[:4] == b"552 "
        client.write(ENVELOPE + b"x" * 98 + b"\r\n.\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
        for chunk in (99, 50_000):
            client.write(ENVELOPE + b"x" * chunk + b"\r\n")
            assert await client.codes(3) == [OK, OK, GO_AHEAD]
            client.write(b".\r\n")
            assert await client.codes(1) == [b"552 "]
        client.write(ENVELOPE + b"y\r\n.\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert [len(message) for message in messages(sink)] == [100, 3]


@pytest.mark.parametrize("end", [b"", b"\r\nNOOP\r\n"])
async def test_a_line_without_end_is_refused_and_the_connection_closed(end: bytes):
    async with Sink() as sink, session(sink) as client:
        client.write(b"NOOP\r\n" + b"x" * 8193 + end)
        assert await client.codes(2) == [OK, b"500 "]
        assert await client.rest() == b""


@pytest.mark.parametrize("end", [end for end in ENDS if b"\r\n.\r\n" not in end], ids=repr)
async def test_nothing_but_crlf_dot_crlf_ends_a_message(end: bytes):
    async with Sink() as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + end + SECOND.removesuffix(b"\r\n.\r\n") + b"\r\n.\r\nQUIT\r\n")
        await client.rest()
        assert len(sink.accepted) == 1
        assert sink.addresses == {"b@example.com": 1}


@pytest.mark.parametrize("break_", [b"\n", b"\r", b"\0"])
async def test_a_command_line_ends_with_crlf_only(break_: bytes):
    async with Sink() as sink, session(sink) as client:
        client.write(b"MAIL FROM:<a@example.com>" + break_ + b"RCPT TO:<b@example.com>" + break_ + b"DATA\r\n")
        assert (await client.line())[:1] == b"5"
        assert await client.silent(), "it is one command, and has one reply"
        assert sink.visits[0].recipients == []


async def test_pipelining_is_not_offered_where_it_is_off():
    async with Sink(pipelining=False) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n")
        assert [(await client.line())[4:] for _ in range(3)][1:] == [b"SIZE 33554432\r\n", b"8BITMIME\r\n"]


@pytest.mark.parametrize(
    "header, message_id",
    [
        (b"Message-ID: <a@b>\r\n", "<a@b>"),
        (b"From: x\r\nmessage-id:<a@b>\r\n", "<a@b>"),
        (b"Message-Id:\r\n <a@b>\r\nTo: x\r\n", "<a@b>"),
        (b"X-Message-ID: <no>\r\n", ""),
        (b"\r\nMessage-ID: <in the body>\r\n", ""),
        (b"", ""),
    ],
)
def test_the_message_id_comes_from_the_header(header: bytes, message_id: str):
    assert sink_module._message_id(b"\r\n" + header + b"\r\nbody\r\n") == message_id


async def test_a_script_is_asked_at_every_stage_in_order():
    async with Sink(lambda _stage, _visit: None) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\nRSET\r\nQUIT\r\n")
        await client.rest()
    assert [stage for _, _, stage in sink.events] == [
        Stage.CONNECT,
        Stage.EHLO,
        Stage.MAIL,
        Stage.RCPT,
        Stage.DATA,
        Stage.CONTENT,
        Stage.DOT,
        Stage.RSET,
        Stage.QUIT,
    ]


async def test_a_script_sees_whom_it_is_asked_about():
    def script(stage: Stage, visit: Visit) -> Action | None:
        if stage is Stage.RCPT and visit.recipients[-1] == "no@example.com":
            return Reply("550 5.1.1 Nobody here")
        return None

    async with Sink(script) as sink, session(sink) as client:
        await client.ask(b"MAIL FROM:<a@example.com>")
        assert await client.ask(b"RCPT TO:<no@example.com>") == b"550 5.1.1 Nobody here\r\n"
        assert (await client.ask(b"DATA"))[:4] == b"503 "
        await client.ask(b"RCPT TO:<yes@example.com>")
        assert (await client.ask(b"DATA"))[:4] == GO_AHEAD
        assert (await client.ask(b"."))[:4] == OK
    assert sink.accepted[0].recipients == ("yes@example.com",)


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.DOT])
@pytest.mark.parametrize("text", [b"451 4.3.0 Later\r\n", b"550 5.0.0 Never\r\n", b"garbage\r\n"])
async def test_a_refusal_keeps_the_message_out_and_the_next_one_goes_through(stage: Stage, text: bytes):
    async with Sink(at(stage, Reply(text), message=1)) as sink, session(sink) as client:
        for command in (b"MAIL FROM:<a@b>", b"RCPT TO:<b@c>", b"DATA", b"."):
            if (reply := await client.ask(command)) == text:
                break
        assert reply == text
        if stage is not Stage.DOT:  # a refused message has ended its transaction
            await client.ask(b"RSET")
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert messages(sink) == [MESSAGE]


async def test_another_reply_of_the_same_class_takes_effect():
    async with Sink(at(Stage.DOT, Reply(b"250 queued as 7\r\n"))) as sink, session(sink) as client:
        client.write(ENVELOPE + b".\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        assert await client.line() == b"250 queued as 7\r\n"
    assert sink.messages == 1


async def test_a_reply_may_be_the_last_word():
    async with (
        Sink(at(Stage.RCPT, Reply("421 4.3.2 Closing", then_cut=True))) as sink,
        session(sink) as client,
    ):
        client.write(ENVELOPE)
        assert await client.rest() == b"250 2.1.0 OK\r\n421 4.3.2 Closing\r\n"
    assert sink.messages == 0


ALL_BUT_QUIET = [Stage.CONNECT, Stage.EHLO, Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.CONTENT, Stage.DOT]


async def replies_until_the_end(sink: Sink) -> bytes:
    async with visit(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\n")
        return await client.rest()


@pytest.mark.parametrize("stage", ALL_BUT_QUIET)
async def test_a_cut_ends_the_connection_without_an_answer_to_the_stage(stage: Stage):
    async with Sink(at(stage, Cut())) as sink:
        replies = await replies_until_the_end(sink)
        await until(lambda: not sink.connections)
    position = min(ALL_BUT_QUIET.index(stage), 5)  # the content has no reply of its own
    assert final_codes(replies) == [b"220", b"250", b"250", b"250", b"354"][:position]
    assert sink.messages == 0


async def test_a_cut_is_a_clean_end_even_while_the_client_writes():
    async with Sink(at(Stage.CONTENT, Cut())) as sink, session(sink) as client:
        client.write(ENVELOPE + b"x" * 3_000_000)
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        assert await client.rest() == b""


@pytest.mark.parametrize("stage", ALL_BUT_QUIET)
async def test_a_reset_is_seen_as_one(stage: Stage):
    async with Sink(at(stage, Reset())) as sink:
        with pytest.raises(ConnectionResetError):
            await replies_until_the_end(sink)
    assert sink.messages == 0


@pytest.mark.parametrize("then, seen", [(Cut(), b""), (Reply("garbage"), b"garbage\r\n"), (Stall(), None)])
async def test_an_accepted_message_stays_accepted_when_its_reply_is_lost(then: Action, seen: bytes | None):
    async with Sink(at(Stage.DOT, Accept(then))) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        if seen is None:
            assert await client.silent()
        else:
            assert await client.line() == seen
        assert messages(sink) == [MESSAGE]


async def test_accept_without_more_is_the_usual_answer():
    async with Sink(at(Stage.DOT, Accept())) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
        assert sink.messages == 1


async def test_a_stall_answers_what_came_before_it_and_nothing_else():
    async with Sink(at(Stage.RCPT, Stall())) as sink, session(sink) as client:
        client.write(ENVELOPE + b"NOOP\r\n")
        assert await client.codes(1) == [OK]
        assert await client.silent()
        assert len(sink.connections) == 1
        assert sink.events[-1][2] is Stage.RCPT


async def test_a_deaf_stall_leaves_what_is_written_with_the_client():
    async with Sink(at(Stage.CONTENT, Stall(deaf=True))) as sink, session(sink) as client:
        client.write(ENVELOPE + b"x" * 16_000_000)
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.writer.drain(), 0.2)
        client.writer.transport.abort()


async def test_a_flood_goes_on_until_the_client_leaves():
    async with Sink(at(Stage.EHLO, Flood(b"x" * 1000))) as sink:
        async with session(sink) as client:
            client.write(b"EHLO x\r\n")
            assert await client.reader.readexactly(1_000_000) == b"x" * 1_000_000
            client.writer.transport.abort()
        await until(lambda: not sink.connections)
        assert sink.visits[0].flooded >= 1_000_000


async def test_a_script_sees_what_came_behind_what_it_is_asked_about():
    behind = {}

    def note(stage: Stage, visit: Visit) -> None:
        behind[stage] = visit.behind

    async with Sink(note) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\nRSET\r\n")
        await client.codes(4)
        await until(lambda: Stage.RSET in behind)
    assert behind[Stage.DOT] == b"RSET\r\n"
    assert behind[Stage.RSET] == b""


@pytest.mark.parametrize("stage", ALL_BUT_QUIET)
async def test_input_behind_a_hold_waits_its_turn(stage: Stage):
    event = asyncio.Event()
    async with Sink(at(stage, Hold(event))) as sink, visit(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\nQUIT\r\n")
        await until(lambda: sink.events and sink.events[-1][2] is stage)
        assert sink.messages == 0
        event.set()
        replies = await client.rest()
    assert final_codes(replies) == [b"220", b"250", b"250", b"250", b"354", b"250", b"221"]
    assert messages(sink) == [MESSAGE]


async def test_a_hold_ends_in_what_the_script_says():
    event = asyncio.Event()
    async with Sink(at(Stage.DOT, Hold(event, Reply("451 4.3.0 Later")))) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        event.set()
        assert await client.line() == b"451 4.3.0 Later\r\n"
    assert sink.messages == 0


@pytest.mark.parametrize("stage, kept", [(Stage.DOT, 1), (Stage.DATA, 0)])
async def test_a_client_that_leaves_during_a_hold_has_handed_over_what_it_finished(stage: Stage, kept: int):
    event = asyncio.Event()
    async with Sink(at(stage, Hold(event))) as sink:
        async with session(sink) as client:
            client.write(ENVELOPE if stage is Stage.DATA else ENVELOPE + MESSAGE + b".\r\n")
            await until(lambda: sink.events[-1][2] is stage)
        await until(lambda: not sink.connections)
        event.set()
        await until(lambda: not sink._tasks)
        assert sink.messages == kept


async def test_a_dropped_connection_takes_its_hold_along():
    event = asyncio.Event()
    async with Sink(at(Stage.DOT, Hold(event))) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        await until(lambda: sink.events[-1][2] is Stage.DOT)
        sink.drop_connections()
        event.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        await until(lambda: not sink._tasks)
        assert sink.messages == 0


@pytest.mark.parametrize("reply, kept", [(None, 1), ("250-a\r\n250 b", 1), (b"451 no\r\n", 0)])
async def test_a_trickle_comes_in_pieces_and_takes_effect(reply: bytes | str | None, kept: int):
    script = at(Stage.DOT, Trickle(reply, chunk=2, delay_s=0.001), message=1)
    async with Sink(script) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\nNOOP\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        while (line := await client.line())[3:4] == b"-":
            pass
        assert line[:3] == (b"250" if kept else b"451")
        assert await client.codes(1) == [OK]
        assert sink.messages == kept


async def test_a_trickle_that_nobody_waits_for_takes_no_effect():
    async with Sink(at(Stage.DOT, Trickle(delay_s=0.001))) as sink:
        async with session(sink) as client:
            client.write(ENVELOPE + MESSAGE + b".\r\n")
            assert await client.codes(3) == [OK, OK, GO_AHEAD]
        await until(lambda: not sink._tasks)
        assert sink.messages == 0


async def test_accept_elsewhere_than_at_the_dot_is_a_mistake():
    async with Sink() as sink:
        connection = sink_module._Connection(sink)
        with pytest.raises(ValueError, match="at DOT only"):
            connection._act(Stage.MAIL, b"250 ", Accept())


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


def on_uvloop(test: Callable[[], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


@pytest.mark.parametrize(
    "law",
    [
        test_a_dot_and_the_next_envelope_may_share_a_write,
        test_a_reply_may_be_the_last_word,
        test_a_cut_is_a_clean_end_even_while_the_client_writes,
        test_a_sink_can_be_gone_for_a_while,
        test_a_dropped_connection_takes_its_hold_along,
    ],
    ids=lambda law: law.__name__,
)
def test_uvloop_changes_nothing(law: Callable[[], Coroutine[None, None, None]]):
    on_uvloop(law)


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.CONTENT, Stage.DOT])
def test_uvloop_changes_nothing_about_a_reset(stage: Stage):
    on_uvloop(lambda: test_a_reset_is_seen_as_one(stage))


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


async def send_secretly(contexts: tuple[ssl.SSLContext, ssl.SSLContext], *, implicit: bool) -> None:
    server, trusting = contexts
    async with Sink(tls=server, implicit_tls=implicit, login=("u", "p:ä")) as sink:
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1",
            port=sink.port,
            use_tls=implicit,
            tls_context=trusting,
            username="u",
            password="p:ä",
            timeout=DEADLINE_S,
        )
        async with client:
            await client.sendmail("a@example.com", ["b@example.com"], MESSAGE)
    assert messages(sink) == [MESSAGE]
    assert sink.visits[0].tls
    assert sink.visits[0].authenticated
    assert sink.url.startswith("smtps:" if implicit else "smtp:")


@pytest.mark.parametrize("implicit", [False, True])
async def test_aiosmtplib_sends_through_tls_and_auth(contexts, implicit: bool):
    await send_secretly(contexts, implicit=implicit)


@pytest.mark.parametrize("implicit", [False, True])
def test_uvloop_changes_nothing_about_tls(contexts, implicit: bool):
    on_uvloop(lambda: send_secretly(contexts, implicit=implicit))


async def test_credentials_are_asked_for_behind_tls_only(contexts):
    async with Sink(tls=contexts[0], login=("u", "p")) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n")
        lines = [await client.line() for _ in range(5)]
        assert lines[-1] == b"250 STARTTLS\r\n"
        assert (await client.ask(b"AUTH PLAIN AHUAcA=="))[:4] == b"530 "


async def test_plain_text_behind_starttls_is_dropped(contexts):
    async with Sink(tls=contexts[0]) as sink, session(sink) as client:
        client.write(b"STARTTLS\r\nMAIL FROM:<injected@example.com>\r\n")
        assert await client.codes(1) == [BANNER]
        await client.writer.start_tls(contexts[1], server_hostname="127.0.0.1")
        assert (await client.ask(b"MAIL FROM:<a@example.com>"))[:4] == OK
        assert sink.visits[0].sender == "a@example.com"


async def test_a_broken_handshake_ends_the_visit(contexts):
    async with Sink(tls=contexts[0]) as sink, session(sink) as client:
        assert (await client.ask(b"STARTTLS"))[:4] == BANNER
        client.write(b"this is not TLS\r\n")
        with contextlib.suppress(ConnectionError):
            await client.rest()
        await until(lambda: not sink.connections)


async def test_a_sink_stops_in_the_middle_of_a_handshake(contexts):
    async with Sink(tls=contexts[0]) as sink, session(sink) as client:
        assert (await client.ask(b"STARTTLS"))[:4] == BANNER
        async with asyncio.timeout(DEADLINE_S):
            await sink.stop()
    assert not sink.connections


def encoded(text: str) -> bytes:
    return base64.b64encode(text.encode())


@pytest.mark.parametrize(
    "dialogue, code",
    [
        ([b"AUTH PLAIN " + encoded("\0u\0p")], b"235 "),
        ([b"AUTH PLAIN", encoded("\0u\0p")], b"235 "),
        ([b"AUTH LOGIN", encoded("u"), encoded("p")], b"235 "),
        ([b"auth login " + encoded("u"), encoded("p")], b"235 "),
        ([b"AUTH PLAIN " + encoded("\0u\0wrong")], b"535 "),
        ([b"AUTH LOGIN", encoded("u"), encoded("wrong")], b"535 "),
        ([b"AUTH PLAIN", b"not base64!"], b"535 "),
        ([b"AUTH PLAIN", b"*"], b"501 "),
        ([b"AUTH CRAM-MD5"], b"504 "),
        ([b"AUTH"], b"504 "),
    ],
)
async def test_login_is_mandatory_once_it_is_configured(dialogue: list[bytes], code: bytes):
    async with Sink(login=("u", "p")) as sink, session(sink) as client:
        assert (await client.ask(b"MAIL FROM:<a@b>"))[:4] == b"530 "
        for line in dialogue:
            reply = await client.ask(line)
        assert reply[:4] == code
        assert (await client.ask(b"MAIL FROM:<a@b>"))[:4] == (OK if code == b"235 " else b"530 ")


async def test_auth_and_starttls_do_not_exist_unless_configured():
    async with Sink() as sink, session(sink) as client:
        assert (await client.ask(b"AUTH PLAIN AHUAcA=="))[:4] == b"500 "
        assert (await client.ask(b"STARTTLS"))[:4] == b"500 "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_journals_and_counts(tmp_path: Path, number: signal.Signals):
    journal = tmp_path / "journal"
    command = [sys.executable, "-m", "outbox.sandbox.smtp_sink", "--journal", str(journal), "--no-pipelining"]
    root = Path(sink_module.__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, env=os.environ) as program:
        assert program.stdout is not None
        word, _, address = program.stdout.readline().decode().strip().partition(" ")
        assert word == "listening"
        host, port = address.split(":")
        with smtplib.SMTP(host, int(port), timeout=DEADLINE_S) as client:
            client.ehlo()
            assert not client.has_extn("pipelining")
            peer_port = client.sock.getsockname()[1]
            for recipients in (["b@example.com", "c@example.com"], ["b@example.com"]):
                client.sendmail("a@example.com", recipients, MESSAGE)
        program.send_signal(number)
        counts = json.loads(program.stdout.read())
    assert program.returncode == 0
    assert counts == {"accepted": 2, "addresses": 2, "duplicates": 1}
    lines = [line.split("\t") for line in journal.read_text().splitlines()]
    assert [line[1:] for line in lines] == [
        [str(peer_port), recipient, "<1@example.com>"]
        for recipient in ("b@example.com", "c@example.com", "b@example.com")
    ]
