"""What goes over the wire beside the message, as `outbox relay` says it: to servers, a mail store and a directory."""

import json
import mailbox
import subprocess

import dkim
import pytest

from outbox.mail.verp import tokens_in
from outbox.sandbox.smtp_sink import EXTENSIONS, Accept, Cut, Sink, Stage
from outbox.smtp.maildir import file_name
from tests.support.bounce_samples import ROWS
from tests.support.fault_levers import in_state

WAY = """
return_path = "bounces+{token}@example.com"
headers = { "X-Tag" = "outbox={email_id}", "X-Key" = "{key}" }
[dkim]
domain = "example.com"
selector = "s1"
key_file = "dkim.pem"
"""


async def examined(fleet):
    """What the doctor finds, by check."""
    return {line["check"]: line for line in json.loads((await fleet.run("doctor", "--json")).out)["checks"]}


@pytest.fixture
def signed(fleet):
    """The fleet with all that a route can add to an email."""
    subprocess.run(["openssl", "genrsa", "-out", fleet.directory / "dkim.pem", "1024"], check=True, capture_output=True)
    fleet.top = WAY
    return fleet


async def test_each_email_bears_the_signature_the_fields_and_the_token_that_a_bounce_brings_back(signed):
    async with Sink(extensions=EXTENSIONS) as sink:
        signed.smtp = sink.url
        await signed.put_emails(3)
        await signed.connection.execute(
            "UPDATE outbox.email SET message = 'From: r@example.com'::bytea || E'\\\\015\\\\012' || message"
        )
        ended = await signed.run("relay", "--until-empty")
        assert ended.code == 0, ended
        assert await signed.states() == {"sent": 3}
        line = (await examined(signed))["dkim"]
        assert line["grade"] == "ok"
        record = line["found"].partition('s1._domainkey.example.com TXT "')[2].partition('"')[0].encode()
        for row in await signed.connection.fetch(ROWS):
            (got,) = [one for one in sink.accepted if one.recipients == (row["recipient"],)]
            token = row["token"]
            assert got.sender == f"bounces+{token}@example.com"
            assert tokens_in(got.sender) == [token]
            assert got.mail_parameters == f"SIZE={len(got.message)} RET=HDRS ENVID={token}"
            assert got.rcpt_parameters == (f"NOTIFY=FAILURE ORCPT=rfc822;{row['recipient']}",)
            assert got.message.endswith(
                f"X-Tag: outbox={row['id']}\r\nX-Key: {row['key']}\r\n".encode() + row["message"]
            )
            assert dkim.verify(got.message, dnsfunc=lambda *_, **__: record)


async def test_a_message_that_is_sent_again_has_the_same_fields(fleet):
    def script(stage, visit):
        return Accept(Cut()) if stage is Stage.DOT and visit.number == 1 else None

    async with Sink(script) as sink:
        fleet.smtp = sink.url
        fleet.top = 'headers = { "X-Tag" = "outbox={email_id}" }'
        await fleet.put_emails(1)
        await fleet.relay()
        await in_state(fleet, "in_doubt", "mail1")
        assert (await fleet.run("resolve", "mail1", "--resend")).code == 0
        await in_state(fleet, "sent", "mail1")
        first, second = sink.accepted
        assert first.message == second.message
        assert first.message.startswith(b"X-Tag: outbox=")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"hello", "holds no RSA private key")],
)
async def test_a_key_that_cannot_sign_is_one_sentence_at_the_start_and_with_the_doctor(signed, content, words):
    path = signed.directory / "dkim.pem"
    path.unlink() if content is None else path.write_bytes(content)
    ended = await signed.run("relay")
    assert ended.code == 2
    (sentence,) = ended.sentences
    assert sentence.startswith(f"dkim.key_file: {path}")
    assert words in sentence
    line = (await examined(signed))["dkim"]
    assert line["grade"] == "fault"
    assert words in line["found"]


async def test_an_address_beyond_ascii_is_written_to_where_smtputf8_is_offered_and_else_refused(fleet):
    put = """SELECT outbox.enqueue(key => $1, sender => 's@example.com', recipient => 'Jürgen <jürgen@b.example>',
                                   body_text => 't')"""
    async with Sink(extensions=["SMTPUTF8"]) as able:
        await fleet.connection.execute(put, "a")
        fleet.smtp = able.url
        assert (await fleet.run("relay", "--until-empty")).code == 0
        (got,) = able.accepted
        assert got.recipients == ("jürgen@b.example",)
        assert got.mail_parameters.endswith("BODY=8BITMIME SMTPUTF8")
        assert "To: =?utf-8?q?J=C3=BCrgen?= <jürgen@b.example>\r\n" in got.message.decode()
    await fleet.connection.execute(put, "b")
    await fleet.put_emails(1)
    fleet.smtp = fleet.sink.url
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert [one.recipients for one in fleet.sink.accepted] == [("p1@example.com",)]
    assert "SMTPUTF8 (RFC 6531), so it was not sent" in (await fleet.run("show", "b")).out
    assert await fleet.states() == {"sent": 2, "dead": 1}


async def test_a_message_that_is_too_large_for_the_server_is_a_dead_letter_and_the_rest_is_sent(fleet):
    async with Sink(size_max=20_000) as sink:
        fleet.smtp = sink.url
        await fleet.put_emails(2)
        await fleet.put_emails(1, first=3, size=50_000)
        assert (await fleet.run("relay", "--until-empty")).code == 0
        assert await fleet.states() == {"sent": 2, "dead": 1}
        said = (await fleet.run("show", "mail3")).out
        assert "this server takes at most 20000" in said
        assert len(sink.visits) <= 2 + 1, "no connection was harmed"


async def test_lmtp_is_spoken_to_a_mail_store(fleet):
    async with Sink(lmtp=True) as sink:
        fleet.smtp = sink.url
        assert sink.url.startswith("lmtp://127.0.0.1:")
        await fleet.put_emails(5)
        ended = await fleet.run("relay", "--until-empty")
        assert ended.code == 0, ended
        assert await fleet.states() == {"sent": 5}
        assert f"relays to {sink.url}" in ended.err
        assert not fleet.twice
        tried = await fleet.run("test-send", "ada@example.com")
        assert tried.code == 0, tried
        assert "250 2.0.0 OK: kept" in tried.out
        found = await examined(fleet)
        assert {found["smtp.server"]["grade"], found["smtp.sender"]["grade"]} == {"ok"}
    found = await examined(fleet)
    assert found["smtp.server"]["grade"] == "fault"
    assert found["smtp.sender"]["grade"] == "unknown"


async def test_a_maildir_stands_for_a_mail_server(fleet):
    place = fleet.directory / "mail" / "try"
    fleet.smtp = f"file://{place}"
    await fleet.put_emails(30)
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0, ended
    assert await fleet.states() == {"sent": 30}
    rows = await fleet.connection.fetch("SELECT id, recipient, message_id, message FROM outbox.email")
    there = {path.name: path.read_bytes() for path in (place / "new").iterdir()}
    assert there == {
        f"{file_name(row['id'], row['message_id'])}.1": (
            f"Return-Path: <reports@example.com>\r\nDelivered-To: {row['recipient']}\r\n".encode() + row["message"]
        )
        for row in rows
    }
    assert len(mailbox.Maildir(place)) == 30
    assert list((place / "tmp").iterdir()) == []
    tried = await fleet.run("test-send", "ada@example.com")
    assert tried.code == 0, tried
    assert "none: it stays on this machine" in tried.out
    assert (await examined(fleet))["smtp.server"]["grade"] == "note"


async def test_a_directory_that_cannot_be_written_to_pauses_the_route_until_it_can(fleet):
    place = fleet.directory / "mail"
    place.write_text("a file in the way")
    fleet.smtp = f"file://{place}"
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await relay.says("SMTP is in trouble")
    assert await fleet.states() == {"pending": 1}
    assert (await examined(fleet))["smtp.server"]["grade"] == "fault"
    place.unlink()
    await in_state(fleet, "sent", "mail1")
    assert len(list((place / "new").iterdir())) == 1


async def test_a_mail_whose_file_cannot_be_made_is_not_tried_and_waits(fleet):
    """The directory is there, and then it is not one any more: the mark is committed by then."""
    place = fleet.directory / "mail"
    fleet.smtp = f"file://{place}"
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await in_state(fleet, "sent", "mail1")
    (place / "tmp").rmdir()
    (place / "tmp").write_text("a file in the way")
    await fleet.put_emails(1, first=2)
    await relay.says("454")
    (place / "tmp").unlink()
    await in_state(fleet, "sent", "mail2")
    assert len(list((place / "new").iterdir())) == 2
