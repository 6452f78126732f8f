"""An SMTP server that keeps what it accepts and delivers nothing: the mailbox of the demo and the benchmarks.

With a script it plays every fault of a real server: the tests' lever on SMTP. It knows nothing of the outbox.

    python -m outbox.sandbox.smtp_sink --port 2525 --journal mail.tsv

A connection's bytes go into one buffer, and `_advance` takes command lines and contents from it in order.
A script may make a stage wait; what the client pipelined behind it stays in the buffer until then.
"""

import argparse
import asyncio
import binascii
import json
import signal
import socket
import ssl
import struct
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, assert_never, cast

LINE_MAX = 8192
"""Bytes of a command line; a longer one ends the connection (RFC 5321 §4.5.3.1.4 asks for 512)."""
RECIPIENTS_MAX = 1000
SIZE_MAX = 32 * 1024 * 1024
_BACKLOG = 1024
_FAREWELL_S = 1.0
_JOURNAL_FLUSH_S = 0.05

_BANNER = b"220 sink.invalid ESMTP\r\n"
_OK = b"250 2.0.0 OK\r\n"
_SENDER_OK = b"250 2.1.0 OK\r\n"
_RECIPIENT_OK = b"250 2.1.5 OK\r\n"
_GO_AHEAD = b"354 End data with <CR><LF>.<CR><LF>\r\n"
_ACCEPTED = b"250 2.0.0 OK: kept\r\n"
_BYE = b"221 2.0.0 Bye\r\n"
_TLS_GO_AHEAD = b"220 2.0.0 Ready to start TLS\r\n"
_LOGIN_OK = b"235 2.7.0 Authentication successful\r\n"
_LOGIN_REFUSED = b"535 5.7.8 Authentication credentials invalid\r\n"
_LOGIN_CANCELLED = b"501 5.7.0 Authentication cancelled\r\n"
_LOGIN_FIRST = b"530 5.7.0 Authentication required\r\n"
_TLS_FIRST = b"530 5.7.0 Must issue a STARTTLS command first\r\n"
_CANNOT_VERIFY = b"252 2.5.2 Cannot VRFY user, but will accept message\r\n"
_UNKNOWN = b"500 5.5.2 Command unrecognized\r\n"
_LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"
_SYNTAX = b"501 5.5.4 Syntax error in parameters\r\n"
_NESTED_MAIL = b"503 5.5.1 Nested MAIL command\r\n"
_MAIL_FIRST = b"503 5.5.1 Need MAIL command\r\n"
_RECIPIENT_FIRST = b"503 5.5.1 Need RCPT command\r\n"
_SEQUENCE = b"503 5.5.1 Bad sequence of commands\r\n"
_NO_MECHANISM = b"504 5.5.4 Authentication mechanism not supported\r\n"
_TOO_MANY_RECIPIENTS = b"452 4.5.3 Too many recipients\r\n"
_UNKNOWN_PARAMETER = b"555 5.5.4 Unsupported parameter\r\n"
_NOT_ASCII = b"553 5.6.7 Address is not ASCII\r\n"
_TOO_BIG = b"552 5.3.4 Message too big\r\n"

_PARAMETERS = {  # which an extension brings: RFC 1870, 6152, 6531, 3461
    "MAIL": {"SIZE": {b"SIZE"}, "8BITMIME": {b"BODY"}, "SMTPUTF8": {b"SMTPUTF8"}, "DSN": {b"RET", b"ENVID"}},
    "RCPT": {"DSN": {b"NOTIFY", b"ORCPT"}},
}
EXTENSIONS = ("SMTPUTF8", "DSN")

_DOT = b"\r\n.\r\n"
_MESSAGE_ID = b"\r\nmessage-id:"
_PROMPTS = {
    b"PLAIN": [b"334 \r\n"],
    b"LOGIN": [b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n"],  # "Username:", "Password:" in base64
}


class Stage(StrEnum):
    """Where a script is asked what to do, before anything is answered or decided."""

    CONNECT = "CONNECT"
    """Before the banner."""
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    """When the credentials are complete and right."""
    MAIL = "MAIL"
    RCPT = "RCPT"
    """Once per recipient; the one asked about is `visit.recipients[-1]`."""
    DATA = "DATA"
    """Before the 354."""
    CONTENT = "CONTENT"
    """When the first bytes after the 354 have arrived; nothing is answered here by default."""
    DOT = "DOT"
    """When the final dot has arrived."""
    RSET = "RSET"
    QUIT = "QUIT"


@dataclass(slots=True)
class Visit:
    """One connection, as far as it has come."""

    number: int
    peer: tuple[str, int]
    tls: bool = False
    authenticated: bool = False
    sender: str | None = None
    recipients: list[str] = field(default_factory=list)
    accepted: int = 0
    """Messages accepted on this connection."""
    messages_begun: int = 0
    """MAIL commands on this connection, the one that a script is being asked about included."""
    behind: bytes = b""
    """What had come behind that which a script is being asked about, its first bytes at least."""
    flooded: int = 0
    """Bytes of a `Flood` that were written."""
    mail_said: bytes = b""
    """The parameters of MAIL."""
    rcpt_said: list[bytes] = field(default_factory=list)
    """The parameters of RCPT, for each recipient."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """One message for which the sink has taken responsibility."""

    at: float
    """Unix time."""
    visit: int
    peer_port: int
    sender: str
    recipients: tuple[str, ...]
    message: bytes
    """As the sender meant it: dots unstuffed, the final CRLF kept. Empty when bodies are not kept."""
    message_id: str
    mail_said: str = ""
    """The parameters of MAIL (RFC 5321 §4.1.2)."""
    rcpt_said: tuple[str, ...] = ()
    """The parameters of RCPT, for each recipient."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Say this instead. The stage takes effect only if the first digit is that of the usual reply."""

    text: bytes | str
    then_cut: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """End the connection with a FIN, and answer nothing."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End the connection with a RST, and answer nothing."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Never answer, and keep the connection open; deaf, read nothing more, so that the client's kernel fills up."""

    deaf: bool = False


@dataclass(frozen=True, slots=True)
class Flood:
    """Write this over and over, for as long as the client takes it."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait for the event, then do `then`, or the usual thing; at DOT also if the client is gone by then."""

    event: asyncio.Event
    then: "Action | None" = None


@dataclass(frozen=True, slots=True)
class Trickle:
    """Write the reply, or the usual one, in pieces; the stage takes effect with the last."""

    reply: bytes | str | None = None
    chunk: int = 1
    delay_s: float = 0.01


@dataclass(frozen=True, slots=True)
class Accept:
    """At DOT: the message is accepted, and then this happens instead of the usual 250."""

    then: "Action | None" = None


Action = Reply | Cut | Reset | Stall | Flood | Hold | Trickle | Accept
Script = Callable[[Stage, Visit], Action | None]
"""Asked at every stage of every connection; None is the usual thing."""


class Sink:
    """The server: starts, keeps, can be gone for a while, stops.

    `login` makes AUTH mandatory; with `tls` and not `implicit_tls` it is offered after STARTTLS only.
    `extensions` (of `EXTENSIONS`) are offered beside the usual ones. With `lmtp` it speaks LMTP (RFC 2033).
    `keep_messages` off keeps envelopes without bodies; `keep_accepted` off keeps only the counts.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        pipelining: bool = True,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        login: tuple[str, str] | None = None,
        size_max: int = SIZE_MAX,
        eight_bit: bool = True,
        extensions: Collection[str] = (),
        lmtp: bool = False,
        keep_messages: bool = True,
        keep_accepted: bool = True,
        on_accepted: Callable[[Accepted], None] | None = None,
    ) -> None:
        self.script = script
        self.pipelining = pipelining
        self.tls = tls
        self.implicit_tls = implicit_tls
        self.login = login
        self.size_max = size_max
        self.eight_bit = eight_bit
        self.extensions = extensions
        self.lmtp = lmtp
        self.parameters = _parameters({"SIZE", *extensions, *(("8BITMIME",) if eight_bit else ())})
        self.host = ""
        self.port = 0
        self.messages = 0
        """Messages accepted."""
        self.refused_logins = 0
        self.accepted: list[Accepted] = []
        self.addresses: Counter[str] = Counter()
        """How many messages each recipient was sent."""
        self.visits: list[Visit] = []
        self.events: list[tuple[float, int, Stage]] = []
        """Unix time, visit number and stage of every question to the script."""
        self.connections: set[_Connection] = set()
        self._keep_messages = keep_messages
        self._keep_accepted = keep_accepted
        self._on_accepted = on_accepted
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where the sink listens, without credentials."""
        scheme = "lmtp" if self.lmtp else "smtps" if self.implicit_tls else "smtp"
        return f"{scheme}://{self.host}:{self.port}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on a TCP port, 0 for a free one."""
        self.host, self.port = host, port
        await self.reopen()

    async def reopen(self) -> None:
        """Listen again where we listened before `close_listener()`."""
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self),
            self.host,
            self.port,
            ssl=self.tls if self.implicit_tls else None,
            backlog=_BACKLOG,
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close_listener(self) -> None:
        """Refuse new connections from now on; those that are open stay."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def drop_connections(self) -> None:
        """Reset all open connections."""
        for connection in tuple(self.connections):
            connection.reset()

    async def stop(self) -> None:
        """Refuse, drop and forget what is still waiting; what was accepted stays readable."""
        await self.close_listener()
        for task in self._tasks:
            task.cancel()
        self.drop_connections()
        gone = [connection.gone for connection in self.connections]
        await asyncio.gather(*gone, *self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def arrive(self, peer: tuple[str, int]) -> Visit:
        """Note a new connection."""
        visit = Visit(len(self.visits) + 1, peer, tls=self.implicit_tls)
        self.visits.append(visit)
        return visit

    def keep(self, visit: Visit, stuffed: bytes) -> None:
        """Accept a message: its content with a CRLF before, the final CRLF, and dots as they were sent."""
        recipients = tuple(visit.recipients)
        visit.accepted += 1
        self.messages += 1
        for recipient in recipients:
            self.addresses[recipient] += 1
        if self._on_accepted is None and not self._keep_accepted:
            return
        accepted = Accepted(
            time.time(),
            visit.number,
            visit.peer[1],
            visit.sender or "",
            recipients,
            stuffed.replace(b"\r\n.", b"\r\n")[2:] if self._keep_messages else b"",
            _message_id(stuffed),
            visit.mail_said.decode(errors="backslashreplace").strip(),
            tuple(said.decode(errors="backslashreplace").strip() for said in visit.rcpt_said),
        )
        if self._keep_accepted:
            self.accepted.append(accepted)
        if self._on_accepted is not None:
            self._on_accepted(accepted)

    def in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run what a stage waits for; `stop()` ends it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Connection(asyncio.Protocol):
    """One SMTP session, server side (RFC 5321, 2920, 3207, 4954)."""

    visit: Visit

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._script = sink.script
        self._transport: asyncio.Transport
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()
        self._at = 0
        """Where the next command begins in the buffer; in a content, the CRLF before its first byte."""
        self._scanned = 0
        """Up to here a content has been searched for its dot."""
        self._in_content = False
        self._content_seen = False
        self._too_big = False
        self._stuffed = b""
        """The content whose dot has arrived."""
        self._blocked = False
        """A stage waits, or the connection is ending: what arrives stays in the buffer."""
        self._waiting: asyncio.Task[None] | None = None
        self._replies: list[bytes] = []
        self._login: tuple[bytes, list[bytes]] | None = None
        """Mechanism and answers of an AUTH dialogue that is under way."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none, and behaves like one
        peer = transport.get_extra_info("peername") or ("", 0)
        self.visit = self._sink.arrive(peer[:2])
        self._sink.connections.add(self)
        self._reach(Stage.CONNECT, _BANNER)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._blocked:
            self._advance()

    def connection_lost(self, _: Exception | None) -> None:
        self._sink.connections.discard(self)
        if not self.gone.done():
            self.gone.set_result(None)

    def pause_writing(self) -> None:
        """A client that does not read replies is not read either."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
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
        del self._buffer[: self._at]
        self._scanned -= self._at
        self._at = 0
        self._flush()

    def _take_line(self) -> bool:
        begin = self._at
        end = self._buffer.find(b"\r\n", begin)
        if (len(self._buffer) if end < 0 else end) - begin > LINE_MAX:
            self._replies.append(_LINE_TOO_LONG)
            self._cut()
            return False
        if end < 0:
            return False
        self._at = end + 2
        line = bytes(self._buffer[begin:end])
        if self._login is not None:
            self._take_answer(line)
        elif (command := self._COMMANDS.get(line.partition(b" ")[0].upper())) is not None:
            command(self, line)
        else:
            self._replies.append(_UNKNOWN)
        return True

    def _take_content(self) -> bool:
        """Look for the dot, in what is new only; the lines of a content are never looked at one by one."""
        if not self._content_seen:
            if len(self._buffer) == self._at + 2:
                return False
            self._content_seen = True
            self._reach(Stage.CONTENT, b"")
            return True
        end = self._buffer.find(_DOT, self._scanned)
        if end < 0:
            self._scanned = max(self._scanned, len(self._buffer) - len(_DOT) + 1)
            self._skip_if_too_big(self._scanned)
            return False
        self._skip_if_too_big(end)
        self._stuffed = bytes(self._buffer[self._at : end + 2])
        self._at = end + len(_DOT)
        self._in_content = False
        if self._too_big:
            self._replies.append(_TOO_BIG)
            self._forget_transaction()
        else:
            self._reach(Stage.DOT, _ACCEPTED)
        return True

    def _skip_if_too_big(self, end: int) -> None:
        if self._too_big or end - self._at > self._sink.size_max:
            self._too_big = True
            self._at = end

    def _begin_content(self) -> None:
        """Begin at the CRLF of the DATA line, so that a lone dot is found like any other."""
        if self._at >= len(b"\r\n"):
            self._at -= len(b"\r\n")
        else:  # DATA had to wait, and its line is gone from the buffer
            self._buffer[:0] = b"\r\n"
        self._scanned = self._at
        self._in_content = True
        self._content_seen = self._script is None
        self._too_big = False

    def _forget_transaction(self) -> None:
        self.visit.sender = None
        self.visit.recipients = []
        self._stuffed = b""

    def _reach(self, stage: Stage, usual: bytes) -> None:
        """Do the usual thing, or what the script says."""
        if self._script is None:
            self._replies.append(usual)
            self._take_effect(stage)
            return
        self._sink.events.append((time.time(), self.visit.number, stage))
        self.visit.behind = bytes(self._buffer[self._at : self._at + LINE_MAX])
        self._act(stage, usual, self._script(stage, self.visit))

    def _act(self, stage: Stage | None, usual: bytes, action: Action | None) -> None:
        """Answer at a stage; no stage means that it has taken effect already."""
        match action:
            case None:
                self._answer(stage, usual, usual)
            case Reply(text, then_cut):
                self._answer(stage, usual, _as_bytes(text))
                if then_cut:
                    self._cut()
            case Cut():
                self._cut()
            case Reset():
                self._flush()
                self.reset()
            case Accept(then):
                self._accept(stage, usual, then)
            case Stall() | Flood() | Hold() | Trickle():
                self._dally(stage, usual, action)
            case _:
                assert_never(action)

    def _dally(self, stage: Stage | None, usual: bytes, action: Stall | Flood | Hold | Trickle) -> None:
        match action:
            case Stall(deaf):
                self._blocked = True
                if deaf:
                    self._transport.pause_reading()
            case Flood(text):
                self._wait(self._flood(text))
            case Hold():
                self._wait(self._hold(stage, usual, action))
            case Trickle():
                self._wait(self._trickle(stage, usual, action))

    def _accept(self, stage: Stage | None, usual: bytes, then: Action | None) -> None:
        if stage is not Stage.DOT:
            raise ValueError(f"A script answered Accept at {stage}: it is an answer at DOT only.")
        self._take_effect(stage)
        self._act(None, usual, then)

    def _answer(self, stage: Stage | None, usual: bytes, text: bytes) -> None:
        self._replies.append(text)
        if text[:1] == usual[:1]:
            self._take_effect(stage)
        else:
            self._take_back(stage)

    def _take_effect(self, stage: Stage | None) -> None:
        if stage is Stage.DATA:
            self._begin_content()
        elif stage is Stage.DOT:
            self._sink.keep(self.visit, self._stuffed)
            self._forget_transaction()
        elif stage is Stage.EHLO or stage is Stage.RSET:
            self._forget_transaction()
        elif stage is Stage.AUTH:
            self.visit.authenticated = True
        elif stage is Stage.STARTTLS:
            self._upgrade()
        elif stage is Stage.QUIT:
            self._cut()

    def _take_back(self, stage: Stage | None) -> None:
        if stage is Stage.MAIL:
            self.visit.sender = None
        elif stage is Stage.RCPT:
            self.visit.recipients.pop()
        elif stage is Stage.DOT:
            self._forget_transaction()

    def _wait(self, work: Coroutine[None, None, None]) -> None:
        self._flush()
        self._blocked = True
        self._waiting = self._sink.in_background(work)

    async def _hold(self, stage: Stage | None, usual: bytes, hold: Hold) -> None:
        """Wait, then go on; also for a client that left meanwhile, since its message was handed over."""
        await hold.event.wait()
        self._go_on(lambda: self._act(stage, usual, hold.then))

    async def _flood(self, text: bytes) -> None:
        while not self._transport.is_closing():
            if not self._transport.get_write_buffer_size():
                self._transport.write(text)
                self.visit.flooded += len(text)
            await asyncio.sleep(0)

    async def _trickle(self, stage: Stage | None, usual: bytes, trickle: Trickle) -> None:
        text = usual if trickle.reply is None else _as_bytes(trickle.reply)
        for begin in range(0, len(text), trickle.chunk):
            if begin:
                await asyncio.sleep(trickle.delay_s)
            if self._transport.is_closing():
                return
            self._transport.write(text[begin : begin + trickle.chunk])
        decide = self._take_effect if text[:1] == usual[:1] else self._take_back
        self._go_on(lambda: decide(stage))

    def _go_on(self, step: Callable[[], None]) -> None:
        """End a wait: do what was waited for, then what the client sent meanwhile."""
        self._waiting = None
        self._blocked = False
        step()
        self._advance()

    def _upgrade(self) -> None:
        """Hand the connection to TLS; plain text that came with STARTTLS is dropped (RFC 3207 §4.2)."""
        self._transport.pause_reading()  # before the client can react to the 220
        self._buffer.clear()
        self._at = 0
        self._wait(self._start_tls())

    async def _start_tls(self) -> None:
        assert self._sink.tls is not None
        loop = asyncio.get_running_loop()
        secure: asyncio.Transport | None = None
        try:
            secure = await loop.start_tls(self._transport, self, self._sink.tls, server_side=True)
        except OSError:
            return  # the client broke the handshake off, which ends the visit
        finally:
            if secure is None:  # asyncio tells nobody about a connection that is lost in the handshake
                self._transport.abort()
                self.connection_lost(None)
        assert secure is not None
        self._transport = secure
        self.visit.tls = True
        self._go_on(self._forget_transaction)

    def _ehlo(self, line: bytes) -> None:
        words = [b"sink.invalid"]
        if line[:4].upper() != b"HELO":
            words += self._extensions()
        usual = b"".join(b"250-%s\r\n" % word for word in words[:-1]) + b"250 %s\r\n" % words[-1]
        self._reach(Stage.EHLO, usual)

    def _extensions(self) -> list[bytes]:
        words = [b"SIZE %d" % self._sink.size_max, *([b"8BITMIME"] if self._sink.eight_bit else [])]
        words += [word.encode() for word in self._sink.extensions]
        if self._sink.pipelining:
            words.insert(0, b"PIPELINING")
        if self._tls_on_offer:
            words.append(b"STARTTLS")
        elif self._sink.login is not None:
            words.append(b"AUTH " + b" ".join(_PROMPTS))
        return words

    @property
    def _tls_on_offer(self) -> bool:
        return self._sink.tls is not None and not self.visit.tls

    def _mail(self, line: bytes) -> None:
        visit = self.visit
        sender, parameters = _path(line, b"MAILFROM:")
        if self._sink.login is not None and not visit.authenticated:
            self._replies.append(_LOGIN_FIRST)
        elif visit.sender is not None:
            self._replies.append(_NESTED_MAIL)
        elif sender is None:
            self._replies.append(_SYNTAX)
        elif parameters and (fault := self._fault_of(parameters, "MAIL")):
            self._replies.append(fault)
        elif not sender.isascii() and b"SMTPUTF8" not in parameters.upper():
            self._replies.append(_NOT_ASCII)
        else:
            visit.sender = sender
            visit.mail_said, visit.rcpt_said = parameters, []
            visit.messages_begun += 1
            if self._script is None:
                self._replies.append(_SENDER_OK)
            else:
                self._reach(Stage.MAIL, _SENDER_OK)

    def _rcpt(self, line: bytes) -> None:
        visit = self.visit
        recipient, parameters = _path(line, b"RCPTTO:")
        if visit.sender is None:
            self._replies.append(_MAIL_FIRST)
        elif not recipient:
            self._replies.append(_SYNTAX)
        elif len(visit.recipients) >= RECIPIENTS_MAX:
            self._replies.append(_TOO_MANY_RECIPIENTS)
        elif parameters and (fault := self._fault_of(parameters, "RCPT")):
            self._replies.append(fault)
        elif not recipient.isascii() and b"SMTPUTF8" not in visit.mail_said.upper():
            self._replies.append(_NOT_ASCII)
        else:
            visit.recipients.append(recipient)
            visit.rcpt_said.append(parameters)
            if self._script is None:
                self._replies.append(_RECIPIENT_OK)
            else:
                self._reach(Stage.RCPT, _RECIPIENT_OK)

    def _fault_of(self, parameters: bytes, command: str) -> bytes | None:
        """What is wrong with the parameters: one was not offered, or the declared size is too much (RFC 1870)."""
        known = self._sink.parameters[command]
        for parameter in parameters.upper().split():
            name, _, value = parameter.partition(b"=")
            if name not in known:
                return _UNKNOWN_PARAMETER
            if name == b"SIZE" and value.isdigit() and int(value) > self._sink.size_max:
                return _TOO_BIG
        return None

    def _data(self, _: bytes) -> None:
        if not self.visit.recipients:
            self._replies.append(_MAIL_FIRST if self.visit.sender is None else _RECIPIENT_FIRST)
        else:
            self._reach(Stage.DATA, _GO_AHEAD)

    def _rset(self, _: bytes) -> None:
        self._reach(Stage.RSET, _OK)

    def _noop(self, _: bytes) -> None:
        self._replies.append(_OK)

    def _vrfy(self, _: bytes) -> None:
        self._replies.append(_CANNOT_VERIFY)

    def _quit(self, _: bytes) -> None:
        self._reach(Stage.QUIT, _BYE)

    def _starttls(self, _: bytes) -> None:
        if self._tls_on_offer:
            self._reach(Stage.STARTTLS, _TLS_GO_AHEAD)
        else:
            self._replies.append(_SEQUENCE if self.visit.tls else _UNKNOWN)

    def _auth(self, line: bytes) -> None:
        mechanism, *initial = line.split()[1:] or [b""]
        if self._sink.login is None:
            self._replies.append(_UNKNOWN)
        elif self._tls_on_offer:
            self._replies.append(_TLS_FIRST)
        elif self.visit.authenticated or self.visit.sender is not None:
            self._replies.append(_SEQUENCE)
        elif mechanism.upper() not in _PROMPTS:
            self._replies.append(_NO_MECHANISM)
        else:
            self._login = (mechanism.upper(), initial)
            self._ask_or_judge()

    def _take_answer(self, line: bytes) -> None:
        assert self._login is not None
        if line == b"*":
            self._login = None
            self._replies.append(_LOGIN_CANCELLED)
        else:
            self._login[1].append(line)
            self._ask_or_judge()

    def _ask_or_judge(self) -> None:
        assert self._login is not None
        mechanism, answers = self._login
        if len(answers) < len(_PROMPTS[mechanism]):
            self._replies.append(_PROMPTS[mechanism][len(answers)])
            return
        self._login = None
        if _credentials(mechanism, answers) == self._sink.login:
            self._reach(Stage.AUTH, _LOGIN_OK)
        else:
            self._sink.refused_logins += 1
            self._replies.append(_LOGIN_REFUSED)

    _COMMANDS: ClassVar[dict[bytes, "Callable[[_Connection, bytes], None]"]] = {
        b"MAIL": _mail,
        b"RCPT": _rcpt,
        b"DATA": _data,
        b"EHLO": _ehlo,
        b"HELO": _ehlo,
        b"LHLO": _ehlo,
        b"RSET": _rset,
        b"NOOP": _noop,
        b"VRFY": _vrfy,
        b"QUIT": _quit,
        b"AUTH": _auth,
        b"STARTTLS": _starttls,
    }


def _as_bytes(text: bytes | str) -> bytes:
    """What a script says, as it says it; a str without an end of line gets one."""
    if isinstance(text, bytes):
        return text
    return text.encode() if text.endswith("\n") else text.encode() + b"\r\n"


def _path(line: bytes, words: bytes) -> tuple[str | None, bytes]:
    """The address between the angle brackets and the parameters behind; no address when the words differ."""
    head, opened, rest = line.partition(b"<")
    address, closed, parameters = rest.partition(b">")
    if not (opened and closed) or head.replace(b" ", b"").upper() != words:
        return None, b""
    return address.decode(errors="backslashreplace"), parameters


def _parameters(offered: set[str]) -> dict[str, set[bytes]]:
    """The parameters that each command may have."""
    return {
        command: set().union(*(names for extension, names in brought.items() if extension in offered))
        for command, brought in _PARAMETERS.items()
    }


def _credentials(mechanism: bytes, answers: list[bytes]) -> tuple[str, ...]:
    """User and password as they were given (RFC 4616; LOGIN is older than its standards), () for nonsense."""
    try:
        decoded = [b64decode(answer, validate=True).decode() for answer in answers]
    except (binascii.Error, UnicodeDecodeError):
        return ()
    return tuple(decoded[0].split("\0")[1:] if mechanism == b"PLAIN" else decoded)


def _message_id(message: bytes) -> str:
    """The Message-ID of a message that has a CRLF before it, "" when it has none."""
    end = message.find(b"\r\n\r\n")
    head = message if end < 0 else message[:end]
    begin = head.lower().find(_MESSAGE_ID)
    words = head[begin + len(_MESSAGE_ID) :].split(None, 1) if begin >= 0 else []
    return words[0].decode(errors="replace") if words else ""


class _Journal:
    """A file with a line per message and recipient accepted: time, peer's port, recipient, Message-ID."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lines: list[str] = []
        self._flush_at: asyncio.TimerHandle | None = None

    def note(self, accepted: Accepted) -> None:
        """Take the lines of a message; they are in the file soon."""
        head, tail = f"{accepted.at:.6f}\t{accepted.peer_port}\t", f"\t{accepted.message_id}\n"
        self._lines += [f"{head}{recipient}{tail}" for recipient in accepted.recipients]
        if self._flush_at is None:
            loop = asyncio.get_running_loop()
            self._flush_at = loop.call_later(_JOURNAL_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what is waiting, in one write."""
        if self._flush_at is not None:
            self._flush_at.cancel()
            self._flush_at = None
        self._file.write("".join(self._lines).encode())
        self._lines.clear()

    def close(self) -> None:
        """Write the rest and close the file."""
        self.flush()
        self._file.close()


async def _serve(options: argparse.Namespace) -> None:
    journal = _Journal(options.journal) if options.journal else None
    sink = Sink(
        pipelining=options.pipelining,
        keep_messages=False,
        keep_accepted=False,
        on_accepted=journal.note if journal else None,
    )
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop.set)
    await sink.start(options.host, options.port)
    sys.stdout.write(f"listening {sink.host}:{sink.port}\n")
    sys.stdout.flush()
    await told_to_stop.wait()
    await sink.stop()
    if journal:
        journal.close()
    counts = {
        "accepted": sink.messages,
        "addresses": len(sink.addresses),
        "duplicates": sink.addresses.total() - len(sink.addresses),
    }
    sys.stdout.write(json.dumps(counts) + "\n")


def _new_loop() -> asyncio.AbstractEventLoop:
    """The loop of uvloop where that is installed: three times as fast here."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> None:
    """Serve until SIGTERM or SIGINT, then say what came in."""
    parser = argparse.ArgumentParser(
        prog="python -m outbox.sandbox.smtp_sink", description="An SMTP server that keeps mail."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--journal", type=Path, help="append time, port, recipient and Message-ID to this file")
    parser.add_argument("--no-pipelining", dest="pipelining", action="store_false")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_serve(options))


if __name__ == "__main__":
    main()
