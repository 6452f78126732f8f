"""Emails with content that servers get wrong, and the check that each arrived whole."""

import re
from collections import Counter

from tests.support.fault_levers import recipients

HEAD = (
    b"From: Progress reports <reports@example.com>\r\nTo: p{n}@example.com\r\nSubject: Week {n}\r\n"
    b"Date: Mon, 30 Nov 2026 06:00:00 +0000\r\nMessage-ID: <{n}@example.com>\r\nMIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: {encoding}\r\n"
)
BODIES = {
    "plain": b"Hello,\r\n\r\nthis is your report.\r\n",
    "dots": b".\r\n..\r\n...\r\n.a\r\n. \r\n\r\n.\r\n",
    "a dot is the last line": b"end\r\n.\r\n",
    "no line end at the end": b"no line end",
    "empty lines at the end": b"text\r\n\r\n\r\n\r\n",
    "empty": b"",
    "a long line": b"x" * 980 + b"\r\n" + b"." * 980 + b"\r\n",
    "white space": b"trailing \t \r\n\t\r\n \r\n",
    "From at a line's start": b"From me\r\n>From you\r\nFrom: x\r\n",
    "commands": b"QUIT\r\nRSET\r\nDATA\r\nMAIL FROM:<a@example.com>\r\n",
    "quoted-printable": b"=46=\r\nrom =E2=9C=93\r\n=\r\n=2E\r\n",
    "UTF-8": "Grüße ✓ — 日本語\r\n".encode() * 5,
    "folded header": b"X-Long: a\r\n\t b\r\n  c\r\n\r\nbody\r\n",  # stands before the empty line
    "60 KB": b"".join(b"%04d %s\r\n" % (n, b"y" * 70) for n in range(800)),
    "LF only": b"one\ntwo\n.\nthree\n",
}


def message(number: int) -> bytes:
    """Return the message of email `number`, as its row holds it."""
    name, body = list(BODIES.items())[number % len(BODIES)]
    head = HEAD.replace(b"{n}", b"%d" % number).replace(b"{encoding}", b"7bit" if body.isascii() else b"8bit")
    return head + (body if name == "folded header" else b"\r\n" + body)


def on_the_wire(message: bytes) -> bytes:
    """Return the bytes that a server must have: every line ends with CRLF, the last one too."""
    lines = re.sub(rb"\r?\n", b"\r\n", message)
    return lines if lines.endswith(b"\r\n") else lines + b"\r\n"


def people(count):
    """Return the recipients and the numbers of so many emails."""
    return [(f"p{number}@example.com", number) for number in range(1, count + 1)]


async def post(fleet, emails):
    """Put emails into the outbox and announce them; each is a recipient and the number of a message."""
    await fleet.connection.execute(
        """WITH made AS (
             INSERT INTO outbox.email (key, sender, recipient, message_id, message)
             SELECT recipient, 'reports@example.com', recipient, '<' || recipient || '>', message
               FROM unnest($1::text[], $2::bytea[]) AS given (recipient, message) RETURNING id)
           INSERT INTO outbox.delivery (email) SELECT id FROM made""",
        [recipient for recipient, _ in emails],
        [message(number) for _, number in emails],
    )
    await fleet.connection.execute("NOTIFY outbox")


async def assert_once_and_whole(fleet, received, count):
    """Show that every email has arrived once with its bytes, or is in doubt; return how many are in doubt."""
    sent, in_doubt = await recipients(fleet, "sent"), await recipients(fleet, "in_doubt")
    arrived = Counter(one.recipient for one in received)
    assert {address: n for address, n in arrived.items() if n > 1} == {}, "accepted twice"
    assert sent - set(arrived) == set(), "the database says sent, and the server does not have it"
    assert set(arrived) - sent - in_doubt == set(), "accepted, and the database does not know that it may be"
    assert len(sent) + len(in_doubt) == count, await fleet.states()
    for one in received:
        expected = on_the_wire(message(int(one.recipient[1:].partition("@")[0])))
        assert one.message == expected or one.message.endswith(b"\r\n" + expected), one
    return len(in_doubt)
