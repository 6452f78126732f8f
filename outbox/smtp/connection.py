"""One SMTP connection after its set-up: mail transactions whose final dot waits for the mark.

    MAIL+RCPT+DATA in one write → 354 → content without its dot → mark (commit) → guard → the dot → 250 → settle

Where PIPELINING is offered an envelope is one write; where it is not, each command waits for its reply. The next
envelope waits for the reply to the dot in either case: RFC 2920 §3.1 allows to write it behind the dot, but some
servers refuse that, and some lose it. aiosmtplib set the connection up; its message path fuses DATA, content and dot,
so the transport was passed on to this protocol.

A refusal reaches the `ConnectionOwner` with its subject (`reply_class`, `connection_history`): only those of the
recipient and of the message are verdicts on the email. The connection knows nothing of Postgres.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, assert_never, cast

from outbox.smtp.commands import Commands
from outbox.smtp.connection_history import ConnectionHistory
from outbox.smtp.connection_owner import ConnectionOwner
from outbox.smtp.outgoing import Try
from outbox.smtp.refusal import TAKES_NOTHING, About, Refusal, Stage
from outbox.smtp.replies import GarbageError, Reply, ReplyReader
from outbox.smtp.reply_class import classify
from outbox.smtp.route_headers import prepare
from outbox.smtp.verdict import REPLY_CHARACTERS_MAX, Accepted, Refused, Verdict, judge_silence

QUIT_TIMEOUT_S: Final = 5.0
SERVICE_CLOSING: Final = 421  # RFC 5321 §3.8: the server closes; a reply to any command
START_CONTENT: Final = 354
COMPLETED: Final = range(200, 300)  # RFC 5321 §4.2.1: positive completion
REFUSED_MIN: Final = 400  # RFC 5321 §4.2.1: 4xx and 5xx are refusals


class State(Enum):
    """State of a connection.

        attach                 MAIL RCPT DATA        354           all content written     mark committed
          │     ┌──────┐ start  ┌──────────┐       ┌─────────┐        ┌─────────┐       ┌────────────────┐
          └────▶│ IDLE │───────▶│ ENVELOPE │──────▶│ CONTENT │───────▶│ MARKING │──────▶│ AWAITING_REPLY │
                └──────┘        └──────────┘       └─────────┘        └─────────┘       └────────────────┘
                 │    ▲  refused     │                                                          │ reply to the dot
                 │    └──────────────┴──────────────────────────────────────────────────────────┘
                 ▼ no more is wanted                              (the next try begins at once if one is ready)
             ┌──────────┐  221, silence       ┌────────┐
             │ QUITTING │────────────────────▶│ CLOSED │◀── from each state: the end of the connection, garbage,
             └──────────┘                     └────────┘    silence, 421, `abandon`, `give_up`

    At the end of the connection a try in ENVELOPE or CONTENT is returned unsent, unless it was refused before; one in
    MARKING stays with the owner, whose commit may be in progress; one in AWAITING_REPLY is in doubt.
    """

    IDLE = auto()
    ENVELOPE = auto()
    CONTENT = auto()
    MARKING = auto()
    AWAITING_REPLY = auto()
    QUITTING = auto()
    CLOSED = auto()


class Expected(Enum):
    """Command that the server's next reply answers."""

    MAIL = auto()
    RCPT = auto()
    DATA = auto()
    DOT = auto()
    LONE_DOT = auto()
    RSET = auto()
    QUIT = auto()


OnReply = Callable[[Expected | None, Reply], None]
"""Observer of replies; the command that one answers is None if there is none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a connection. `messages_max` is the number of messages after which it is closed."""

    command_timeout_s: float
    data_done_timeout_s: float
    """Seconds to wait for the reply to the final dot."""
    messages_max: int


class SmtpConnection(asyncio.Protocol):
    """Client's side of the mail transactions on one connection.

    `current` is the try that it is at, None between two. An email that the server cannot take, by what it offers, or
    that no server should get (`content`), is refused here and not sent; the connection goes on. This is the last check,
    so it also covers emails that an older version made.
    """

    def __init__(
        self,
        owner: ConnectionOwner,
        commands: Commands,
        limits: Limits,
        *,
        clock: Callable[[], float],
        redact: Callable[[str], str] | None = None,
        on_reply: OnReply | None = None,
    ) -> None:
        """`redact` takes secrets out of the server's replies, and `on_reply` is given each of them first."""
        self.owner = owner
        self.commands = commands
        self.limits = limits
        self.clock = clock
        self.transport: asyncio.Transport | None = None
        self.state = State.IDLE
        self.current: Try | None = None
        self.is_draining = False
        """True if nothing more is taken after the current try."""
        self.messages_left = limits.messages_max
        self.history = ConnectionHistory()
        self.began_at = clock()
        """Time at which the latest envelope was written."""
        self.idle_since: float | None = None
        self._pipelining = commands.offers.pipelining
        self._mail = b""  # the command of the current try
        self._refusal: Refusal | None = None  # of the current transaction, until all of it is answered
        self._reset_needed = False
        self._expected: deque[Expected] = deque()
        self._replies = ReplyReader(redact)
        self._on_reply = on_reply
        self._writable = True
        self._content: Iterator[bytes] | None = None  # the part of the current content that is still to be written
        self._deadline_s: float | None = None
        self._heard_at = clock()

    @property
    def is_closed(self) -> bool:
        """Return True once the connection is over."""
        return self.state is State.CLOSED

    @property
    def awaiting_reply(self) -> Try | None:
        """Return the try whose final dot is written and not answered."""
        return self.current if self.state is State.AWAITING_REPLY else None

    @property
    def silence_s(self) -> float:
        """Return for how many seconds the server has not replied while something is in flight."""
        return self.clock() - self._heard_at

    def is_marking(self, tried: Try) -> bool:
        """Return True if the connection still waits for the mark of this try, so that its dot may be written."""
        return self.current is tried and self.state is State.MARKING

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over a transport that is connected, encrypted and authenticated as far as it will be."""
        self.transport = transport
        transport.set_protocol(self)
        # So that "writable" means: all is with the kernel. Not 0: asyncio's TLS would call nothing at all too much.
        transport.set_write_buffer_limits(high=1)
        self._go_on()

    def start(self, tried: Try) -> None:
        """Begin with this try; the connection must be idle."""
        assert self.state is State.IDLE
        assert self.current is None
        self.idle_since = None
        self._heard_at = self.clock()
        self.messages_left -= 1
        if self._may_send(tried):
            self._begin(tried)
        else:
            self._go_on()

    def send_final_dot(self) -> None:
        """Write the final dot: the mark is committed and the guard has agreed. The commit point of SMTP."""
        assert self.state is State.MARKING
        assert self.current is not None
        self.state = State.AWAITING_REPLY
        self._expected.append(Expected.DOT)
        self._write(b".\r\n")
        now = self.clock()
        self.current.note_dot(now)
        self._deadline_s = now + self.limits.data_done_timeout_s

    def limit_to(self, messages: int) -> None:
        """Send at most so many messages on this connection in all, since the server takes no more."""
        begun = self.history.accepted + (self.current is not None)
        self.messages_left = min(self.messages_left, max(messages - begun, 0))

    def abandon(self, reason: str) -> None:
        """Let go of the current try, which is not this relay's any more, without a call to the owner about it.

        The connection is dropped, so the server discards what it has (RFC 5321 §4.1.1.10).
        """
        self.current = None
        self._drop(None, reason)

    def close_politely(self) -> None:
        """Take nothing more, and write QUIT as soon as nothing is in flight."""
        self.is_draining = True
        if self.state is State.IDLE:
            self.state = State.QUITTING
            self._expected.append(Expected.QUIT)
            self._write(b"QUIT\r\n")
            self._deadline_s = self.clock() + QUIT_TIMEOUT_S

    def give_up(self, reason: str) -> None:
        """Drop the connection in any state: a try before its dot was not sent, one past it is in doubt."""
        self._drop(None, reason)

    def check_deadline(self) -> None:
        """Fail if the server has been silent for too long; called about once a second."""
        if self._deadline_s is None or self.state is State.MARKING or self.clock() < self._deadline_s or self.is_closed:
            return
        waited_for = self._expected[0].name if self._expected else "the content to be taken"
        self._fail(f"the server was silent for too long ({waited_for})")

    def data_received(self, data: bytes) -> None:
        """Take replies as they come (asyncio.Protocol)."""
        self._heard_at = self.clock()
        try:
            for reply in self._replies.feed(data):
                if self.state is State.CLOSED:
                    return
                if self._on_reply is not None:
                    self._on_reply(self._expected[0] if self._expected else None, reply)
                self._answer(reply)
        except GarbageError as garbage:
            self._fail(str(garbage))

    def pause_writing(self) -> None:
        """Note that some of what was written is not with the kernel yet (asyncio.Protocol)."""
        self._writable = False

    def resume_writing(self) -> None:
        """Note that all that was written is with the kernel (asyncio.Protocol)."""
        self._writable = True
        self._write_on()

    def eof_received(self) -> None:
        """Fail at once: the server sends nothing more. Left to itself, asyncio would write on first."""
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the server, the network or this side has ended the connection (asyncio.Protocol)."""
        if self._expected and self._expected[0] is Expected.QUIT:
            self._finish(None)
        else:
            self._fail(f"the connection was lost{f' ({exc})' if exc else ''}")

    def _may_send(self, tried: Try) -> bool:
        """Return True if the email may be sent to this server; if not, it is refused."""
        outgoing = tried.outgoing
        if tried.prepared is None:
            tried.prepare(prepare(outgoing, self.commands.headers))
        prepared = tried.prepared
        assert prepared is not None
        problem = prepared.problem
        if problem is None:
            try:
                self._mail = self.commands.mail(outgoing, prepared)
            except ValueError as error:
                problem = str(error)
        if problem is None:
            return True
        self._report(tried, Refused(problem))
        return False

    def _begin(self, tried: Try) -> None:
        """Write the commands that open a transaction: as many as the server takes at once."""
        self.current = tried
        self.state = State.ENVELOPE
        self._refusal = None
        self.began_at = self.clock()
        self._deadline_s = self.began_at + self.limits.command_timeout_s
        reset = b""
        if self._reset_needed:  # a refused transaction is still open there, and a second MAIL would be out of order
            self._reset_needed = False
            self._expected.append(Expected.RSET)
            reset = b"RSET\r\n"
            if not self._pipelining:
                self._write(reset)
                return
        self._expected.append(Expected.MAIL)
        if not self._pipelining:
            self._write(self._mail)
            return
        self._expected += (Expected.RCPT, Expected.DATA)
        self._write(reset + self._mail + self.commands.rcpt(tried.outgoing) + b"DATA\r\n")

    def _next(self) -> Try | None:
        while not self.is_draining and self.messages_left > 0 and (tried := self.owner.take()) is not None:
            if self._may_send(tried):
                self.messages_left -= 1
                return tried
        return None

    def _go_on(self) -> None:
        """Begin the next try, rest, or say QUIT; called with nothing in flight."""
        if self.state in (State.CLOSED, State.QUITTING):
            return
        self.state = State.IDLE
        tried = self._next()
        if tried is not None:
            self._begin(tried)
        elif self.is_draining or self.messages_left <= 0:
            self.close_politely()
        else:
            self._deadline_s = None
            self.idle_since = self.clock()
            self.owner.idle(self)

    def _end_try(self) -> Try:
        """Return the current try, which is over; nothing is in flight then."""
        tried, self.current = self.current, None
        assert tried is not None
        self.state = State.IDLE
        return tried

    def _answer(self, reply: Reply) -> None:
        if not self._expected:
            self._answer_unasked(reply)
            return
        expected = self._expected.popleft()
        if reply.code < REFUSED_MIN:
            self._answer_good(expected, reply)
        elif expected is Expected.QUIT:
            self._drop(None)
        else:
            self._answer_refused(expected, self._refusal_of(expected, reply))

    def _answer_good(self, expected: Expected, reply: Reply) -> None:
        match expected:
            case Expected.DOT:
                self._answer_dot(reply)
            case Expected.MAIL | Expected.RCPT:
                self._answer_envelope(expected, reply)
            case Expected.DATA:
                self._answer_data(reply)
            case Expected.RSET:
                self._answer_reset(reply)
            case Expected.LONE_DOT:
                self._end_refused()
            case Expected.QUIT:
                self._drop(None)
            case _:
                assert_never(expected)

    def _answer_envelope(self, expected: Expected, reply: Reply) -> None:
        if reply.code not in COMPLETED:
            if self._refusal is None:
                self._fail(f"no reply to {expected.name}: {reply.code} {reply.text}"[:200])
        elif self._pipelining or self.current is None:
            pass
        elif expected is Expected.MAIL:
            self._step(Expected.RCPT, self.commands.rcpt(self.current.outgoing))
        else:
            self._step(Expected.DATA, b"DATA\r\n")

    def _answer_data(self, reply: Reply) -> None:
        if reply.code == START_CONTENT and self._refusal is not None:
            # DATA went out with a RCPT that was then refused: a lone dot ends it (RFC 2920 §3.1).
            self._step(Expected.LONE_DOT, b".\r\n")
        elif reply.code == START_CONTENT and self.current is not None:
            self._write_content(self.current)
        else:
            self._fail(f"no reply to DATA: {reply.code} {reply.text}"[:200])

    def _answer_dot(self, reply: Reply) -> None:
        if reply.code not in COMPLETED:
            self._fail(f"no reply to the final dot: {reply.code} {reply.text}"[:200])
            return
        tried = self._end_try()
        self.history.note_accepted()
        self._report(tried, Accepted(f"{reply.code} {reply.text}"[:REPLY_CHARACTERS_MAX]))
        self._go_on()

    def _answer_reset(self, reply: Reply) -> None:
        """Go on to MAIL; pipelined, that is on its way."""
        if reply.code not in COMPLETED:
            self._fail(f"no reply to RSET: {reply.code} {reply.text}"[:200])
        elif not self._pipelining and self.current is not None:
            self._step(Expected.MAIL, self._mail)

    def _answer_refused(self, expected: Expected, refusal: Refusal) -> None:
        """Act on a 4xx or 5xx reply. The first one of a transaction shows why it ended; the others follow from it."""
        if refusal.code == SERVICE_CLOSING or (refusal.about is About.CLOSING and expected is not Expected.LONE_DOT):
            self._answer_closing(expected, refusal)
        elif expected is Expected.DOT:
            self._conclude(self._end_try(), refusal)
            self._go_on()
        elif expected is Expected.RSET:  # no transaction can be begun here: the next email goes by another connection
            self._refusal = replace(refusal, about=About.SESSION)
            self._drop(None)
        elif expected is Expected.LONE_DOT:
            self._end_refused()
        else:
            self._answer_no(expected, refusal)

    def _answer_no(self, expected: Expected, refusal: Refusal) -> None:
        """Keep a refusal of the envelope until the rest of what was pipelined is answered."""
        self._refusal = self._refusal or refusal
        if expected is Expected.DATA or not self._pipelining:
            # A refused MAIL opened nothing; a second MAIL in an open transaction would be out of order.
            self._reset_needed = self._refusal.stage != Stage.MAIL
            self._end_refused()

    def _answer_closing(self, expected: Expected, refusal: Refusal) -> None:
        """End a connection that the server closes, or takes nothing more on: in reply to any command, and no message
        is to blame.
        """
        names_cause = refusal.about is not About.CLOSING
        if expected is not Expected.DOT and self._refusal is None and (names_cause or self.history.is_used):
            self._refusal = refusal  # it closes after other mail, or for a cause that it names: the server works
            self._drop(None)
            return
        reason = self._reason_of(refusal)  # first, so that the owner knows of the trouble when it decides
        if self.state is State.AWAITING_REPLY:
            self._conclude(self._end_try(), refusal)
        self._drop(None if names_cause else reason, reason)

    def _answer_unasked(self, reply: Reply) -> None:
        """Fail after a reply to nothing: the server closes. In mid-content a refusal is the message's or its own."""
        if reply.code < REFUSED_MIN:
            self._fail(f"a reply to nothing: {reply.code} {reply.text}"[:200])
            return
        refusal = self._refusal_of(Expected.DATA, reply)
        if self.current is not None and self.state is not State.MARKING and refusal.about is not About.CLOSING:
            self._refusal = refusal
        self._fail(self._reason_of(refusal))

    def _reason_of(self, refusal: Refusal) -> str:
        """Return why the server closes; the owner learns at once if it takes no client's mail."""
        reply = f"{refusal.code} {refusal.text}"
        if refusal.code != TAKES_NOTHING or refusal.about is not About.CLOSING:
            return f"the server closes: {reply}"[:200]
        reason = f"the server takes no mail for now: {reply}"[:200]
        self.owner.paused(reason)
        return reason

    def _refusal_of(self, expected: Expected, reply: Reply) -> Refusal:
        stage = Stage.DOT if expected is Expected.LONE_DOT else Stage(expected.name)
        about = classify(stage, reply.code, reply.text)
        return Refusal(about, stage, reply.code, reply.text, self.commands.redirect_to)

    def _end_refused(self) -> None:
        """End a transaction of which all is answered, and which was refused."""
        refusal, self._refusal = self._refusal, None
        if self.current is not None and refusal is not None:
            self._conclude(self._end_try(), refusal)
        self._go_on()

    def _conclude(self, tried: Try, refusal: Refusal) -> None:
        """Report a try whose transaction was refused, by the subject of the refusal."""
        about = self.history.note_refusal(refusal)
        if about is About.SESSION or self.history.is_exhausted:
            self.is_draining = True
        if about in (About.RECIPIENT, About.MESSAGE):
            self.owner.on_verdict(tried, refusal.verdict)
        else:
            self.owner.on_refusal(self, tried, refusal, about)

    def _report(self, tried: Try, verdict: Verdict) -> None:
        """Report a verdict; a reply that another address got must not pass for one about the recipient."""
        if self.commands.redirect_to:
            verdict = replace(verdict, reply=f"redirected to {self.commands.redirect_to}: {verdict.reply}")
        self.owner.on_verdict(tried, verdict)

    def _step(self, expected: Expected, command: bytes) -> None:
        self._expected.append(expected)
        self._deadline_s = self.clock() + self.limits.command_timeout_s
        self._write(command)

    def _write_content(self, tried: Try) -> None:
        assert tried.prepared is not None
        self.state = State.CONTENT
        self._deadline_s = self.clock() + self.limits.command_timeout_s
        self._content = self.commands.content(tried.outgoing, tried.prepared)
        self._write_on()

    def _write_on(self) -> None:
        """Write what the kernel takes of the content; when it has all, ask for the mark.

        Piece by piece, since TLS takes a write whole, however long, and reports what the kernel did not take at the
        next one only: with the content still here, a connection that breaks would leave doubt about a dot behind it.
        """
        while self.state is State.CONTENT and self._writable:
            assert self._content is not None
            assert self.current is not None
            piece = next(self._content, None)
            if piece is not None:
                self._write(piece)
            else:
                self._content = None
                self.state = State.MARKING
                self.owner.ask_mark(self, self.current)

    def _write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def _fail(self, reason: str) -> None:
        """Drop a connection on which nothing more can be exchanged, and report what is in flight."""
        if self.is_closed:
            return
        # An idle connection that ends is no news; one that ends in the middle of a dialogue is.
        busy = self.current is not None or self._expected
        self._drop(reason if busy else None, reason)

    def _drop(self, trouble: str | None, reason: str = "the connection was dropped") -> None:
        if self.transport is not None:
            self.transport.abort()
        self._finish(trouble, reason)

    def _finish(self, trouble: str | None, reason: str = "the connection was dropped") -> None:
        """Report the current try and the end; see `State` for what becomes of the try."""
        state, self.state = self.state, State.CLOSED
        if state is State.CLOSED:
            return
        self._deadline_s = None
        self._content = None
        tried, self.current = self.current, None
        if tried is None:
            pass
        elif state is State.AWAITING_REPLY:
            self._report(tried, judge_silence(reason, dot_sent=True))
        elif self._refusal is not None:
            self._conclude(tried, self._refusal)  # the server did say it, before the connection ended
        elif state is not State.MARKING:
            self.owner.return_unsent(tried, reason)
        self.owner.closed(self, trouble)


def transport_of(value: object) -> asyncio.Transport | None:
    """Return aiosmtplib's transport, None after the connection's end, under its real type: it is one that writes."""
    return cast("asyncio.Transport | None", value)
