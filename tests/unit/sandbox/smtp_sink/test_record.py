import asyncio
import smtplib

import pytest

from outbox.sandbox.smtp_sink import Sink
from outbox.sandbox.smtp_sink.record import message_id
from tests.support.sink_client import (
    DEADLINE_S,
    ENVELOPE,
    GO_AHEAD,
    OK,
    messages,
    session,
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


@pytest.mark.parametrize(
    "header, found",
    [
        (b"Message-ID: <a@b>\r\n", "<a@b>"),
        (b"From: x\r\nmessage-id:<a@b>\r\n", "<a@b>"),
        (b"Message-Id:\r\n <a@b>\r\nTo: x\r\n", "<a@b>"),
        (b"X-Message-ID: <no>\r\n", ""),
        (b"\r\nMessage-ID: <in the body>\r\n", ""),
        (b"", ""),
    ],
)
def test_the_message_id_comes_from_the_header(header: bytes, found: str):
    assert message_id(b"\r\n" + header + b"\r\nbody\r\n") == found
