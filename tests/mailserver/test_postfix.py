"""Against a real Postfix, and read back with a real Dovecot: what lies in the mailboxes is the witness."""

import asyncio
import json
import os
import random
import smtplib
import ssl
from email import message_from_bytes

import pytest
import trustme

from tests.support.fault_levers import delivery, in_state, locked, mark_waits, no_session, recipients, status
from tests.support.kill_storm import storm
from tests.support.postfix import AT_DATA, DOMAIN, mail_server, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

STEPWISE = "smtpd_discard_ehlo_keywords = pipelining, silent-discard\n"


def mailboxes(count):
    return [f"p{n}@{DOMAIN}" for n in range(1, count + 1)]


async def emails_made(fleet, server, count):
    """A report and an email for each of so many people, by `outbox generate`."""
    await fleet.hire(count)
    fleet.smtp = server.url
    ended = await fleet.run("generate")
    assert ended.code == 0, ended


async def keys(fleet, addresses):
    rows = await fleet.connection.fetch("SELECT key FROM outbox.email WHERE recipient = ANY ($1)", list(addresses))
    return [row["key"] for row in rows]


async def read_back(fleet, server):
    """What lies in each mailbox: nothing, or the one email that was written for it, as it was written; never two."""
    await server.delivered()
    rows = await fleet.connection.fetch("SELECT recipient, message_id, message FROM outbox.email")
    written = {row["recipient"]: row for row in rows}
    found = await server.read(written)
    assert {address: len(mails) for address, mails in found.items() if len(mails) > 1} == {}
    for address, mails in found.items():
        for mail in mails:
            assert message_from_bytes(mail)["Message-ID"] == written[address]["message_id"]
            assert mail.endswith(b"\r\n" + bytes(written[address]["message"])), "below Postfix's fields: what was sent"
    return found


def holders(found):
    return {address for address, mails in found.items() if mails}


async def test_after_a_storm_of_kills_each_mailbox_holds_one_message_or_its_email_is_in_doubt(fleet):
    count, kills, connections = 200, 12, 2
    seed = int(os.environ.get("STORM_SEED", random.randrange(10**6)))
    print(f"STORM_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
    dice = random.Random(seed)

    async def pause(_state, _recipient):  # so that kills find mail at each step
        await asyncio.sleep(dice.uniform(0, 0.25))

    fleet.top = f"connections_max = {connections}"
    async with mail_server(mailboxes(count), pause=pause) as server:
        await emails_made(fleet, server, count)
        await storm(fleet, dice, relays=3, kills=kills)
        states = await fleet.settled(60)
        found = await read_back(fleet, server)
        sent, in_doubt = await recipients(fleet, "sent"), await recipients(fleet, "in_doubt")
        arrived = in_doubt & holders(found)
        print(f"{kills} kills, {len(in_doubt)} in doubt, {len(arrived)} of them arrived")  # noqa: T201

        assert len(found) == count == len(sent) + len(in_doubt), states
        assert sent - holders(found) == set(), "sent, says the database, and the mailbox is empty"
        assert (await status(fleet))["in_doubt"] == len(in_doubt)
        assert len(in_doubt) <= kills * connections
        assert arrived, "no kill met an accepted message: nothing would have been doubled without the mark"

        await decide(fleet, arrived, in_doubt - arrived)
        assert await fleet.settled(60) == {"sent": count}
        assert holders(await read_back(fleet, server)) == set(mailboxes(count))


async def decide(fleet, arrived, lost):
    """What a person does who has looked into the mailboxes of those in doubt."""
    for choice, addresses in (("--sent", arrived), ("--resend", lost)):
        if addresses:
            ended = await fleet.run("resolve", choice, *await keys(fleet, addresses))
            assert ended.code == 0, ended


async def test_postfix_delivers_nothing_of_a_relay_killed_before_its_dot_and_it_is_in_doubt(fleet):
    """The mark was committed, so nobody may guess; a person who finds the mailbox empty has it sent."""
    go_ahead, reached = asyncio.Event(), asyncio.Event()

    async def pause(state, _recipient):
        if state == AT_DATA:
            reached.set()
            await go_ahead.wait()

    async with mail_server(mailboxes(1), pause=pause) as server:
        await emails_made(fleet, server, 1)
        (key,) = await keys(fleet, mailboxes(1))
        relay = await fleet.relay()
        await asyncio.wait_for(reached.wait(), 20)
        async with locked(fleet, key) as holder:
            go_ahead.set()
            await mark_waits(fleet)  # the content is with Postfix, all but its dot
            await relay.kill()
            await holder.close()
        await no_session(fleet)
        assert (await delivery(fleet, key))["state"] == "sending"
        assert holders(await read_back(fleet, server)) == set()
        await fleet.relay()
        await in_state(fleet, "in_doubt", key)
        shown = await status(fleet)
        assert [(trouble["key"], trouble["state"]) for trouble in shown["troubles"]] == [(key, "in_doubt")]

        await decide(fleet, set(), mailboxes(1))
        assert await fleet.settled() == {"sent": 1}
        assert holders(await read_back(fleet, server)) == set(mailboxes(1))
        assert server.dots.total() == 1


def offered(server):
    """What Postfix says that it can do, once the connection is encrypted."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with smtplib.SMTP("127.0.0.1", server.smtp_port, timeout=10) as client:
        client.starttls(context=trusting)
        client.ehlo()
        return set(client.esmtp_features)


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
async def test_over_starttls_each_mailbox_gets_one_message(fleet, tmp_path, pipelining: bool):
    count = 50
    identity = tmp_path / "postfix.pem"
    trustme.CA().issue_cert("mail.example.net").private_key_and_cert_chain_pem.write_to_path(identity)
    tls = f"smtpd_tls_security_level = may\nsmtpd_tls_chain_files = {identity}\n"
    async with mail_server(mailboxes(count), main_cf=tls + ("" if pipelining else STEPWISE)) as server:
        assert ("pipelining" in await asyncio.to_thread(offered, server)) is pipelining
        await emails_made(fleet, server, count)
        ended = await fleet.run("relay", "--until-empty")
        assert ended.code == 0, ended
        shown = await status(fleet)
        assert shown["sent"] == count
        assert shown["troubles"] == []
        found = await read_back(fleet, server)
        assert holders(found) == set(mailboxes(count))
        assert all("using TLSv1" in message_from_bytes(mail)["Received"] for (mail,) in found.values())


async def test_dovecot_gets_mail_by_lmtp_over_a_port_and_over_a_socket(fleet):
    people = mailboxes(20)
    async with mail_server(people) as server:
        await fleet.hire(len(people))
        assert (await fleet.run("generate")).code == 0
        for number, fleet.smtp in enumerate(server.lmtp_urls):
            await fleet.put_emails(10, first=1 + 10 * number)
            ended = await fleet.run("relay", "--until-empty")
            assert ended.code == 0, ended
            assert f"relays to {fleet.smtp}" in ended.err
            checks = json.loads((await fleet.run("doctor", "--json")).out)["checks"]
            assert {one["check"]: one["grade"] for one in checks}["smtp.sender"] == "ok"
        rows = await fleet.connection.fetch("SELECT recipient, message FROM outbox.email")
        found = await server.read(people)
        assert sum(map(len, found.values())) == len(rows) == 40
        for row in rows:
            assert any(mail.endswith(b"\r\n" + bytes(row["message"])) for mail in found[row["recipient"]])
        assert (await status(fleet))["sent"] == 40


async def test_postfix_that_wants_a_good_name_in_ehlo_takes_the_default_one(fleet):
    """The name of a container's host is a word without a dot."""
    strict = "smtpd_helo_required = yes\nsmtpd_helo_restrictions = reject_non_fqdn_helo_hostname,"
    strict += " reject_invalid_helo_hostname, reject_unknown_helo_hostname\n"
    async with mail_server(mailboxes(3), main_cf=strict) as server:
        await emails_made(fleet, server, 3)
        relay = await fleet.relay("--until-empty")
        assert (await relay.ended()).code == 0
        assert await fleet.states() == {"sent": 3}
        assert len(holders(await read_back(fleet, server))) == 3
        checks = json.loads((await fleet.run("doctor", "--json")).out)["checks"]
        (line,) = [line for line in checks if line["check"] == "smtp.helo"]
        assert line["grade"] == "ok", line


async def test_postfix_without_a_certificate_that_offers_starttls_gets_mail_in_the_clear(fleet):
    """As after `smtpd_tls_cert_file` was moved: STARTTLS is offered, and answered with 454."""
    broken = "smtpd_tls_security_level = may\nsmtpd_tls_cert_file = /nowhere/certificate.pem\n"
    async with mail_server(mailboxes(3), main_cf=broken) as server:
        await emails_made(fleet, server, 3)
        relay = await fleet.relay("--until-empty")
        ended = await relay.ended()
        assert (ended.code, await fleet.states()) == (0, {"sent": 3})
        assert "emails are sent there in clear text: 454 4.7.0 TLS not available" in ended.err, server.log()
        doctor = await fleet.run("doctor")
        assert "STARTTLS is offered and fails (454 4.7.0 TLS not available" in doctor.out
        assert "emails go in clear text" in doctor.out
