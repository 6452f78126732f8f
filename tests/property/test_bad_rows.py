"""Whatever a row holds, a relay sends every healthy email once and comes to its end, and says what it did not send.

Rows come by all ways: through `outbox.put`, by INSERT under the CHECKs as they are, and from before the CHECKs. The
relay is a real one, until nothing is left, with a real Postgres and a real SMTP server.
"""

import asyncio
import logging
from contextlib import suppress

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox.sandbox.smtp_sink import Sink
from tests.faults.test_bad_rows import (
    BOUNDS,
    all_checks,
    assert_healthy_are_sent,
    drop_checks,
    put,
    relay_all,
    restore_checks,
)

INTS = st.sampled_from([0, 1, 2, 3, 6, 7, -1, 2**31 - 1, 2**31 - 2, -(2**31)])
# Not in the future: an `--until-empty` waits for what is due some day.
PAST = st.sampled_from(["-infinity", "4713-11-24 BC", "0001-01-01 BC", "0001-01-01", "1969-12-31", "2020-01-01"])
DUE = PAST | st.just("infinity")
ANY_TIME = PAST | st.sampled_from(["infinity", "2999-12-31", "3000-01-01", "20000-01-01", "294276-12-31"])
TEXT = st.sampled_from(
    ["", " ", "a@b.example", "a\r\nRCPT TO:<x@y>", "a b", "<>", "ü@b.example", "\x85", "x" * 5000, "%s{}"]
)
MESSAGE = st.sampled_from([
    b"", b"\0", b"\r", b"\n", b".", b"\r\n.\r\n", b"Subject: x\n\n\r.\r", b"\xff\xfe", b"x" * 999,
    b"Subject: \xe9\r\n\r\nx", b"y\r\n" * 30_000, b" " * 100_000, b"z\r\n" * 100_000,
])  # fmt: skip
STATE = st.sampled_from(["pending"] * 5 + ["sending", "in_doubt"])

deliveries = st.fixed_dictionaries(
    {"due_at": DUE, "state": STATE},
    optional={
        "attempt": INTS, "withdrawn": INTS, "orphaned": INTS, "relay": INTS,
        "send_before": ANY_TIME, "marked_at": ANY_TIME, "doubted_at": ANY_TIME,
        "paused": st.sampled_from(["", "nothing"]), "priority": st.sampled_from([0, 1, 2, -1]),
    },
)  # fmt: skip
emails = st.fixed_dictionaries(
    {},
    optional={
        "sender": st.none() | TEXT, "recipient": st.none() | TEXT, "message_id": st.none() | TEXT,
        "message": st.none() | MESSAGE, "traceparent": TEXT, "made_by": TEXT,
    },
)  # fmt: skip
rows = st.lists(st.tuples(st.sampled_from(["as it is", "from before"]), deliveries, emails), min_size=1, max_size=5)
puts = st.lists(
    st.fixed_dictionaries(
        {"recipients": st.lists(TEXT, min_size=1, max_size=3), "tail": MESSAGE},
        optional={
            "sender": TEXT, "send_at": DUE, "send_before": ANY_TIME,
            "priority": st.sampled_from([0, 1, 2, -1]), "route": st.sampled_from(["", "nowhere"]), "domain": TEXT,
        },
    ),
    max_size=3,
)  # fmt: skip


async def write(connection, number, delivery, email):
    """Put in a row whose columns are these, unless a CHECK or a type does not let it in."""
    email = {"key": f"odd{number}", "sender": "a@example.com", "recipient": f"odd{number}@example.com",
             "message_id": "<1@x>", "message": b"Subject: odd\r\n\r\nodd\r\n", **email}  # fmt: skip
    if delivery["state"] != "pending":
        delivery = {"relay": 77, "marked_at": "2020-01-01", "attempt": 1, **delivery}
    delivery = {"doubted_at": "2020-01-01", **delivery}
    if delivery["state"] != "in_doubt":
        del delivery["doubted_at"]
    values = [_as_text(n, _kind(name, value)) for n, (name, value) in enumerate(delivery.items(), 2)]
    places = ", ".join(f"${n}" for n in range(1, len(email) + 1))
    with suppress(asyncpg.PostgresError):
        async with connection.transaction():
            identity = await connection.fetchval(
                f"INSERT INTO outbox.email ({', '.join(email)}) VALUES ({places}) RETURNING id", *email.values()
            )
            await connection.execute(
                f"INSERT INTO outbox.delivery (email, {', '.join(delivery)}) VALUES ($1, {', '.join(values)})",
                identity,
                *map(str, delivery.values()),
            )


def _kind(name, value):
    if name in ("due_at", "send_at", "send_before", "marked_at", "doubted_at"):
        return "timestamptz"
    return {int: "integer", bytes: "bytea", list: "text[]"}.get(type(value), "text")


def _as_text(number, kind):
    """A parameter that is given as text: Python's dates end where those of Postgres go on."""
    return f"CAST(${number}::text AS {kind})"


async def put_in(connection, number, what):
    """As an application would, or an attacker who may do no more."""
    values = {"key": f"put{number}", "sender": "a@example.com", "head": b"Subject: x\r\nMessage-ID: <",
              "domain": "example.com", **what}  # fmt: skip
    named = []
    for n, (name, value) in enumerate(values.items(), 1):
        kind = _kind(name, value)
        named.append(f"{name} => " + (_as_text(n, kind) if kind == "timestamptz" else f"${n}::{kind}"))
    with suppress(asyncpg.PostgresError):
        async with connection.transaction():
            await connection.execute(f"SELECT outbox.put({', '.join(named)})", *values.values())


EMPTIED = """
TRUNCATE outbox.attempt, outbox.delivery, outbox.email, outbox.relay;
ALTER TABLE outbox.delivery DROP CONSTRAINT IF EXISTS test_due, DROP CONSTRAINT IF EXISTS test_before
"""
OPEN = """
SELECT email, to_jsonb(d)::text AS row FROM outbox.delivery d
 WHERE state IN ('pending', 'sending') AND route = ''
"""


async def write_all(connection, found, way):
    for number, (one_way, delivery, email) in enumerate(found):
        if one_way == way:
            await write(connection, number, dict(delivery), email)


async def one_round(url, found, more, caplog):
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(EMPTIED)
        healthy = [f"well{number}" for number in range(3)]
        await put(connection, healthy[0])
        await write_all(connection, found, "as it is")
        for number, what in enumerate(more):
            await put_in(connection, number, what)
        checks = await all_checks(connection)
        await drop_checks(connection)
        await write_all(connection, found, "from before")
        await restore_checks(connection, checks)
        await connection.execute(BOUNDS)
        for key in healthy[1:]:
            await put(connection, key)
        async with Sink() as sink:
            with caplog.at_level(logging.INFO):
                await relay_all(url, sink)
        assert_healthy_are_sent(sink, healthy)
        for row in await connection.fetch(OPEN):
            assert f"email {row['email']}" in caplog.text, f"{row['row']} is neither settled nor named"
    finally:
        await connection.close()
        caplog.clear()


@pytest.fixture(scope="module")
def odd_database(postgres_server):
    async def make():
        admin = await asyncpg.connect(postgres_server.url)
        await admin.execute("CREATE DATABASE odd TEMPLATE outbox_template")
        await admin.close()
        connected = await asyncpg.connect(postgres_server.database_url("odd"))
        # No foreign keys: TRUNCATE then needs no other tables.
        await drop_checks_of_keys(connected)
        await connected.close()

    asyncio.run(make())
    return postgres_server.database_url("odd")


async def drop_checks_of_keys(connection):
    await connection.execute(
        "ALTER TABLE outbox.delivery DROP CONSTRAINT delivery_email_fkey;"
        "ALTER TABLE outbox.email DROP CONSTRAINT email_report_fkey"
    )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(found=rows, more=puts)
def test_no_row_stops_a_relay(odd_database, caplog, found, more):
    asyncio.run(one_round(odd_database, found, more, caplog))
