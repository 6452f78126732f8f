"""The way to the mail server is in trouble: the whole fleet pauses, one relay tries, and all go on together."""

import asyncio
import json
import os
import shutil
import subprocess
import time

import pytest

from bench.harness.fault_proxy import Proxy
from outbox.sandbox.smtp_sink import Reply, Stage, Stall
from tests.support.fault_levers import SLOW, At, all_sent, delivery, post, status
from tests.support.fleet import until
from tests.support.scripted_smtp import Scripted

QUOTA = Reply("454 4.7.0 quota exceeded")
BUSY = Reply("421 4.3.2 too many connections", then_cut=True)


async def route(fleet):
    return await fleet.connection.fetchrow("SELECT * FROM outbox.route")


async def test_a_server_that_is_gone_pauses_the_fleet_and_burns_no_try(fleet):
    """Four relays find it out at once; afterwards one of them tries at a time, and status says since when and why."""
    fleet.top = SLOW
    visits = []
    trouble = At(Stage.CONNECT, BUSY, when=lambda _: visits.append(time.monotonic()) or True)
    fleet.sink.script = trouble
    for _ in range(4):
        await fleet.relay()
    await post(fleet, 20)
    await until(lambda: route(fleet), "the fleet knows")
    await asyncio.sleep(6)
    quiet = [at for at in visits if at > visits[0] + 2]
    assert 1 <= len(quiet) <= 4, "one relay at a time, with pauses"
    shown = await status(fleet)
    (told,) = shown["routes"]
    assert "421 4.3.2 too many connections" in told["reason"]
    assert told["since"]
    assert all("421" in relay["trouble"] for relay in shown["relays"] if relay["trouble"])
    trouble.on = False
    back = time.monotonic()
    await all_sent(fleet, 20)
    assert time.monotonic() - back < 5 + 2, "found within five seconds, and sent"
    assert await route(fleet) is None
    assert (await delivery(fleet))["tries"] == 1


async def test_a_relay_that_starts_during_the_pause_does_not_bother_the_server(fleet):
    fleet.top = SLOW
    until_at = await fleet.connection.fetchval(
        "INSERT INTO outbox.route (name, reason, retry_at) VALUES ($1, 'it was refused', now() + interval '3.9 s')"
        " RETURNING extract(epoch FROM retry_at)::float8",
        fleet.sink.url.removeprefix("smtp://"),
    )
    fleet.sink.script = At(Stage.CONNECT, BUSY, times=0)  # so that visits are written down
    await fleet.put_emails(5)
    relay = await fleet.relay()
    await relay.says("is paused: it was refused")
    await all_sent(fleet, 5)
    assert min(at for at, _, _ in fleet.sink.events) >= until_at


async def test_a_quota_pauses_the_route_at_once_and_counts_for_nobody(fleet):
    fleet.top = SLOW
    script = At(Stage.MAIL, QUOTA, times=3)
    fleet.sink.script = script
    await fleet.put_emails(10)
    await fleet.relay()
    await script.reached(1)
    await until(lambda: route(fleet), "the fleet knows")
    await all_sent(fleet, 10)
    rows = await fleet.connection.fetch("SELECT attempt - withdrawn AS tries FROM outbox.delivery")
    assert {row["tries"] for row in rows} == {1}


async def test_a_quota_at_the_dot_is_not_held_against_the_message(fleet):
    fleet.top = SLOW + "\nconnections_max = 1"
    fleet.sink.script = At(Stage.DOT, QUOTA, times=2)
    await fleet.put_emails(3)
    await fleet.relay()
    await all_sent(fleet, 3)
    rows = await fleet.connection.fetch("SELECT attempt - withdrawn AS tries FROM outbox.delivery")
    assert {row["tries"] for row in rows} == {1}
    assert fleet.twice == {}


async def test_a_host_that_cannot_reach_a_working_server_does_not_stop_the_others(fleet):
    """One relay's own network is broken; the others' connections stand and go on."""
    fleet.top = SLOW
    host, port = fleet.sink.url.removeprefix("smtp://").rsplit(":", 1)
    async with Proxy((host, int(port))) as broken:
        broken.refuse = True
        await fleet.relay(environment={"OUTBOX_SMTP_URL": f"smtp://127.0.0.1:{broken.port}"})
        await fleet.relay()
        for first in range(1, 400, 40):
            await post(fleet, 40, first=first)
            await asyncio.sleep(0.1)
        await all_sent(fleet, 400)
    assert fleet.twice == {}


async def test_a_connection_that_hangs_does_not_keep_the_fleet_from_trying_the_server(fleet):
    """One dot is never answered, the server takes no more connections for a while, and then it does."""
    fleet.top = SLOW + "\nconnections_max = 4\nidle_s = 0.3"
    dot = At(Stage.DOT, Stall(), times=1)
    fleet.sink.script = dot
    await fleet.put_emails(1)
    await fleet.relay()
    await dot.reached()
    await fleet.sink.close_listener()
    await post(fleet, 5, first=2)
    await until(lambda: route(fleet), "the fleet knows")
    await fleet.sink.reopen()
    await until(lambda: len(fleet.sink.accepted) == 5, "the others are sent", 15)


async def test_a_relay_that_died_while_it_probed_is_followed_by_another(fleet):
    fleet.top = SLOW
    await fleet.put_emails(5)
    await fleet.connection.execute(
        "INSERT INTO outbox.route (name, reason, relay, retry_at)"
        " VALUES ($1, 'it was refused', 1000, now() + interval '4 seconds')",
        fleet.sink.url.removeprefix("smtp://"),
    )
    await fleet.relay()
    await all_sent(fleet, 5)
    assert await route(fleet) is None


async def test_status_for_people_names_the_trouble(fleet):
    await fleet.connection.execute(
        "INSERT INTO outbox.route (name, reason, retry_at) VALUES ('mx:25', 'mx:25: connection refused', now())"
    )
    ended = await fleet.run("status")
    assert "mx:25" in ended.out
    assert "connection refused" in ended.out
    assert json.loads((await fleet.run("status", "--json")).out)["routes"][0]["name"] == "mx:25"


async def pause(fleet, retry_at):
    await fleet.connection.execute(
        f"INSERT INTO outbox.route (name, reason, since, retry_at) VALUES ($1, 'it was refused', now(), {retry_at})",
        fleet.sink.url.removeprefix("smtp://"),
    )


async def test_a_server_that_is_back_is_found_although_nothing_is_due(fleet):
    """Else the first mail of next Monday finds the route paused, and status tells of trouble all week."""
    fleet.top = SLOW
    fleet.sink.script = trouble = At(Stage.CONNECT, BUSY)
    await fleet.relay()
    await pause(fleet, "now()")
    await trouble.reached(2)
    assert (await route(fleet))["failures"] > 1
    trouble.on = False

    async def works():
        return await route(fleet) is None

    await until(works, "the fleet knows", 5 + 2)
    assert len(fleet.sink.accepted) == 0


async def test_mail_that_is_only_put_off_keeps_its_server_in_trouble(fleet):
    """That the server says EHLO proves nothing while there is mail to prove it with."""
    fleet.top = SLOW + "\nconnections_max = 1"
    fleet.sink.script = trouble = At(Stage.MAIL, BUSY)
    await fleet.put_emails(1)
    await fleet.relay()
    await until(lambda: route(fleet), "the fleet knows")
    since = (await route(fleet))["since"]
    await trouble.reached(4)
    assert (await route(fleet))["since"] == since
    trouble.on = False
    await all_sent(fleet, 1)


async def test_a_pause_from_before_the_servers_clock_was_set_back_is_no_pause(fleet):
    fleet.top = SLOW
    await pause(fleet, "now() + interval '1 hour'")
    await fleet.put_emails(5)
    await fleet.relay()
    await all_sent(fleet, 5)
    assert await route(fleet) is None


async def test_a_pause_that_no_relay_cares_for_any_more_is_not_told(fleet):
    await pause(fleet, "now() - interval '2 minutes'")
    assert (await status(fleet))["routes"] == []


def cannot_mount():
    """Why no process here can have a hosts file of its own; None if it can."""
    if os.geteuid() or shutil.which("unshare") is None:
        return "a hosts file of one's own needs root and the command `unshare`"
    probe = subprocess.run(["unshare", "-m", "mount", "--bind", "/etc/hosts", "/etc/hosts"], check=False)
    return "the kernel makes no mount namespace" if probe.returncode else None


async def takes_it_and_says_nothing(peer):
    await peer.silence()


async def refuses_it(peer):
    await peer.say("421 4.3.2 too many connections")


@pytest.mark.parametrize("first", [takes_it_and_says_nothing, refuses_it], ids=["silent", "421"])
async def test_a_name_whose_first_address_cannot_be_used_gets_its_mail_by_the_second(fleet, first):
    """As the resolver orders them: IPv6 first, which goes nowhere."""
    if reason := cannot_mount():
        pytest.skip(reason)
    fleet.top = "connect_timeout_s = 10"
    hosts = fleet.directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n::1 mx.example\n127.0.0.1 mx.example\n")
    own_hosts = ("unshare", "-m", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
    async with Scripted(first, host="::1", port=fleet.sink.port) as bad:
        fleet.smtp = f"smtp://mx.example:{fleet.sink.port}"
        await fleet.put_emails(5)
        relay = await fleet.start("relay", within=own_hosts)
        await relay.says("holds its lock")
        await all_sent(fleet, 5, 30)
        assert bad.visits
        doctor = await (await fleet.start("doctor", "--json", within=own_hosts)).ended(60)
        lines = {line["check"]: line for line in json.loads(doctor.out)["checks"]}
        found = lines["smtp.server"]["found"]
        assert lines["smtp.server"]["grade"] == "note"
        assert "answers at 127.0.0.1, and not at every address: [::1]: " in found
        assert ("no answer within" if first is takes_it_and_says_nothing else "421 4.3.2 too many connections") in found
        assert lines["smtp.sender"]["grade"] == "ok"
