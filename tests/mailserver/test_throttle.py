"""Real mail servers that limit one client: no email becomes a dead letter, and few are refused."""

import pytest

from tests.neighbours.servers import Exim
from tests.support.fleet import until
from tests.support.postfix import DOMAIN, mail_server, missing

needs_postfix = pytest.mark.skipif(missing() is not None, reason=str(missing()))

COUNT = 600
ANVIL = "anvil_rate_time_unit = 1s\nsmtpd_client_event_limit_exceptions =\n"


def mailboxes(count):
    return [f"p{n}@{DOMAIN}" for n in range(1, count + 1)]


def logged(server, words):
    """How many lines of Postfix's log say so."""
    return (server.base / "postfix.log").read_text(errors="replace").count(words)


async def send_all(fleet, server, count, *, deadline_s=120.0):
    """Two relays send so many emails."""
    fleet.smtp = server.url
    await fleet.put_emails(count)
    for _ in range(2):
        await fleet.relay()
    return await fleet.settled(deadline_s)


async def tries_used(fleet):
    """How many tries were counted that ended in a deferral."""
    return await fleet.connection.fetchval("SELECT count(*) FROM outbox.attempt WHERE verdict = 'deferred'")


async def no_pause(fleet):
    return not await fleet.connection.fetchval("SELECT count(*) FROM outbox.route")


@needs_postfix
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("smtpd_client_message_rate_limit = 30", "Message delivery request rate limit exceeded"),
        ("smtpd_client_recipient_rate_limit = 60", "Recipient address rate limit exceeded"),
    ],
)
async def test_a_rate_limit_makes_no_dead_letter_and_refuses_a_tenth_at_most(fleet, limit, words):
    async with mail_server(mailboxes(COUNT), main_cf=f"{ANVIL}{limit}\n") as server:
        states = await send_all(fleet, server, COUNT)
        refused = logged(server, words)
        print(f"{refused} refused", dict(await fleet.connection.fetchrow("SELECT * FROM outbox.pace")))  # noqa: T201
        assert states == {"sent": COUNT}
        assert 0 < refused <= COUNT / 10
        assert await tries_used(fleet) == 0


@needs_postfix
@pytest.mark.slow
@pytest.mark.parametrize("connections", [16, 64])
async def test_thousands_of_emails_go_at_the_pace_of_the_server(fleet, connections):
    fleet.top = f"connections_max = {connections}"
    async with mail_server(mailboxes(3000), main_cf=f"{ANVIL}smtpd_client_message_rate_limit = 30\n") as server:
        states = await send_all(fleet, server, 3000, deadline_s=600)
        refused = logged(server, "Message delivery request rate limit exceeded")
        print(f"{refused} refused")  # noqa: T201
        assert states == {"sent": 3000}
        assert 0 < refused <= 300
        assert await tries_used(fleet) == 0


@needs_postfix
async def test_no_more_connections_are_held_than_the_server_grants(fleet):
    limit = "smtpd_client_connection_count_limit = 5\nsmtpd_client_event_limit_exceptions =\n"
    async with mail_server(mailboxes(COUNT), main_cf=limit) as server:
        states = await send_all(fleet, server, COUNT)
        refused = logged(server, "Connection concurrency limit exceeded")
        print(f"{refused} refused")  # noqa: T201
        assert states == {"sent": COUNT}
        assert 0 < refused <= COUNT / 10
        assert await tries_used(fleet) == 0
        await until(lambda: no_pause(fleet), "the server works")


@needs_postfix
async def test_connections_are_not_opened_faster_than_the_server_grants(fleet):
    limit = "smtpd_client_connection_rate_limit = 4\nsmtpd_client_event_limit_exceptions =\n"
    fleet.top = "messages_per_connection_max = 200"
    async with mail_server(mailboxes(COUNT), main_cf=f"{limit}anvil_rate_time_unit = 5s\n") as server:
        states = await send_all(fleet, server, COUNT)
        refused = logged(server, "Connection rate limit exceeded")
        print(f"{refused} refused")  # noqa: T201
        assert states == {"sent": COUNT}
        assert 0 < refused <= COUNT / 10
        assert await tries_used(fleet) == 0


async def test_exim_is_sent_to_over_as_many_connections_as_it_grants(fleet):
    if (reason := Exim.missing()) is not None:
        pytest.skip(reason)
    async with Exim.running("smtp_accept_max_per_host = 3\nsmtp_accept_max = 20\n") as server:
        states = await send_all(fleet, server, 200)
        assert states == {"sent": 200}
        log = (server.base / "exim-log" / "mainlog").read_text(errors="replace")
        refused = log.count("Connection from [127.0.0.1] refused: too many connections from that IP address")
        print(f"{refused} refused")  # noqa: T201
        assert 0 < refused <= 60
        assert await tries_used(fleet) == 0
