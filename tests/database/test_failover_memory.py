"""What a relay tells a Postgres that may have forgotten: its own tries, whatever their age, and nobody else's."""

import asyncio
from contextlib import nullcontext

import asyncpg
import pytest

from outbox.relay import ledger
from outbox.relay.failover import (
    MESSAGES_BYTES_MAX,
    REMAINS,
    REMEMBERED_BYTES_MAX,
    REMEMBERED_S,
    RETURN_S,
    Memory,
    News,
    news_of,
    reassert,
    tell_again,
)
from outbox.relay.ledger import Settlement
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.verdict import Outcome
from tests.support.fleet import until

TAKEN_BACK = Outcome("pending", "withdrawn", "its mark was not confirmed", 0.3)
LATER = Outcome("pending", "deferred", "451 later", 0.3)
DOUBT = Outcome("in_doubt", "in_doubt", "the connection was lost")
SENT = Outcome("sent", "accepted", "250 ok")


def news(outcome, *, relay=1, attempt=1):
    return News("mail1", "a@example.com", "b@example.com", "<1@x>", b"gone", relay, attempt, outcome)


def marked(relay=1, *, key="mail1", message=b"hello"):
    tried = Try(OutgoingEmail(relay, 1, key, 0, 0, "a@example.com", "b@example.com", "<1@x>", message))
    tried.mark(1)
    return tried


@pytest.fixture
async def marked_by_another(fleet):
    """mail1: relay 1's mark was lost with the server, relay 2 marked it since, under the same number."""
    await fleet.put_emails(1)
    for _ in range(2):
        await fleet.connection.execute(
            "INSERT INTO outbox.relay (host, pid, backend_pid, version) VALUES ('h', 1, 1, '0')"
        )
    done = await ledger.tick(fleet.connection, 2, room=5)
    await ledger.tick(fleet.connection, 2, marks=[done.claims[0].email])
    return fleet


async def row(fleet):
    return tuple(await fleet.connection.fetchrow("SELECT state, relay, attempt FROM outbox.delivery"))


@pytest.mark.parametrize("outcome", [TAKEN_BACK, LATER, DOUBT], ids=["withdrawn", "deferred", "in doubt"])
async def test_what_is_told_again_does_not_touch_another_relays_mark(marked_by_another, outcome):
    assert (await reassert(marked_by_another.connection, [news(outcome)]))[1] == 0
    assert await row(marked_by_another) == ("sending", 2, 1)


async def test_an_acceptance_that_is_told_again_counts_whoever_holds_the_mark(marked_by_another):
    await reassert(marked_by_another.connection, [news(SENT)])
    assert await row(marked_by_another) == ("sent", 1, 1)


@pytest.mark.parametrize("outcome", [SENT, DOUBT], ids=["accepted", "in doubt"])
async def test_an_email_that_another_session_is_writing_again_is_told_too(fleet, database, outcome):
    """`generate` or the application makes anew what the failover lost, in a transaction that is still open."""
    teller, watch = await asyncpg.connect(database), await asyncpg.connect(database)
    transaction = fleet.connection.transaction()
    await transaction.start()
    await fleet.put_emails(1)
    telling = asyncio.ensure_future(tell_again(teller, [news(outcome)], nullcontext))

    async def waits():
        pid = teller.get_server_pid()
        return bool(await watch.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))

    await until(waits, "it waits for the other session")
    await transaction.commit()
    emails, changed = await telling
    assert (list(emails), changed) == (["mail1"], 1)
    assert await row(fleet) == (outcome.state, 1, 1)
    await teller.close()
    await watch.close()


@pytest.mark.parametrize("outcome", [SENT, DOUBT], ids=["accepted", "in doubt"])
async def test_what_expired_while_nobody_knew_of_the_try_is_what_the_try_made_of_it(fleet, outcome):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'expired', settled_at = now(), send_before = now()"
    )
    assert (await reassert(fleet.connection, [news(outcome)]))[1] == 1
    assert await row(fleet) == (outcome.state, 1, 1)


async def test_what_expired_stays_so_when_a_try_was_taken_back(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'expired', settled_at = now(), send_before = now()"
    )
    assert (await reassert(fleet.connection, [news(TAKEN_BACK)]))[1] == 0
    assert await row(fleet) == ("expired", None, 0)


async def test_a_mark_of_ones_own_is_taken_back(fleet):
    await fleet.put_emails(1)
    done = await ledger.tick(fleet.connection, 1, room=5)
    await ledger.tick(fleet.connection, 1, marks=[done.claims[0].email])
    assert (await reassert(fleet.connection, [news(TAKEN_BACK)]))[1] == 1
    assert await row(fleet) == ("pending", None, 1)


async def test_an_email_that_is_gone_comes_back_as_sent_under_its_key(fleet):
    await reassert(fleet.connection, [news(SENT)])
    await reassert(fleet.connection, [news(SENT)])
    assert await row(fleet) == ("sent", 1, 1)
    assert await fleet.connection.fetchval("SELECT key FROM outbox.email") == "mail1"
    with pytest.raises(asyncpg.UniqueViolationError):
        await fleet.put_emails(1)


def test_nothing_grows_old_while_there_is_no_session():
    memory = Memory()
    memory.note(marked(), 1, SENT, 1000.0)
    memory.lost_at = 1000.0 + REMEMBERED_S - 1
    memory.note(marked(), 2, SENT, 1000.0 + 10 * REMEMBERED_S)
    told = memory.recall([], [], doubt_s=None)
    assert [(n.key, n.attempt) for n in told] == [("mail1", 2)], "the latest of an email"
    assert len(memory._news) == 2


def test_verdicts_grow_old_while_there_is_one():
    memory = Memory()
    memory.note(marked(), 1, SENT, 1000.0)
    memory.note(marked(), 2, SENT, 1001.0 + REMEMBERED_S)
    assert len(memory._news) == 1


def test_what_is_remembered_takes_a_bounded_memory():
    memory = Memory()
    for number in range(40):
        memory.note(marked(key=f"k{number}", message=b"x" * 2**20), 1, DOUBT, 1000.0)
    memory.lost_at = 1000.0
    told = memory.recall([], [], doubt_s=None)
    memory.lost_at = None
    assert len(told) == 40, "the verdicts are all there"
    assert sum(len(n.message) for n in told if n.message is not REMAINS) <= MESSAGES_BYTES_MAX
    assert all(n.outcome.delay_s is None for n in told if n.message is REMAINS), "it is not sent by itself without them"
    long = "k" * 1000
    for number in range(60_000):
        memory.note(marked(key=f"{long}{number}"), 1, SENT, 1000.0)
    assert memory._bytes <= REMEMBERED_BYTES_MAX
    assert 20_000 < len(memory._news) < 60_000
    memory.note(marked(), 2, SENT, 1001.0 + REMEMBERED_S)
    assert memory._message_bytes == 0
    assert memory._bytes == memory._news[0][1].bytes


async def test_a_verdict_that_cannot_be_told_again_does_not_keep_back_the_others(fleet, caplog):
    await fleet.put_emails(3)
    await fleet.connection.execute(
        "ALTER TABLE outbox.delivery ADD CONSTRAINT test CHECK (email <> 2 OR state <> 'sent')"
    )
    news = [news_of(marked(key=f"mail{n}"), 1, SENT) for n in (1, 2, 3)]
    emails, changed = await tell_again(fleet.connection, news, nullcontext)
    assert (set(emails), changed) == ({"mail1", "mail3"}, 2)
    assert "mail2, attempt 1: the verdict 'accepted' cannot be written again: " in caplog.text


def test_a_dot_without_an_answer_is_told_as_doubt_on_the_policys_clock():
    (told,) = Memory().recall([], [marked()], doubt_s=60.0)
    assert (told.outcome.state, told.outcome.delay_s, told.message) == ("in_doubt", 60.0, b"hello")


def test_a_verdict_that_no_commit_confirmed_is_told():
    unsettled = Settlement(1, 1, "mail1", 1, marked=True, outcome=LATER)
    assert [n.outcome for n in Memory().recall([unsettled], [], doubt_s=None)] == [LATER]


def test_after_a_change_of_servers_nothing_grows_old_for_as_long_as_the_old_one_may_come_back():
    memory = Memory()
    memory.note_move(0.0, 1000.0)
    memory.note(marked(), 1, SENT, 1001.0)
    memory.note(marked(key="mail2"), 1, SENT, 1000.0 + RETURN_S - 1)
    memory.lost_at = 1000.0 + RETURN_S - 1
    assert {n.key for n in memory.recall([], [], doubt_s=None)} == {"mail1", "mail2"}
    memory.lost_at = None
    memory.note(marked(key="mail3"), 1, SENT, 1000.0 + RETURN_S + REMEMBERED_S)
    assert len(memory._news) == 1


def test_an_acceptance_is_told_rather_than_a_try_with_a_later_number_on_another_server():
    memory = Memory()
    memory.note(marked(), 1, SENT, 1000.0)
    memory.note(marked(), 5, TAKEN_BACK, 1001.0)
    memory.note(marked(), 6, DOUBT, 1002.0)
    memory.lost_at = 1003.0
    assert [n.outcome for n in memory.recall([], [], doubt_s=None)] == [SENT]


async def test_an_acceptance_counts_whatever_number_the_row_has_come_to(fleet):
    """On the server that lost it the same email was tried more often."""
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 3, withdrawn = 2")
    assert (await reassert(fleet.connection, [news(SENT, attempt=1)]))[1] == 1
    assert await row(fleet) == ("sent", 1, 3)


async def test_doubt_counts_whatever_number_the_row_has_come_to_and_its_answer_finds_it(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 3")
    found, _ = await reassert(fleet.connection, [news(DOUBT, attempt=1)])
    assert await row(fleet) == ("in_doubt", 1, 3)
    assert found["mail1"].attempt == 3


async def test_a_doubt_that_a_person_has_decided_since_is_not_told_again(fleet):
    await fleet.put_emails(1)
    await reassert(fleet.connection, [news(DOUBT)])
    await fleet.connection.execute("UPDATE outbox.delivery SET state = 'pending', doubted_at = NULL, relay = NULL")
    assert (await reassert(fleet.connection, [news(DOUBT)]))[1] == 0
    assert await row(fleet) == ("pending", None, 1)


async def test_an_acceptance_ends_the_doubt_that_another_servers_try_of_the_same_number_left(marked_by_another):
    await marked_by_another.connection.execute(
        "UPDATE outbox.delivery SET state = 'in_doubt', doubted_at = now(), due_at = 'infinity'"
    )
    settlement = Settlement(1, 1, "mail1", 1, marked=True, outcome=SENT)
    done = await ledger.tick(marked_by_another.connection, 9, settlements=[settlement])
    assert done.settled == {(1, 1)}
    assert await row(marked_by_another) == ("sent", 1, 1)
