"""Verdicts that are written again on a server that may lack them: of this relay's own tries, and of no others."""

import asyncio
from contextlib import nullcontext

import asyncpg
import pytest

from outbox.relay.failover import reassert, reassert_portion
from outbox.relay.settlement import Settlement
from outbox.relay.tick import TickRequest, tick
from outbox.relay.verdict_history import RecentVerdict
from outbox.smtp.verdict import Outcome
from tests.support.fleet import until

TAKEN_BACK = Outcome("pending", "withdrawn", "its mark was not confirmed", 0.3)
LATER = Outcome("pending", "deferred", "451 later", 0.3)
DOUBT = Outcome("in_doubt", "in_doubt", "the connection was lost")
SENT = Outcome("sent", "accepted", "250 ok")


def verdict(outcome, *, relay=1, attempt=1):
    return RecentVerdict("mail1", "a@example.com", "b@example.com", "<1@x>", b"gone", relay, attempt, outcome)


@pytest.fixture
async def marked_by_another(fleet):
    """mail1: relay 1's mark was lost with the server, relay 2 marked it since, under the same number."""
    await fleet.put_emails(1)
    for _ in range(2):
        await fleet.connection.execute(
            "INSERT INTO outbox.relay (host, pid, backend_pid, version) VALUES ('h', 1, 1, '0')"
        )
    done = await tick(fleet.connection, 2, TickRequest(claims_max=5))
    await tick(fleet.connection, 2, TickRequest(marks=[done.claims[0].email]))
    return fleet


async def row(fleet):
    return tuple(await fleet.connection.fetchrow("SELECT state, relay, attempt FROM outbox.delivery"))


@pytest.mark.parametrize("outcome", [TAKEN_BACK, LATER, DOUBT], ids=["withdrawn", "deferred", "in doubt"])
async def test_what_is_written_again_does_not_touch_another_relays_mark(marked_by_another, outcome):
    assert (await reassert_portion(marked_by_another.connection, [verdict(outcome)])).changed == 0
    assert await row(marked_by_another) == ("sending", 2, 1)


async def test_an_acceptance_that_is_written_again_counts_whoever_holds_the_mark(marked_by_another):
    await reassert_portion(marked_by_another.connection, [verdict(SENT)])
    assert await row(marked_by_another) == ("sent", 1, 1)


@pytest.mark.parametrize("outcome", [SENT, DOUBT], ids=["accepted", "in doubt"])
async def test_an_email_that_another_session_is_writing_again_is_told_too(fleet, database, outcome):
    """`generate` or the application makes anew what the failover lost, in a transaction that is still open."""
    writer, watch = await asyncpg.connect(database), await asyncpg.connect(database)
    transaction = fleet.connection.transaction()
    await transaction.start()
    await fleet.put_emails(1)
    writing = asyncio.ensure_future(reassert(writer, [verdict(outcome)], nullcontext))

    async def waits():
        pid = writer.get_server_pid()
        return bool(await watch.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))

    await until(waits, "it waits for the other session")
    await transaction.commit()
    done = await writing
    assert (list(done.emails), done.changed) == (["mail1"], 1)
    assert await row(fleet) == (outcome.state, 1, 1)
    await writer.close()
    await watch.close()


@pytest.mark.parametrize("outcome", [SENT, DOUBT], ids=["accepted", "in doubt"])
async def test_what_expired_while_nobody_knew_of_the_try_is_what_the_try_made_of_it(fleet, outcome):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'expired', settled_at = now(), send_before = now()"
    )
    assert (await reassert_portion(fleet.connection, [verdict(outcome)])).changed == 1
    assert await row(fleet) == (outcome.state, 1, 1)


async def test_what_expired_stays_so_when_a_try_was_taken_back(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'expired', settled_at = now(), send_before = now()"
    )
    assert (await reassert_portion(fleet.connection, [verdict(TAKEN_BACK)])).changed == 0
    assert await row(fleet) == ("expired", None, 0)


async def test_a_mark_of_ones_own_is_taken_back(fleet):
    await fleet.put_emails(1)
    done = await tick(fleet.connection, 1, TickRequest(claims_max=5))
    await tick(fleet.connection, 1, TickRequest(marks=[done.claims[0].email]))
    assert (await reassert_portion(fleet.connection, [verdict(TAKEN_BACK)])).changed == 1
    assert await row(fleet) == ("pending", None, 1)


async def test_an_email_that_is_gone_comes_back_as_sent_under_its_key(fleet):
    await reassert_portion(fleet.connection, [verdict(SENT)])
    await reassert_portion(fleet.connection, [verdict(SENT)])
    assert await row(fleet) == ("sent", 1, 1)
    assert await fleet.connection.fetchval("SELECT key FROM outbox.email") == "mail1"
    with pytest.raises(asyncpg.UniqueViolationError):
        await fleet.put_emails(1)


async def test_a_verdict_that_cannot_be_written_again_does_not_keep_back_the_others(fleet, caplog):
    await fleet.put_emails(3)
    await fleet.connection.execute(
        "ALTER TABLE outbox.delivery ADD CONSTRAINT test CHECK (email <> 2 OR state <> 'sent')"
    )
    verdicts = [verdict(SENT)._replace(key=f"mail{n}") for n in (1, 2, 3)]
    done = await reassert(fleet.connection, verdicts, nullcontext)
    assert (set(done.emails), done.changed) == ({"mail1", "mail3"}, 2)
    assert "mail2, attempt 1: the verdict 'accepted' cannot be written again: " in caplog.text


async def test_an_acceptance_counts_whatever_number_the_row_has_come_to(fleet):
    """On the server that lost it the same email was tried more often."""
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 3, withdrawn = 2")
    assert (await reassert_portion(fleet.connection, [verdict(SENT, attempt=1)])).changed == 1
    assert await row(fleet) == ("sent", 1, 3)


async def test_doubt_counts_whatever_number_the_row_has_come_to_and_its_answer_finds_it(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 3")
    done = await reassert_portion(fleet.connection, [verdict(DOUBT, attempt=1)])
    assert await row(fleet) == ("in_doubt", 1, 3)
    assert done.emails["mail1"].attempt == 3


async def test_a_doubt_that_a_person_has_decided_since_is_not_written_again(fleet):
    await fleet.put_emails(1)
    await reassert_portion(fleet.connection, [verdict(DOUBT)])
    await fleet.connection.execute("UPDATE outbox.delivery SET state = 'pending', doubted_at = NULL, relay = NULL")
    assert (await reassert_portion(fleet.connection, [verdict(DOUBT)])).changed == 0
    assert await row(fleet) == ("pending", None, 1)


async def test_an_acceptance_ends_the_doubt_that_another_servers_try_of_the_same_number_left(marked_by_another):
    await marked_by_another.connection.execute(
        "UPDATE outbox.delivery SET state = 'in_doubt', doubted_at = now(), due_at = 'infinity'"
    )
    settlement = Settlement(1, 1, "mail1", 1, marked=True, outcome=SENT)
    done = await tick(marked_by_another.connection, 9, TickRequest(settlements=[settlement]))
    assert done.settled == {(1, 1)}
    assert await row(marked_by_another) == ("sent", 1, 1)
