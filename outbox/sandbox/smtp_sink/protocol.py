"""One connection of the sink: takes what has arrived in order, replies, and does what the script says.

A script may make a stage wait; what the client pipelined behind it stays in the buffer until then.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Final, Protocol, assert_never, cast

from outbox.sandbox.smtp_sink import replies
from outbox.sandbox.smtp_sink.client_input import ClientInput, ContentTooBigError, LineTooLongError
from outbox.sandbox.smtp_sink.commands import Commands, Offer
from outbox.sandbox.smtp_sink.record import Record
from outbox.sandbox.smtp_sink.script import (
    Accept,
    Action,
    Cut,
    Flood,
    Hold,
    Reply,
    Reset,
    Script,
    Stage,
    Stall,
    Trickle,
    Visit,
    reply_bytes,
)

_FAREWELL_S: Final = 1.0
"""Time in which a client closes after our FIN."""
_EFFECTLESS: Final = (Stage.MAIL, Stage.RCPT)
"""Stages whose commands have changed the visit already."""


class Server(Protocol):
    """Part of the sink that its connections use."""

    @property
    def record(self) -> Record:
        """Record to which visits and messages are added."""

    def opened(self, connection: "Connection") -> None:
        """Add a connection to the open ones."""

    def closed(self, connection: "Connection") -> None:
        """Remove a connection from the open ones."""

    def in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run what a stage waits for until the sink stops."""


class Connection(asyncio.Protocol):
    """One SMTP session, server side (RFC 5321, 2920, 3207, 4954)."""

    visit: Visit

    def __init__(self, server: Server, offer: Offer, script: Script | None, *, tls_active: bool) -> None:
        self._server = server
        self._record = server.record
        self._offer = offer
        self._script = script
        self._tls_active = tls_active
        self._transport: asyncio.Transport
        self._commands: Commands
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection is lost."""
        self._input = ClientInput(offer.size_max)
        self._in_content = False
        self._content_seen = False
        self._content = b""
        """Content whose dot has arrived and is not answered yet."""
        self._blocked = False
        """True while a stage waits and while the connection ends: what arrives stays in the buffer."""
        self._waiting: asyncio.Task[None] | None = None
        self._replies: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin a visit with the banner."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none, and behaves like one
        peer = transport.get_extra_info("peername") or ("", 0)
        self.visit = self._record.new_visit(peer[:2], tls=self._tls_active)
        self._commands = Commands(self._offer, self.visit)
        self._server.opened(self)
        self._reach(Stage.CONNECT, replies.BANNER)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take the input now, or after the stage that waits."""
        self._input.feed(data)
        if not self._blocked:
            self._advance()

    def connection_lost(self, _: Exception | None) -> None:
        """End the visit."""
        self._server.closed(self)
        if not self.gone.done():
            self.gone.set_result(None)

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its replies."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on."""
        self._transport.resume_reading()

    def reset(self) -> None:
        """End with a RST: with no time to linger, closing discards and resets."""
        if (raw := self._transport.get_extra_info("socket")) is not None:
            with suppress(OSError):  # the client was faster
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._blocked = True
        if self._waiting is not None:
            self._waiting.cancel()
        self._transport.abort()

    def _cut(self) -> None:
        """End with a FIN.

        Closing at once would send a RST if input lies unread, so the client gets the time to close first.
        """
        self._flush()
        self._blocked = True
        if self._transport.is_closing() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        asyncio.get_running_loop().call_later(_FAREWELL_S, self._transport.close)

    def _flush(self) -> None:
        text = b"".join(self._replies)
        self._replies.clear()
        if text and not self._transport.is_closing():
            self._transport.write(text)

    def _advance(self) -> None:
        """Take what has arrived, in order, until more is needed or a stage waits."""
        while not self._blocked and (self._take_content() if self._in_content else self._take_line()):
            pass
        self._input.compact()
        self._flush()

    def _take_line(self) -> bool:
        try:
            line = self._input.take_line()
        except LineTooLongError:
            self._replies.append(replies.LINE_TOO_LONG)
            self._cut()
            return False
        if line is None:
            return False
        stage, reply = self._commands.take(line)
        if stage is None or (self._script is None and stage in _EFFECTLESS):
            self._replies.append(reply)
        else:
            self._reach(stage, reply)
        return True

    def _take_content(self) -> bool:
        if not self._content_seen:
            if not self._input.has_content():
                return False
            self._content_seen = True
            self._reach(Stage.CONTENT, b"")
            return True
        try:
            content = self._input.take_content()
        except ContentTooBigError:
            self._in_content = False
            self._replies.append(replies.TOO_BIG)
            self.visit.end_transaction()
            return True
        if content is None:
            return False
        self._in_content = False
        self._content = content
        self._reach(Stage.DOT, replies.ACCEPTED)
        return True

    def _reach(self, stage: Stage, usual: bytes) -> None:
        """Do the usual thing, or what the script says."""
        if self._script is None:
            self._replies.append(usual)
            self._take_effect(stage)
            return
        self._record.note_stage(self.visit, stage)
        self.visit.behind = self._input.peek()
        self._act(stage, usual, self._script(stage, self.visit))

    def _act(self, stage: Stage | None, usual: bytes, action: Action | None) -> None:
        """Answer at a stage; no stage means that it has taken effect already."""
        match action:
            case None:
                self._answer(stage, usual, usual)
            case Reply(text, then_cut):
                self._answer(stage, usual, reply_bytes(text))
                if then_cut:
                    self._cut()
            case Cut():
                self._cut()
            case Reset():
                self._flush()
                self.reset()
            case Accept(then):
                self._accept(stage, usual, then)
            case Stall(deaf):
                self._blocked = True
                if deaf:
                    self._transport.pause_reading()
            case Flood() | Hold() | Trickle():
                self._wait(self._act_slowly(stage, usual, action))
            case _:
                assert_never(action)

    async def _act_slowly(self, stage: Stage | None, usual: bytes, action: Flood | Hold | Trickle) -> None:
        match action:
            case Flood(text):
                await self._flood(text)
            case Hold():
                await self._hold(stage, usual, action)
            case Trickle():
                await self._trickle(stage, usual, action)

    def _accept(self, stage: Stage | None, usual: bytes, then: Action | None) -> None:
        if stage is not Stage.DOT:
            raise ValueError(f"A script answered Accept at {stage}: it is an answer at DOT only.")
        self._take_effect(stage)
        self._act(None, usual, then)

    def _answer(self, stage: Stage | None, usual: bytes, text: bytes) -> None:
        self._replies.append(text)
        self._conclude(stage, usual, text)

    def _conclude(self, stage: Stage | None, usual: bytes, text: bytes) -> None:
        """Let the stage take effect if the reply has the first digit of the usual one, else undo its command."""
        if stage is None:
            return
        if text[:1] == usual[:1]:
            self._take_effect(stage)
        else:
            self._commands.take_back(stage)

    def _take_effect(self, stage: Stage) -> None:
        if stage is Stage.DATA:
            self._input.begin_content()
            self._in_content = True
            self._content_seen = self._script is None
        elif stage is Stage.DOT:
            self._record.keep(self.visit, self._content)
            self._content = b""
            self.visit.end_transaction()
        elif stage is Stage.STARTTLS:
            self._upgrade()
        elif stage is Stage.QUIT:
            self._cut()
        else:
            self._commands.take_effect(stage)

    def _wait(self, work: Coroutine[None, None, None]) -> None:
        self._flush()
        self._blocked = True
        self._waiting = self._server.in_background(work)

    async def _hold(self, stage: Stage | None, usual: bytes, hold: Hold) -> None:
        """Wait, then go on; also for a client that left meanwhile, since its dot had arrived."""
        await hold.event.wait()
        self._go_on(lambda: self._act(stage, usual, hold.then))

    async def _flood(self, text: bytes) -> None:
        while not self._transport.is_closing():
            if not self._transport.get_write_buffer_size():
                self._transport.write(text)
                self.visit.flooded += len(text)
            await asyncio.sleep(0)

    async def _trickle(self, stage: Stage | None, usual: bytes, trickle: Trickle) -> None:
        text = usual if trickle.reply is None else reply_bytes(trickle.reply)
        for begin in range(0, len(text), trickle.chunk):
            if begin:
                await asyncio.sleep(trickle.delay_s)
            if self._transport.is_closing():
                return
            self._transport.write(text[begin : begin + trickle.chunk])
        self._go_on(lambda: self._conclude(stage, usual, text))

    def _go_on(self, step: Callable[[], None]) -> None:
        """End a wait: do what was waited for, then what the client sent meanwhile."""
        self._waiting = None
        self._blocked = False
        step()
        self._advance()

    def _upgrade(self) -> None:
        """Hand the connection to TLS; plain text that came with STARTTLS is dropped (RFC 3207 §4.2)."""
        self._transport.pause_reading()  # before the client can react to the 220
        self._input.clear()
        self._wait(self._start_tls())

    async def _start_tls(self) -> None:
        assert self._offer.tls is not None
        loop = asyncio.get_running_loop()
        secure: asyncio.Transport | None = None
        try:
            secure = await loop.start_tls(self._transport, self, self._offer.tls, server_side=True)
        except OSError:
            return  # the client broke the handshake off, which ends the visit
        finally:
            if secure is None:  # asyncio reports no connection that is lost in the handshake
                self._transport.abort()
                self.connection_lost(None)
        assert secure is not None
        self._transport = secure
        self.visit.tls = True
        self._go_on(self.visit.end_transaction)
