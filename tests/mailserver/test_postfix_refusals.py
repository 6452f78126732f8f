"""Refusals of a real Postfix that are not about the email: host name, sender, relaying, too many errors."""

import pytest

from tests.support.fault_levers import recipients, status
from tests.support.fleet import Fleet, until
from tests.support.postfix import DOMAIN, mail_server, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

REFUSES_ALL = {
    "the HELO name": ("smtpd_helo_restrictions = check_helo_access static:reject\n", "Helo command rejected"),
    "the client": ("smtpd_client_restrictions = check_client_access static:reject\n", "Client host rejected"),
    "the sender": ("smtpd_sender_restrictions = check_sender_access static:reject\n", "Sender address rejected"),
    "words that nobody knows": ("smtpd_recipient_restrictions = check_recipient_access static:{REJECT no}\n", "no"),
}


def mailboxes(first: int, last: int) -> list[str]:
    return [f"p{n}@{DOMAIN}" for n in range(first, last + 1)]


async def tries(fleet: Fleet) -> set[int]:
    rows = await fleet.connection.fetch("SELECT DISTINCT attempt - withdrawn AS tries FROM outbox.delivery")
    return {row["tries"] for row in rows}


@pytest.mark.parametrize(("main_cf", "words"), REFUSES_ALL.values(), ids=REFUSES_ALL)
async def test_a_refusal_of_everything_leaves_the_mail_pending_and_the_exit_code_says_so(fleet, main_cf, words):
    await fleet.put_emails(20)
    async with mail_server(mailboxes(1, 20), main_cf=main_cf) as server:
        fleet.smtp = server.url
        ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 1
    assert words in ended.err.splitlines()[-1]
    assert await fleet.states() == {"pending": 20}
    assert await tries(fleet) == {0}
    async with mail_server(mailboxes(1, 20)) as server:
        fleet.smtp = server.url
        assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 20}


async def test_relaying_denied_for_everybody_is_the_routes(fleet):
    await fleet.put_emails(20)
    await fleet.connection.execute("UPDATE outbox.email SET recipient = replace(recipient, '@', '@elsewhere.')")
    async with mail_server([], main_cf="smtpd_relay_restrictions = reject_unauth_destination\n") as server:
        fleet.smtp = server.url
        relay = await fleet.relay()
        await relay.says("refuses this sender or host")

        async def is_told() -> bool:
            return any("Relay access denied" in one["reason"] for one in (await status(fleet))["routes"])

        await until(is_told, "status shows the reply")
        assert await fleet.states() == {"pending": 20}


async def test_relaying_denied_for_a_few_makes_dead_letters_of_these_only(fleet):
    fleet.top = "connections_max = 1"
    await fleet.put_emails(20)
    await fleet.connection.execute(
        "UPDATE outbox.email SET recipient = replace(recipient, '@', '@elsewhere.') WHERE key IN ('mail7', 'mail12')"
    )
    cf = "smtpd_relay_restrictions = reject_unauth_destination\n"
    async with mail_server(mailboxes(1, 20), main_cf=cf) as server:
        fleet.smtp = server.url
        assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 18, "dead": 2}
    assert await recipients(fleet, "dead") == {"p7@elsewhere.example.com", "p12@elsewhere.example.com"}


async def test_unknown_users_are_dead_letters_and_too_many_errors_cost_no_other_email_a_try(fleet):
    """After smtpd_hard_error_limit errors Postfix answers the next command with 421 4.7.0 Error: too many errors."""
    fleet.top = "connections_max = 2"
    await fleet.put_emails(60)
    limits = "smtpd_soft_error_limit = 50\nsmtpd_hard_error_limit = 4\n"
    async with mail_server(mailboxes(1, 20), main_cf=limits) as server:
        fleet.smtp = server.url
        assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 20, "dead": 40}
    assert await tries(fleet) == {1}
    verdicts = await fleet.connection.fetch("SELECT verdict, count(*) AS n FROM outbox.attempt GROUP BY verdict")
    assert {row["verdict"]: row["n"] for row in verdicts} == {"accepted": 20, "refused": 40}
