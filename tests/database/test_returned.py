"""What bounces do in the database: settle what is in doubt, and count towards `bounces_max`."""

import asyncio

import asyncpg
import pytest

from outbox.database.roles import grant_roles
from outbox.feedback import bounce_proof, bounces
from outbox.feedback.bounces import Outcome, Policy
from outbox.operations import suppression_list
from outbox.operations.resolve import Decision, resolve
from tests.support.bounce_samples import ROWS, report
from tests.support.living_relays import emptied, living_relay, living_relays, made_once, put, row  # noqa: F401 - fixtures

FULL = {"status": "5.2.2", "diagnostic": "smtp; 552 5.2.2 mailbox full"}
ALWAYS = Policy()
COUNTING = Policy(bounces_max=3, within_s=86_400.0, within="1d")
IN_DOUBT = "a bounce of it proves that a server accepted it: sent"


@pytest.fixture(scope="module")
def one_database(postgres_server):
    return made_once(postgres_server, "returned", lambda connected: connected.execute("SELECT 1"))


@pytest.fixture
async def database(one_database):
    connected = await asyncpg.connect(one_database)
    await connected.execute("TRUNCATE outbox.suppression, outbox.operation, outbox.bounce")
    await connected.close()
    return await emptied(one_database)


@pytest.fixture
async def emails(connection):
    """Four emails to one address."""
    made = await put(connection, 4)
    await connection.execute("UPDATE outbox.email SET recipient = 'Bo@Example.com'")
    return made


async def about(connection, email, **how):
    one = await connection.fetchrow(f"{ROWS} WHERE id = $1", email)
    return report(token=one["token"], **({"final": f"rfc822; {one['recipient']}"} | how))


async def read(connection, email, policy=ALWAYS, **how):
    return await bounces.read(connection, await about(connection, email, **how), name="x", policy=policy)


async def listed(connection):
    rows = await connection.fetch("SELECT address, reason, why FROM outbox.suppression")
    return [tuple(one) for one in rows]


async def test_so_many_emails_that_failed_suppress_an_address_and_say_why(connection, emails):
    first, second, third, _ = emails
    for email, more in ((first, ""), (first, "X-Again: yes\n"), (second, "")):
        found = await read(connection, email, COUNTING, more=more, **FULL)
        assert found.sentence.endswith("Bo@Example.com is still written to.")
    assert await listed(connection) == [], "two bounces of one email are one"
    found = await read(connection, third, COUNTING, **FULL)
    assert found.sentence.endswith("Bo@Example.com gets no more email, since 3 emails to it bounced within 1d.")
    said = "3 emails bounced within 1d, the last one with 5.2.2 552 5.2.2 mailbox full"
    assert await listed(connection) == [("bo@example.com", "bounced", said)]
    assert (await read(connection, third, COUNTING, **FULL)).outcome is Outcome.AGAIN


@pytest.mark.parametrize(
    "policy, how",
    [
        (Policy(), FULL),
        (Policy(bounces_max=1, within_s=86_400.0, suppressing=False), FULL),
        (COUNTING, {"status": "5.7.1", "diagnostic": "smtp; 550 5.7.1 IP address blacklisted"}),
        (COUNTING, {"status": "5.1.1", "diagnostic": "smtp; 550 5.7.1 IP address blacklisted"}),
        (COUNTING, {"status": "5.1.1", "final": "rfc822; left@example.com"}),
        (COUNTING, {"status": "4.2.2", "action": "delayed"}),
    ],
    ids=["off", "redirected", "policy", "policy as 5.1.1", "a member of an alias", "delayed"],
)
async def test_what_does_not_count_never_suppresses(connection, emails, policy, how):
    for email in emails:
        found = await read(connection, email, policy, **how)
        assert found.outcome is Outcome.SOFT
    assert await listed(connection) == []


async def test_bounces_that_are_older_than_the_time_do_not_count(connection, emails):
    for email in emails[:2]:
        await read(connection, email, COUNTING, **FULL)
    await connection.execute("UPDATE outbox.bounce SET at = at - interval '25 hours'")
    await read(connection, emails[2], COUNTING, **FULL)
    assert await listed(connection) == []


async def test_an_address_that_is_taken_off_the_list_is_counted_anew(connection, emails):
    for email in emails[:3]:
        await read(connection, email, COUNTING, **FULL)
    assert await suppression_list.remove(connection, "bo@example.com", "", who="ann", why="it has room again")
    assert "is still written to" in (await read(connection, emails[3], COUNTING, **FULL)).sentence
    assert await listed(connection) == []


async def test_of_two_processes_that_record_the_last_two_at_once_one_suppresses(connection, database, emails):
    await read(connection, emails[0], COUNTING, **FULL)
    raws = [await about(connection, email, **FULL) for email in emails[1:3]]
    others = [await asyncpg.connect(database) for _ in raws]
    try:
        await asyncio.gather(
            *(bounces.read(other, raw, name="x", policy=COUNTING) for other, raw in zip(others, raws, strict=True))
        )
    finally:
        for other in others:
            await other.close()
    assert len(await listed(connection)) == 1


async def in_doubt(connection, relay, emails):
    """Put these emails into doubt, as a relay that dies does."""
    await connection.execute(
        """UPDATE outbox.delivery SET state = 'in_doubt', attempt = 1, relay = $2, marked_at = now(),
                  doubted_at = now(), due_at = 'infinity' WHERE email = ANY ($1::bigint[])""",
        list(emails),
        relay.relay,
    )


async def trail(connection, email):
    rows = await connection.fetch(
        "SELECT verdict, attempt, reply FROM outbox.attempt WHERE email = $1 ORDER BY ctid", email
    )
    return [tuple(one) for one in rows]


@pytest.mark.parametrize(
    "how",
    [
        {},
        FULL,
        {"status": "4.4.1", "more": "\n"},
        {"final": "rfc822; left@example.com", "original": "rfc822; bo@example.com"},
    ],
    ids=["hard", "soft", "later", "alias"],
)
async def test_a_bounce_of_an_email_in_doubt_proves_that_it_was_accepted(connection, relay, emails, how):
    one, other, *_ = emails
    await in_doubt(connection, relay, (one, other))
    found = await read(connection, one, Policy(suppressing=False), **how)
    assert found.sentence.endswith(
        "; the email was in doubt and is sent now, since the bounce proves that a server accepted it."
    )
    now = await row(connection, one)
    assert (now["state"], now["doubted_at"], now["attempt"]) == ("sent", None, 1)
    (bounced, *_), resolved = await trail(connection, one)
    assert (bounced, resolved) == ("bounced", ("resolved", 1, IN_DOUBT))
    assert (await row(connection, other))["state"] == "in_doubt"
    assert (await read(connection, one, **how)).outcome is Outcome.AGAIN
    assert len(await trail(connection, one)) == 2


async def test_a_bounce_that_came_before_the_doubt_settles_it_and_one_of_an_earlier_try_does_not(
    connection,
    relay,
    emails,
):
    before, earlier, none, _ = emails
    for email in (before, earlier):
        await read(connection, email)
    await in_doubt(connection, relay, (before, earlier, none))
    await connection.execute(
        "UPDATE outbox.delivery SET marked_at = now() - interval '1 hour' WHERE email = $1", before
    )
    assert await bounces.settle_doubts(connection) == 1
    assert await bounces.settle_doubts(connection) == 0
    states = [(await row(connection, email))["state"] for email in (before, earlier, none)]
    assert states == ["sent", "in_doubt", "in_doubt"]


async def test_a_bounce_that_others_could_have_written_settles_nothing(connection, relay, emails):
    one, copy, *_ = emails
    message_id = f"<{one}.0123456789abcdef@example.com>"
    await connection.execute("UPDATE outbox.email SET message_id = $2 WHERE id = ANY ($1)", [one, copy], message_id)
    await connection.execute("UPDATE outbox.email SET key = 'a' || CASE WHEN id <> $1 THEN '#2' ELSE '' END"
                             " WHERE id = ANY ($2)", one, [one, copy])  # fmt: skip
    await connection.execute("UPDATE outbox.email SET recipient = 'al@example.com' WHERE id = $1", copy)
    await in_doubt(connection, relay, (one, copy))
    raw = report(final="rfc822; bo@example.com").replace(
        b"MIME-Version", b"In-Reply-To: %s\nMIME-Version" % message_id.encode()
    )
    assert (await bounces.read(connection, raw, name="x")).outcome is Outcome.HARD
    assert await bounces.settle_doubts(connection) == 0
    assert (await row(connection, one))["state"] == "in_doubt"


@pytest.mark.parametrize("decision", [Decision.RESEND, Decision.DISCARD])
async def test_what_was_decided_before_the_bounce_came_stays_decided(connection, relay, emails, decision):
    await in_doubt(connection, relay, emails)
    key = await connection.fetchval("SELECT key FROM outbox.email WHERE id = $1", emails[0])
    assert await resolve(connection, [key], decision, who="ann") == [key]
    before = await row(connection, emails[0])
    assert "sent now" not in (await read(connection, emails[0])).sentence
    assert await row(connection, emails[0]) == before


async def test_a_person_who_decides_at_this_moment_is_not_waited_for_and_wins(connection, database, relay, emails):
    await in_doubt(connection, relay, emails)
    key = await connection.fetchval("SELECT key FROM outbox.email WHERE id = $1", emails[0])
    raw = await about(connection, emails[0])
    other = await asyncpg.connect(database)
    try:
        deciding = other.transaction()
        await deciding.start()
        assert await resolve(other, [key], Decision.RESEND, who="ann") == [key]
        async with asyncio.timeout(10):
            assert "sent now" not in (await bounces.read(connection, raw, name="x")).sentence
        await deciding.rollback()
        assert await bounces.settle_doubts(connection) == 1, "the person took it back"
    finally:
        await other.close()


async def test_the_role_that_reads_bounces_settles_doubts_and_changes_no_delivery_otherwise(
    connection,
    relay,
    emails,
):
    await grant_roles(connection)
    await in_doubt(connection, relay, emails)
    raws = [await about(connection, email, **FULL) for email in emails]
    await connection.execute("SET ROLE outbox_bounce")
    try:
        for raw in raws:
            assert "is sent now" in (await bounces.read(connection, raw, name="x", policy=COUNTING)).sentence
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE outbox.delivery SET state = 'sent'")
        await connection.execute("SET ROLE outbox_operate")
        assert await suppression_list.remove(connection, "bo@example.com", "", who="ann", why="")
    finally:
        await connection.execute("RESET ROLE")


async def test_each_statement_looks_up_by_index_in_tables_without_statistics(connection):
    await connection.execute(
        """INSERT INTO outbox.email (key, sender, recipient, message_id, message)
           SELECT 'k' || n, 'a@example.com', 'p' || n || '@example.com', '<' || n || '@x>', ''
             FROM generate_series(1, 5000) n;
           INSERT INTO outbox.bounce (email, message, kind, counts) SELECT id, 'm', 'soft', true FROM outbox.email"""
    )
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    for statement in (*bounce_proof.STATEMENTS, *bounces.STATEMENTS, suppression_list.REMOVE):
        prepared = await connection.prepare(statement)
        nulls = ", ".join("NULL" for _ in prepared.get_parameters())
        await connection.execute(f"PREPARE planned AS {statement}")
        told = [row[0] for row in await connection.fetch(f"EXPLAIN EXECUTE planned({nulls})")]
        await connection.execute("DEALLOCATE planned")
        assert not [line for line in told if "Seq Scan on email" in line or "Seq Scan on bounce" in line], told
