"""No row stops a relay: what it cannot read or write is quarantined, or named in its log, and the others are sent.

The rows here are older than the CHECKs, written by hand, or by a role that may do no more than enqueue.
"""

import asyncio
import logging

import pytest

from outbox.database.roles import grant_roles
from outbox.relay.memory_budget import ENVELOPE_BYTES_MAX
from outbox.relay.relay import Relay
from outbox.settings import MESSAGE_BYTES_MAX, Settings

HEALTHY = 5
INT_MAX = 2**31 - 1
LIMIT_S = 60

# As an upgrade leaves them: in force for what is written from now on, not for what is there.
BOUNDS = """
ALTER TABLE outbox.delivery
    ADD CONSTRAINT test_due CHECK (due_at >= '1970-01-01 UTC' AND (due_at < '3000-01-01 UTC' OR due_at = 'infinity'))
        NOT VALID,
    ADD CONSTRAINT test_before CHECK (send_before >= '1970-01-01 UTC' AND send_before < '3000-01-01 UTC') NOT VALID
"""
PUT = """
WITH made AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    VALUES ($1, 'reports@example.com', $1 || '@example.com', '<' || $1 || '@x>', $2) RETURNING id)
INSERT INTO outbox.delivery (email, due_at) SELECT id, now() - interval '1 hour' FROM made RETURNING email
"""
MESSAGE = b"Subject: x\r\n\r\nhello\r\n"


async def put(connection, key, message=MESSAGE):
    return await connection.fetchval(PUT, key, message)


async def drop_checks(connection):
    """Take off all CHECKs, and the NOT NULLs: what an older version, or its owner, could write."""
    await connection.execute(r"""
        DO $$ DECLARE c record; BEGIN
            FOR c IN SELECT conname, conrelid::regclass AS of FROM pg_constraint
                      WHERE contype IN ('c', 'f')
                        AND conrelid IN ('outbox.delivery'::regclass, 'outbox.email'::regclass)
            LOOP EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', c.of, c.conname); END LOOP;
        END $$;
        ALTER TABLE outbox.email ALTER sender DROP NOT NULL, ALTER recipient DROP NOT NULL,
            ALTER message_id DROP NOT NULL, ALTER message DROP NOT NULL;
    """)


async def restore_checks(connection, checks):
    for of, name, said in checks:
        wide = said if said.endswith("NOT VALID") else f"{said} NOT VALID"
        await connection.execute(f"ALTER TABLE {of} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} {wide}")


async def all_checks(connection):
    rows = await connection.fetch("""
        SELECT conrelid::regclass::text, quote_ident(conname), pg_get_constraintdef(oid) FROM pg_constraint
         WHERE conrelid IN ('outbox.delivery'::regclass, 'outbox.email'::regclass) AND contype = 'c'
    """)
    return [tuple(row) for row in rows]


def settings_for(database, sink, **further):
    return Settings.model_validate({
        "database_url": database, "smtp_url": sink.url, "lease_s": 4, "guard_s": 2, "poll_max_s": 0.2,
        "retry": {"base_s": 0.05, "max_s": 0.1, "attempts_max": 3}, **further,
    })  # fmt: skip


async def relay_all(database, sink, **further):
    """One relay, until nothing is left."""
    relay = Relay(settings_for(database, sink, **further), until_empty=True)
    async with asyncio.timeout(LIMIT_S):
        await relay.run()
    return relay


async def state_of(connection, email):
    return await connection.fetchval("SELECT state FROM outbox.delivery WHERE email = $1", email)


async def trail_of(connection, email):
    rows = await connection.fetch(
        "SELECT verdict, reply FROM outbox.attempt WHERE email = $1 ORDER BY settled_at, attempt", email
    )
    return [(row["verdict"], row["reply"]) for row in rows]


def assert_healthy_are_sent(sink, keys):
    assert {address: sink.addresses[address] for address in (f"{key}@example.com" for key in keys)} == {
        f"{key}@example.com": 1 for key in keys
    }


@pytest.fixture
async def healthy(connection):
    """Keys of emails behind which nothing is wrong, put in around the one of the test."""
    keys = [f"well{number}" for number in range(HEALTHY)]
    for key in keys:
        await put(connection, key)
    return keys


WRONG = {
    "due in the year 4000 BC": "due_at = '4000-01-01 BC'",
    "due since minus infinity": "due_at = '-infinity'",
    "to be sent before the year 20000": "send_before = '20000-01-01'",
    "to be sent before a day BC": "send_before = '4000-01-01 BC'",
    "an attempt that cannot be counted on": f"attempt = {INT_MAX}",
    "as many withdrawn": f"attempt = {INT_MAX}, withdrawn = {INT_MAX}",
    "more withdrawn than tried": "withdrawn = 7",
    "negative numbers": "attempt = -3, withdrawn = -4, orphaned = -5",
}


@pytest.mark.parametrize("wrong", WRONG, ids=WRONG)
async def test_a_row_that_breaks_a_check_when_it_is_written_is_quarantined(
    database, connection, sink, healthy, wrong, caplog
):
    checks = await all_checks(connection)
    await drop_checks(connection)
    bad = [await put(connection, f"bad{number}") for number in range(6)]
    await connection.execute(f"UPDATE outbox.delivery SET {WRONG[wrong]} WHERE email = ANY ($1)", bad)
    await restore_checks(connection, checks)
    await connection.execute(BOUNDS)
    await put(connection, "behind")
    with caplog.at_level(logging.INFO):
        await relay_all(database, sink)
    assert_healthy_are_sent(sink, [*healthy, "behind"])
    for number, email in enumerate(bad):
        assert await state_of(connection, email) == "dead"
        (verdict, reply), *more = await trail_of(connection, email)
        assert (verdict, more) == ("quarantined", [])
        assert reply.startswith("outbox cannot work with its row: ")
        assert f"bad{number} is quarantined" in caplog.text


@pytest.mark.parametrize("state", ["pending", "sending"])
async def test_what_a_dead_relay_died_with_too_often_to_count_is_judged(database, connection, sink, healthy, state):
    email = await put(connection, "bad")
    await connection.execute("INSERT INTO outbox.relay (host, pid, backend_pid, version) VALUES ('x', 1, 1, '1')")
    relay = await connection.fetchval("SELECT max(id) FROM outbox.relay")
    await connection.execute(
        f"UPDATE outbox.delivery SET orphaned = {INT_MAX}, relay = $1, state = $2, attempt = 1, marked_at = now()"
        " WHERE email = $3",
        relay, state, email,
    )  # fmt: skip
    await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    assert await state_of(connection, email) == ("dead" if state == "pending" else "in_doubt")
    assert await connection.fetchval("SELECT ended_at IS NOT NULL FROM outbox.relay WHERE id = $1", relay)


@pytest.mark.parametrize("column", ["sender", "recipient", "message_id", "message"])
async def test_a_null_where_none_is_expected_is_quarantined(database, connection, sink, healthy, column):
    await drop_checks(connection)
    email = await put(connection, "bad")
    await connection.execute(f"UPDATE outbox.email SET {column} = NULL WHERE id = $1", email)
    await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    assert [verdict for verdict, _ in await trail_of(connection, email)] == ["quarantined"]


async def test_a_delivery_without_its_email_is_quarantined(database, connection, sink, healthy):
    await drop_checks(connection)
    email = await put(connection, "bad")
    await connection.execute("DELETE FROM outbox.email WHERE id = $1", email)
    await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    assert await state_of(connection, email) == "dead"


async def test_a_message_whose_stored_bytes_are_damaged_is_quarantined(database, connection, sink, healthy, caplog):
    """Its pieces are gone from the table where Postgres keeps what is large."""
    await connection.execute("ALTER TABLE outbox.email ALTER message SET STORAGE EXTERNAL")
    for key, size in (("bad", 9_000), ("worse", 300_000)):
        await put(connection, key, MESSAGE + b"x\r\n" * (size // 3))
    toast = await connection.fetchval("SELECT reltoastrelid FROM pg_class WHERE oid = 'outbox.email'::regclass")
    await connection.execute("SET allow_system_table_mods = on")
    kind = "UPDATE pg_class SET relkind = '{}' WHERE oid = " + str(toast)
    await connection.execute(kind.format("r"))
    await connection.execute(f"DELETE FROM {await connection.fetchval('SELECT $1::oid::regclass::text', toast)}")
    await connection.execute(kind.format("t"))
    with caplog.at_level(logging.INFO):
        await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    for key in ("bad", "worse"):
        assert f"{key} is quarantined (dead)" in caplog.text


async def test_a_row_that_cannot_be_quarantined_is_left_out_and_named(database, connection, sink, healthy, caplog):
    email = await put(connection, "bad")
    await connection.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'not this one'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON outbox.delivery FOR EACH ROW WHEN (old.email = {email})
            EXECUTE FUNCTION refuse();
    """)
    with caplog.at_level(logging.INFO):
        await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    assert await state_of(connection, email) == "pending"
    assert f"bad (email {email}) is left out for 60 s: " in caplog.text
    assert "not this one" in caplog.text


async def test_a_verdict_that_cannot_be_written_quarantines_its_email_as_what_it_says(
    database, connection, sink, healthy
):
    """It was accepted, and a CHECK came about meanwhile that its row breaks: it is sent, and nothing else."""
    email = await put(connection, "bad")
    await connection.execute("ALTER TABLE outbox.delivery DROP CONSTRAINT delivery_bounds")
    await connection.execute("UPDATE outbox.delivery SET due_at = '1960-01-01' WHERE email = $1", email)
    relay = Relay(settings_for(database, sink), until_empty=True)
    whole = relay._ticker.tick
    bounded = False

    async def tick(session, room=0):
        nonlocal bounded
        if not bounded and any(s.key == "bad" for s in relay.verdicts.settlements):
            await connection.execute(BOUNDS)
            bounded = True
        await whole(session, room)

    relay._ticker.tick = tick
    async with asyncio.timeout(LIMIT_S):
        await relay.run()
    assert bounded
    assert_healthy_are_sent(sink, [*healthy, "bad"])
    assert await state_of(connection, email) == "sent"
    assert [verdict for verdict, _ in await trail_of(connection, email)] == ["accepted"]


async def test_what_is_held_by_relays_that_never_were_or_do_not_know_it_is_let_go_of(
    database, connection, sink, healthy
):
    itself = 1 + await connection.fetchval("SELECT coalesce(max(id), 0) FROM outbox.relay")
    for key, relay in (("free", 12345), ("nobody", 0), ("itself", itself)):
        email = await put(connection, key)
        await connection.execute("UPDATE outbox.delivery SET relay = $1 WHERE email = $2", relay, email)
    doubtful = await put(connection, "doubtful")
    await connection.execute(
        "UPDATE outbox.delivery SET relay = -1, state = 'sending', attempt = 1, marked_at = now() WHERE email = $1",
        doubtful,
    )
    await relay_all(database, sink)
    assert_healthy_are_sent(sink, [*healthy, "free", "nobody", "itself"])
    assert await state_of(connection, doubtful) == "in_doubt"


async def test_what_is_never_due_is_named_at_the_end(database, connection, sink, healthy, caplog):
    email = await put(connection, "never")
    await connection.execute("UPDATE outbox.delivery SET due_at = 'infinity' WHERE email = $1", email)
    with caplog.at_level(logging.INFO):
        await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    assert f"email {email} is never sent: its due_at is infinity" in caplog.text


async def test_a_message_over_the_limit_is_quarantined_and_its_bytes_are_never_fetched(
    database, connection, sink, healthy
):
    """288 MB that Postgres packs into a few: fetched, they would take three times as much here."""
    await drop_checks(connection)
    email = await put(connection, "bad")
    await connection.execute(
        "UPDATE outbox.email SET message = convert_to(repeat(repeat('x', 70) || E'\\r\\n', 4000000), 'UTF8')"
        " WHERE id = $1",
        email,
    )
    await relay_all(database, sink)
    assert_healthy_are_sent(sink, healthy)
    ((verdict, reply),) = await trail_of(connection, email)
    assert verdict == "quarantined"
    assert f"it has 288000044 bytes, and a relay takes at most {MESSAGE_BYTES_MAX + ENVELOPE_BYTES_MAX}" in reply


async def test_a_relay_with_no_more_rights_than_it_needs_may_quarantine(database, connection, sink, healthy):
    checks = await all_checks(connection)
    await drop_checks(connection)
    bad = [await put(connection, f"bad{number}") for number in range(3)]
    await connection.execute(
        f"UPDATE outbox.delivery SET {WRONG['to be sent before a day BC']} WHERE email = $1", bad[0]
    )
    await connection.execute(f"UPDATE outbox.delivery SET {WRONG['as many withdrawn']} WHERE email = $1", bad[1])
    await connection.execute("DELETE FROM outbox.email WHERE id = $1", bad[2])
    await restore_checks(connection, checks)
    await connection.execute(BOUNDS)
    await grant_roles(connection)
    await connection.execute("CREATE ROLE bad_rows_login LOGIN IN ROLE outbox_relay")
    try:
        await relay_all(database.replace("postgres@", "bad_rows_login@"), sink)
    finally:
        await connection.execute("DROP ROLE bad_rows_login")
    assert_healthy_are_sent(sink, healthy)
    assert [await state_of(connection, email) for email in bad] == ["dead"] * 3


async def test_trouble_of_the_database_quarantines_nothing(database, connection, sink, healthy):
    """A right that is missing fails for every row, and is no row's fault."""
    await connection.execute("CREATE ROLE bad_rows_relay LOGIN")
    try:
        await connection.execute(
            "GRANT USAGE ON SCHEMA outbox TO bad_rows_relay;"
            "GRANT ALL ON ALL TABLES IN SCHEMA outbox TO bad_rows_relay;"
            "REVOKE ALL ON outbox.pause FROM bad_rows_relay"
        )
        url = database.replace("postgres@", "bad_rows_relay@")
        relay = Relay(settings_for(url, sink, drain_s=1))
        running = asyncio.create_task(relay.run())
        async with asyncio.timeout(LIMIT_S):
            while relay.sessions.former is None:
                await asyncio.sleep(0.01)
        relay.stop()
        await running
        assert await connection.fetch("SELECT FROM outbox.attempt") == []
        assert await connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE state = 'pending'") == HEALTHY
    finally:
        await connection.execute("DROP OWNED BY bad_rows_relay; DROP ROLE bad_rows_relay")
