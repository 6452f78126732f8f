import pytest

from outbox.sandbox.smtp_sink import (
    Script,
    Sink,
)
from outbox.sandbox.smtp_sink.client_input import ClientInput, ContentTooBigError
from tests.support.sink_client import ENVELOPE, GO_AHEAD, MESSAGE, OK, SESSION, messages, outcome, session
from tests.support.smuggling import ENDS, SECOND


@pytest.mark.parametrize("script", [None, lambda _stage, _visit: None], ids=["plain", "scripted"])
async def test_a_session_may_arrive_split_anywhere(script: Script | None):
    whole = await outcome([SESSION], script)
    assert whole[1] == [b".one\r\ntwo\r\n..\r\n\r\n", b"", b"\r\n\r.\n.\r\n\r\r\n"]
    for position in range(1, len(SESSION)):
        assert await outcome([SESSION[:position], SESSION[position:]], script) == whole, position
    assert await outcome([SESSION[i : i + 1] for i in range(len(SESSION))], script) == whole


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


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_and_contents_come_out_as_they_were_however_they_arrive(size: int):
    sent = b"DATA\r\nMessage\r\n..\r\n.\r\nQUIT\r\n"
    client, taken, in_content = ClientInput(100), [], False
    for begin in range(0, len(sent), size):
        client.feed(sent[begin : begin + size])
        while (piece := client.take_content() if in_content else client.take_line()) is not None:
            taken.append(piece)
            in_content = piece == b"DATA"
            if in_content:
                client.begin_content()
        client.compact()
    assert taken == [b"DATA", b"\r\nMessage\r\n..\r\n", b"QUIT"]


def test_a_content_may_begin_when_its_command_is_gone_from_the_buffer():
    client = ClientInput(100)
    client.feed(b"DATA\r\n")
    client.take_line()
    client.compact()
    client.begin_content()
    assert not client.has_content()
    client.feed(b".\r\n")
    assert client.has_content()
    assert client.take_content() == b"\r\n"


def test_a_content_that_is_too_big_is_taken_and_gone():
    client = ClientInput(10)
    client.feed(b"DATA\r\n" + b"x" * 50)
    client.take_line()
    client.begin_content()
    assert client.take_content() is None
    client.compact()
    client.feed(b"\r\n.\r\nNOOP\r\n")
    with pytest.raises(ContentTooBigError):
        client.take_content()
    assert client.take_line() == b"NOOP"
