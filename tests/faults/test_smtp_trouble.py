"""The SMTP server goes away and comes back; it wants TLS and a login; it dies between messages."""

import asyncio
import base64
import ssl
import time

import pytest
import trustme

from outbox.sandbox.smtp_sink import Accept, Action, Cut, Hold, Reset, Sink, Stage, Trickle
from tests.support.fault_levers import CLOSING, At, all_sent, balance, delivery, post, recipients, status, trail
from tests.support.fleet import Fleet, until

BACK_S = 5.0
GONE_S = 3.0


async def test_an_smtp_server_that_is_gone_for_seconds_costs_nothing(fleet):
    fleet.sink.script = At(Stage.DOT, Trickle(chunk=12, delay_s=0.1))
    relays = [await fleet.relay() for _ in range(2)]
    await post(fleet, 300)
    await until(lambda: fleet.sink.messages >= 100, "100 are accepted")
    sending = "SELECT count(DISTINCT relay) = 2 FROM outbox.delivery WHERE state IN ('sending', 'sent')"
    await until(lambda: fleet.connection.fetchval(sending), "both relays are at it, so both have connections to lose")
    gone_at = time.monotonic()
    await fleet.sink.close_listener()
    fleet.sink.drop_connections()
    await fleet.put_emails(100, first=301)
    for relay in relays:
        await relay.says("connection closed")
    await until(lambda: time.monotonic() - gone_at > GONE_S, "the server has been gone for seconds")
    waiting = await recipients(fleet, "pending")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE state = 'sending'") == 0
    assert len(waiting) >= 100
    assert await fleet.connection.fetchval("SELECT max(attempt) FROM outbox.delivery WHERE email > 300") == 0
    assert {relay.process.returncode for relay in relays} == {None}

    fleet.sink.script = None
    await fleet.sink.reopen()
    states = await fleet.settled(BACK_S)
    in_doubt = await balance(fleet, 400)
    assert states["sent"] == 400 - len(in_doubt)
    assert waiting - await recipients(fleet, "sent") == set()
    untried = await fleet.connection.fetchval("SELECT max(attempt) FROM outbox.delivery WHERE email > 300")
    assert untried == 1


async def test_mail_waits_for_a_server_that_was_never_there(fleet):
    await fleet.sink.close_listener()
    await fleet.put_emails(1)
    relay = await fleet.relay()
    await relay.says("SMTP is in trouble")
    assert await fleet.connection.fetchval("SELECT max(attempt) FROM outbox.delivery") == 0
    await fleet.sink.reopen()
    await all_sent(fleet, 1, BACK_S)
    await balance(fleet, 1)


@pytest.mark.parametrize(
    "action, outcome",
    [(Cut(), "in_doubt"), (Reset(), "in_doubt"), (Accept(Cut()), "in_doubt"), (CLOSING, "sent")],
    ids=["cut", "reset", "accepted and cut", "421"],
)
async def test_a_server_that_dies_at_a_dot_leaves_its_message_alone_in_doubt(fleet, action: Action, outcome: str):
    k = 4
    fleet.top = "connections_max = 1"
    fall = asyncio.Event()
    fleet.sink.script = script = At(
        Stage.DOT, Hold(fall, action), times=1, when=lambda visit: (visit.number, visit.accepted) == (1, k - 1)
    )
    await fleet.put_emails(10)
    await fleet.relay()
    await script.reached()
    fall.set()
    expected = {"sent": 10} if outcome == "sent" else {"sent": 9, "in_doubt": 1}
    assert await fleet.settled() == expected
    in_doubt = await balance(fleet, 10)
    assert in_doubt == (set() if outcome == "sent" else {f"p{k}@example.com"})
    assert await trail(fleet, f"mail{k}") == (["withdrawn", "accepted"] if outcome == "sent" else ["in_doubt"])
    assert await trail(fleet, f"mail{k + 1}") == ["accepted"]
    assert (await delivery(fleet, f"mail{k + 1}"))["attempt"] == 1


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def secure(fleet, authority, tmp_path) -> Fleet:
    """The fleet with a server that wants STARTTLS and a login, whose certificate it can check."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with Sink(tls=context, login=("user", "se cret@1")) as sink:
        fleet.sink = sink
        yield fleet
        await fleet.stop_all()


def trusting(fleet: Fleet, authority: trustme.CA) -> dict[str, str]:
    path = fleet.directory / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return {"SSL_CERT_FILE": str(path)}


async def test_mail_goes_through_starttls_and_a_login(secure, authority):
    secure.smtp = f"smtp://user:se%20cret%401@localhost:{secure.sink.port}"
    secure.top = "connections_max = 2"
    await secure.put_emails(50)
    relay = await secure.relay(environment=trusting(secure, authority))
    await all_sent(secure, 50)
    await balance(secure, 50)
    assert len(secure.sink.visits) <= 2
    assert all(visit.tls and visit.authenticated for visit in secure.sink.visits)
    relay.send(15)
    assert (await relay.ended()).code == 0


async def test_a_wrong_password_leaves_mail_untouched_and_stays_secret_and_a_new_one_is_found(secure, authority):
    secret_file = secure.directory / "smtp_url"

    def write(password: str) -> None:
        new = secret_file.with_suffix(".new")
        new.write_text(f"smtp://user:{password}@localhost:{secure.sink.port}\n")
        new.rename(secret_file)

    write("0pen%20sesame")
    await secure.put_emails(1)
    environment = {**trusting(secure, authority), "OUTBOX_SMTP_URL_FILE": str(secret_file)}
    relay = await secure.relay(environment=environment)
    await relay.says("SMTP is in trouble")
    assert any("535 5.7.8 Authentication credentials invalid" in line for line in relay.log)
    assert await secure.states() == {"pending": 1}
    assert await secure.connection.fetchval("SELECT max(attempt) FROM outbox.delivery") == 0

    write("se%20cret%401")
    await all_sent(secure, 1)
    await relay.says("login_changed")
    relay.send(15)
    log = (await relay.ended()).err
    for secret in (
        "sesame",
        "se cret",
        base64.b64encode(b"0pen sesame").decode(),
        base64.b64encode(b"\0user\x000pen sesame").decode(),
    ):
        assert secret not in log


async def test_a_wrong_password_is_sent_once_for_the_whole_fleet_and_a_new_one_at_once(secure, authority):
    secret_file = secure.directory / "smtp_url"
    secret_file.write_text(f"smtp://user:0pen%20sesame@localhost:{secure.sink.port}\n")
    environment = {**trusting(secure, authority), "OUTBOX_SMTP_URL_FILE": str(secret_file)}
    await secure.put_emails(40)
    first = await secure.relay(environment=environment)
    await first.says("535 5.7.8 Authentication credentials invalid (the login is tried again in 1 min")
    told = "SELECT logins = 1 AND retry_at > now() + interval '30 seconds' FROM outbox.route"
    await until(lambda: secure.connection.fetchval(told), "the fleet knows")
    second = await secure.relay(environment=environment)
    await second.says("is paused: localhost")
    assert secure.sink.refused_logins == 1, "".join([*first.log, "----", *second.log])
    assert (await status(secure))["routes"][0]["reason"].count("535 5.7.8") == 1
    secret_file.write_text(f"smtp://user:se%20cret%401@localhost:{secure.sink.port}\n")
    await all_sent(secure, 40)
    assert secure.sink.refused_logins == 1
    assert await secure.connection.fetchval("SELECT count(*) FROM outbox.route") == 0


@pytest.mark.parametrize("source", ["settings", "environment"])
async def test_a_relay_that_starts_with_a_corrected_password_does_not_wait_for_the_pause(secure, authority, source):
    def environment(password):
        smtp = f"smtp://user:{password}@localhost:{secure.sink.port}"
        if source == "settings":
            secure.smtp = smtp
            return trusting(secure, authority)
        return {**trusting(secure, authority), "OUTBOX_SMTP_URL": smtp}

    await secure.put_emails(1)
    wrong = await secure.relay(environment=environment("0pen%20sesame"))
    await until(lambda: secure.connection.fetchval("SELECT logins = 1 FROM outbox.route"), "the fleet knows")
    wrong.send(15)
    await wrong.ended()
    await secure.relay(environment=environment("se%20cret%401"))
    await all_sent(secure, 1)
    assert secure.sink.refused_logins == 1


async def test_a_relay_until_empty_ends_where_the_login_was_refused_to_another(secure, authority):
    secret_file = secure.directory / "smtp_url"
    secret_file.write_text(f"smtp://user:0pen%20sesame@localhost:{secure.sink.port}\n")
    environment = {**trusting(secure, authority), "OUTBOX_SMTP_URL_FILE": str(secret_file)}
    await secure.put_emails(1)
    await secure.relay(environment=environment)
    await until(lambda: secure.connection.fetchval("SELECT logins = 1 FROM outbox.route"), "the fleet knows")
    ended = await secure.run("relay", "--until-empty", environment=environment)
    assert (ended.code, secure.sink.refused_logins) == (1, 1), ended.err
    assert "535 5.7.8" in ended.err


async def test_a_wrong_password_ends_a_relay_that_runs_until_empty(secure, authority):
    secure.smtp = f"smtp://user:0pen%20sesame@localhost:{secure.sink.port}"
    await secure.put_emails(1)
    ended = await secure.run("relay", "--until-empty", environment=trusting(secure, authority))
    assert ended.code != 0
    assert await secure.states() == {"pending": 1}


async def test_a_certificate_that_nobody_vouches_for_gets_no_password(secure):
    secure.smtp = f"smtp://user:se%20cret%401@localhost:{secure.sink.port}"
    await secure.put_emails(5)
    relay = await secure.relay()
    await relay.says("SMTP is in trouble")
    assert any("certificate" in line for line in relay.log)
    assert await secure.states() == {"pending": 5}
    assert Stage.AUTH not in {stage for _, _, stage in secure.sink.events}
    assert not any(visit.authenticated for visit in secure.sink.visits)


async def test_a_login_is_never_given_to_a_server_without_tls(fleet):
    fleet.sink.login = ("user", "secret")
    fleet.smtp = f"smtp://user:secret@localhost:{fleet.sink.port}"
    await fleet.put_emails(5)
    relay = await fleet.relay()
    await relay.says("SMTP is in trouble")
    assert await fleet.states() == {"pending": 5}
    assert not any(visit.authenticated for visit in fleet.sink.visits)
