"""Raw SMTP client for tests of the sink."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from outbox.sandbox.smtp_sink import (
    Action,
    Script,
    Sink,
    Stage,
    Visit,
)

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


def final_codes(replies: bytes) -> list[bytes]:
    return [line[:3] for line in replies.split(b"\r\n") if line[3:4] == b" "]
