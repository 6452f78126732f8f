"""No message of ours is two for Postfix or Exim, whatever a row holds (SMTP smuggling, CVE-2023-51764)."""

import asyncio
import re
import socket

import pytest

from tests.faults.test_bad_rows import relay_all
from tests.neighbours.servers import Exim
from tests.support.postfix import DOMAIN, mail_server
from tests.support.postfix import missing as no_postfix
from tests.support.smuggling import ENDS, HEAD, MESSAGES, SECOND

VICTIM = f"victim@{DOMAIN}"
# As it was before the fixes of December 2023, and still is where a person chose so.
NAIVE = "smtpd_forbid_bare_newline = no\nsmtpd_forbid_unauth_pipelining = no\nsmtpd_data_restrictions =\n"

needs_postfix = pytest.mark.skipif(no_postfix() is not None, reason=str(no_postfix()))


@pytest.fixture
def exim_unpacked():
    if (reason := Exim.missing()) is not None:
        pytest.skip(reason)


async def put_all(connection):
    """Each message as a row that was written by hand; gives the recipients of those that may be sent."""
    for number, message in enumerate(MESSAGES):
        await connection.execute(
            """WITH made AS (
                 INSERT INTO outbox.email (key, sender, recipient, message_id, message)
                 VALUES ('m' || $1::int, 'reports@example.com', 'm' || $1::int || '@example.com', '<1@x>', $2)
                 RETURNING id)
               INSERT INTO outbox.delivery (email) SELECT id FROM made""",
            number,
            message,
        )
    return [f"m{number}@{DOMAIN}" for number, message in enumerate(MESSAGES) if b"\0" not in message]


async def assert_refused_are_dead(connection, sent):
    rows = await connection.fetch(
        "SELECT d.state, a.verdict, a.reply FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email"
        " JOIN outbox.attempt a ON a.email = m.id WHERE m.recipient <> ALL ($1)",
        sent,
    )
    assert len(rows) == len(MESSAGES) - len(sent)
    assert {(row["state"], row["verdict"]) for row in rows} == {("dead", "refused")}
    assert all("NUL" in row["reply"] for row in rows)


@needs_postfix
async def test_postfix_takes_each_message_for_one(database, connection):
    sent = await put_all(connection)
    async with mail_server([*sent, VICTIM], main_cf=NAIVE) as server:
        await relay_all(database, server)
        await server.delivered()
        found = await server.read([*sent, VICTIM])
    assert {address: len(mails) for address, mails in found.items()} == {VICTIM: 0} | dict.fromkeys(sent, 1)
    for number, message in enumerate(MESSAGES):
        if message.startswith(HEAD) and b"\0" not in message:
            body = re.sub(rb"\r\n|\r|\n", b"\r\n", message[len(HEAD) :])
            (mail,) = found[f"m{number}@{DOMAIN}"]
            assert mail.endswith(body), "nothing of it is lost"
    await assert_refused_are_dead(connection, sent)


@needs_postfix
async def test_written_as_it_is_such_a_message_is_two_for_the_same_postfix():
    """So the test above can fail: its server takes some of these sequences for the end of a message."""
    async with mail_server([f"m0@{DOMAIN}", VICTIM], main_cf=NAIVE) as server:
        for end in ENDS[1:]:
            if b"\0" not in end:
                await asyncio.to_thread(_write_raw, server.smtp_port, HEAD + b"hello" + end + SECOND)
        await server.delivered()
        found = await server.read([VICTIM])
    assert len(found[VICTIM]) >= 1


def _write_raw(port, content):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire, wire.makefile("rb") as replies:
        replies.readline()
        for command in (b"EHLO x", b"MAIL FROM:<a@example.com>", b"RCPT TO:<m0@example.com>", b"DATA"):
            wire.sendall(command + b"\r\n")
            while replies.readline()[3:4] == b"-":
                pass
        wire.sendall(content + b"\r\n.\r\nQUIT\r\n")
        while replies.readline():
            pass


async def test_exim_takes_each_message_for_one(database, connection, exim_unpacked):
    sent = await put_all(connection)
    async with Exim.running() as server:
        await relay_all(database, server)
        received = server.received()
        assert sorted(one.recipient for one in received) == sorted(sent)
        assert any(b"evil" in one.message for one in received), "what was to be smuggled is text"
    await assert_refused_are_dead(connection, sent)
