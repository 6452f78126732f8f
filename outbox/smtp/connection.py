"""One SMTP connection after its set-up: mail transactions whose final dot waits for the mark.

    MAIL+RCPT+DATA in one write → 354 → content without its dot → mark (commit) → guard → the dot → 250 → settle

Where PIPELINING is offered an envelope is one write; where it is not, each command waits for its reply. The next
envelope waits for the reply to the dot in either case: RFC 2920 §3.1 allows to write it behind the dot, but some
servers refuse that, and some lose it. aiosmtplib set the connection up; its message path fuses DATA, content and dot,
so the transport was handed over to this protocol.

A refusal is told to the `Desk` by what it is about (`reply_class`): only those of the recipient and of the message are
verdicts on the email. The conversation knows nothing of Postgres.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum, auto
from typing import Final, Literal, Protocol, cast

from outbox.smtp.content import PIECE_BYTES, dot_stuffed, header_of, pieces
from outbox.smtp.extensions import TOO_LARGE, Offers, body_parameters, original_recipient
from outbox.smtp.outgoing import Claim
from outbox.smtp.replies import GarbageError, Reply, ReplyReader
from outbox.smtp.reply_class import TAKES_NOTHING, About, Refusal, Stage, classify
from outbox.smtp.route_headers import Letterhead, check
from outbox.smtp.verdict import REPLY_CHARACTERS_MAX, Accepted, Refused, Verdict, Withdrawn, judge_silence

QUIT_TIMEOUT_S: Final = 5.0
SERVICE_CLOSING: Final = 421  # RFC 5321 §3.8: the server closes; said in reply to anything
START_CONTENT: Final = 354
DEFERRALS_MAX: Final = 2  # in a row, after which a connection that took messages may have reached a limit of its own
REFUSED_MIN: Final = 400  # RFC 5321 §4.2.1: 4xx and 5xx are refusals

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

    def is_own_limit(self, claim: Claim) -> bool:
        """Note that the server wants this email later; return True if it keeps on taking others meanwhile."""

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
    whose dot is written and not answered. At most one of them is set. `accepted` counts the messages that the server
    took on this connection.

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
        self.accepted = 0
        self.clock = clock
        self.redirect_to = redirect_to
        self.transport: asyncio.Transport | None = None
        self.ahead: Claim | None = None
        self.handed_over: Claim | None = None
        self.mark_asked = False
        self.closing = False
        self.is_closed = False
        self.began_at = clock()  # when the latest envelope was written
        self.idle_since: float | None = None
        self._parameters = ""  # of MAIL, for an email that is not ASCII
        self._refusal: Refusal | None = None
        self._deferrals = 0  # since the latest message that was accepted
        self._refusals = 0  # on this connection, which its server may limit too
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

    def limit_to(self, messages: int) -> None:
        """Send at most so many messages on this connection in all, since the server takes no more."""
        begun = self.accepted + (self.ahead is not None or self.handed_over is not None)
        self.messages_left = min(self.messages_left, max(messages - begun, 0))

    def abandon(self, reason: str) -> None:
        """Let go of `ahead`, which is not this relay's any more; its try leaves no trace with the server.

        The connection is dropped, so the server discards what it has (RFC 5321 §4.1.1.10).
        """
        self.ahead, self.mark_asked = None, False
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
        self.began_at = self.clock()
        self._deadline_s = self.began_at + self.command_timeout_s
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
        if expected is Expected.QUIT:
            self._drop(None)
        elif reply.code >= REFUSED_MIN:
            self._answer_refused(expected, self._refusal_of(expected, reply))
        else:
            self._answer_good(expected, reply)

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
            case _:
                self._refused()

    def _answer_refused(self, expected: Expected, refusal: Refusal) -> None:
        """Act on a 4xx or 5xx reply. The first one of a transaction says why it ended; the others follow from it."""
        if refusal.code == SERVICE_CLOSING or (refusal.about is About.CLOSING and expected is not Expected.LONE_DOT):
            self._answer_closing(expected, refusal)
        elif expected is Expected.DOT:
            claim, self.handed_over = self.handed_over, None
            assert claim is not None
            self._conclude(claim, refusal)
            self._go_on()
        elif expected is Expected.RSET:  # no transaction can be begun here: the next email goes by another connection
            self._refusal = replace(refusal, about=About.SESSION)
            self._drop(None)
        elif expected is Expected.LONE_DOT:
            self._refused()
        else:
            self._answer_no(expected, refusal)

    def _answer_no(self, expected: Expected, refusal: Refusal) -> None:
        """Keep a refusal of the envelope until the rest of what was pipelined is answered."""
        self._refusal = self._refusal or refusal
        if expected is Expected.DATA or not self.pipelining:
            # A refused MAIL opened nothing; a second MAIL in an open transaction would be out of order.
            self._reset_needed = self._refusal.stage != Stage.MAIL
            self._refused()

    def _answer_closing(self, expected: Expected, refusal: Refusal) -> None:
        """The server closes, or takes nothing more here: to whatever command it is said, no message is to blame."""
        names_cause = refusal.about is not About.CLOSING
        if expected is not Expected.DOT and self._refusal is None and (names_cause or self._is_used):
            self._refusal = refusal  # it closes after other mail, or for a cause that it names: the server works
            self._drop(None)
            return
        reason = self._hear(refusal)  # first, so that whoever judges knows that the server is in trouble
        claim, self.handed_over = self.handed_over, None
        if claim is not None:
            self._conclude(claim, refusal)
        self._drop(None if names_cause else reason, reason)

    def _answer_unasked(self, reply: Reply) -> None:
        """A reply to nothing: the server closes. In mid-content it is about the message, unless it is the server's."""
        if reply.code < REFUSED_MIN:
            self._fail(f"a reply to nothing: {reply.code} {reply.text}"[:200])
            return
        refusal = self._refusal_of(Expected.DATA, reply)
        if self.ahead is not None and not self.mark_asked and refusal.about is not About.CLOSING:
            self._refusal = refusal
        self._fail(self._hear(refusal))

    def _hear(self, refusal: Refusal) -> str:
        """What a reply says of the server; the desk is told at once if nobody's mail is taken."""
        said = f"{refusal.code} {refusal.text}"
        if refusal.code != TAKES_NOTHING or refusal.about is not About.CLOSING:
            return f"the server closes: {said}"[:200]
        reason = f"the server takes no mail for now: {said}"[:200]
        self.desk.paused(reason)
        return reason

    def _answer_reset(self, reply: Reply) -> None:
        """Go on to MAIL; pipelined, that is on its way."""
        if not 200 <= reply.code < 300:  # noqa: PLR2004 - as below
            self._fail(f"no reply to RSET: {reply.code} {reply.text}"[:200])
        elif not self.pipelining and self.ahead is not None:
            self._step(Expected.MAIL, self._mail(self.ahead))

    def _answer_dot(self, reply: Reply) -> None:
        if not 200 <= reply.code < 300:  # noqa: PLR2004 - as below
            self._fail(f"no reply to the final dot: {reply.code} {reply.text}"[:200])
            return
        claim, self.handed_over = self.handed_over, None
        assert claim is not None
        self.accepted += 1
        self._deferrals = 0
        self._bring(claim, Accepted(f"{reply.code} {reply.text}"[:REPLY_CHARACTERS_MAX]))
        self._go_on()

    def _bring(self, claim: Claim, verdict: Verdict) -> None:
        """Tell the desk; a reply that another address got must not pass for one about the recipient."""
        if self.redirect_to:
            verdict = replace(verdict, reply=f"redirected to {self.redirect_to}: {verdict.reply}")
        self.desk.judged(claim, verdict)

    def _conclude(self, claim: Claim, refusal: Refusal) -> None:
        """Tell the desk what became of a claim whose transaction was refused, by what the refusal is about."""
        about = self._subject_of(refusal)
        self._refusals += 1
        self._deferrals += not refusal.is_permanent
        if self.accepted and self._deferrals >= DEFERRALS_MAX:
            self.closing = True  # in whatever words it is said: a new connection finds out, and costs little
        is_late = refusal.stage in (Stage.RCPT, Stage.DATA, Stage.DOT)  # so that a recipient is named
        match about:
            case About.RECIPIENT | About.MESSAGE:
                self.desk.judged(claim, refusal.verdict)
            case About.RATE | About.CONNECTIONS | About.SESSION if is_late and self.desk.is_own_limit(claim):
                self.desk.judged(claim, refusal.verdict)
            case About.UNCLEAR | About.RELAYING | About.ROUTE:
                self.desk.route_refused(claim, refusal)
            case About.RATE:
                self.desk.throttled(self, "rate", refusal.reply)
                self._give_back(claim, refusal.reply)
            case About.CONNECTIONS:
                self.desk.throttled(self, "connections", refusal.reply)
                self._give_back(claim, refusal.reply)
            case About.SESSION:
                self.closing = True
                may_be_the_limit = refusal.stage == Stage.MAIL and refusal.about is not About.ROUTE
                self.desk.session_full(self, self.accepted if may_be_the_limit and self._refusals == 1 else None)
                self._give_back(claim, refusal.reply)
            case About.CLOSING:
                self._give_back(claim, refusal.reply)

    def _subject_of(self, refusal: Refusal) -> About:
        """Return what the refusal is about, given what went over this connection before."""
        about = refusal.about
        if about is About.CLOSING and self._is_used and refusal.stage != Stage.DOT:
            return About.SESSION
        if about is About.SESSION and not self._is_used and refusal.stage != Stage.RSET:
            return About.RATE if refusal.code < 500 else About.ROUTE  # noqa: PLR2004 - RFC 5321 §4.2.1
        if about is About.ROUTE and refusal.stage == Stage.MAIL and self.accepted:
            return About.SESSION  # where it is no limit of this connection, the next one hears it at its first MAIL
        return about

    @property
    def _is_used(self) -> bool:
        """Return True if the server has judged a message on this connection, so that it may have reached a limit."""
        return self.accepted + self._refusals > 0

    def _give_back(self, claim: Claim, reason: str) -> None:
        """Return a claim that the server did not take for a reason that is not the email's."""
        if claim.marked:
            self.desk.judged(claim, Withdrawn(reason))
        else:
            self.desk.requeue(claim, reason)

    def _answer_envelope(self, expected: Expected, reply: Reply) -> None:
        if not 200 <= reply.code < 300:  # noqa: PLR2004 - positive completion, RFC 5321 §4.2.1
            if self._refusal is None:
                self._fail(f"no reply to {expected.name}: {reply.code} {reply.text}"[:200])
        elif self.pipelining or self.ahead is None:
            pass
        elif expected is Expected.MAIL:
            self._step(Expected.RCPT, self._rcpt(self.ahead))
        else:
            self._step(Expected.DATA, b"DATA\r\n")

    def _step(self, expected: Expected, command: bytes) -> None:
        self._expected.append(expected)
        self._deadline_s = self.clock() + self.command_timeout_s
        self._write(command)

    def _answer_data(self, reply: Reply) -> None:
        if reply.code == START_CONTENT and self._refusal is not None:
            # DATA went out with a RCPT that was then refused: a lone dot ends it (RFC 2920 §3.1).
            self._step(Expected.LONE_DOT, b".\r\n")
        elif reply.code == START_CONTENT and self.ahead is not None:
            self._write_content(self.ahead)
        else:
            self._fail(f"no reply to DATA: {reply.code} {reply.text}"[:200])

    def _refusal_of(self, expected: Expected, reply: Reply) -> Refusal:
        stage = Stage.DOT if expected is Expected.LONE_DOT else Stage(expected.name)
        return Refusal(classify(stage, reply.code, reply.text), stage, reply.code, reply.text, self.redirect_to)

    def _refused(self) -> None:
        claim, self.ahead = self.ahead, None
        refusal, self._refusal = self._refusal, None
        if claim is not None and refusal is not None:
            self._conclude(claim, refusal)
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
            self._conclude(ahead, self._refusal)  # it was said, whatever became of the connection then
        elif ahead is not None and not self.mark_asked:
            self.desk.untouched(ahead, reason)
        self.desk.closed(self, trouble)


def _redirected_from(claim: Claim) -> bytes:
    """The header line that says whom a redirected email is for; before all others, so that no signature breaks."""
    return f"X-Outbox-Redirected-From: {claim.recipient}\r\n".encode()


def transport_of(value: object) -> asyncio.Transport | None:
    """Return aiosmtplib's transport, None after the connection's end, under its real type: it is one that writes."""
    return cast("asyncio.Transport | None", value)
