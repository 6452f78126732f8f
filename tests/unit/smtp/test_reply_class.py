"""The table of replies: each row by sentences that real servers say, and the defaults by stage."""

import time

import pytest

from outbox.relay.refusals import RefusalJudge
from outbox.smtp.refusal import About, Refusal, Stage
from outbox.smtp.reply_class import classify, is_server_trouble, names_recipient, row_of
from outbox.smtp.reply_table import DEFAULTS, TABLE
from outbox.smtp.verdict import Deferred, Refused

SENTENCES = {
    About.RECIPIENT: (
        ("RCPT", "550 5.5.0 Requested action not taken: mailbox unavailable (S2017062302)."),
        ("RCPT", "450 4.2.1 The user you are trying to contact is receiving mail too quickly. Please resend later."),
        ("RCPT", "452 recipient has exceeded the daily limit of received messages"),
        ("RCPT", "450 user x has reached the hourly receiving limit"),
        ("RCPT", "501 <x@y..z>: domain missing or malformed"),
        ("RCPT", "504 5.5.2 <x@y>: Recipient address rejected: need fully-qualified address"),
        ("RCPT", "550 <helo@example.com>: User unknown"),
        ("RCPT", "550 unknown user helo@example.com"),
        ("RCPT", "450 <x@throttle.example>: Mailbox busy"),
        ("RCPT", "450 4.2.0 <rate@example.com>: Recipient address rejected: try later"),
        ("RCPT", "550 spf@example.com: no such mailbox"),
        ("RCPT", "550 <dkim@example.com> unknown"),
        ("RCPT", "550 No user x@y.z found on this server"),
        ("RCPT", "550 <x@y.z> is not a valid user of this server"),
        ("RCPT", "550 host rejected: no such user here"),
        ("RCPT", "550 The recipient's server rejected the message: user unknown"),
        ("RCPT", "550 x@y.z: user does not exist. See https://help.example/reputation"),
        ("RCPT", "554 delivery error: dd This user doesn't have a yahoo.com account (x@yahoo.com) [0]"),
        ("RCPT", "552 5.2.2 user has exceeded quota"),
        ("DOT", "552 5.2.2 <x> Quota exceeded (mailbox for user is full)"),
        ("RCPT", "452"),
        ("RCPT", "550 Unrouteable address"),
        ("RCPT", "550 5.1.1 <x>: Recipient address rejected: User unknown in local recipient table"),
        ("RCPT", "550 No such user here"),
        ("RCPT", "550 user unknown"),
        ("RCPT", "551 not our customer"),
        ("RCPT", "550 mailbox unavailable"),
        ("RCPT", "550 5.2.1 mailbox disabled"),
        ("RCPT", "452 4.2.2 over quota"),
        ("RCPT", "552 5.2.2 mailbox full"),
        ("RCPT", "450 4.2.0 <x>: Recipient address rejected: Greylisted, see"),
        ("RCPT", "451 4.7.1 Greylisting in action, please come back later"),
        ("RCPT", "451 4.3.0 try later"),
        ("RCPT", "501 5.1.3 Bad recipient address syntax"),
        ("RCPT", "450 4.2.1 The user you are trying to contact is receiving mail at a rate that prevents"),
        ("RCPT", "550 5.7.133 RESOLVER.RST.SenderNotAuthenticatedForGroup; authentication required"),
        ("RCPT", "550 5.7.1 Recipient <x> does not exist"),
        ("RCPT", "451 4.7.1 Please try again later"),
        ("RCPT", "550 5.2.121 recipient's per hour message receive limit exceeded"),
        ("RCPT", "550 5.1.1 unknown"),
        ("RCPT", "501 <a@@b>: malformed address: @b may not follow a"),
        ("RCPT", "551 5.1.6 user has moved"),
        ("RCPT", "450 4.2.1 mailbox busy"),
    ),
    About.MESSAGE: (
        ("DOT", "554 host policy: executable attachment rejected"),
        ("DOT", "554 5.7.1 Mail server rejected: Virus (Eicar) found in message from sender"),
        ("DOT", "552-5.7.0 Our system detected an illegal attachment on your message."),
        ("DATA", "451 4.3.0 later"),
        ("DOT", "552 5.3.4 too big"),
        ("MAIL", "552 5.3.4 Message size exceeds fixed limit"),
        ("MAIL", "552 Message size exceeds maximum permitted"),
        ("RCPT", "553 5.6.7 Address is not ASCII"),
        ("DOT", "552-5.7.0 This message was blocked because its content presents a potential"),
        ("DOT", "451 4.3.0 queue file write error"),
        ("DOT", "452 4.3.1 Insufficient system storage"),
        ("MAIL", "552"),
        ("DOT", "552 Message size exceeds maximum permitted"),
        ("DOT", "500 5.5.2 Error: line too long"),
        ("DOT", "552 5.2.3 Message exceeds the maximum size"),
        ("DOT", "554 5.7.1 virus Eicar found"),
    ),
    About.UNCLEAR: (
        ("RCPT", "550 Administrative prohibition"),
        ("RCPT", "550-Verification failed for <x>"),
        ("RCPT", "550 #5.1.0 Address rejected."),
        ("RCPT", "550 no"),
        ("RCPT", "554 5.7.1 Access denied"),
        ("DOT", "550 no"),
        ("DOT", "554 5.7.1 spam message rejected"),
        ("RCPT", "550 5.7.1 <p@x>: Recipient address rejected: Access denied"),
    ),
    About.RELAYING: (
        ("RCPT", "550 5.7.1 Sender <a@b.c> unknown"),
        ("RCPT", "550 Invalid account credentials"),
        ("RCPT", "550 Sender verify failed: 550 no such user here"),
        ("RCPT", "550-Verification failed for <a@b.c> The account may not exist. 550 Sender verify failed"),
        ("RCPT", "553 5.1.0 <a@b.c>: Sender address rejected: User unknown in local recipient table"),
        ("DOT", "554 Transaction failed: Sending suspended for this account."),
        ("DOT", "554 Message rejected: Sending paused for this account. For more information, please check"),
        ("RCPT", "550 5.7.511 Access denied, banned sender[1.2.3.4]. To request removal"),
        ("DOT", "550 5.7.515 Access denied, sending domain X doesn't meet the required authentication level."),
        ("DOT", "554 Message rejected: identities failed the check in region US-EAST-1: x"),
        ("RCPT", "550 5.7.1 <x>... Relaying denied. IP name lookup failed"),
        ("RCPT", "554 5.7.1 <x[1.2.3.4]>: Client host rejected: Access denied"),
        (
            "RCPT",
            "550 SC-001 (COL004-MC1F4) messages from 1.2.3.4 weren't sent, part of their network is on our block list",
        ),
        ("RCPT", "513 Relaying denied"),
        ("RCPT", "550 authentication required"),
        ("RCPT", "554 5.7.1 <a@b.c>: Relay access denied"),
        ("RCPT", "454 4.7.1 <a@b.c>: Relay access denied"),
        ("RCPT", "550 relay not permitted"),
        ("RCPT", "550 5.7.1 Unable to relay"),
        ("RCPT", "550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain"),
        ("RCPT", "550 5.7.1 <a@b.c>... Relaying denied. Proper authentication required."),
        ("RCPT", "553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)"),
        ("RCPT", "553 5.7.1 <r@e.x>: Sender address rejected: not owned by user joe"),
        ("RCPT", "550 Sender verify failed"),
        ("RCPT", "530 5.7.0 Authentication required"),
        ("RCPT", "554 5.7.1 Service unavailable; Client host [1.2.3.4] blocked using zen.spamhaus.org; https://x"),
        ("DOT", "550 5.7.26 This mail has been blocked because the sender is unauthenticated."),
        ("DOT", "554 Message rejected: Email address is not verified."),
        ("DOT", "550 5.7.9 message rejected, see policy"),
        ("DOT", "554 DMARC check failed"),
        ("DOT", "550 5.7.606 banned sending IP"),
    ),
    About.ROUTE: (
        ("RCPT", "550 User joe@example.com has exceeded its 24-hour sending limit."),
        ("MAIL", "550 5.7.1 Client was not authenticated"),
        ("DATA", "503 5.5.1 RCPT first"),
        ("MAIL", "503 Bad sequence of commands - pipelined after end of DATA"),
        ("RCPT", "504 5.5.2 <vm>: Helo command rejected: need fully-qualified hostname"),
        ("RCPT", "450 4.7.1 <vm>: Helo command rejected: Host not found"),
        ("MAIL", "550 5.4.5 Daily user sending limit exceeded"),
        ("MAIL", "530 5.7.0 Authentication required"),
        ("MAIL", "535 5.7.8 bad"),
        ("DOT", "550 5.7.60 SMTP; Client does not have permissions to send as this sender"),
        ("DOT", "554 5.2.252 SendAsDenied; a@b not allowed to send as c@d"),
        ("DOT", "454 Throttling failure: Daily message quota exceeded"),
        ("MAIL", "450 4.1.8 <x>: Sender address rejected: Domain not found"),
        ("MAIL", "550 go away"),
        (
            "RCPT",
            "550 Domain acme.example has exceeded the max emails per hour (100/100 (100%)) allowed. Message discarded.",
        ),
        ("DOT", "550 5.1.90 Your message can't be sent because you've reached your daily limit for message recipients"),
        ("DOT", "550 5.1.8 Access denied, bad outbound sender"),
        ("RCPT", "501 5.5.4 Syntax error in parameters"),
        ("MAIL", "555 5.5.4 Unsupported option: SIZE"),
        ("RSET", "500 what"),
        ("CONNECT", "554 5.7.1 go"),
        ("DATA", "554 5.5.1 Error: no valid recipients"),
        ("EHLO", "504 no such parameter"),
        ("MAIL", "504 Command parameter not implemented"),
        ("RCPT", "550 5.5.1 protocol error"),
        ("RCPT", "554 5.7.708 Service unavailable. Access denied, traffic not accepted from this IP"),
        ("AUTH", "535 5.7.8 Error: authentication failed"),
        ("MAIL", "550 5.7.1 sender rejected"),
        ("EHLO", "550 you are not welcome"),
    ),
    About.SESSION: (
        ("MAIL", "452 4.7.0 Too many transactions"),
        ("RCPT", "550 too many recipients this session"),
        ("MAIL", "421 4.7.0 MAIL sent too many times"),
        ("RSET", "421 4.7.0 RSET sent too many times"),
        ("MAIL", "421 Message limit reached, please reconnect"),
        ("RCPT", "452 4.5.3 Error: too many recipients"),
        ("MAIL", "421 4.3.2 Too many messages in session"),
        ("MAIL", "452 4.3.1 too many mails for this session"),
        ("MAIL", "421 Session limit reached"),
        ("RCPT", "421 Too many bad recipients"),
        ("MAIL", "450 max messages per connection reached"),
        ("MAIL", "452 4.5.3 Too many messages sent"),
        ("MAIL", "421 too many messages in this connection"),
        ("RSET", "554 Too many nonmail commands"),
        ("MAIL", "421 4.7.0 mx Error: too many errors"),
        ("MAIL", "451 later"),
        ("RCPT", "452 4.5.3 Too many recipients"),
        ("MAIL", "452 4.5.3 enough"),
        ("MAIL", "452 Too many recipients"),
    ),
    About.RATE: (
        ("RCPT", "450 rcpt rate limit exceeded"),
        ("RCPT", "451 4.7.500 Server busy. Please try again later from [1.2.3.4]. (AS77714)"),
        ("DOT", "454 4.7.0 quota exceeded"),
        ("MAIL", "451 4.3.0 later"),
        ("RCPT", "450 4.5.3 Error: too many recipients from x"),
        ("RCPT", "450 4.7.1 Error: too much mail from 1.2.3.4"),
        ("MAIL", "450 4.7.1 Error: too much mail from 1.2.3.4"),
        ("RCPT", "450 4.7.1 Error: too many recipients from 1.2.3.4"),
        ("MAIL", "421 4.7.0 Try again later, closing connection."),
        ("MAIL", "454 Throttling failure: Maximum sending rate exceeded."),
        ("MAIL", "452 4.3.1 Insufficient system storage"),
        ("MAIL", "451 4.3.0 Temporary lookup failure"),
        ("MAIL", "421 4.4.2 Message submission rate for this client has exceeded the configured limit"),
        ("CONNECT", "450 4.7.1 not now"),
        ("MAIL", "451 4.7.1 policy server does not answer"),
    ),
    About.CONNECTIONS: (
        ("MAIL", "450 4.7.1 Error: too many connections"),
        ("CONNECT", "421 4.7.0 mx Error: too many connections from 1.2.3.4"),
        ("CONNECT", "421 Too many concurrent SMTP connections; please try again later."),
        ("CONNECT", "421 4.3.2 Connection rate limit exceeded."),
        ("CONNECT", "421 4.3.2 Too many open connections."),
        ("MAIL", "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded"),
        ("MAIL", "432 4.3.2 wait"),
    ),
    About.CLOSING: (
        ("MAIL", "421 closing"),
        ("DOT", "421 closing"),
        ("CONNECT", "421 Service not available"),
        ("CONNECT", "450 busy"),
        ("MAIL", "454 4.3.0 disk trouble"),
        ("CONNECT", "421 4.3.2 Service shutting down"),
    ),
}
SAID = [(stage, reply, about) for about, replies in SENTENCES.items() for stage, reply in replies]


def split(reply):
    return int(reply[:3]), reply[4:]


@pytest.mark.parametrize(("stage", "reply", "about"), SAID, ids=lambda value: getattr(value, "name", value))
def test_each_reply_is_classified_by_its_words(stage, reply, about):
    assert classify(stage, *split(reply)) is about


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.source)
def test_each_row_of_the_table_decides_some_sentence_and_names_its_source(row):
    """A row that another one hides would be a rule that nobody keeps."""
    assert row.source

    assert any(row_of(stage, *split(reply)) is row for stage, reply, _ in SAID)


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_capital_letters_decide_nothing(case):
    assert classify("RCPT", 554, case("5.7.1 <p@example.com>: relay access denied")) is About.RELAYING


def test_a_reply_may_come_in_several_lines_and_without_an_enhanced_code():
    assert classify("MAIL", 421, "too many messages  in this connection") is About.SESSION


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("code", [400, 450, 499, 500, 550, 599])
def test_every_stage_and_digit_has_a_default(stage, code):
    assert classify(stage, code, "words that nobody knows") in About
    assert (stage, code // 100) in DEFAULTS


@pytest.mark.parametrize("code", [500, 501, 502, 503, 504, 555])
@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA", "DOT", "RSET"])
def test_what_the_server_did_not_understand_is_never_about_the_email(stage, code):
    assert classify(stage, code, "no") is About.ROUTE
    assert classify(stage, code, "5.5.1 Bad sequence of commands") is About.ROUTE


@pytest.mark.parametrize("code", range(500, 556))
def test_a_permanent_refusal_at_mail_is_about_the_route_unless_it_is_the_message_size(code):
    assert classify("MAIL", code, "5.7.1 no") is About.ROUTE
    assert classify("MAIL", code, "no") is (About.MESSAGE if code == 552 else About.ROUTE)


def test_a_refusal_gives_its_reply_and_verdict():
    refusal = Refusal(About.RECIPIENT, "RCPT", 550, "5.1.1 unknown")
    assert refusal.reply == "550 5.1.1 unknown (to RCPT)"
    assert refusal.verdict == Refused(refusal.reply)
    assert Refusal(About.MESSAGE, "DOT", 451, "later").verdict == Deferred("451 later")
    redirected = Refusal(About.MESSAGE, "DOT", 451, "later", "staging@example.com")
    assert redirected.reply == "redirected to staging@example.com: 451 later"


@pytest.mark.parametrize(
    ("code", "text", "is_syntax"),
    [(503, "no", True), (550, "5.5.1 no", True), (550, "5.7.1 no", False), (554, "no", False), (555, "no", True)],
)
def test_a_refusal_knows_whether_the_server_understood(code, text, is_syntax):
    assert Refusal(About.ROUTE, "RCPT", code, text).is_syntax is is_syntax


HOSTILE = ("a ", "<", "-", "a-", "1.", "user/", "user-user ", "limit ", "too many a b c ", "a@a", "@", "http://", "x@")


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_long_reply_is_judged_in_no_time(piece):
    """A server may send 64 KB, and some patterns take the square of the length: 10 s of all routes, without bounds."""
    text = (piece * 64_000)[:64_000]
    began_at = time.process_time()

    for stage in ("MAIL", "RCPT", "DOT"):
        refusal = Refusal(classify(stage, 550, text), stage, 550, text)
        RefusalJudge().rule(refusal, "a@example.com", "b@example.com", 0.0)

    assert time.process_time() - began_at < 1.0  # 0.02 s here; unbounded it is 8 s


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ("452 4.2.2 mailbox full (to RCPT)", True),
        ("redirected to a@example.com: 452 4.2.2 mailbox full (to RCPT)", True),
        ("450 4.2.1 The user you are trying to contact is receiving mail at a rate that (to RCPT)", True),
        ("451 4.3.5 Server configuration error (to RCPT)", False),
        ("451 Temporary local problem (to RCPT)", False),
        ("451 4.7.1 Try again later", False),
        ("the connection was lost", False),
        ("", False),
    ],
)
def test_a_deferral_names_its_recipient_only_in_so_many_words(reply, names):
    assert names_recipient(reply) is names


@pytest.mark.parametrize(
    ("reply", "is_trouble"),
    [
        ("451 4.3.5 Server configuration error (to MAIL)", True),
        ("451 4.4.1 no answer from the directory (to MAIL)", True),
        ("450 4.7.1 not now (to MAIL)", True),
        ("450 4.7.1 Error: too much mail from 192.0.2.1 (to MAIL)", False),
        ("421 4.7.0 Try again later, closing connection (to MAIL)", False),
        ("451 4.3.5 Server configuration error (to RCPT)", False),
    ],
)
def test_trouble_of_the_server_is_told_from_a_rate_limit(reply, is_trouble):
    assert is_server_trouble(reply) is is_trouble
