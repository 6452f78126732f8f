"""Commands of a transaction, as a connection writes them to a server with these offers."""

import pytest

from outbox.smtp.outgoing import Try
from outbox.smtp.route_headers import RouteHeaders
from outbox.smtp.verdict import Accepted, Refused
from tests.unit.smtp.test_connection import HELLO, Talk, both_ways, mail

ALL = {"size_max": 1000, "eight_bit": True, "utf8": True, "dsn": True}
TOKEN = "4711k1t0123456789abcdef"
ABROAD = "jürgen@b.example"
UTF8_HEADER = f"To: {ABROAD}\r\n\r\nhello\r\n".encode()
BINARY_BODY = b"Subject: x\r\n\r\n\xe9\r\n"


def to(address, message=HELLO):
    return mail(message, recipient=address)


def said(talk, pipelining):
    """MAIL and RCPT as they were said."""
    written = talk.wire.taken() if pipelining else [*talk.wire.taken(), *talk.say("250")]
    mail_from, rcpt_to, *_ = b"".join(written).decode().splitlines()
    return mail_from, rcpt_to


@both_ways
def test_plain_mail_is_said_without_parameters_whatever_is_offered_if_bounces_are_not_to_name_it(pipelining):
    claim = mail()
    talk = Talk(claim, pipelining=pipelining, offers=ALL)
    assert said(talk, pipelining) == (f"MAIL FROM:<{claim.outgoing.sender}>", f"RCPT TO:<{claim.outgoing.recipient}>")


@both_ways
def test_where_dsn_is_offered_a_bounce_names_the_email(pipelining):
    claim = mail(recipient="a+b=c@example.com", token=TOKEN)
    talk = Talk(claim, pipelining=pipelining, size=True, offers=ALL, asks_bounces=True)
    assert said(talk, pipelining) == (
        f"MAIL FROM:<{claim.outgoing.sender}> SIZE={len(HELLO)} RET=HDRS ENVID={TOKEN}",
        "RCPT TO:<a+b=c@example.com> NOTIFY=FAILURE ORCPT=rfc822;a+2Bb+3Dc@example.com",
    )


@both_ways
def test_where_it_is_not_nothing_is_said_of_it(pipelining):
    talk = Talk(mail(), pipelining=pipelining, offers=ALL | {"dsn": False}, asks_bounces=True)
    assert not any("=" in line for line in said(talk, pipelining))


@both_ways
@pytest.mark.parametrize(
    ("claim", "parameters"),
    [
        (to(ABROAD), " BODY=8BITMIME SMTPUTF8"),
        (mail(UTF8_HEADER), " BODY=8BITMIME SMTPUTF8"),
        (mail(BINARY_BODY), " BODY=8BITMIME"),
        (mail(), ""),
    ],
)
def test_8_bits_are_said_where_they_are_offered_and_needed(pipelining, claim, parameters):
    claim, following = Try(claim.outgoing), mail()
    talk = Talk(claim, following, pipelining=pipelining, offers=ALL)
    mail_from, rcpt_to = said(talk, pipelining)
    assert (mail_from, rcpt_to) == (
        f"MAIL FROM:<{claim.outgoing.sender}>{parameters}",
        f"RCPT TO:<{claim.outgoing.recipient}>",
    )
    replies = ("250", "250", "354") if pipelining else ("250", "354")
    assert talk.say(*replies)[-1] == claim.outgoing.message
    written = [*talk.mark(), *talk.say("250 taken")]
    assert talk.owner.verdicts == [(claim, Accepted("250 taken"))]
    next_one = f"MAIL FROM:<{following.outgoing.sender}>\r\n".encode()
    assert next_one in b"".join(written), "what one email needs is not said of the next"


@both_ways
@pytest.mark.parametrize(
    ("claim", "offers", "reason"),
    [
        (to(ABROAD), ALL | {"utf8": False}, "an address of it is not ASCII, and this server does not offer SMTPUTF8"),
        (mail(UTF8_HEADER), ALL | {"utf8": False}, "the message's header is not ASCII, and this server does not"),
        (mail(BINARY_BODY), ALL | {"eight_bit": False}, "the message has 8-bit bytes, and this server does not offer"),
        (mail(b"Subject: \xe9\r\n\r\nx\r\n"), ALL, "the message's header is neither ASCII nor UTF-8"),
        (mail(b"x" * 998 + b"\r\n."), ALL, "the message has 1001 bytes and this server takes at most 1000"),
    ],
)
def test_what_the_server_cannot_take_is_refused_unsent_and_the_connection_goes_on(pipelining, claim, offers, reason):
    claim, following = Try(claim.outgoing), mail()
    talk = Talk(claim, following, pipelining=pipelining, offers=offers)
    ((refused, verdict),) = talk.owner.verdicts
    assert refused is claim
    assert not claim.marked
    assert isinstance(verdict, Refused)
    assert verdict.reply.startswith(reason)
    assert "so it was not sent: " in verdict.reply or "and it was not sent: " in verdict.reply
    assert said(talk, pipelining)[1] == f"RCPT TO:<{following.outgoing.recipient}>"
    assert not talk.owner.ended


def test_a_sender_beyond_ascii_that_a_return_path_stands_in_for_asks_for_nothing():
    claim = mail(sender=ABROAD)
    talk = Talk(claim, offers=ALL | {"utf8": False}, headers=RouteHeaders({}, None, "bounces@b.example"))
    assert said(talk, pipelining=True)[0] == "MAIL FROM:<bounces@b.example>"


def test_an_idle_connection_that_is_started_with_what_it_cannot_take_is_idle_again():
    talk = Talk(offers=ALL | {"utf8": False})
    talk.connection.start(to(ABROAD))
    assert [type(verdict) for _, verdict in talk.owner.verdicts] == [Refused]
    assert talk.wire.taken() == []
    assert talk.owner.idles == 2
