"""A mail server that echoes its login: it is not in the log, the database, status, doctor and test-send."""

import ssl
from base64 import b64encode

import pytest
import trustme

from outbox.sandbox.smtp_sink import Reply, Sink, Stage
from tests.support.fleet import until

USER, PASSWORD = "relay-user", "hunter2-Secret/9"
PLAIN = b64encode(f"\0{USER}\0{PASSWORD}".encode()).decode()
SPLIT = f"535-5.7.8 you said {PLAIN[:11]}\r\n535-5.7.8 {PLAIN[11:]}\r\n535 5.7.8 that is {PASSWORD[:7]}\r\n"
ECHOES = {
    "base64": f"535 5.7.8 bad login {PLAIN}",
    "plain": f"535 5.7.8 bad login {USER} / {PASSWORD}",
    "url": f"535 5.7.8 bad login {USER}:{PASSWORD.replace('/', '%2F')}",
    "parts": f"535 5.7.8 {b64encode(USER.encode()).decode()} {b64encode(PASSWORD.encode()).decode()}",
    "cut off": f"535 5.7.8 bad login {PLAIN[:18]}...",
    "split": SPLIT,
}
# Whatever is longer than these tells something.
PARTS = {
    *(PLAIN[at : at + 6] for at in range(len(PLAIN) - 5)),
    *(b64encode(PASSWORD.encode()).decode()[at : at + 6] for at in range(16)),
    *(PASSWORD[at : at + 7] for at in range(len(PASSWORD) - 6)),
    PASSWORD.replace("/", "%2F"),
    USER,
}


def tells(text):
    return sorted(part for part in PARTS if part in text)


@pytest.fixture
async def echoing(fleet):
    """The fleet with a server that wants STARTTLS and a login; a test scripts what it echoes."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(fleet.directory / "authority.pem"))
    async with Sink(tls=context, login=(USER, PASSWORD)) as sink:
        fleet.sink = sink
        fleet.smtp = f"smtp://{USER}:{PASSWORD.replace('/', '%2F')}@localhost:{sink.port}"
        yield fleet
        await fleet.stop_all()


def trusting(fleet):
    return {"SSL_CERT_FILE": str(fleet.directory / "authority.pem")}


async def kept(fleet):
    """All text of all rows of the schema that can hold what a server said."""
    rows = []
    for table in ("attempt", "relay", "route", "pace", "delivery", "operation"):
        rows += [row[0] for row in await fleet.connection.fetch(f"SELECT t::text FROM outbox.{table} t")]
    return "\n".join(rows)


@pytest.mark.parametrize("name", ECHOES)
async def test_a_login_that_is_echoed_in_auth_is_nowhere_to_be_read(echoing, name):
    echo = ECHOES[name]
    said = Reply(echo if echo.endswith("\n") else f"{echo}\r\n")
    echoing.sink.script = lambda stage, _: said if stage is Stage.AUTH else None
    await echoing.put_emails(1)
    relay = await echoing.relay(environment=trusting(echoing))
    await relay.says("SMTP is in trouble")
    await until(lambda: echoing.connection.fetchval("SELECT count(*) FROM outbox.route"), "the fleet knows")
    status = await echoing.run("status")
    as_json = await echoing.run("status", "--json")
    doctor = await echoing.run("doctor", environment=trusting(echoing))
    trial = await echoing.run("test-send", "me@example.com", environment=trusting(echoing))
    shown = "\n".join(one.out + one.err for one in (status, as_json, doctor, trial))
    assert "535" in shown
    assert "***" in shown
    assert await echoing.states() == {"pending": 1}
    relay.send(15)
    log = (await relay.ended()).err
    assert tells(log) == tells(shown) == tells(await kept(echoing)) == []


async def test_a_login_that_is_echoed_in_a_refusal_of_the_sender_is_nowhere_to_be_read(echoing):
    said = Reply(f"550-5.7.1 {PLAIN} and {PASSWORD[:5]}\r\n550 5.7.1 {PASSWORD[5:]}\r\n")
    echoing.sink.script = lambda at, _: said if at is Stage.MAIL else None
    echoing.top = 'log_level = "debug"'
    await echoing.put_emails(2)
    relay = await echoing.relay(environment=trusting(echoing))
    await until(lambda: echoing.connection.fetchval("SELECT count(*) FROM outbox.route"), "the fleet knows")
    shown = (await echoing.run("status")).out
    assert "***" in shown
    relay.send(15)
    assert tells((await relay.ended()).err) == tells(shown) == tells(await kept(echoing)) == []


@pytest.mark.parametrize("stage", [Stage.RCPT, Stage.DATA, Stage.DOT])
async def test_a_login_that_is_echoed_to_an_email_is_not_in_its_trail(echoing, stage):
    code = "550" if stage is not Stage.DOT else "250"
    said = Reply(f"{code}-5.7.1 {PLAIN} and {PASSWORD[:5]}\r\n{code} 5.7.1 {PASSWORD[5:]}\r\n")
    echoing.sink.script = lambda at, _: said if at is stage else None
    echoing.top = 'log_level = "debug"\nconnections_max = 1'
    await echoing.put_emails(2)
    relay = await echoing.relay(environment=trusting(echoing))
    await echoing.settled()
    shown = await echoing.run("show", "mail1")
    assert "***" in shown.out
    assert tells(shown.out) == []
    relay.send(15)
    assert tells((await relay.ended()).err) == tells(await kept(echoing)) == []


async def test_what_is_no_reply_and_holds_the_login_is_redacted(echoing):
    wrong = Reply(f"well {PLAIN}, {PASSWORD}\r\n".encode())
    echoing.sink.script = lambda at, _: wrong if at is Stage.RCPT else None
    await echoing.put_emails(1)
    relay = await echoing.relay(environment=trusting(echoing))
    await relay.says("no SMTP reply")
    relay.send(15)
    log = (await relay.ended()).err
    assert "***" in log
    assert tells(log) == tells(await kept(echoing)) == []


def test_these_parts_would_be_found():
    assert all(tells(echo) for echo in ECHOES.values())
