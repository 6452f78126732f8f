"""One SMTP connection after its set-up: mail transactions whose final dot waits for the mark.

    MAIL+RCPT+DATA in one write → 354 → content without its dot → mark (commit) → guard → the dot → 250 → settle

Where PIPELINING is offered the envelope of the next message follows the dot of the last without waiting for its reply
(RFC 2920 §3.1); where it is not, each command waits for its reply. At most one message per connection is past its dot
and unanswered: the content of the next is written after that answer only. aiosmtplib set the connection up; its message
path fuses DATA, content and dot, so the transport was handed over to this protocol.

It knows the desk that it works for (`Desk`, the relay), and nothing of Postgres.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum, auto
from typing import Final, Literal, Protocol, cast

from outbox.content import PIECE_BYTES, dot_stuffed, header_of, pieces
from outbox.esmtp import TOO_LARGE, Offers, body_parameters, original_recipient
from outbox.ledger import Claim
from outbox.letterhead import Letterhead, check
from outbox.replies import GarbageError, Reply, ReplyReader
from outbox.reply_class import Refusal
from outbox.verdict import Deferred, Refused, Verdict, judge_reply, judge_silence, takes_nothing

# Between a dot and the envelope behind it. Postfix writes no reply while commands that it has read wait: with both in
# one read, the 250 waits for all that it asks (policies, milters) before the next 354, and a kill then means doubt.
CHAIN_AFTER_S: Final = 0.001
QUIT_TIMEOUT_S: Final = 5.0
SERVICE_CLOSING: Final = 421  # RFC 5321 §3.8: the server closes; said in reply to anything
START_CONTENT: Final = 354
LOGIN_FIRST: Final = 530  # RFC 4954 §6; "STARTTLS first" in RFC 3207 §4

Throttle = Literal["rate", "connections"]


class Desk(Protocol):
    """Where a conversation gets its mail and brings its news. All calls are synchronous and on the loop's thread."""

    def take(self) -> Claim | None:
        """The next claim to send, or None: nothing is ready, or no more is wanted of this connection."""

    def ask_mark(self, conversation: "Conversation", claim: Claim) -> None:
        """The content is written: call `hand_over` once the mark is committed, else `abandon`."""

    def judged(self, claim: Claim, verdict: Verdict) -> None:
        """A try has ended in a verdict; `claim.marked` says on which side of the mark."""

    def untouched(self, claim: Claim, reason: str) -> None:
        """A try came to nothing by no fault of the message, before its mark."""

    def idle(self, conversation: "Conversation") -> None:
        """The connection has nothing to do; `start` gives it something."""

    def paused(self, reason: str) -> None:
        """The server said that it takes nothing from anybody for now; `closed` follows."""

    def throttled(self, conversation: "Conversation", kind: Throttle, reason: str) -> None:
        """Hear that the server wants mail more slowly ("rate") or over fewer connections ("connections").

        The claim that met this comes back by `requeue`, or as withdrawn if its dot was written.
        """

    def session_full(self, conversation: "Conversation", messages: int | None) -> None:
        """Hear that the server takes no more on this connection, which closes; nothing is wrong otherwise.

        `messages` is how many it took before, where that may be the limit; None where the limit is another one.
        """

    def route_refused(self, claim: Claim, refusal: Refusal) -> None:
        """Decide about a refusal that may concern the sender, this host, the login or our syntax; judge the claim."""

    def requeue(self, claim: Claim, reason: str) -> None:
        """Take back a claim that the server did not take for a reason that is not its own; its dot is not written."""

    def closed(self, conversation: "Conversation", trouble: str | None) -> None:
        """The connection is over; `trouble` says what was wrong with the server, None if nothing was."""


class Expected(Enum):
    """What the server's next reply answers."""

    MAIL = auto()
    RCPT = auto()
    DATA = auto()
    DOT = auto()
    LONE_DOT = auto()
    RSET = auto()
    QUIT = auto()


class Conversation(asyncio.Protocol):
    """The client's side of the mail transactions on one connection, with what the server `offers`.

    `ahead` is the claim whose envelope or content is under way and whose dot is not written; `handed_over` the one
    whose dot is written and not answered. Both may be there at once, when chained.

    An email that the server cannot take, by what it offers, or that no server should get (`content`), is refused here
    and not sent; the connection goes on.
    What the route's `letterhead` says goes before each message. With `redirect_to` that address gets every email
    instead of its recipient, whom one header line more names; each verdict says so. Here, at the last gate, nothing
    that was made or claimed before slips by.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        offers: Offers,
        command_timeout_s: float,
        data_done_timeout_s: float,
        messages_max: int,
        clock: Callable[[], float],
        later: Callable[..., object] | None = None,
        redirect_to: str | None = None,
        letterhead: Letterhead | None = None,
        dsn: bool = False,
        redact: Callable[[str], str] | None = None,
    ) -> None:
        self.desk = desk
        self.offers = offers
        self.pipelining = offers.pipelining
        self.size_max = offers.size_max or sys.maxsize
        self.letterhead = letterhead
        self.dsn = dsn and offers.dsn
        self.command_timeout_s = command_timeout_s
        self.data_done_timeout_s = data_done_timeout_s
        self.messages_left = messages_max
        self.clock = clock
        self.later = later or asyncio.get_running_loop().call_later
        self.redirect_to = redirect_to
        self.transport: asyncio.Transport | None = None
        self.ahead: Claim | None = None
        self.handed_over: Claim | None = None
        self.mark_asked = False
        self.closing = False
        self.is_closed = False
        self.idle_since: float | None = None
        self._parameters = ""  # of MAIL, for an email that is not ASCII
        self._refusal: Verdict | None = None
        self._reset_needed = False
        self._expected: deque[Expected] = deque()
        self._replies = ReplyReader(redact)
        self._writable = True
        self._content: Iterator[bytes] | None = None  # the part of the content of `ahead` that is still to be written
        self._deadline_s: float | None = None
        self._heard_at = clock()

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over a transport that is connected, encrypted and authenticated as far as it will be."""
        self.transport = transport
        transport.set_protocol(self)
        # So that "writable" means: all is with the kernel. Not 0: asyncio's TLS would call nothing at all too much.
        transport.set_write_buffer_limits(high=1)
        self._go_on()

    def start(self, claim: Claim) -> None:
        """Begin with this claim; the conversation must be idle."""
        assert self.ahead is None
        assert self.handed_over is None
        self.idle_since = None
        self._heard_at = self.clock()
        self.messages_left -= 1
        if self._may_send(claim):
            self._write(self._envelope(claim))
        else:
            self._go_on()

    def hand_over(self) -> None:
        """Write the final dot: the mark of `ahead` is committed and the guard has agreed. The commit point of SMTP."""
        claim, self.ahead, self.mark_asked = self.ahead, None, False
        assert claim is not None
        self.handed_over = claim
        self._expected.append(Expected.DOT)
        self._write(b".\r\n")
        claim.handed_over_at = self.clock()
        self._deadline_s = claim.handed_over_at + self.data_done_timeout_s
        if self.pipelining:
            self.later(CHAIN_AFTER_S, self._chain, claim)

    def _chain(self, claim: Claim) -> None:
        """If the dot of `claim` is still unanswered, write the next envelope behind it."""
        if self.handed_over is claim and self.ahead is None and not self.is_closed:
            following = self._next()
            if following is not None:
                self._write(self._envelope(following))
                self._deadline_s = self.clock() + self.data_done_timeout_s

    def abandon(self, reason: str) -> None:
        """Let go of `ahead`, which is not this relay's any more; its try leaves no trace with the server.

        With nothing past its dot the connection is dropped, so the server discards what it has (RFC 5321 §4.1.1.10).
        Otherwise the answer to that dot is waited for first.
        """
        self.ahead, self.mark_asked = None, False
        self.closing = True
        if self.handed_over is None:
            self._drop(None, reason)

    def close_politely(self) -> None:
        """Say QUIT as soon as nothing is under way; take nothing more."""
        self.closing = True
        if (
            self.ahead is None
            and self.handed_over is None
            and not self.is_closed
            and Expected.QUIT not in self._expected
        ):
            self._expected.append(Expected.QUIT)
            self._write(b"QUIT\r\n")
            self._deadline_s = self.clock() + QUIT_TIMEOUT_S

    def give_up(self, reason: str) -> None:
        """Drop the connection whatever is under way: before its dot it was not sent, past it it is in doubt."""
        self._drop(None, reason)

    def waited_s(self) -> float:
        """How long the server has said nothing while something is under way."""
        return self.clock() - self._heard_at

    def check_deadline(self) -> None:
        """Judge a server that has been silent for too long; called about once a second."""
        if self._deadline_s is None or self.mark_asked or self.clock() < self._deadline_s or self.is_closed:
            return
        waited_for = self._expected[0].name if self._expected else "the content to be taken"
        self._fail(f"the server was silent for too long ({waited_for})")

    def data_received(self, data: bytes) -> None:
        """Take replies as they come (asyncio.Protocol)."""
        self._heard_at = self.clock()
        try:
            for reply in self._replies.feed(data):
                if self.is_closed:
                    return
                self._answer(reply)
        except GarbageError as garbage:
            self._fail(str(garbage))

    def pause_writing(self) -> None:
        """Some of what was written is not with the kernel yet (asyncio.Protocol)."""
        self._writable = False

    def resume_writing(self) -> None:
        """All that was written is with the kernel (asyncio.Protocol)."""
        self._writable = True
        self._write_on()

    def eof_received(self) -> None:
        """The server will say nothing more. Left to itself, asyncio would write on first (asyncio.Protocol)."""
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server, the network or this side has ended the connection (asyncio.Protocol)."""
        expected = self._expected[0] if self._expected else None
        if expected is Expected.QUIT:
            self._finish(None)
        else:
            self._fail(f"the connection was lost{f' ({exc})' if exc else ''}")

    def _envelope(self, claim: Claim) -> bytes:
        """The commands that open a transaction: all that may be said at once."""
        self.ahead = claim
        self._refusal = None
        self._deadline_s = self.clock() + self.command_timeout_s
        reset = b""
        if self._reset_needed:  # a refused transaction is still open there, and a second MAIL would be out of order
            self._reset_needed = False
            self._expected.append(Expected.RSET)
            reset = b"RSET\r\n"
            if not self.pipelining:
                return reset
        self._expected.append(Expected.MAIL)
        if not self.pipelining:
            return self._mail(claim)
        self._expected += (Expected.RCPT, Expected.DATA)
        return reset + self._mail(claim) + self._rcpt(claim) + b"DATA\r\n"

    def _mail(self, claim: Claim) -> bytes:
        sender = claim.sender if self.letterhead is None else self.letterhead.sender_of(claim)
        size = f" SIZE={self._size_of(claim)}" if self.offers.size else ""
        if not self.dsn:
            return f"MAIL FROM:<{sender}>{size}{self._parameters}\r\n".encode()
        # RET=HDRS: a bounce with the whole report would show it to whoever reads bounces.
        named = f" RET=HDRS ENVID={claim.token}" if claim.token else " RET=HDRS"
        return f"MAIL FROM:<{sender}>{size}{self._parameters}{named}\r\n".encode()

    def _rcpt(self, claim: Claim) -> bytes:
        recipient = self.redirect_to or claim.recipient
        if not self.dsn:
            return f"RCPT TO:<{recipient}>\r\n".encode()
        # Not DELAY: a server that goes on trying says nothing that anybody could act on.
        return f"RCPT TO:<{recipient}> NOTIFY=FAILURE ORCPT={original_recipient(recipient)}\r\n".encode()

    def _size_of(self, claim: Claim) -> int:
        """Return how many bytes go over the wire between 354 and the dot, dots undoubled (RFC 1870 §5)."""
        assert claim.wire_bytes is not None
        size = claim.wire_bytes + (len(claim.head) if claim.head is not None else 0)
        return size + len(_redirected_from(claim)) if self.redirect_to else size

    def _may_send(self, claim: Claim) -> bool:
        """Return True if the email may be sent to this server; if not, report the reason to the desk."""
        if self.letterhead is not None:
            self.letterhead.prepare(claim)  # most was prepared before; here, at the last gate, nothing slips by
        else:
            check(claim)
        self._parameters = ""
        fault = claim.fault
        if fault is not None:
            pass
        elif (size := self._size_of(claim)) > self.size_max:
            fault = TOO_LARGE.format(bytes=size, bytes_max=self.size_max)
        elif not (claim.message.isascii() and claim.recipient.isascii() and claim.sender.isascii()) or (
            self.redirect_to and not self.redirect_to.isascii()
        ):
            try:
                self._parameters = self._body_parameters(claim)
            except ValueError as error:
                fault = str(error)
        if fault is None:
            return True
        self._bring(claim, Refused(fault))
        return False

    def _body_parameters(self, claim: Claim) -> str:
        sender = claim.sender if self.letterhead is None else self.letterhead.sender_of(claim)
        addresses = sender + (self.redirect_to or claim.recipient)
        header = header_of(claim.message)
        if self.redirect_to:
            header = _redirected_from(claim) + header
        return body_parameters(self.offers, header, is_ascii=claim.message.isascii(), addresses=addresses)

    def _answer(self, reply: Reply) -> None:
        if not self._expected:
            self._answer_unasked(reply)
            return
        expected = self._expected.popleft()
        if expected is not Expected.QUIT and _is_of_the_server(reply, expected):
            reason = self._hear(reply, expected)  # first, so that whoever judges knows that the server is in trouble
            if expected is Expected.DOT:
                self._judge_dot(reply)
            self._drop(reason, reason)
            return
        match expected:
            case Expected.DOT:
                self._answer_dot(reply)
            case Expected.MAIL | Expected.RCPT:
                self._answer_envelope(expected, reply)
            case Expected.DATA:
                self._answer_data(reply)
            case Expected.LONE_DOT:
                self._refused()
            case Expected.RSET:
                self._answer_reset(reply)
            case Expected.QUIT:
                self._drop(None)

    def _answer_unasked(self, reply: Reply) -> None:
        """A reply to nothing: the server closes. In mid-content it is about the message, unless it is the server's."""
        if self.ahead is not None and not self.mark_asked and not _is_of_the_server(reply):
            self._refusal = self._refusal_of(Expected.DATA, reply)
        self._fail(self._hear(reply))

    def _hear(self, reply: Reply, expected: Expected | None = None) -> str:
        """What a reply says of the server; the desk is told at once if nobody's mail is taken."""
        if not _takes_nothing(reply, expected):
            return f"the server closes: {reply.code} {reply.text}"[:200]
        reason = f"the server takes no mail for now: {reply.code} {reply.text}"[:200]
        self.desk.paused(reason)
        return reason

    def _answer_reset(self, reply: Reply) -> None:
        """Go on to MAIL; pipelined, that is on its way. Without a reset it would be refused by no fault of its own."""
        if not 200 <= reply.code < 300:  # noqa: PLR2004 - as below
            self._fail(f"no reply to RSET: {reply.code} {reply.text}"[:200])
        elif not self.pipelining and self.ahead is not None:
            self._step(Expected.MAIL, self._mail(self.ahead))

    def _answer_dot(self, reply: Reply) -> None:
        if not self._judge_dot(reply):
            self._fail(f"no reply to the final dot: {reply.code} {reply.text}"[:200])
        elif self.ahead is not None:
            self._deadline_s = self.clock() + self.command_timeout_s
        elif self.closing and self._expected:
            self._drop(None)  # what was begun behind the dot is no longer ours to send
        else:
            self._go_on()

    def _judge_dot(self, reply: Reply) -> bool:
        """Bring the verdict on the message whose dot this answers; False if the reply is none."""
        claim = self.handed_over
        assert claim is not None
        verdict = judge_reply(reply.code, reply.text)
        if verdict is None:
            return False
        self.handed_over = None
        self._bring(claim, verdict)
        return True

    def _bring(self, claim: Claim, verdict: Verdict) -> None:
        """Tell the desk; a reply that another address got must not pass for one about the recipient."""
        if self.redirect_to:
            verdict = replace(verdict, reply=f"redirected to {self.redirect_to}: {verdict.reply}")
        self.desk.judged(claim, verdict)

    def _answer_envelope(self, expected: Expected, reply: Reply) -> None:
        good = 200 <= reply.code < 300  # noqa: PLR2004 - positive completion, RFC 5321 §4.2.1
        if not good and self._refusal is None:
            self._refusal = self._refusal_of(expected, reply)
            if self._refusal is None:
                self._fail(f"no reply to {expected.name}: {reply.code} {reply.text}"[:200])
                return
        if self.pipelining or self.ahead is None:
            return
        if not good:
            self._reset_needed = expected is Expected.RCPT
            self._refused()
        elif expected is Expected.MAIL:
            self._step(Expected.RCPT, self._rcpt(self.ahead))
        else:
            self._step(Expected.DATA, b"DATA\r\n")

    def _step(self, expected: Expected, command: bytes) -> None:
        self._expected.append(expected)
        self._deadline_s = self.clock() + self.command_timeout_s
        self._write(command)

    def _answer_data(self, reply: Reply) -> None:
        if self.ahead is None:
            self._drop(None)  # abandoned while its envelope was under way
        elif reply.code == START_CONTENT and self._refusal is not None:
            # DATA went out with a RCPT that was then refused: a lone dot ends it (RFC 2920 §3.1).
            self._step(Expected.LONE_DOT, b".\r\n")
        elif reply.code == START_CONTENT:
            self._write_content(self.ahead)
        else:
            if self._refusal is None:
                self._refusal = self._refusal_of(Expected.DATA, reply)
            if self._refusal is None:
                self._fail(f"no reply to DATA: {reply.code} {reply.text}"[:200])
            else:
                self._reset_needed = True
                self._refused()

    @staticmethod
    def _refusal_of(expected: Expected, reply: Reply) -> Verdict | None:
        verdict = judge_reply(reply.code, reply.text)
        match verdict:
            case Deferred(text):
                return Deferred(f"{text} (to {expected.name})")
            case Refused(text):
                return Refused(f"{text} (to {expected.name})")
            case _:
                return None

    def _refused(self) -> None:
        claim, self.ahead = self.ahead, None
        if claim is not None and self._refusal is not None:
            self._bring(claim, self._refusal)
        self._refusal = None
        self._go_on()

    def _write_content(self, claim: Claim) -> None:
        """Begin the message: its dots doubled (RFC 5321 §4.5.2), its last line ended, without the final dot."""
        self._deadline_s = self.clock() + self.command_timeout_s
        self._content = dot_stuffed(self._parts(claim))
        self._write_on()

    def _parts(self, claim: Claim) -> Iterable[bytes]:
        """Yield everything between 354 and the final dot; short content in one piece, since each piece is a write."""
        head = claim.head or b""
        if self.redirect_to:
            head = _redirected_from(claim) + head
        clean = claim.wire_bytes == len(claim.message)
        if len(claim.message) > PIECE_BYTES:
            yield head
            yield from pieces(claim.message, clean=clean)
        elif clean:
            yield head + claim.message
        else:
            yield head + b"".join(pieces(claim.message, clean=False))

    def _write_on(self) -> None:
        """Write what the kernel takes of the content; when it has all, ask for the mark.

        Piece by piece, since TLS takes a write whole, however long, and reports what the kernel did not take at the
        next one only: with the content still here, a connection that breaks would leave doubt about a dot behind it.
        """
        while self._content is not None and self.ahead is not None and self._writable and not self.is_closed:
            piece = next(self._content, None)
            if piece is not None:
                self._write(piece)
            else:
                self._content = None
                self.mark_asked = True
                self.desk.ask_mark(self, self.ahead)

    def _next(self) -> Claim | None:
        if self.closing or self.messages_left <= 0:
            return None
        while (claim := self.desk.take()) is not None:
            if self._may_send(claim):
                self.messages_left -= 1
                return claim
        return None

    def _go_on(self) -> None:
        """Nothing is under way: begin the next message, or rest, or say goodbye."""
        if self.is_closed:
            return
        claim = self._next()
        if claim is not None:
            self._write(self._envelope(claim))
        elif self.closing or self.messages_left <= 0:
            self.close_politely()
        else:
            self._deadline_s = None
            self.idle_since = self.clock()
            self.desk.idle(self)

    def _write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def _fail(self, reason: str) -> None:
        """The server cannot be talked to any more: judge what is under way, and drop the connection."""
        if self.is_closed:
            return
        # An idle connection that ends is no news; one that ends in the middle of a dialogue is.
        busy = self.ahead is not None or self.handed_over is not None or self._expected
        self._drop(reason if busy else None, reason)

    def _drop(self, trouble: str | None, reason: str = "the connection was dropped") -> None:
        if self.transport is not None:
            self.transport.abort()
        self._finish(trouble, reason)

    def _finish(self, trouble: str | None, reason: str = "the connection was dropped") -> None:
        """Bring the last news and be over.

        `ahead` with its mark asked for stays the desk's: the commit may be under way.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self._deadline_s = None
        self._content = None
        handed_over, self.handed_over = self.handed_over, None
        if handed_over is not None:
            self._bring(handed_over, judge_silence(reason, handed_over=True))
        ahead, self.ahead = self.ahead, None
        if ahead is not None and self._refusal is not None:
            self._bring(ahead, self._refusal)  # it was said, whatever became of the connection then
        elif ahead is not None and not self.mark_asked:
            self.desk.untouched(ahead, reason)
        self.desk.closed(self, trouble)


def _redirected_from(claim: Claim) -> bytes:
    """The header line that says whom a redirected email is for; before all others, so that no signature breaks."""
    return f"X-Outbox-Redirected-From: {claim.recipient}\r\n".encode()


def _is_of_the_server(reply: Reply, expected: Expected | None = None) -> bool:
    """Whether it closes, or takes nothing from anybody: to whatever command it is said, no message is to blame."""
    return reply.code == SERVICE_CLOSING or _takes_nothing(reply, expected)


def _takes_nothing(reply: Reply, expected: Expected | None) -> bool:
    """Whether nobody's mail is taken on this connection. At RCPT it is one recipient that asks for a login."""
    return takes_nothing(reply.code, reply.text) or (expected is Expected.MAIL and reply.code == LOGIN_FIRST)


def transport_of(value: object) -> asyncio.Transport:
    """Aiosmtplib's transport under its real type: it is always one that writes."""
    return cast("asyncio.Transport", value)
