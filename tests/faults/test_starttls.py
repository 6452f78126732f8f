"""`starttls = "always"`: without TLS to the right server no email leaves, whatever a server or a network does.

`Between` stands between relay and server, as whoever owns the network does: it keeps each byte that the relay sends in
clear text.
"""

import asyncio
import contextlib
import json
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import trustme

from outbox.sandbox.smtp_sink import Cut, Reply, Sink, Stage
from outbox.settings import Settings
from tests.support.fault_levers import all_sent
from tests.support.fleet import until

ALWAYS = 'starttls = "always"\nconnections_max = 1'


def context_of(authority, host="localhost", **how):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(host, **how).configure_cert(context)
    return context


@pytest.fixture
def authority(fleet):
    made = trustme.CA()
    made.cert_pem.write_to_path(str(fleet.directory / "authority.pem"))
    return made


@pytest.fixture
def trusting(fleet, authority):
    return {"SSL_CERT_FILE": str(fleet.directory / "authority.pem")}


class Between:
    """Forwards to a port line by line until TLS begins; `change` may replace what the server says in clear text."""

    def __init__(self, target, change=lambda line: line):
        self.target, self.change = target, change
        self.clear = b""  # what the relay said before TLS
        self.port = 0
        self._server = None

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._meet, "localhost", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _meet(self, reader, writer):
        server_reader, server_writer = await asyncio.open_connection("localhost", self.target)

        async def up():
            while data := await reader.read(65536):
                if data[:1] != b"\x16":  # no TLS record
                    self.clear += data
                    server_writer.write(data)
                    continue
                server_writer.write(data)
                while data := await reader.read(65536):
                    server_writer.write(data)
            server_writer.close()

        async def down():
            is_clear = True
            while data := await server_reader.read(65536):
                is_clear = is_clear and data[:1] not in (b"\x16", b"\x14", b"\x15", b"\x17")  # types of TLS records
                lines = data.splitlines(keepends=True) if is_clear else []
                writer.write(b"".join(map(self.change, lines)) if is_clear else data)
            writer.close()

        with contextlib.suppress(OSError):
            await asyncio.gather(up(), down())


def said(clear):
    """The commands in clear text."""
    return {line.split()[0].upper() for line in clear.splitlines() if line.strip()}


async def is_refused(fleet, sink, trusting, *words):
    """The relay says why, the circuit is open, the mail is pending and untouched, and the server saw none of it."""
    relay = await fleet.relay(environment=trusting)
    await relay.says("SMTP is in trouble")
    line = next(line for line in relay.log if "SMTP is in trouble" in line)
    for word in words:
        assert word in json.loads(line)["reason"]
    await until(lambda: fleet.connection.fetchval("SELECT count(*) FROM outbox.route"), "the fleet keeps away")
    assert await fleet.states() == {"pending": 3}
    assert await fleet.connection.fetchval("SELECT max(attempt) FROM outbox.delivery") == 0
    assert not {Stage.MAIL, Stage.AUTH, Stage.RCPT, Stage.DATA} & {stage for *_, stage in sink.events}
    return relay


async def test_with_a_verified_certificate_all_mail_goes_over_tls_without_a_login(fleet, authority, trusting):
    async with Sink(tls=context_of(authority)) as sink, Between(sink.port) as between:
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{between.port}", ALWAYS
        await fleet.put_emails(3)
        await fleet.relay(environment=trusting)
        await all_sent(fleet, 3)
        assert all(visit.tls for visit in sink.visits)
        assert said(between.clear) == {b"EHLO", b"STARTTLS"}
        await fleet.stop_all()


@pytest.mark.parametrize("fault", ["unknown authority", "self-signed", "wrong name", "expired", "not yet valid"])
async def test_a_certificate_that_does_not_verify_gets_no_mail(fleet, authority, trusting, fault):
    now = datetime.now(UTC)
    context = {
        "unknown authority": lambda: context_of(trustme.CA()),
        "self-signed": lambda: _self_signed(fleet.directory),
        "wrong name": lambda: context_of(authority, "mail.elsewhere.example"),
        "expired": lambda: context_of(authority, not_after=now - timedelta(days=1)),
        "not yet valid": lambda: context_of(authority, not_before=now + timedelta(days=1)),
    }[fault]()
    async with Sink(tls=context) as sink, Between(sink.port) as between:
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{between.port}", ALWAYS
        await fleet.put_emails(3)
        await is_refused(fleet, sink, trusting, "certificate verify failed")
        assert said(between.clear) <= {b"EHLO", b"STARTTLS", b"QUIT"}
        await fleet.stop_all()


def _self_signed(directory):
    """A certificate for localhost that is its own authority."""
    authority = trustme.CA()
    authority.private_key_pem.write_to_path(str(directory / "own.key"))
    authority.cert_pem.write_to_path(str(directory / "own.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "own.pem", directory / "own.key")
    return context


async def test_a_server_that_offers_no_starttls_gets_no_mail_until_it_does(fleet, authority, trusting):
    async with Sink() as sink:
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{sink.port}", ALWAYS
        await fleet.put_emails(3)
        await is_refused(fleet, sink, trusting, "it offers no STARTTLS", 'starttls is "always"', "smtps://")
        sink.tls = context_of(authority)
        await all_sent(fleet, 3)
        await fleet.stop_all()


@pytest.mark.parametrize("into", [b"250-XXXXXXXA\r\n", b""], ids=["renamed", "removed"])
async def test_who_strips_starttls_on_the_way_gets_no_mail(fleet, authority, trusting, into):
    def strip(line):
        return into if line.upper().startswith(b"250-STARTTLS") else line.replace(b"250 STARTTLS", b"250 HELP")

    async with Sink(tls=context_of(authority)) as sink, Between(sink.port, strip) as between:
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{between.port}", ALWAYS
        await fleet.put_emails(3)
        await is_refused(fleet, sink, trusting, "it offers no STARTTLS")
        assert said(between.clear) <= {b"EHLO", b"QUIT"}
        await fleet.stop_all()


@pytest.mark.parametrize(
    "action",
    [
        Reply("454 4.7.0 TLS not available due to temporary reason"),
        Reply("501 5.5.4 no parameters allowed"),
        Reply("502 5.5.1 not implemented"),
        Reply("250 2.0.0 fine, go on in the clear"),
        Cut(),
    ],
    ids=["454", "501", "502", "250", "cut"],
)
async def test_a_server_that_offers_starttls_and_refuses_it_gets_no_mail(fleet, authority, trusting, action):
    async with Sink(tls=context_of(authority)) as sink, Between(sink.port) as between:
        sink.script = lambda stage, _: action if stage is Stage.STARTTLS else None
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{between.port}", ALWAYS
        await fleet.put_emails(3)
        await is_refused(fleet, sink, trusting)
        assert said(between.clear) <= {b"EHLO", b"STARTTLS", b"QUIT"}
        sink.script = lambda *_: None
        await all_sent(fleet, 3)
        assert said(between.clear) <= {b"EHLO", b"STARTTLS", b"QUIT"}
        await fleet.stop_all()


async def test_replies_that_are_injected_before_tls_count_for_nothing(fleet, authority, trusting):
    def inject(line):
        evil = b"250-evil.example\r\n250-SIZE 1\r\n250 AUTH PLAIN\r\n" + b"250 fine\r\n" * 2 + b"354 go\r\n250 kept\r\n"
        return line + evil if line.startswith(b"220 2.0.0 Ready") else line

    async with Sink(tls=context_of(authority)) as sink, Between(sink.port, inject) as between:
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{between.port}", ALWAYS
        await fleet.put_emails(3)
        relay = await fleet.relay(environment=trusting)

        async def is_over():
            return await fleet.states() == {"sent": 3} or any("SMTP is in trouble" in line for line in relay.log)

        await until(is_over, "it was sent, or not")
        states = await fleet.states()
        # What came in the clear is dropped, or breaks the handshake; it is never taken for a reply.
        assert states.get("sent", 0) == sink.messages
        assert states.keys() <= {"sent", "pending"}
        assert said(between.clear) <= {b"EHLO", b"STARTTLS", b"QUIT"}
        await fleet.stop_all()


async def test_without_the_setting_mail_goes_by_a_certificate_that_does_not_verify_and_in_the_clear(fleet, authority):
    async with Sink(tls=context_of(trustme.CA())) as sink:
        fleet.sink, fleet.smtp = sink, f"smtp://localhost:{sink.port}"
        await fleet.put_emails(1)
        await fleet.relay()
        await all_sent(fleet, 1)
        assert all(visit.tls for visit in sink.visits)
        await fleet.stop_all()


async def test_with_never_starttls_is_not_used(fleet, authority):
    async with Sink(tls=context_of(authority)) as sink:
        fleet.sink, fleet.smtp, fleet.top = sink, f"smtp://localhost:{sink.port}", 'starttls = "never"'
        await fleet.put_emails(1)
        await fleet.relay()
        await all_sent(fleet, 1)
        assert not any(visit.tls for visit in sink.visits)
        assert Stage.STARTTLS not in {stage for *_, stage in sink.events}
        doctor = await fleet.run("doctor")
        assert 'starttls is "never": emails go in the clear' in doctor.out
        await fleet.stop_all()


async def test_a_route_may_want_more_or_less_than_the_top_level(fleet, authority, trusting):
    async with Sink() as plain, Sink(tls=context_of(authority)) as secure:
        fleet.sink, fleet.smtp = secure, f"smtp://localhost:{secure.port}"
        fleet.top = ALWAYS
        fleet.report = f'[routes.near]\nsmtp_url = "{plain.url}"\nstarttls = "never"\ndomains = ["near.example"]'
        assert (await fleet.run("init")).code == 0
        await fleet.put_emails(1)
        await fleet.connection.execute(
            """WITH made AS (
                 INSERT INTO outbox.email (key, sender, recipient, message_id, message)
                 SELECT 'near', 'reports@example.com', 'x@near.example', '<n@example.com>', message FROM outbox.email
               RETURNING id)
               INSERT INTO outbox.delivery (email, route) SELECT id, 'near' FROM made"""
        )
        await fleet.relay(environment=trusting)
        await all_sent(fleet, 2)
        assert (plain.messages, secure.messages) == (1, 1)
        assert all(visit.tls for visit in secure.visits)
        await fleet.stop_all()


async def test_doctor_and_test_send_want_what_the_relay_wants(fleet, authority, trusting):
    async with (
        Sink() as plain,
        Sink(tls=context_of(trustme.CA())) as stranger,
        Sink(tls=context_of(authority)) as known,
    ):
        fleet.top = ALWAYS
        for sink, words in ((plain, "it offers no STARTTLS"), (stranger, "does not hold")):
            fleet.sink, fleet.smtp = sink, f"smtp://localhost:{sink.port}"
            doctor = await fleet.run("doctor", environment=trusting)
            assert doctor.code == 1
            assert words in doctor.out
            trial = await fleet.run("test-send", "me@example.com", environment=trusting)
            assert trial.code == 1
            assert sink.messages == 0
            assert not {Stage.MAIL, Stage.RCPT} & {stage for *_, stage in sink.events}
        fleet.sink, fleet.smtp = known, f"smtp://localhost:{known.port}"
        trial = await fleet.run("test-send", "me@example.com", environment=trusting)
        assert (trial.code, known.messages) == (0, 1)
        assert "certificate verified" in trial.out


LOGIN = "smtp://user:secret@localhost"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"smtp_url": LOGIN, "starttls": "never"}, "has a login"),
        (
            {"smtp_url": LOGIN + ":587", "routes": {"a": {"smtp_url": LOGIN, "starttls": "never"}}},
            "a.smtp_url has a login",
        ),
        ({"starttls": "never", "routes": {"a": {"smtp_url": LOGIN}}}, "a.smtp_url has a login"),
        ({"smtp_url": "lmtp://localhost:24", "starttls": "always"}, "is LMTP, which is not encrypted"),
        ({"starttls": "always", "routes": {"a": {"smtp_url": "lmtp://localhost:24"}}}, "a.smtp_url is LMTP"),
        ({"starttls": "yes"}, "auto"),
    ],
)
def test_settings_that_would_show_a_password_or_cannot_be_met_are_refused(given, words):
    with pytest.raises(ValueError, match=words) as raised:
        Settings.model_validate(given)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {"smtp_url": "smtps://user:secret@localhost", "starttls": "never"},
        {"smtp_url": "lmtp:///run/lmtp", "starttls": "always"},
        {"smtp_url": "file:///var/mail/try", "starttls": "always"},
        {"starttls": "always", "routes": {"a": {"smtp_url": "lmtp://localhost:24", "starttls": "never"}}},
        {"smtp_url": LOGIN, "starttls": "always"},
    ],
)
def test_settings_that_can_be_met_are_not_refused(given):
    Settings.model_validate(given)
