"""`outbox test-send` and `redirect_to`: what goes to whom, past the outbox and through it."""

import json
import ssl

import trustme

from outbox.sandbox.smtp_sink import Accept, Cut, Reply, Sink, Stage, Stall

STAGING = "staging@example.com"


async def test_a_test_email_goes_past_the_outbox_and_the_servers_replies_are_shown(fleet):
    await fleet.hire(3)
    fleet.database, there = "postgresql://nobody@127.0.0.1:1/none", fleet.database
    ended = await fleet.run("test-send", "me@Example.com")
    assert ended.code == 0, ended
    *lines, last = ended.out.splitlines()
    assert {line[:9].strip(): line[9:] for line in lines} == {
        "server": fleet.sink.url,
        "TLS": "none: it goes in the clear",
        "from": "reports@example.com",
        "to": "me@example.com",
        "MAIL": "250 2.1.0 OK",
        "RCPT": "250 2.1.5 OK",
        "DATA": "354 End data with <CR><LF>.<CR><LF>",
        "the dot": "250 2.0.0 OK: kept",
    }
    (mail,) = fleet.sink.accepted
    assert mail.recipients == ("me@example.com",)
    assert b"Subject: Test of outbox on " in mail.message
    assert last == f"The mail server took it: 250 2.0.0 OK: kept. Its Message-ID is {mail.message_id}."

    fleet.database = there
    ended = await fleet.run("test-send", "me@example.com", "--report", "progress", "--for", "2", "--json")
    assert ended.code == 0, ended
    assert json.loads(ended.out)["verdict"] == "accepted"
    mail = fleet.sink.accepted[-1].message
    assert b"To: Person 2 <me@example.com>" in mail, "Person 2 is not written to"
    assert b"https://reports.example.com/r/PREVIEW" in mail
    assert fleet.sink.addresses == {"me@example.com": 2}
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 0


async def test_a_test_email_that_is_not_taken_exits_with_1_and_a_bad_address_with_2(fleet):
    async def sent(action, at=Stage.DOT):
        fleet.sink.script = lambda stage, _: action if stage is at else None
        ended = await fleet.run("test-send", "me@example.com")
        assert ended.code == 1
        (sentence,) = ended.sentences
        return sentence

    assert await sent(Reply("550 5.1.1 no such user"), Stage.RCPT) == (
        "It was not sent: 550 5.1.1 no such user (to RCPT)."
    )
    assert await sent(Reply("451 later")) == "It was not sent: 451 later."
    assert "It was not sent: the connection was lost" in await sent(Cut(), Stage.MAIL)
    assert "It was not sent: the server takes no mail for now: 454" in await sent(Reply("454 quota"), Stage.MAIL)
    assert "Nobody knows whether it was sent: the connection was lost" in await sent(Accept(Cut()))
    fleet.top = "command_timeout_s = 0.3"
    assert "the server was silent for too long (MAIL)" in await sent(Stall(), Stage.MAIL)
    assert await sent(Reply("554 go away"), Stage.CONNECT) == (
        f"It was not sent: {fleet.sink.url.removeprefix('smtp://')}: 554 go away; see `outbox doctor`."
    )
    for words, said in {
        ("me@",): "'me@' is no email address: ",
        ("me@example.com", "--for", "1"): "--for: says whose report; add --report REPORT.",
    }.items():
        ended = await fleet.run("test-send", *words)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith(f"outbox: {said}")


async def test_a_test_email_takes_the_encryption_and_the_login_that_the_relay_takes(fleet):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(fleet.directory / "ca.pem"))
    async with Sink(tls=context, login=("user", "s3cret")) as sink:
        port = sink.url.rpartition(":")[2]
        fleet.smtp = f"smtp://user:s3cret@localhost:{port}"
        ended = await fleet.run("test-send", "me@example.com")
        assert ended.code == 1
        assert "It was not sent" in ended.err
        ended = await fleet.run(
            "test-send", "me@example.com", environment={"SSL_CERT_FILE": str(fleet.directory / "ca.pem")}
        )
        assert (ended.code, len(sink.accepted)) == (0, 1), ended
        assert f"server   smtp://***@localhost:{port}\n" in ended.out
        assert "), certificate verified\n" in ended.out
        assert "s3cret" not in ended.out


async def test_with_redirect_to_no_email_reaches_its_recipient_and_everybody_who_looks_is_told(fleet):
    await fleet.put_emails(2)  # made before anybody thought of redirect_to
    await fleet.hire(2)
    assert (await fleet.run("generate")).code == 0
    original = {
        row["recipient"]: bytes(row["message"])
        for row in await fleet.connection.fetch("SELECT recipient, message FROM outbox.email WHERE report IS NOT NULL")
    }
    fleet.top = f'redirect_to = "{STAGING}"'
    relay = await fleet.run("relay", "--until-empty", environment={"OUTBOX_LOG_ADDRESSES": "true"})
    assert f"redirect_to is set: every email goes to {STAGING}, none to its recipient" in relay.err
    assert (await fleet.run("test-send", "me@example.com")).out.startswith(f"REDIRECTED: every email goes to {STAGING}")
    assert fleet.sink.addresses == {STAGING: 5}
    header = "X-Outbox-Redirected-From: {}\r\n".format
    for recipient, message in original.items():
        assert header(recipient).encode() + message in [mail.message for mail in fleet.sink.accepted]
    assert fleet.sink.accepted[-1].message.startswith(header("me@example.com").encode())

    replies = await fleet.connection.fetch("SELECT DISTINCT reply FROM outbox.attempt")
    assert [reply for (reply,) in replies] == [f"redirected to {STAGING}: 250 2.0.0 OK: kept"]
    assert await fleet.connection.fetchval("SELECT sent = 4 AND last_reply LIKE 'redirected to %' FROM outbox.relay"), (
        "the relay's row says how it went"
    )
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email WHERE recipient = $1", STAGING) == 0
    said = f"REDIRECTED: every email goes to {STAGING} (redirect_to), none to its recipient."
    assert (await fleet.run("status")).out.splitlines()[0] == said
    assert json.loads((await fleet.run("status", "--json")).out)["redirect_to"] == STAGING
    (line,) = [line for line in (await fleet.run("doctor")).out.splitlines() if "redirect_to" in line]
    assert line.split(None, 2)[:2] == ["note", "redirect_to"]
    assert "p1@example.com" not in str(fleet.sink.addresses)
