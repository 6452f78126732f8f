"""SQL functions on any text: the same result as Python, or one plain error."""

import asyncio
import email
import email.policy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from hypothesis import strategies as st

from outbox.mail.header_fields import one_line
from outbox.mail.mailbox import parse_mailbox
from tests.fuzz.harness import TARGETS, Check, Target, words
from tests.fuzz.mail import ADDRESSES

# Postgres takes neither NUL nor lone surrogates as text, so no caller can send them.
_SAFE = re.compile(r"[\0\ud800-\udfff]")


@contextmanager
def _connected(url: str | None, check) -> Iterator[Check]:
    assert url is not None
    with asyncio.Runner() as runner:
        # A statement that takes longer is a finding, as error 57014.
        connection = runner.run(asyncpg.connect(url, server_settings={"statement_timeout": "5s"}))
        try:
            yield lambda example: runner.run(check(connection, example))
        finally:
            runner.run(connection.close())


async def _same_mailbox(connection, text):
    """An address that SQL takes is one that Python takes, and both say the same of it."""
    text = _SAFE.sub("", text)
    try:
        row = await connection.fetchrow("SELECT name, address FROM outbox.mailbox($1, 'sender')", text)
    except asyncpg.PostgresError as error:
        assert error.sqlstate == "22023", f"{error.sqlstate}: {error}"
        return
    address = row["address"]
    assert not re.search(r"[\s\0<>@]", address.replace("@", "", 1)), row
    assert len(address.encode()) <= 254
    if not address.isascii() or re.search(r"[@.]..--|\.(invalid|onion|arpa)$", address, re.IGNORECASE):
        return  # Python looks closer at these: names that can never get mail, and what Unicode allows
    mailbox = parse_mailbox(text)
    assert (mailbox.name, mailbox.address) == (one_line(row["name"]), address)


_TEXT = words(
    "a\r\nBcc: spy@example.com\r\n\r\n", "\r", "\n", "\r\n.\r\n", "\n.\r\n", "é", "🙂", " ", "=?utf-8?q?x?=",
    "\x1b", "\x85",
    "\u2028", '"', "\\", "<x@y>", "x" * 100, size_max=20_000,
)  # fmt: skip
_TIME = st.sampled_from([
    None, "4000-01-01 BC", "20000-01-01", "infinity", "-infinity", "2026-11-30T06:00:00Z", "3000-01-01", "1969-12-31",
])  # fmt: skip
_EMAIL = st.fixed_dictionaries({
    "key": st.one_of(
        words("a/", "/2026-W43/", "#1", "2026/", "é", " ", "-", "--", "\n", "'", "\u2028", "x" * 100, size_max=3000),
        st.just("order-4711/receipt"),
    ),
    "sender": st.one_of(ADDRESSES, st.just("Shop <shop@example.com>")),
    "recipient": st.one_of(ADDRESSES, st.just("ann@example.com")),
    "subject": _TEXT, "body_text": st.one_of(_TEXT, st.none()), "body_html": st.one_of(_TEXT, st.none()),
    "headers": st.one_of(st.none(), st.dictionaries(st.one_of(_TEXT, st.just("X-Extra")), _TEXT, max_size=2)),
    "send_at": _TIME, "send_before": _TIME,
    "priority": st.sampled_from(["normal", "urgent", "", "high"]), "route": st.sampled_from([None, "", "bulk",
    "Bulk", "x\n"]),
})  # fmt: skip

_ENQUEUE = """
SELECT outbox.enqueue(key => $1, sender => $2, recipient => $3, subject => $4, body_text => $5, body_html => $6,
       headers => $7::jsonb, send_at => $8::text::timestamptz, send_before => $9::text::timestamptz,
       priority => $10, route => $11)
"""
_STORED = """
SELECT m.message, m.sender, m.recipient, d.due_at::text AS due_at
  FROM outbox.email m JOIN outbox.delivery d ON d.email = m.id
"""


async def _enqueued(connection, example):
    """Whatever is put in by SQL is stored sound, or refused with 22023."""
    import json

    def safe(value):
        return _SAFE.sub("", value) if isinstance(value, str) else value

    headers = example["headers"]
    values = [
        *(safe(example[name]) for name in ("key", "sender", "recipient", "subject", "body_text", "body_html")),
        None if headers is None else json.dumps({safe(name): safe(value) for name, value in headers.items()}),
        *(example[name] for name in ("send_at", "send_before", "priority", "route")),
    ]
    # Nothing of it stays, so that each input finds an empty outbox.
    transaction = connection.transaction()
    await transaction.start()
    try:
        try:
            await connection.fetchval(_ENQUEUE, *values)
        except asyncpg.PostgresError as error:
            assert error.sqlstate == "22023", f"{error.sqlstate}: {error}"
            return
        for row in await connection.fetch(_STORED):
            raw = bytes(row["message"])
            assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\0", raw)
            assert max(map(len, raw.split(b"\r\n"))) <= 998
            assert not re.search(r"[\s\0]", row["sender"] + row["recipient"])
            assert "BC" not in row["due_at"]
            message = email.message_from_bytes(raw, policy=email.policy.compat32)
            assert message.get_all("From") is not None
            assert len(message.get_all("From")) == len(message.get_all("To")) == len(message.get_all("Subject")) == 1
            assert "Bcc" not in message or any(name.lower() == "bcc" for name in headers or {})
    finally:
        await transaction.rollback()


TARGETS["mailboxes"] = Target(
    "mailboxes", ADDRESSES, str, lambda url: _connected(url, _same_mailbox), needs_database=True
)
TARGETS["enqueue"] = Target("enqueue", _EMAIL, dict, lambda url: _connected(url, _enqueued), needs_database=True)
