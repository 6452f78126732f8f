import pytest

from outbox.sandbox.smtp_sink import Sink, Stage, Visit
from outbox.sandbox.smtp_sink.commands import Commands, Offer
from tests.support.sink_client import SESSION, final_codes, outcome, session


async def test_each_command_has_its_code():
    replies, _, _ = await outcome([SESSION])
    assert b" ".join(final_codes(replies)) == (
        b"220 250 250 503 503 250 503 250 250 250 503 250 501 354 250 250 250 354 250 250 250 354 250 500 501 221"
    )


async def test_pipelining_is_not_offered_where_it_is_off():
    async with Sink(pipelining=False) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n")
        assert [(await client.line())[4:] for _ in range(3)][1:] == [b"SIZE 33554432\r\n", b"8BITMIME\r\n"]


async def test_credentials_are_asked_for_behind_tls_only(contexts):
    async with Sink(tls=contexts[0], login=("u", "p")) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n")
        lines = [await client.line() for _ in range(5)]
        assert lines[-1] == b"250 STARTTLS\r\n"
        assert (await client.ask(b"AUTH PLAIN AHUAcA=="))[:4] == b"530 "


async def test_auth_and_starttls_do_not_exist_unless_configured():
    async with Sink() as sink, session(sink) as client:
        assert (await client.ask(b"AUTH PLAIN AHUAcA=="))[:4] == b"500 "
        assert (await client.ask(b"STARTTLS"))[:4] == b"500 "


def offer() -> Offer:
    return Offer(pipelining=True, tls=None, login=None, size_max=100, eight_bit=True, extensions=("DSN",))


def test_a_refused_recipient_takes_its_parameters_along():
    visit = Visit(1, ("127.0.0.1", 1))
    commands = Commands(offer(), visit)
    assert commands.take(b"MAIL FROM:<a@example.com>").stage is Stage.MAIL
    assert commands.take(b"RCPT TO:<no@example.com> NOTIFY=NEVER").stage is Stage.RCPT
    commands.take_back(Stage.RCPT)
    assert commands.take(b"RCPT TO:<yes@example.com> NOTIFY=FAILURE").stage is Stage.RCPT
    assert (visit.recipients, visit.rcpt_parameters) == (["yes@example.com"], [b" NOTIFY=FAILURE"])


@pytest.mark.parametrize(
    "parameter, code", [(b"SIZE=100", b"250"), (b"SIZE=101", b"552"), (b"SMTPUTF8", b"555"), (b"BODY=8BITMIME", b"250")]
)
def test_a_parameter_is_taken_only_if_its_extension_is_offered(parameter: bytes, code: bytes):
    commands = Commands(offer(), Visit(1, ("127.0.0.1", 1)))
    assert commands.take(b"MAIL FROM:<a@example.com> " + parameter).reply[:3] == code


def test_what_ends_a_transaction_ends_its_recipients():
    visit = Visit(1, ("127.0.0.1", 1))
    commands = Commands(offer(), visit)
    commands.take(b"MAIL FROM:<a@example.com>")
    commands.take(b"RCPT TO:<b@example.com>")
    commands.take_effect(Stage.RSET)
    assert (visit.sender, visit.recipients) == (None, [])
    assert commands.take(b"DATA").stage is None
