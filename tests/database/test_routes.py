"""Which email takes which route, and in what order a relay of a route takes them."""

import asyncpg
import pytest

from outbox.operations import route_rules
from outbox.relay.claiming import ClaimCursor, PriorityShare
from outbox.relay.lease_connection import PLANS
from outbox.relay.quarantine import Quarantine
from outbox.relay.registration import register
from outbox.relay.remaining import is_empty
from outbox.relay.sweep import Sweep, sweep
from outbox.relay.tick import TickRequest, tick
from outbox.settings import Settings

REPORT = {"link": "https://example.com/{token}", "recipients": "select 1", "data": "select :key"}


def settings_of(**routes):
    return Settings.model_validate(
        {
            "reports": {"progress": REPORT, "weekly": REPORT},
            "routes": {name: {"smtp_url": "smtp://mail:25", **rules} for name, rules in routes.items()},
        }
    )


SETTINGS = settings_of(
    partner={"domains": ["partner.example", "*.Partner.example"]},
    bulk={"reports": ["progress"], "domains": ["*.example.org"]},
    named={},
)


async def put(connection, count, *, route="", priority=0, report=None, recipient="p@example.com"):
    """Emails that are due, the first longest; gives their ids."""
    rows = await connection.fetch(
        """
        WITH made AS (
            INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
            SELECT gen_random_uuid(), $5, 'a@example.com', $4, '<' || n || '@x>', 'hello'
              FROM generate_series(1, $1) n RETURNING id
        )
        INSERT INTO outbox.delivery (email, due_at, route, priority)
        SELECT id, now() - interval '1 second' + row_number() OVER (ORDER BY id) * interval '1 microsecond', $2, $3
          FROM made RETURNING email
        """,
        count, route, priority, recipient, report,
    )  # fmt: skip
    return sorted(row["email"] for row in rows)


@pytest.fixture
async def relay(database):
    """A relay's session, and its id."""
    connected = await asyncpg.connect(database, server_settings=PLANS)
    yield connected, await register(connected, 1)
    await connected.close()


async def claim(relay, room, **how):
    return [one.email for one in (await tick(*relay, TickRequest(claims_max=room, **how))).claims]


@pytest.mark.parametrize(
    "report, recipient, route",
    [
        (None, "a@example.com", ""),
        ("weekly", "a@example.com", ""),
        ("progress", "a@example.com", "bulk"),
        ("progress", "a@partner.example", "partner"),
        (None, "a@PARTNER.Example", "partner"),
        (None, "a@mail.partner.example", "partner"),
        (None, "a@notpartner.example", ""),
        (None, "a@example.org", ""),
        (None, "a@b.c.example.org", "bulk"),
        (None, "partner.example@elsewhere.example", ""),
    ],
)
async def test_the_first_rule_that_fits_says_the_route_in_sql_and_in_a_preview(connection, report, recipient, route):
    await route_rules.write_rules(connection, SETTINGS)
    assert await connection.fetchval("SELECT outbox.route_of($1, $2)", report, recipient) == route
    assert route_rules.route_for(SETTINGS, report, recipient) == route


async def test_a_relay_claims_of_its_own_route_only_and_says_when_that_is_empty(connection, relay):
    usual, bulk = await put(connection, 2), await put(connection, 3, route="bulk")
    assert sorted(await claim(relay, 10, route="bulk")) == bulk
    assert await is_empty(connection, route="named")
    assert not await is_empty(connection, route="bulk")
    assert sorted(await claim(relay, 10)) == usual


async def test_a_dead_relay_of_another_route_is_judged_and_its_claims_wait_for_their_route(connection, relay, database):
    emails = await put(connection, 2, route="bulk")
    other = await asyncpg.connect(database)
    others = await register(other, 1, "bulk")
    await claim((other, others), 2, route="bulk")
    mine = await asyncpg.connect(database)
    await register(mine, 1, "bulk")
    assert await sweep(*relay, doubt_s=None, route="bulk", quarantine=Quarantine()) == Sweep([], alive=2, beside=2)
    await other.close()
    found = await sweep(*relay, doubt_s=None, quarantine=Quarantine())
    assert (found.dead, found.freed, found.alive, found.beside) == ([others], 2, 1, 0)
    assert await claim(relay, 2) == []
    assert sorted(await claim(relay, 2, route="bulk")) == emails
    await mine.close()


async def test_an_urgent_email_is_claimed_before_a_backlog_however_far_that_is_claimed(connection, relay):
    backlog = await put(connection, 10)
    first = await tick(*relay, TickRequest(claims_max=2))
    assert sorted(one.email for one in first.claims) == backlog[:2]
    (urgent,) = await put(connection, 1, priority=1)
    done = await tick(*relay, TickRequest(claims_max=2, since=first.reached, urgent_since=first.urgent_reached))
    assert sorted(one.email for one in done.claims) == [backlog[2], urgent]
    assert [one.email for one in done.claims if one.urgent] == [urgent]


async def test_a_long_transaction_s_urgent_email_is_found_within_the_overlap_and_then_by_the_look_for_all(
    connection, relay
):
    first = await tick(*relay, TickRequest(claims_max=2))
    (late,) = await put(connection, 1, priority=1)  # it has been due for a second by now
    await connection.execute("UPDATE outbox.delivery SET due_at = now() - interval '10 seconds'")
    assert await claim(relay, 2, urgent_since=first.urgent_reached) == []
    assert await claim(relay, 2) == [late]


@pytest.mark.parametrize("room", [1, 2, 5, 8])
async def test_of_four_that_are_claimed_while_both_wait_one_is_not_urgent(connection, relay, room):
    await put(connection, 50)
    await put(connection, 200, priority=1)
    turns, frontier, urgent_frontier, claims = PriorityShare(), ClaimCursor(), ClaimCursor(), []
    while len(claims) < 80:
        since, urgent_since = frontier.since(0.0), urgent_frontier.since(0.0)
        done = await tick(
            *relay,
            TickRequest(
                claims_max=room, since=since, urgent_since=urgent_since, urgent_max=(most := turns.urgent_max(room))
            ),
        )
        frontier.note(done.reached, since, 0.0)
        urgent_frontier.note(done.urgent_reached, urgent_since, 0.0)
        assert not turns.note(done.claims, room, most)
        claims += done.claims
    assert len({one.email for one in claims}) == len(claims)
    assert sum(one.urgent for one in claims) == pytest.approx(0.75 * len(claims), abs=1)


@pytest.mark.parametrize("room", [1, 8])
async def test_room_that_nobody_else_wants_is_offered_to_urgent_ones_at_once(connection, relay, room):
    urgent = await put(connection, 20, priority=1)
    turns, claimed, empty = PriorityShare(), [], 0
    while len(claimed) < len(urgent):
        done = await tick(*relay, TickRequest(claims_max=room, urgent_max=(most := turns.urgent_max(room))))
        again = turns.note(done.claims, room, most)
        empty += not done.claims
        assert again or len(done.claims) == room or len(claimed) + len(done.claims) == len(urgent)
        claimed += [one.email for one in done.claims]
    assert sorted(claimed) == urgent
    assert empty <= len(urgent) // 3


async def test_init_writes_the_rules_once_and_moves_what_waits_for_a_route_that_is_no_more(connection, relay):
    await connection.execute("""
        INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('progress', 'p', now(), 'infinity');
        INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES (1, 'k', 't', 't', 'h')""")
    before = settings_of(old={"reports": ["progress"]}, gone={})
    assert (await route_rules.write_rules(connection, before)).changed == "+ progress by old"
    held = await put(connection, 1, route="gone")
    assert await claim(relay, 1, route="gone") == held
    await put(connection, 1, route="old", report=1)
    await put(connection, 2, route="gone", priority=1)
    await put(connection, 1, route="named")
    await put(connection, 1, recipient="a@partner.example")
    found = {one.route: one.waiting for one in await route_rules.read_unserved(connection)}
    assert found == {"gone": 3, "named": 1, "old": 1}
    written = await route_rules.write_rules(connection, SETTINGS)
    assert "- progress by old" in str(written.changed)
    assert written.moved == {"bulk": 1, "": 2}
    rows = await connection.fetch("SELECT route, count(*) FROM outbox.delivery GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in rows] == [("", 3), ("bulk", 1), ("gone", 1), ("named", 1)], "what is held stays"
    again = await route_rules.write_rules(connection, SETTINGS)
    assert (again.changed, again.moved) == (None, {})
    assert await route_rules.difference(connection, SETTINGS) is None
    assert "- *.partner.example by partner" in str(await route_rules.difference(connection, settings_of()))
