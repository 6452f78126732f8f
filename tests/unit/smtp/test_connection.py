import asyncio
import itertools
import re
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.smtp.commands import Commands
from outbox.smtp.connection import QUIT_TIMEOUT_S, Expected, Limits, SmtpConnection
from outbox.smtp.content import PIECE_BYTES
from outbox.smtp.extensions import Offers
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.refusal import About, Refusal
from outbox.smtp.route_headers import RouteHeaders
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Refused, Verdict, Withdrawn
from tests.support.smuggling import MESSAGES

COMMAND_TIMEOUT_S = 30.0
DATA_DONE_TIMEOUT_S = 600.0
HELLO = b"Subject: hello\r\n\r\nhello\r\n"

_emails = itertools.count(1)


def mail(message: bytes = HELLO, **fields: object) -> Try:
    email = next(_emails)
    fields = {"sender": "reports@example.com", "recipient": f"p{email}@example.com", "key": f"mail{email}", **fields}
    return Try(OutgoingEmail(7, email, attempt=0, withdrawn=0, message_id="<1@x>", message=message, **fields))


class Wire(asyncio.Transport):
    """What the connection writes, and whether it hung up."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False
        self.high: int | None = None
        self.full: SmtpConnection | None = None  # whose kernel takes nothing now

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high, self.low = high, low

    def write(self, data: bytes) -> None:
        assert not self.aborted, "written to a connection that was dropped"
        self.writes.append(bytes(data))
        if self.full is not None:
            self.full.pause_writing()

    def abort(self) -> None:
        self.aborted = True

    def taken(self) -> list[bytes]:
        """The writes since the last look."""
        writes, self.writes = self.writes, []
        return writes


@dataclass
class Book:
    """Owner of a connection that records all calls."""

    ready: deque[Try] = field(default_factory=deque)
    asked: deque[Try] = field(default_factory=deque)
    verdicts: list[tuple[Try, Verdict]] = field(default_factory=list)
    unsent: list[Try] = field(default_factory=list)
    idles: int = 0
    pauses: list[str] = field(default_factory=list)
    throttles: list[str] = field(default_factory=list)
    full_after: list[int | None] = field(default_factory=list)
    route_refusals: list[tuple[Try, Refusal]] = field(default_factory=list)
    requeued: list[Try] = field(default_factory=list)
    ended: list[str | None] = field(default_factory=list)

    def take(self) -> Try | None:
        return self.ready.popleft() if self.ready else None

    def ask_mark(self, connection: SmtpConnection, claim: Try) -> None:
        assert connection.current is claim
        self.asked.append(claim)

    def on_verdict(self, claim: Try, verdict: Verdict) -> None:
        self.verdicts.append((claim, verdict))

    def return_unsent(self, claim: Try, reason: str) -> None:
        assert reason
        self.unsent.append(claim)

    def idle(self, connection: SmtpConnection) -> None:
        assert not connection.is_closed
        self.idles += 1

    def paused(self, reason: str) -> None:
        assert not self.ended, "it is told before the connection is over"
        self.pauses.append(reason)

    def on_refusal(self, connection: SmtpConnection, tried: Try, refusal: Refusal, about: About) -> None:
        assert about not in (About.RECIPIENT, About.MESSAGE)
        if about in (About.UNCLEAR, About.RELAYING, About.ROUTE):
            self.route_refusals.append((tried, refusal))
            return
        if about is About.SESSION:
            connection.close_politely()
            self.full_after.append(connection.history.limit_shown_by(refusal))
        elif about is not About.CLOSING:
            self.throttles.append({About.RATE: "rate", About.CONNECTIONS: "connections"}[about])
        if tried.marked:
            self.verdicts.append((tried, Withdrawn(refusal.reply)))
        else:
            self.requeued.append(tried)

    def closed(self, connection: SmtpConnection, trouble: str | None) -> None:
        assert connection.is_closed
        self.ended.append(trouble)


class Talk:
    """A connection between its owner and a wire, with a clock that stands still until it is moved."""

    def __init__(
        self, *claims: Try, pipelining: bool = True, size: bool = False, messages_max: int = 100, **how: object
    ) -> None:
        offers = how.pop("offers", {})
        self.now = 0.0
        self.observed: list[tuple[Expected | None, int]] = []
        self.wire, self.owner = Wire(), Book(deque(claims))
        self.connection = SmtpConnection(
            self.owner,
            Commands(Offers(pipelining=pipelining, size=size, **offers), **how),
            Limits(COMMAND_TIMEOUT_S, DATA_DONE_TIMEOUT_S, messages_max),
            clock=lambda: self.now,
            on_reply=lambda expected, reply: self.observed.append((expected, reply.code)),
        )
        self.connection.attach(self.wire)

    def say(self, *replies: str) -> list[bytes]:
        """The server says these, each in a piece of its own; gives what was written in answer."""
        for reply in replies:
            self.connection.data_received(reply.encode() + b"\r\n")
        return self.wire.taken()

    def mark(self) -> list[bytes]:
        """The mark that was asked for is committed, as the relay says it."""
        claim = self.owner.asked.popleft()
        claim.mark(1)
        self.connection.send_final_dot()
        return self.wire.taken()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.connection.check_deadline()

    def take_content(self) -> list[bytes]:
        """Bring a message from its envelope to its content; gives what was written as that."""
        return self.say("250", "250", "354")[-1:]

    @property
    def trouble(self) -> str | None:
        """What was wrong with the server, once the connection is over."""
        assert self.wire.aborted
        assert len(self.owner.ended) == 1
        return self.owner.ended[0]


def envelope(claim: Try, *, first: bytes = b"") -> bytes:
    rcpt = f"RCPT TO:<{claim.outgoing.recipient}>\r\n"
    return first + f"MAIL FROM:<{claim.outgoing.sender}>\r\n{rcpt}DATA\r\n".encode()


def commands(claim: Try) -> list[bytes]:
    return envelope(claim).splitlines(keepends=True)


both_ways = pytest.mark.parametrize("pipelining", [True, False], ids=["pipelining", "step by step"])


def test_an_observer_is_given_each_reply_with_the_command_that_it_answers():
    talk = Talk(mail())
    talk.take_content()
    talk.mark()
    talk.say("250 queued", "421 bye")
    assert talk.observed == [
        (Expected.MAIL, 250),
        (Expected.RCPT, 250),
        (Expected.DATA, 354),
        (Expected.DOT, 250),
        (None, 421),
    ]


# ── the walk of a message ────────────────────────────────────────────────────────────────────────────────────


def test_where_pipelining_is_offered_the_envelope_is_one_write():
    claim = mail()
    talk = Talk(claim)
    assert talk.wire.taken() == [envelope(claim)]
    assert talk.say("250 ok", "250 ok") == []
    assert talk.say("354 go") == [HELLO]
    assert talk.mark() == [b".\r\n"]
    talk.say("250 queued")
    assert talk.owner.verdicts == [(claim, Accepted("250 queued"))]


def test_where_it_is_not_each_command_waits_for_its_reply():
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=False)
    mail_from, rcpt_to, data = commands(claim)
    assert talk.wire.taken() == [mail_from]
    assert talk.say("250 ok") == [rcpt_to]
    assert talk.say("250 ok") == [data]
    assert talk.say("354 go") == [HELLO]
    assert talk.mark() == [b".\r\n"]
    assert talk.say("250 queued") == commands(following)[:1]


@both_ways
def test_the_next_envelope_waits_for_the_reply_to_the_dot(pipelining):
    """Haraka refuses an envelope behind an unanswered dot, and other servers lose it."""
    first, second = mail(), mail(b"second\r\n")
    talk = Talk(first, second, pipelining=pipelining)
    talk.take_content()
    assert talk.mark() == [b".\r\n"]
    talk.wait(DATA_DONE_TIMEOUT_S - 1)
    assert talk.wire.taken() == []
    written = envelope(second) if pipelining else commands(second)[0]
    assert talk.say("250 first") == [written]
    assert talk.take_content() == [b"second\r\n"]


@both_ways
def test_content_is_never_followed_by_its_dot_before_the_mark(pipelining):
    talk = Talk(mail(), mail(), pipelining=pipelining)
    assert talk.take_content() == [HELLO]
    talk.wait(10 * DATA_DONE_TIMEOUT_S)
    assert talk.wire.taken() == []
    assert list(talk.owner.asked) == [talk.connection.current]
    assert not talk.wire.aborted
    assert talk.mark()[0].startswith(b".\r\n")


def test_the_mark_is_asked_for_once_all_content_is_with_the_kernel():
    talk = Talk(mail())
    assert talk.wire.high == 1, "else 'writable' would not mean that all is with the kernel"
    talk.wire.full = talk.connection
    talk.say("250", "250", "354")
    assert not talk.owner.asked
    talk.wire.full = None
    talk.connection.resume_writing()
    assert len(talk.owner.asked) == 1
    talk.connection.pause_writing()
    talk.connection.resume_writing()
    assert len(talk.owner.asked) == 1, "a mark is asked for once"


def test_content_is_written_no_faster_than_the_kernel_takes_it():
    message = (b"x" * 998 + b"\r\n") * 200
    talk = Talk(mail(message))
    talk.wire.full = talk.connection
    pieces = talk.take_content()
    while not talk.owner.asked:
        assert len(b"".join(pieces)) <= len(message)
        talk.connection.resume_writing()
        pieces += talk.wire.taken()
    assert b"".join(pieces) == message
    assert len(pieces) == 4
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)
    talk.connection.resume_writing()
    assert talk.wire.taken() == []
    assert len(talk.owner.asked) == 1


def test_the_size_is_declared_where_the_server_asks_for_it():
    claim = mail()
    assert (
        Talk(claim, size=True)
        .wire.taken()[0]
        .startswith(f"MAIL FROM:<{claim.outgoing.sender}> SIZE={len(HELLO)}\r\n".encode())
    )


def test_without_mail_the_connection_is_idle_and_start_wakes_it():
    talk = Talk()
    assert talk.owner.idles == 1
    assert talk.connection.idle_since == 0
    claim = mail()
    talk.connection.start(claim)
    assert talk.connection.idle_since is None
    assert talk.wire.taken() == [envelope(claim)]


def test_replies_in_one_piece_are_as_good_as_in_many():
    talk = Talk(mail())
    talk.wire.taken()
    talk.connection.data_received(b"250 ok\r\n250-a\r\n250 ok\r\n354 go\r\n")
    assert talk.wire.taken() == [HELLO]


# ── the content ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("message", "written"),
    [
        (b"a\r\n", b"a\r\n"),
        (b"a", b"a\r\n"),
        (b"", b"\r\n"),
        (b".\r\n", b"..\r\n"),
        (b"a\r\n.\r\nb\r\n", b"a\r\n..\r\nb\r\n"),
        (b"a\r\n.b\r\n..c\r\n.", b"a\r\n..b\r\n...c\r\n..\r\n"),
        (b"\r\n.\r\n.\r\n", b"\r\n..\r\n..\r\n"),
        (b"a.b\r\nc.\r\n", b"a.b\r\nc.\r\n"),
        (b"a\n.\nb\n", b"a\r\n..\r\nb\r\n"),  # nor does a bare line feed end the message
    ],
)
def test_a_dot_that_begins_a_line_is_doubled(message, written):
    talk = Talk(mail(message))
    assert talk.take_content() == [written]


@given(st.lists(st.sampled_from([b".", b"..", b"a", b"\r\n", b".\r\n", b"\r\n.\r\n", b"QUIT\r\n"])).map(b"".join))
def test_a_server_reads_back_just_the_message(message):
    talk = Talk(mail(message))
    wire = b"".join(talk.take_content() + talk.mark())
    content, end, rest = (b"\r\n" + wire).partition(b"\r\n.\r\n")
    assert end, "the message has an end"
    assert rest == b"", "and no other before it"
    unstuffed = (content + b"\r\n").replace(b"\r\n.", b"\r\n")[2:]
    assert unstuffed == message if message.endswith(b"\r\n") else unstuffed == message + b"\r\n"


# ── refusals before the mark ─────────────────────────────────────────────────────────────────────────────────

NOBODY = "550 5.1.1 user unknown"
BUSY = "451 4.2.0 mailbox busy"


@pytest.mark.parametrize(("said", "kind"), [(BUSY, Deferred), (NOBODY, Refused)])
@both_ways
def test_a_refused_recipient_is_a_verdict_on_the_message_before_its_mark(pipelining, said, kind):
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    talk.say("250", said, *["503 out of order"] * pipelining)
    ((judged, verdict),) = talk.owner.verdicts
    assert judged is claim
    assert not claim.marked
    assert verdict == kind(f"{said} (to RCPT)")
    assert not talk.owner.asked
    assert not talk.wire.aborted
    assert talk.connection.current is following, "and the connection goes on"


@pytest.mark.parametrize(
    ("said", "kind"), [("451 4.6.0 no", Deferred), ("552 5.3.4 too big", Refused), ("554 5.6.0 virus found", Refused)]
)
@both_ways
def test_a_refused_message_is_a_verdict_on_it_before_its_mark(pipelining, said, kind):
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    talk.say("250", "250", said)
    assert talk.owner.verdicts == [(claim, kind(f"{said} (to DATA)"))]
    assert talk.connection.current is following


def test_354_for_a_refused_recipient_is_answered_with_a_lone_dot_and_no_content():
    claim, following = mail(), mail()
    talk = Talk(claim, following)
    talk.wire.taken()
    assert talk.say("250", NOBODY, "354 go") == [b".\r\n"]
    assert talk.owner.verdicts == []
    assert talk.say("554 no valid recipients") == [envelope(following)]
    assert talk.owner.verdicts == [(claim, Refused(f"{NOBODY} (to RCPT)"))]
    assert not talk.owner.asked


@pytest.mark.parametrize("said", [["250", "550", "503"], ["250", "550", "554"], ["250", "250", "451"]])
def test_a_transaction_that_was_refused_is_reset_before_the_next_mail(said):
    following = mail()
    talk = Talk(mail(), following)
    talk.wire.taken()
    assert talk.say(*said) == [envelope(following, first=b"RSET\r\n")]
    assert talk.say("250 reset", "250", "250", "354") == [HELLO]


@pytest.mark.parametrize("said", [["250", "550"], ["250", "250", "451"]])
def test_step_by_step_the_reset_waits_for_its_reply_too(said):
    following = mail()
    talk = Talk(mail(), following, pipelining=False)
    talk.say(*said[:-1])
    assert talk.say(said[-1]) == [b"RSET\r\n"]
    assert talk.say("250 reset") == commands(following)[:1]
    assert talk.say("250") == commands(following)[1:2]


@pytest.mark.parametrize("said", ["451 no", "502 no", "554 Too many nonmail commands", "421 4.7.0 Too many errors"])
@both_ways
def test_a_server_that_will_not_reset_is_left_and_the_next_message_goes_by_another_connection(pipelining, said):
    """Exim answers the eleventh RSET of a session with 554 (smtp_accept_max_nonmail)."""
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    talk.say("250", NOBODY, *["503"] * pipelining, said)
    assert talk.connection.is_closed
    talk.say("503 nested MAIL")
    assert talk.owner.verdicts == [(claim, Refused(f"{NOBODY} (to RCPT)"))]
    assert talk.owner.requeued == [following]
    assert talk.owner.full_after == [None], "no number of messages is the limit"
    assert talk.trouble is None, "the server works"


@both_ways
def test_a_reply_of_no_use_to_a_reset_is_trouble_and_leaves_the_next_message_untouched(pipelining):
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    talk.say("250", NOBODY, *["503"] * pipelining, "354 no")
    assert talk.owner.verdicts == [(claim, Refused(f"{NOBODY} (to RCPT)"))]
    assert talk.owner.unsent == [following]
    assert talk.trouble


def test_a_refused_mail_command_opened_nothing_to_reset():
    following = mail()
    talk = Talk(mail(), following)
    talk.wire.taken()
    assert talk.say("552 5.3.4 too big", "503", "503") == [envelope(following)]


def test_step_by_step_a_refused_mail_command_opened_nothing_to_reset():
    following = mail()
    talk = Talk(mail(), following, pipelining=False)
    talk.wire.taken()
    assert talk.say("552 5.3.4 too big") == commands(following)[:1]


@pytest.mark.parametrize("end", ["421 too many errors", "lost"])
@pytest.mark.parametrize("said", [["552 5.3.4 too big"], ["250", NOBODY]])
def test_a_refusal_that_was_said_stands_though_the_server_hangs_up(said, end):
    claim = mail()
    talk = Talk(claim)
    talk.say(*said)
    if end == "lost":
        talk.connection.connection_lost(None)
    else:
        talk.say(end)
    assert [(judged, type(verdict)) for judged, verdict in talk.owner.verdicts] == [(claim, Refused)]
    assert talk.owner.unsent == []


# ── the final dot ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("250 queued", Accepted("250 queued")),
        ("200 fine", Accepted("200 fine")),
        ("451 later", Deferred("451 later")),
        ("552 too big", Refused("552 too big")),
        (NOBODY, Refused(NOBODY)),
    ],
)
@both_ways
def test_the_reply_to_the_final_dot_is_the_verdict(pipelining, reply, verdict):
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    talk.take_content()
    talk.mark()
    talk.say(reply)
    assert talk.owner.verdicts == [(claim, verdict)]
    assert talk.connection.current is following, "whatever it was, the connection goes on"


def past_the_dot(*, pipelining: bool = True) -> tuple[Talk, Try]:
    """A message whose dot is written, and a second one that waits."""
    first = mail()
    talk = Talk(first, mail(), pipelining=pipelining)
    talk.take_content()
    talk.mark()
    assert talk.connection.awaiting_reply is first
    return talk, first


FATES = {
    "a lost connection": lambda talk: talk.connection.connection_lost(None),
    "an end": lambda talk: talk.connection.eof_received(),
    "a reset": lambda talk: talk.connection.connection_lost(ConnectionResetError("reset")),
    "garbage": lambda talk: talk.connection.data_received(b"<html>\r\n"),
    "a reply that ends nothing": lambda talk: talk.say("354 go"),
    "a line without an end": lambda talk: talk.connection.data_received(b"250 " + b"x" * 9000),
    "silence": lambda talk: talk.wait(DATA_DONE_TIMEOUT_S),
    "giving up": lambda talk: talk.connection.give_up("stopped"),
}
troubles = pytest.mark.parametrize("fate", [fate for fate in FATES if fate != "giving up"])


@pytest.mark.parametrize("fate", FATES)
def test_no_usable_reply_after_the_final_dot_is_doubt_about_this_message_only(fate):
    talk, first = past_the_dot()
    FATES[fate](talk)
    ((judged, verdict),) = talk.owner.verdicts
    assert judged is first
    assert isinstance(verdict, InDoubt)
    assert verdict.reply
    assert talk.owner.unsent == []
    assert len(talk.owner.ready) == 1
    assert (talk.trouble is None) == (fate == "giving up")


def test_a_reply_that_came_before_garbage_counts():
    talk, first = past_the_dot()
    talk.connection.data_received(b"250 queued\r\n<html>\r\n")
    assert talk.owner.verdicts == [(first, Accepted("250 queued"))]


def test_421_to_the_final_dot_says_that_the_message_was_not_taken_and_is_no_try_of_it():
    talk, first = past_the_dot()
    talk.say("421 closing")
    assert talk.owner.verdicts == [(first, Withdrawn("421 closing"))]
    assert talk.owner.unsent == []
    assert "421 closing" in talk.trouble


# ── replies that nothing asked for ───────────────────────────────────────────────────────────────────────────


def in_mid_content() -> tuple[Talk, Try]:
    claim = mail()
    talk = Talk(claim)
    talk.wire.full = talk.connection
    talk.take_content()
    assert not talk.owner.asked
    return talk, claim


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("552 too big", Refused("552 too big (to DATA)")), ("452 no room", Deferred("452 no room (to DATA)"))],
)
def test_a_refusal_in_mid_content_is_a_verdict_on_the_message(reply, verdict):
    talk, claim = in_mid_content()
    talk.say(reply)
    assert talk.owner.verdicts == [(claim, verdict)]
    assert talk.owner.unsent == []
    assert reply in talk.trouble, "and nothing more can be said on this connection"


@pytest.mark.parametrize("reply", ["421 closing", "250 out of step", "354 go", "<html>", None])
def test_whatever_else_comes_in_mid_content_leaves_the_message_untouched(reply):
    talk, claim = in_mid_content()
    if reply is None:
        talk.connection.eof_received()
    else:
        talk.say(reply)
    assert talk.owner.verdicts == []
    assert talk.owner.unsent == [claim]
    assert talk.trouble


def test_a_reply_to_nothing_ends_an_idle_connection_before_a_message_meets_it():
    """It would be taken for the reply to the next command, and all that follow would be one step out."""
    talk = Talk()
    talk.say("250 out of step")
    assert talk.connection.is_closed
    assert talk.wire.taken() == []
    assert talk.owner.ended == [None]
    assert talk.owner.idles == 1


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA"])
@both_ways
def test_a_reply_too_many_never_counts_as_the_answer_to_a_dot(pipelining, step):
    claim = mail()
    talk = Talk(claim, pipelining=pipelining)
    replies = {"MAIL": ["250"], "RCPT": ["250"], "DATA": ["354"]}
    replies[step] *= 2
    for reply in itertools.chain(*replies.values()):
        if not talk.connection.is_closed:
            talk.say(reply)
    assert talk.connection.is_closed
    assert talk.connection.awaiting_reply is None
    assert talk.owner.verdicts == []


# ── a server that takes nothing from anybody ─────────────────────────────────────────────────────────────────

TAKES_NOTHING = "454 4.3.0 nothing is taken now"


@pytest.mark.parametrize("answered", [0, 1, 2])
@both_ways
def test_454_before_the_content_pauses_the_route_and_leaves_the_message_untouched(pipelining, answered):
    claim = mail()
    talk = Talk(claim, pipelining=pipelining)
    talk.say(*["250"] * answered, TAKES_NOTHING)
    assert talk.owner.verdicts == []
    assert talk.owner.unsent == [claim]
    (reason,) = talk.owner.pauses
    assert TAKES_NOTHING in reason
    assert talk.trouble == reason


@both_ways
def test_454_to_the_final_dot_is_a_try_that_does_not_count_and_pauses_the_route(pipelining):
    talk, first = past_the_dot(pipelining=pipelining)
    talk.say(TAKES_NOTHING)
    assert talk.owner.verdicts == [(first, Withdrawn(TAKES_NOTHING))]
    assert len(talk.owner.pauses) == 1
    assert talk.trouble == talk.owner.pauses[0]


@pytest.mark.parametrize("taken", [False, True], ids=["in mid-content", "at the mark"])
def test_454_that_nobody_asked_for_pauses_the_route_too(taken):
    claim = mail()
    talk = Talk(claim)
    talk.wire.full = None if taken else talk.connection
    talk.take_content()
    talk.say(TAKES_NOTHING)
    assert talk.owner.verdicts == []
    assert talk.owner.unsent == ([] if taken else [claim]), "the owner has it, once its mark is asked for"
    assert talk.trouble == talk.owner.pauses[0]


@pytest.mark.parametrize("said", [["421 idle for too long"], ["250", "421 closing"], ["451 later"]])
def test_no_other_reply_pauses_the_route_at_once(said):
    talk = Talk(mail())
    talk.say(*said)
    assert talk.owner.pauses == []


def test_a_refusal_that_was_said_stands_though_the_server_takes_nothing_then():
    claim = mail()
    talk = Talk(claim)
    talk.say("250", NOBODY, TAKES_NOTHING)
    assert talk.owner.verdicts == [(claim, Refused(f"{NOBODY} (to RCPT)"))]
    assert len(talk.owner.pauses) == 1


# ── refusals that are not the email's ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "about"),
    [
        (["503 Bad sequence of commands - pipelined after end of DATA"], About.ROUTE),
        (["550 5.4.5 Daily user sending limit exceeded"], About.ROUTE),
        (["530 5.7.0 Authentication required"], About.ROUTE),
        (["250", "504 5.5.2 <vm>: Helo command rejected: need fully-qualified hostname"], About.ROUTE),
        (["250", "530 SMTP authentication is required"], About.RELAYING),
        (["250", "454 4.7.1 <p1@example.com>: Relay access denied"], About.RELAYING),
        (["250", "550 go away"], About.UNCLEAR),
        (["250", "250", "554 go away"], About.UNCLEAR),
    ],
)
@both_ways
def test_what_may_be_about_the_route_is_for_the_owner_to_decide(pipelining, said, about):
    claim, following = mail(), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    talk.say(*said, *["503"] * (3 - len(said)) * pipelining)
    ((refused, refusal),) = talk.owner.route_refusals
    assert refused is claim
    assert refusal.about is about
    assert refusal.reply == f"{said[-1]} (to {refusal.stage})"
    assert talk.owner.verdicts == []
    assert talk.owner.pauses == []
    assert talk.connection.current is following


def test_a_refusal_of_the_sender_to_the_dot_is_for_the_owner_to_decide():
    talk, first = past_the_dot()
    talk.say("550 5.7.60 SMTP; Client does not have permissions to send as this sender")
    ((refused, refusal),) = talk.owner.route_refusals
    assert refused is first
    assert refused.marked
    assert refusal.about is About.ROUTE


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("450 4.7.1 Error: too much mail from 192.0.2.1", "rate"),
        ("451 4.3.0 Temporary lookup failure", "rate"),
        ("421 4.7.0 Try again later, closing connection", "rate"),
        ("432 4.3.2 Concurrent connections limit exceeded", "connections"),
        ("421 4.7.0 Error: too many connections from 192.0.2.1", "connections"),
    ],
)
@both_ways
def test_throttling_is_told_and_costs_the_message_nothing(pipelining, said, kind):
    claim = mail()
    talk = Talk(claim, pipelining=pipelining)
    talk.say(said, *(["503"] * 2 * pipelining if not said.startswith("421") else []))
    assert talk.owner.throttles == [kind]
    assert talk.owner.requeued == [claim]
    assert talk.owner.verdicts == []
    assert talk.connection.is_closed == said.startswith("421")
    assert talk.owner.ended in ([], [None]), "that is no trouble of the server"


def test_throttling_at_the_dot_is_a_try_that_does_not_count():
    talk, first = past_the_dot()
    talk.say("450 4.7.1 Error: too much mail from 192.0.2.1")
    assert talk.owner.throttles == ["rate"]
    assert talk.owner.verdicts == [(first, Withdrawn("450 4.7.1 Error: too much mail from 192.0.2.1"))]


@pytest.mark.parametrize("said", ["450 4.7.1 rate limit exceeded", "452 4.3.1 out of resources"])
def test_a_connection_that_took_messages_and_then_defers_two_in_a_row_is_given_up(said):
    talk, _ = after_messages(2)
    assert not talk.connection.is_draining
    talk.say("250", said, "503")
    assert not talk.connection.is_draining
    talk.say("250", "250", said, "503")
    assert talk.connection.is_draining


# ── limits of a session ──────────────────────────────────────────────────────────────────────────────────────


def after_messages(count: int, *, pipelining: bool = True) -> tuple[Talk, Try]:
    """A connection that took so many messages, and the claim whose envelope is written after them."""
    claims = [mail() for _ in range(count + 2)]
    talk = Talk(*claims, pipelining=pipelining)
    for _ in range(count):
        talk.take_content()
        talk.mark()
        talk.say("250 queued")
    talk.owner.verdicts.clear()
    talk.wire.taken()
    return talk, claims[count]


LIMITS = {
    "OpenSMTPD": "452 4.5.3 Too many messages sent",
    "Exim": "421 too many messages in this connection",
    "words that nobody knows": "450 enough of you for today's session",
    "no words": "421",
}


@pytest.mark.parametrize("said", LIMITS.values(), ids=LIMITS)
@both_ways
def test_a_limit_of_messages_costs_nothing_and_the_next_connection_takes_the_claim(pipelining, said):
    talk, claim = after_messages(3, pipelining=pipelining)
    written = talk.say(said, *([] if said.startswith("421") else ["503"] * 2 * pipelining))
    assert talk.owner.full_after == [3]
    assert talk.owner.requeued == [claim]
    assert talk.owner.verdicts == []
    assert len(talk.owner.ready) == 1, "nothing more is taken on this connection"
    assert written == ([] if said.startswith("421") else [b"QUIT\r\n"])
    talk.say("221 bye")
    assert talk.trouble is None


@pytest.mark.parametrize("said", ["452 4.5.3 Too many messages sent", "450 enough of you"])
def test_a_limit_that_the_first_message_meets_is_throttling(said):
    talk, claim = after_messages(0)
    talk.say(said, "503", "503")
    assert talk.owner.full_after == []
    assert talk.owner.throttles == ["rate"]
    assert talk.owner.requeued == [claim]


def test_a_refused_mail_command_after_other_messages_is_tried_on_another_connection_first():
    """It may be a limit of this session in words that nobody knows; if not, the next connection's first MAIL tells."""
    talk, claim = after_messages(2)
    assert talk.say("550 no more", "503", "503") == [b"QUIT\r\n"]
    assert talk.owner.requeued == [claim]
    assert talk.owner.full_after == [None], "and teaches no limit"
    assert talk.owner.route_refusals == []


def test_too_many_errors_close_the_connection_and_cost_the_next_message_nothing():
    """Postfix says so at the command behind the error that was one too many (smtpd_hard_error_limit)."""
    claim, following = mail(), mail()
    talk = Talk(claim, following)
    talk.say("250", NOBODY, "503", "250", "250", "421 4.7.0 mx.example.com Error: too many errors")
    assert talk.owner.verdicts == [(claim, Refused(f"{NOBODY} (to RCPT)"))]
    assert talk.owner.requeued == [following]
    assert talk.owner.full_after == [None]
    assert talk.trouble is None


def test_a_limit_at_the_dot_is_a_try_that_does_not_count():
    talk, _ = after_messages(2)
    claim = talk.connection.current
    talk.take_content()
    talk.mark()
    assert talk.say("452 4.5.3 Too many messages sent") == [b"QUIT\r\n"]
    assert talk.owner.verdicts == [(claim, Withdrawn("452 4.5.3 Too many messages sent"))]
    assert talk.owner.full_after == [None]


def test_a_connection_whose_limit_is_known_says_goodbye_before_it():
    talk, _ = after_messages(2)
    talk.connection.limit_to(3)
    talk.take_content()
    talk.mark()
    assert talk.say("250 queued") == [b"QUIT\r\n"]
    assert talk.owner.full_after == []


def test_whatever_a_goodbye_is_answered_with_pauses_nothing():
    talk = Talk()
    talk.connection.close_politely()
    talk.say(TAKES_NOTHING)
    assert talk.owner.pauses == []
    assert talk.trouble is None


def test_a_server_may_take_ten_minutes_for_its_answer_to_the_dot():
    talk, first = past_the_dot()
    talk.wait(DATA_DONE_TIMEOUT_S - 1)
    assert not talk.wire.aborted
    talk.say("250 at last")
    assert talk.owner.verdicts == [(first, Accepted("250 at last"))]
    talk.wait(COMMAND_TIMEOUT_S - 1)
    assert not talk.wire.aborted, "the next envelope has its own time from here on"
    talk.wait(1)
    assert talk.wire.aborted


# ── trouble before the mark ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("answered", [0, 1, 2])
@pytest.mark.parametrize("fate", ["421", *FATES])
@both_ways
def test_trouble_before_the_content_leaves_the_message_untouched(pipelining, fate, answered):
    claim = mail()
    talk = Talk(claim, pipelining=pipelining)
    talk.say(*["250"] * answered)
    if fate == "421":
        talk.say("421 closing")
    elif fate == "a reply that ends nothing":
        talk.say("354" if answered < 2 else "250")
    else:
        FATES[fate](talk)
    assert talk.owner.verdicts == []
    assert talk.owner.unsent == [claim]
    assert (talk.trouble is None) == (fate == "giving up")


@pytest.mark.parametrize("fate", ["421", *FATES])
def test_trouble_while_the_mark_is_asked_for_leaves_the_try_to_its_owner(fate):
    talk = Talk(mail())
    talk.take_content()
    if fate == "421":
        talk.say("421 closing")
    elif fate == "silence":
        talk.wait(DATA_DONE_TIMEOUT_S)
        assert not talk.wire.aborted, "it is our commit that is waited for, not the server"
        return
    else:
        FATES[fate](talk)
    assert talk.owner.verdicts == []
    assert talk.owner.unsent == []
    assert talk.connection.is_closed, "so the owner sees that no dot may be written"
    assert talk.connection.current is None
    assert (talk.trouble is None) == (fate == "giving up")


def test_content_that_the_server_does_not_take_is_trouble_and_no_doubt():
    claim = mail()
    talk = Talk(claim)
    talk.wire.full = talk.connection
    talk.take_content()
    talk.wait(COMMAND_TIMEOUT_S)
    assert talk.owner.unsent == [claim]
    assert not talk.owner.asked
    assert talk.trouble is not None


@both_ways
def test_a_command_may_take_its_time_and_no_more(pipelining):
    talk = Talk(mail(), pipelining=pipelining)
    talk.wait(COMMAND_TIMEOUT_S - 1)
    assert not talk.wire.aborted
    talk.wait(1)
    assert talk.wire.aborted


def test_step_by_step_each_command_has_its_own_time():
    talk = Talk(mail(), pipelining=False)
    for _ in range(3):
        talk.wait(COMMAND_TIMEOUT_S - 1)
        assert not talk.wire.aborted
        talk.say("250") if talk.connection._expected[0].name != "DATA" else talk.say("354")
    assert len(talk.owner.asked) == 1


# ── abandoning ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", ["the envelope is under way", "the mark is asked for"])
@both_ways
def test_an_abandoned_message_is_dropped_before_its_dot_and_nothing_is_said_of_it(pipelining, stage):
    talk = Talk(mail(), mail(), pipelining=pipelining)
    if stage == "the mark is asked for":
        talk.take_content()
    talk.wire.taken()
    talk.connection.abandon("the session is gone")
    assert talk.wire.taken() == []
    assert talk.owner.verdicts == []
    assert talk.owner.unsent == []
    assert talk.trouble is None


def test_an_owner_that_abandons_at_once_when_asked_for_a_mark_drops_the_connection():
    talk = Talk(mail())
    talk.owner.ask_mark = lambda connection, _claim: connection.abandon("not ours")  # type: ignore[method-assign]
    talk.connection.data_received(b"250\r\n250\r\n354\r\n250 what\r\n")
    assert talk.wire.aborted
    assert talk.owner.verdicts == []


# ── the end of a connection ──────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_after_its_last_message_a_connection_says_goodbye(pipelining):
    talk = Talk(mail(), mail(), mail(), pipelining=pipelining, messages_max=2)
    for _ in range(2):
        talk.take_content()
        written = talk.mark()
        talk.wire.writes = talk.say("250 queued")
    assert written == [b".\r\n"]
    assert talk.wire.taken() == [b"QUIT\r\n"]
    assert len(talk.owner.ready) == 1
    talk.say("221 bye")
    assert talk.trouble is None


def test_messages_given_by_start_count_too():
    talk = Talk(messages_max=1)
    talk.connection.start(mail())
    talk.owner.ready.append(mail())
    talk.take_content()
    talk.mark()
    assert talk.say("250") == [b"QUIT\r\n"]


def test_an_idle_connection_closes_with_quit_and_once():
    talk = Talk()
    talk.connection.close_politely()
    talk.connection.close_politely()
    assert talk.wire.taken() == [b"QUIT\r\n"]
    talk.say("221 bye")
    assert talk.trouble is None


@pytest.mark.parametrize("end", ["lost", "silence", "421", "500"])
def test_whatever_answers_quit_is_no_trouble(end):
    talk = Talk()
    talk.connection.close_politely()
    if end == "lost":
        talk.connection.connection_lost(None)
        assert talk.owner.ended == [None]
    elif end == "silence":
        talk.wait(QUIT_TIMEOUT_S)
        assert talk.wire.aborted
    else:
        talk.say(end)
        assert talk.trouble is None


def test_closing_lets_what_is_under_way_finish():
    talk, _first = past_the_dot()
    talk.connection.close_politely()
    assert talk.wire.taken() == []
    assert talk.say("250 queued") == [b"QUIT\r\n"]
    assert len(talk.owner.verdicts) == 1
    assert len(talk.owner.ready) == 1


def test_a_closing_connection_finishes_a_refused_message_too():
    talk = Talk(mail())
    talk.connection.close_politely()
    talk.wire.taken()
    assert talk.say("250", "550", "503") == [b"QUIT\r\n"]


@pytest.mark.parametrize("end", ["lost", "421 idle for too long", "250 what"])
def test_an_idle_connection_that_ends_is_no_trouble(end):
    talk = Talk()
    if end == "lost":
        talk.connection.connection_lost(None)
    else:
        talk.say(end)
    assert talk.connection.is_closed
    assert talk.owner.ended == [None]


def test_what_comes_after_the_end_changes_nothing():
    talk, first = past_the_dot()
    talk.connection.give_up("stopped")
    before = list(talk.owner.verdicts), list(talk.owner.unsent)
    talk.say("250 queued")
    talk.connection.data_received(b"garbage\r\n")
    talk.connection.connection_lost(None)
    talk.connection.resume_writing()
    talk.connection.close_politely()
    talk.connection.give_up("again")
    talk.wait(10 * DATA_DONE_TIMEOUT_S)
    assert (talk.owner.verdicts, talk.owner.unsent) == before
    assert talk.owner.verdicts[0][0] is first
    assert talk.owner.ended == [None]


# ── any server, any owner ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Server:
    """A server that reads what was written as RFC 5321 says, and answers one command when asked to.

    It is the judge of the other side: what it has read whole, for a recipient, is what may be in a mailbox.
    """

    unread: bytes = b""
    in_content: bool = False
    has_mail: bool = False
    has_recipient: bool = False
    messages: list[bytes] = field(default_factory=list)
    misorders: list[str] = field(default_factory=list)

    @property
    def is_asked(self) -> bool:
        return b"\r\n.\r\n" in b"\r\n" + self.unread if self.in_content else b"\r\n" in self.unread

    @property
    def asked(self) -> int:
        """How many commands wait for their replies."""
        return self.is_asked if self.in_content else self.unread.count(b"\r\n")

    def answer(self, code: int) -> bytes:
        """Answer the next command with this code, as far as the code can answer it."""
        if self.in_content:
            content, _, self.unread = (b"\r\n" + self.unread).partition(b"\r\n.\r\n")
            if self.has_recipient:  # else it is the lone dot that ends nothing's content
                self.messages.append((content + b"\r\n")[2:])
            self.in_content = self.has_mail = self.has_recipient = False
            return self._say(code)
        line, _, self.unread = self.unread.partition(b"\r\n")
        verb = line[:4].upper()
        if verb == b"RSET":
            self.has_mail = self.has_recipient = False
        elif verb == b"MAIL":
            if self.has_mail:
                self.misorders.append("MAIL in an open transaction")
            self.has_mail = 200 <= code < 300
        elif verb == b"RCPT":
            self.has_recipient = self.has_mail and 200 <= code < 300
        elif verb == b"DATA":
            self.in_content = code == 354
        elif verb != b"QUIT":
            self.misorders.append(f"unknown command {line!r}")
        return self._say(code)

    @staticmethod
    def _say(code: int) -> bytes:
        return f"{code} said\r\n".encode()


GOOD = {b"MAIL": 250, b"RCPT": 250, b"DATA": 354, b"RSET": 250, b"QUIT": 221}

moves = st.one_of(
    st.just(("good", 0)),
    st.just(("good", 0)),
    st.just(("good", 0)),
    st.just(("mark", 0)),
    st.just(("mark", 0)),
    st.tuples(st.just("answer"), st.sampled_from([250, 251, 354, 421, 451, 452, 454, 503, 530, 550, 554, 334, 221])),
    st.tuples(st.just("put"), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([1, 29, 31, 601])),
    st.tuples(st.just("unasked"), st.sampled_from([250, 354, 421, 452, 454, 552])),
    st.sampled_from(["abandon", "full", "empty", "close", "garbage", "lost", "give_up"]).map(lambda name: (name, 0)),
)


class Play:
    """One dialogue of random moves, with the facts that are checked after each."""

    def __init__(self, claims: int, *, pipelining: bool, messages_max: int) -> None:
        self.claims = [mail(message) for message in [HELLO, b".\r\nQUIT\r\n", b"no end", b"x\r\n..\r\n"] * 3][:claims]
        self.talk = Talk(*self.claims, pipelining=pipelining, messages_max=messages_max)
        self.server = Server()
        self.dotted: list[Try] = []
        self.abandoned: list[Try] = []
        self.accepted = 0
        self.is_in_step = True  # replies answer commands one to one; the server's own doing if not
        self.read()

    @property
    def is_over(self) -> bool:
        return self.talk.connection.is_closed

    def read(self) -> None:
        self.server.unread += b"".join(self.talk.wire.taken())

    def move(self, name: str, value: int) -> None:
        getattr(self, name)(value)
        self.read()

    def good(self, _: int) -> None:
        self.answer(250 if self.server.in_content else GOOD.get(self.server.unread[:4].upper(), 250))

    def answer(self, code: int) -> None:
        if self.server.is_asked and not self.is_over:
            self.accepted += self.server.in_content and 200 <= code < 300
            self.talk.connection.data_received(self.server.answer(code))

    def mark(self, _: int) -> None:
        if self.talk.owner.asked and not self.is_over:
            claim = self.talk.owner.asked.popleft()
            assert self.talk.connection.current is claim
            claim.mark(1)
            self.dotted.append(claim)
            self.talk.connection.send_final_dot()

    def abandon(self, _: int) -> None:
        claim = self.talk.connection.current
        if claim is not None:
            self.abandoned.append(claim)
            if claim in self.talk.owner.asked:
                self.talk.owner.asked.remove(claim)
            self.talk.connection.abandon("the session is gone")

    def put(self, count: int) -> None:
        connection = self.talk.connection
        if connection.idle_since is not None and not connection.is_draining and not self.is_over:
            fresh = [mail() for _ in range(count)]
            self.claims += fresh
            self.talk.owner.ready.extend(fresh[1:])
            connection.start(fresh[0])

    def wait(self, seconds: int) -> None:
        self.talk.wait(seconds)

    def full(self, _: int) -> None:
        self.talk.wire.full = self.talk.connection

    def empty(self, _: int) -> None:
        self.talk.wire.full = None
        self.talk.connection.resume_writing()

    def close(self, _: int) -> None:
        self.talk.connection.close_politely()

    def unasked(self, code: int) -> None:
        self.is_in_step = False
        self.talk.connection.data_received(f"{code} unasked\r\n".encode())

    def garbage(self, _: int) -> None:
        self.talk.connection.data_received(b"\x00\r\n")

    def lost(self, _: int) -> None:
        self.talk.connection.connection_lost(None)

    def give_up(self, _: int) -> None:
        self.talk.connection.give_up("stopped")

    def check(self) -> None:
        owner = self.talk.owner
        judged = [claim for claim, _ in owner.verdicts]
        assert len(judged) == len({claim.outgoing.email for claim in judged}), "at most one verdict per claim"
        assert len(self.server.messages) <= len(self.dotted), "no dot without a mark"
        for claim, verdict in owner.verdicts:
            was_past_its_dot = claim in self.dotted
            assert was_past_its_dot or isinstance(verdict, Deferred | Refused)
            assert not (was_past_its_dot and claim in owner.requeued)
            assert not isinstance(verdict, Accepted | InDoubt) or was_past_its_dot
        if self.is_in_step:
            assert self.talk.connection.commands.offers.pipelining or self.server.asked <= 1, "a command did not wait"
            assert sum(isinstance(verdict, Accepted) for _, verdict in owner.verdicts) <= self.accepted
            assert not self.server.misorders
        assert len(owner.ended) <= 1

    def check_ends(self) -> None:
        """Each claim that was taken has ended in just one way."""
        owner, connection = self.talk.owner, self.talk.connection
        assert connection.is_closed
        assert len(owner.ended) == 1
        judged = {claim.outgoing.email for claim, _ in [*owner.verdicts, *owner.route_refusals]}
        for claim in self.claims:
            ends = [
                claim in owner.ready,
                claim.outgoing.email in judged,
                claim in owner.unsent,
                claim in owner.requeued,
                claim in owner.asked,
                claim in self.abandoned,
            ]
            assert sum(ends) == 1, f"{claim.outgoing.key} ended in {ends}"


@given(
    moves=st.lists(moves, max_size=60),
    claims=st.integers(0, 6),
    pipelining=st.booleans(),
    messages_max=st.sampled_from([1, 2, 100]),
)
@settings(max_examples=600, deadline=None)
def test_whatever_is_said_each_claim_ends_once_and_no_dot_comes_without_a_mark(moves, claims, pipelining, messages_max):
    play = Play(claims, pipelining=pipelining, messages_max=messages_max)
    play.check()
    for name, value in moves:
        play.move(name, value)
        play.check()
    play.talk.connection.connection_lost(None)
    play.check()
    play.check_ends()


@given(claims=st.integers(0, 12), pipelining=st.booleans(), messages_max=st.integers(1, 20))
@settings(deadline=None)
def test_a_good_server_gets_each_message_once_and_whole(claims, pipelining, messages_max):
    play = Play(claims, pipelining=pipelining, messages_max=messages_max)
    while not play.is_over and (play.server.is_asked or play.talk.owner.asked):
        play.move("mark" if play.talk.owner.asked else "good", 0)
        play.check()
    sent = min(claims, messages_max)
    assert len(play.server.messages) == sent
    for claim, content in zip(play.claims, play.server.messages, strict=False):
        message = (b"\r\n" + content).replace(b"\r\n.", b"\r\n")[2:]
        assert message.removesuffix(b"\r\n") == claim.outgoing.message.removesuffix(b"\r\n")
    assert [type(verdict) for _, verdict in play.talk.owner.verdicts] == [Accepted] * sent


@pytest.mark.parametrize("pipelining", [True, False])
def test_redirected_mail_goes_to_one_address_whole_and_every_verdict_says_so(pipelining):
    claims = [mail(), mail(b".dot\r\n"), mail()]
    talk = Talk(*claims, pipelining=pipelining, size=True, redirect_to="staging@example.com")
    written = b"".join(talk.wire.taken())
    header = b"X-Outbox-Redirected-From: " + claims[0].outgoing.recipient.encode() + b"\r\n"
    written += b"".join(talk.say("250", "250", "354"))
    assert written == (
        b"MAIL FROM:<reports@example.com> SIZE=%d\r\nRCPT TO:<staging@example.com>\r\nDATA\r\n" % len(header + HELLO)
        + header
        + HELLO
    )
    talk.mark()
    written = b"".join(talk.say("250 taken"))
    assert talk.owner.verdicts[-1] == (claims[0], Accepted("redirected to staging@example.com: 250 taken"))
    written += b"".join(talk.say("250", NOBODY, "554 no", "250", "250", "250", "354"))
    assert isinstance(talk.owner.verdicts[-1][1], Refused)
    assert talk.owner.verdicts[-1][1].reply.startswith(f"redirected to staging@example.com: {NOBODY}")
    assert claims[1].outgoing.recipient.encode() not in written


# ── the last gate ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
@both_ways
def test_no_message_ends_before_its_end_and_none_with_nul_is_begun(pipelining, message):
    talk = Talk(mail(message), pipelining=pipelining)
    if b"\0" in message:
        ((_, verdict),) = talk.owner.verdicts
        assert isinstance(verdict, Refused)
        assert "NUL" in verdict.reply
        assert talk.wire.taken() == []
        return
    (wire,) = talk.take_content()
    assert b"\r\n.\r\n" not in b"\r\n" + wire
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", wire)


@pytest.mark.parametrize("field", ["sender", "recipient"])
@pytest.mark.parametrize("bad", ["\r\nRCPT TO:<evil@example.com>", "\n", "\r", "\0", " SIZE=1", "> BODY=8BITMIME <"])
@both_ways
def test_an_address_that_could_be_taken_for_another_command_is_never_written(pipelining, field, bad):
    claim, following = mail(**{field: f"a@example.com{bad}"}), mail()
    talk = Talk(claim, following, pipelining=pipelining)
    ((refused, verdict),) = talk.owner.verdicts
    assert refused is claim
    assert isinstance(verdict, Refused)
    assert f"the {field} has a control character" in verdict.reply
    assert b"evil" not in b"".join(talk.wire.taken())
    assert talk.connection.current is following


def test_a_line_over_998_octets_is_a_dead_letter_before_it_is_signed():
    class Signer:
        def sign(self, *_, **__):
            raise AssertionError("it was parsed")

    talk = Talk(mail(b"Subject: x\r\n\r\n" + b" " * 3_000_000), headers=RouteHeaders({}, Signer()))
    ((_, verdict),) = talk.owner.verdicts
    assert isinstance(verdict, Refused)
    assert "a line of more than 998 octets" in verdict.reply
