"""Pauses and cancellations against relays at work, statement by statement: none is left behind, none is sent."""

import asyncio

import asyncpg
import pytest

from outbox.database.pause_list import FLEET, read_pauses
from outbox.operations.pause import begin_pause, end_pause
from outbox.operations.retry_cancel import Act, operate
from outbox.relay import pauses
from outbox.relay.expiry import expire
from outbox.relay.quarantine import Quarantine
from outbox.relay.tick import TickRequest, tick
from tests.support.fleet import until
from tests.support.living_relays import DOUBT, SENT, emptied, living_relay, living_relays, made_once, put, settlement  # noqa: F401 - fixtures

EDITIONS = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at)
SELECT r, '2026-W47', '2026-11-16', '2026-11-23' FROM unnest(ARRAY ['sales', 'stock']) r;
INSERT INTO outbox.report (edition, recipient_key, token, title, html) SELECT id, 'k', id, 't', 'h' FROM outbox.edition
"""


@pytest.fixture(scope="module")
def one_database(postgres_server):
    return made_once(postgres_server, "pauses", lambda connected: connected.execute(EDITIONS))


@pytest.fixture
async def database(one_database):
    """The URL of an outbox without emails and pauses, and with an edition of `sales` and one of `stock`."""
    connected = await asyncpg.connect(one_database)
    await connected.execute("TRUNCATE outbox.pause, outbox.operation")
    await connected.close()
    return await emptied(one_database)


async def put_of(connection, report, count):
    emails = await put(connection, count)
    await connection.execute(
        "UPDATE outbox.email SET report = (SELECT r.id FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition"
        " WHERE e.report = $1) WHERE id = ANY ($2::bigint[])",
        report,
        emails,
    )
    return emails


async def begin(connection, report):
    assert await begin_pause(connection, report, who="ann", why="wrong")


async def end(connection, report):
    assert await end_pause(connection, report, who="ann", why="")


async def rows(connection):
    found = await connection.fetch("SELECT email, state, paused, due_at = 'infinity', relay FROM outbox.delivery")
    return {email: tuple(rest) for email, *rest in found}


async def set_aside(one):
    claims = await one.claim(100)
    return await pauses.set_aside(one.connection, one.relay, [claim.email for claim in claims], Quarantine())


async def waits_for_a_row(connection, pid):
    async def waits():
        query = "SELECT wait_event IN ('transactionid', 'tuple') FROM pg_stat_activity WHERE pid = $1"
        return await connection.fetchval(query, pid)

    await until(waits, "it waits for the row")


async def test_only_unmarked_claims_of_a_paused_report_are_set_aside_and_a_tick_tells_what_is_paused(connection, relay):
    sales, stock = await put_of(connection, "sales", 2), await put_of(connection, "stock", 1)
    (none,) = await put(connection, 1)
    first = await relay.claim_and_mark()
    await begin(connection, "sales")
    await begin(connection, FLEET)
    done = await tick(relay.connection, relay.relay, TickRequest(claims_max=100))
    assert done.held == {"sales", ""}
    claims = [claim.email for claim in done.claims]
    assert await pauses.set_aside(relay.connection, relay.relay + 1, claims, Quarantine()) == frozenset(), (
        "they are another's"
    )
    assert await pauses.set_aside(relay.connection, relay.relay, [first.email, *claims], Quarantine()) == {sales[1]}
    assert await rows(connection) == {
        sales[0]: ("sending", None, False, relay.relay),
        sales[1]: ("pending", "sales", True, None),
        stock[0]: ("pending", None, False, relay.relay),
        none: ("pending", None, False, relay.relay),
    }


async def test_what_is_set_aside_while_its_pause_ends_is_taken_up(connection, relay, relays, database):
    (email,) = await put_of(connection, "sales", 1)
    await begin(connection, "sales")
    (claim,) = await relay.claim()
    holder = await asyncpg.connect(database)
    await holder.execute("BEGIN; SELECT FROM outbox.delivery FOR UPDATE")
    setting = asyncio.create_task(pauses.set_aside(relay.connection, relay.relay, [claim.email], Quarantine()))
    await waits_for_a_row(connection, relay.connection.get_server_pid())
    await end(connection, "sales")
    assert await pauses.take_up((await relays()).connection, Quarantine()) == 0, "there is nothing yet"
    await holder.close()
    assert await setting == {email}, "it saw the pause"
    assert (await rows(connection))[email][:3] == ("pending", "sales", True)
    assert await pauses.take_up(relay.connection, Quarantine()) == 1
    assert [claim.email for claim in await relay.claim()] == [email]


async def test_only_what_is_under_an_ended_pause_is_taken_up_and_by_one_relay(connection, relay, relays, database):
    sales, stock = await put_of(connection, "sales", 5), await put_of(connection, "stock", 5)
    for report in ("sales", "stock"):
        await begin(connection, report)
    assert await set_aside(relay) == {*sales, *stock}
    assert await pauses.take_up(relay.connection, Quarantine()) == 0
    await end(connection, "stock")
    holder = await asyncpg.connect(database)
    await holder.execute(f"BEGIN; SELECT FROM outbox.delivery WHERE email = {stock[0]} FOR UPDATE")
    some = [await relays() for _ in range(3)]
    async with asyncio.timeout(10):
        assert sum(await asyncio.gather(*(pauses.take_up(one.connection, Quarantine()) for one in some))) == 4, (
            "nobody waits"
        )
    await holder.close()
    assert await pauses.take_up(relay.connection, Quarantine()) == 1
    assert {claim.email for claim in await relay.claim(100)} == set(stock)
    assert not await pauses.is_held(connection), "what is claimed is still to be sent"


async def test_what_is_set_aside_expires_is_cancelled_and_is_sent_if_it_was_after_all(connection, relay):
    late, cancelled, arrived = await put_of(connection, "sales", 3)
    claims = {claim.email: claim for claim in await relay.claim(3)}
    await relay.mark(claims[arrived])
    await relay.settle(settlement(claims[arrived], DOUBT, attempt=1))
    await connection.execute(
        "UPDATE outbox.delivery SET state = 'pending', doubted_at = NULL, relay = NULL, due_at = now()"
    )
    await begin(connection, "sales")
    assert await set_aside(relay) == {late, cancelled, arrived}
    await connection.execute("UPDATE outbox.delivery SET send_before = now() WHERE email = $1", late)
    assert await expire(relay.connection, relay.relay, relay.quarantine) == 1
    assert await operate(connection, Act.CANCEL, [cancelled], who="a", why="", target="t") == [cancelled]
    await relay.settle(settlement(claims[arrived], SENT, attempt=1))
    found = await rows(connection)
    assert {email: (state, paused) for email, (state, paused, *_) in found.items()} == {
        late: ("expired", None),
        cancelled: ("cancelled", None),
        arrived: ("sent", None),
    }


async def test_a_late_acceptance_is_stronger_than_a_cancellation(connection, relay):
    """In doubt, put back by the policy, cancelled, and then its 250 comes after all: a retry must not send it twice."""
    (email,) = await put(connection, 1)
    claim = await relay.claim_and_mark()
    await relay.settle(settlement(claim, DOUBT, attempt=1))
    await connection.execute("UPDATE outbox.delivery SET state = 'pending', doubted_at = NULL, relay = NULL")
    assert await operate(connection, Act.CANCEL, [email], who="a", why="", target="t") == [email]
    assert await relay.settle(settlement(claim, SENT, attempt=1)) == {(email, 1)}
    assert await operate(connection, Act.RETRY, [email], who="a", why="", target="t") == []
    assert (await rows(connection))[email][0] == "sent"


async def test_of_a_cancellation_and_a_mark_at_once_the_first_has_the_row(connection, relay, database):
    first, second = await put(connection, 2)
    claims = await relay.claim(2)
    other = await asyncpg.connect(database)
    transaction = other.transaction(isolation="read_committed")
    await transaction.start()
    assert await operate(other, Act.CANCEL, [first], who="a", why="", target="t") == [first]
    marking = asyncio.create_task(tick(relay.connection, relay.relay, TickRequest(marks=[c.email for c in claims])))
    await waits_for_a_row(connection, relay.connection.get_server_pid())
    await transaction.commit()
    assert (await marking).marked == {second: 1}, "what is cancelled is not marked, and all else is"
    assert await operate(other, Act.CANCEL, [second], who="a", why="", target="t") == []
    await other.close()
    assert {email: row[0] for email, row in (await rows(connection)).items()} == {first: "cancelled", second: "sending"}


async def test_a_retry_takes_nothing_from_a_relay_that_claims_it_at_this_moment(connection, relay, database):
    (email,) = await put(connection, 1)
    await connection.execute("UPDATE outbox.delivery SET due_at = now() + interval '1 hour'")
    other = await asyncpg.connect(database)
    await other.execute(f"BEGIN; UPDATE outbox.delivery SET relay = {relay.relay}, due_at = now()")
    retrying = asyncio.create_task(operate(connection, Act.RETRY, [email], who="a", why="", target="t"))
    await waits_for_a_row(other, connection.get_server_pid())
    await other.execute("COMMIT")
    await other.close()
    assert await retrying == []
    assert (await rows(connection))[email][-1] == relay.relay


async def test_nothing_is_left_but_what_is_held_only_where_nothing_else_is_open(connection, relay):
    await put_of(connection, "sales", 1)
    await begin(connection, "sales")
    assert not await pauses.is_held(connection), "it is not set aside yet"
    await set_aside(relay)
    assert await pauses.is_held(connection)
    (other,) = await put(connection, 1)
    await connection.execute("UPDATE outbox.delivery SET due_at = now() + interval '1 day' WHERE email = $1", other)
    assert not await pauses.is_held(connection), "that one is due some day"
    await begin(connection, FLEET)
    assert await pauses.is_held(connection)
    await end(connection, FLEET)
    await operate(connection, Act.CANCEL, [other], who="a", why="", target="t")
    await end(connection, "sales")
    assert not await pauses.is_held(connection), "it is to be taken up"


async def test_what_waits_under_a_pause_is_counted_to_a_bound_set_aside_or_not(connection, relay):
    emails = await put_of(connection, "sales", 5)
    await put_of(connection, "stock", 2)
    await begin(connection, "sales")
    await connection.execute("UPDATE outbox.delivery SET relay = $1 WHERE email = ANY ($2)", relay.relay, emails[:2])
    assert len(await pauses.set_aside(connection, relay.relay, emails[:2], Quarantine())) == 2
    assert [one.waiting for one in await read_pauses(connection)] == [5]
    await begin(connection, "")
    assert [one.waiting for one in await read_pauses(connection)] == [7, 5]
    assert [one.waiting for one in await read_pauses(connection, waiting_max=1)] == [1, 2]
    assert [one.waiting for one in await read_pauses(connection, waiting_max=0)] == [0, 0]
