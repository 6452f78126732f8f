"""Several routes in one `outbox relay`: each email takes its own, and none is in another's way. Real processes."""

import asyncio
import json
import re
import signal

import pytest

from outbox.sandbox.smtp_sink import Sink
from tests.acceptance.test_http import asked, measured, place_of
from tests.support.fleet import until

ROUTES = """
[routes.bulk]
smtp_url = "{bulk}"
rate = "{rate}"
reports = ["progress"]
[routes.partner]
smtp_url = "{partner}"
domains = ["partner.example", "*.partner.example"]
[routes.named]
smtp_url = "{bulk}"
"""
ENQUEUE = """SELECT outbox.enqueue(key => $1, sender => 'a@example.com', recipient => $2, body_text => 'hello',
                                   priority => $3, route => $4)"""


@pytest.fixture
async def bulk():
    async with Sink() as server:
        yield server


@pytest.fixture
async def partner():
    async with Sink() as server:
        yield server


async def initialised(fleet, routes):
    fleet.report = routes
    ended = await fleet.run("init")
    assert (ended.code, ended.err) == (0, "")
    return ended.out


async def enqueue(fleet, key, recipient, priority="normal", route=None):
    assert await fleet.connection.fetchval(ENQUEUE, key, recipient, priority, route)


async def test_each_email_takes_the_route_that_rules_or_whoever_put_it_in_say(fleet, bulk, partner):
    said = await initialised(fleet, ROUTES.format(bulk=bulk.url, partner=partner.url, rate="1000/s"))
    assert "(+ progress by bulk, + partner.example by partner, + *.partner.example by partner)" in said
    await fleet.hire(3)
    assert (await fleet.run("generate", "--period", "2026-W47")).code == 0
    await enqueue(fleet, "a", "a@example.com")
    await enqueue(fleet, "b", "b@mail.partner.example", "urgent")
    await enqueue(fleet, "c", "c@partner.example", route="")
    await enqueue(fleet, "d", "d@example.com", route="named")
    shown = await fleet.run("show", "b")
    assert "route        partner" in shown.out
    assert "priority     urgent" in shown.out
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0, ended.err
    assert sorted(fleet.sink.addresses) == ["a@example.com", "c@partner.example"]
    assert sorted(partner.addresses) == ["b@mail.partner.example"]
    assert sorted(bulk.addresses) == ["d@example.com", *(f"p{n}@example.com" for n in (1, 2, 3))]


async def test_a_dead_server_and_a_low_rate_hold_up_the_mail_of_their_own_routes_only(fleet, bulk):
    await initialised(fleet, ROUTES.format(bulk=bulk.url, partner="smtp://127.0.0.1:9", rate="5/s"))
    await enqueue(fleet, "dead", "a@partner.example")
    for n in range(30):
        await enqueue(fleet, f"slow{n}", f"slow{n}@example.com", route="bulk")
    process = await fleet.start("relay", "--http", "127.0.0.1:0")
    await process.says("SMTP is in trouble")
    await until(lambda: bulk.addresses, "the slow route has begun")
    await fleet.put_emails(300)
    await enqueue(fleet, "urgent", "urgent@example.com", "urgent", "bulk")
    await until(lambda: len(fleet.sink.addresses) == 300, "the usual route's mail is sent")
    assert bulk.addresses.total() < 30, "meanwhile the slow route keeps its rate"
    await until(lambda: "urgent@example.com" in bulk.addresses, "the urgent one is sent")
    assert bulk.addresses.total() < 30, "before most that were there"
    found = json.loads((await fleet.run("status", "--json")).out)
    assert sorted(relay["route"] for relay in found["relays"]) == ["", "bulk", "named", "partner"]
    assert [route["name"] for route in found["routes"]] == ["partner"]
    assert found["unserved"] == []
    assert re.search(r"relay +route +host", (await fleet.run("status")).out)
    place = await place_of(process)
    numbers = await measured(place)
    ready = {route: numbers["outbox_relay_ready", route] for route in ("", "bulk", "named", "partner")}
    assert ready == {"": 1, "bulk": 1, "named": 1, "partner": 0}
    assert numbers["outbox_emails_settled_total", "", "accepted"] == 300
    assert numbers["outbox_relays",] == 4
    assert (await asked(f"{place}/livez"))[0] == 200
    status, reasons = await asked(f"{place}/readyz")
    assert status == 503
    assert '"reasons": ["route partner: SMTP: 127.0.0.1:9: ' in reasons
    paces = await fleet.connection.fetch("SELECT route FROM outbox.pace")
    assert [row["route"] for row in paces] == ["bulk"], "not by its server, which another route leads to"
    process.send(signal.SIGTERM)
    assert (await process.ended()).code == 0
    await until(lambda: _none_held(fleet), "nothing is held any more")


async def _serving(fleet, relays):
    routes = await fleet.connection.fetch("SELECT route FROM outbox.relay WHERE ended_at IS NULL")
    return len(routes) == len(set(routes)) == relays


async def _none_held(fleet):
    return not await fleet.connection.fetchval(
        "SELECT count(*) FROM outbox.delivery WHERE settled_at IS NULL AND (relay IS NOT NULL OR state <> 'pending')"
    )


async def test_a_process_whose_sessions_are_all_ended_goes_on_with_each_route(fleet, bulk, partner):
    await initialised(fleet, ROUTES.format(bulk=bulk.url, partner=partner.url, rate="1000/s"))
    process = await fleet.start("relay")
    await until(lambda: sum("holds its lock" in line for line in process.log) == 4, "each has its session")
    for n in range(200):
        await enqueue(fleet, f"n{n}", f"n{n}@example.com", route=("", "bulk", "partner", "named")[n % 4])
    await until(lambda: fleet.sink.addresses and bulk.addresses and partner.addresses, "each sends")
    await fleet.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox relay'"
    )
    assert await fleet.settled() == {"sent": 200}
    assert (fleet.sink.addresses + bulk.addresses + partner.addresses).most_common(1)[0][1] == 1
    await until(lambda: _serving(fleet, 4), "each has a new session, and the former ones are judged")


async def test_what_waits_where_nobody_relays_and_rules_that_differ_are_named_with_their_mend(fleet, bulk, partner):
    routes = ROUTES.format(bulk=bulk.url, partner=partner.url, rate="1000/s")
    await initialised(fleet, routes)
    await enqueue(fleet, "b", "b@partner.example")
    fleet.report = ""
    process = await fleet.start("relay")
    await process.says("1 emails wait for route partner, which no living relay serves")
    await process.says("run `outbox init` with the settings that are right")
    assert "\n1 emails wait for route partner" in (await fleet.run("status")).out
    doctor = (await fleet.run("doctor")).out
    assert "which no living relay serves" in doctor
    assert "fault    rules" in doctor
    process.send(signal.SIGTERM)
    await process.ended()
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("outbox: 1 emails wait for route partner")
    assert "1 emails that waited for a route that is no more take the usual route now." in await initialised(fleet, "")
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert sorted(fleet.sink.addresses) == ["b@partner.example"]


async def test_a_route_can_be_tried_out_and_looked_at(fleet, bulk):
    await fleet.hire(1)
    await initialised(fleet, ROUTES.format(bulk=bulk.url, partner="smtp://127.0.0.1:9", rate="1000/s"))
    tried, unknown, doctor, shown = await asyncio.gather(
        fleet.run("test-send", "me@example.com", "--route", "bulk"),
        fleet.run("test-send", "me@example.com", "--route", "bulky"),
        fleet.run("doctor"),
        fleet.run("preview", "progress", "--json"),
    )
    assert tried.code == 0, tried.err
    assert sorted(bulk.addresses) == ["me@example.com"]
    assert unknown.code == 2
    assert unknown.sentences == [
        "routes.bulky: is not configured; write one of bulk, partner, named (did you mean bulk?)."
    ]
    assert "fault    partner.smtp.server" in doctor.out
    assert "ok       bulk.smtp.server" in doctor.out
    assert json.loads(shown.out)["route"] == "bulk"
