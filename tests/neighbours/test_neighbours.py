"""Relays with default settings against mail servers with theirs."""

import asyncio
import json
import os
import random
from dataclasses import dataclass

import pytest

from tests.neighbours.conftest import needs
from tests.neighbours.mail import assert_once_and_whole, people, post
from tests.neighbours.neighbour import Neighbour
from tests.neighbours.servers import Aiosmtpd, Exim, Haraka, OpenSmtpd, Postfix, SmtpServer
from tests.neighbours.wire import wire
from tests.support.fault_levers import recipients, status
from tests.support.fleet import until
from tests.support.kill_storm import storm

CONNECTIONS_MAX = 16  # of a relay, by default

DEFAULTS = """
database_url = "{database}"
smtp_url = "{smtp}"
sender = "Progress reports <reports@example.com>"
{more}
"""


def defaults(fleet, server, more=""):
    fleet.settings = DEFAULTS.format(database=fleet.database, smtp=server.url, more=more)


async def settled(fleet, server, deadline_s, dead=0):
    """Wait until every email is sent or in doubt; on the way there are no more than `dead` dead letters."""

    async def is_so():
        states = await fleet.states()
        assert states.get("dead", 0) <= dead, await trouble(fleet)
        return not {"pending", "sending"} & set(states)

    try:
        await until(is_so, "every email is settled", deadline_s)
    except AssertionError as late:
        raise AssertionError(f"{late}: {await trouble(fleet)}\n{server.log()}") from late


async def trouble(fleet):
    """Return what the database knows of emails that are not sent, and the relays' logs."""
    replies = await fleet.connection.fetch(
        "SELECT verdict, reply, count(*) AS n FROM outbox.attempt WHERE verdict <> 'accepted' GROUP BY 1, 2 ORDER BY 3"
    )
    logs = "".join(line for process in fleet.processes for line in process.log[-10:])
    return f"{await fleet.states()}\n{[tuple(row) for row in replies]}\n{logs}"


async def test_each_email_arrives_once_with_its_bytes_and_at_the_first_try(fleet, kind):
    count = 300
    async with kind.running() as server:
        defaults(fleet, server)
        await post(fleet, people(count))
        for _ in range(2):
            await fleet.start("relay")
        await settled(fleet, server, 60)
        assert await assert_once_and_whole(fleet, await server.delivered(), count) == 0
    assert await fleet.connection.fetch("SELECT FROM outbox.attempt WHERE verdict <> 'accepted'") == []
    assert (await status(fleet))["troubles"] == []


@pytest.mark.parametrize(("count", "kills"), [(150, 4), pytest.param(900, 25, marks=pytest.mark.slow)])
async def test_no_email_of_a_killed_relay_arrives_twice_and_each_that_misses_is_in_doubt(fleet, kind, count, kills):
    connections = 4
    seed = int(os.environ.get("STORM_SEED", random.randrange(10**6)))
    print(f"STORM_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
    async with kind.running() as server:
        # Slow enough for kills between the emails.
        defaults(fleet, server, f'connections_max = {connections}\nrate = "100/s"')
        await post(fleet, people(count))
        await storm(fleet, random.Random(seed), relays=3, kills=kills)
        await settled(fleet, server, 60)
        in_doubt = await assert_once_and_whole(fleet, await server.delivered(), count)
    assert in_doubt <= kills * connections


@pytest.mark.parametrize("ending", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("count", "ends"), [(150, 1), pytest.param(900, 6, marks=pytest.mark.slow)])
async def test_a_server_that_ends_and_starts_again_has_each_email_once_or_it_is_in_doubt(
    fleet, kind, count, ends, ending
):
    async with kind.running() as server:
        defaults(fleet, server, 'rate = "100/s"')
        await post(fleet, people(count))
        for _ in range(2):
            await fleet.start("relay")
        for end in range(ends):
            await sent(fleet, 50 + 100 * end)
            await (server.stop() if ending == "stop" else server.kill())
            await server.start()
        await settled(fleet, server, 120)
        in_doubt = await assert_once_and_whole(fleet, await server.delivered(), count)
    assert in_doubt <= ends * 2 * CONNECTIONS_MAX


async def sent(fleet, sent_min):
    async def is_so():
        return (await fleet.states()).get("sent", 0) >= sent_min

    await until(is_so, f"{sent_min} are sent", 60)


async def test_only_unknown_recipients_are_refused_and_the_others_of_that_connection_get_their_mail(fleet, kind):
    """A refused recipient costs an RSET, and servers count those, errors, and what a session does altogether."""
    count, in_a_row = 60, 12
    options = "smtpd_error_sleep_time = 0" if kind is Postfix else ""  # a pause is no refusal, and the test's time
    async with kind.running(options) as server, wire(server) as between:
        defaults(fleet, between, "connections_max = 1")
        unknown = [(f"unknown+{number}@example.com", number) for number in range(count + in_a_row)]
        in_turns = [email for pair in zip(people(count), unknown, strict=False) for email in pair]
        await post(fleet, in_turns + unknown[count:])
        await fleet.start("relay")
        dead = len(unknown)
        await settled(fleet, server, 60, dead=dead)
        assert await fleet.states() == {"sent": count, "dead": dead}, await trouble(fleet)
        assert await assert_once_and_whole(fleet, await server.delivered(), count) == 0
    assert all(address.startswith("unknown") for address in await recipients(fleet, "dead"))
    assert {address: n for address, n in (await tries(fleet)).items() if n > 1} == {}, between.refusals


async def tries(fleet):
    """Return how many tries each recipient's email was charged with."""
    rows = await fleet.connection.fetch(
        "SELECT m.recipient, d.attempt - d.withdrawn AS n FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email"
    )
    return {row["recipient"]: row["n"] for row in rows}


@dataclass
class Limit:
    """A limit of a server: its option, our settings, how many emails meet it, and what the server says then."""

    kind: type[Neighbour]
    says: str
    options: str = ""
    more: str = ""
    count: int = 300
    relays: int = 2


def calls_max(command, count):
    return json.dumps({"command_call_limit": {command: count, "*": 1000}})


LIMITS = {
    "exim's 20 connections": Limit(Exim, "421 Too many concurrent SMTP connections", count=900),
    "opensmtpd's 100 messages in a session": Limit(
        OpenSmtpd, "452 4.5.3 Too many recipients: Too many messages sent", more="connections_max = 1", relays=1
    ),
    "postfix, 60 messages a second": Limit(
        Postfix, "450 4.7.1 ", "smtpd_client_message_rate_limit = 60\nanvil_rate_time_unit = 1s"
    ),
    "haraka, 3 connections": Limit(Haraka, "421 ", "[concurrency]\nenabled=true\nmax=3\n"),
    "smtp-server, 3 connections": Limit(SmtpServer, "421 ", '{"maxClients": 3}'),
    "aiosmtpd, 25 MAIL in a session": Limit(Aiosmtpd, "421 4.7.0 MAIL", calls_max("MAIL", 25), "connections_max = 2"),
}
MORE_LIMITS = {
    "exim, 10 messages in a connection": Limit(Exim, "421 ", "smtp_accept_max_per_connection = 10"),
    "opensmtpd with defaults on both sides": Limit(OpenSmtpd, "452 4.5.3 ", count=4000),
    "postfix, 4 connections": Limit(Postfix, "421 4.7.0 ", "smtpd_client_connection_count_limit = 4"),
    "postfix, 60 recipients a second": Limit(
        Postfix, "450 4.7.1 ", "smtpd_client_recipient_rate_limit = 60\nanvil_rate_time_unit = 1s", count=600
    ),
    "postfix, 10 connects a second": Limit(
        Postfix, "421 4.7.0 ", "smtpd_client_connection_rate_limit = 10\nanvil_rate_time_unit = 1s"
    ),
    "postfix, 5 processes": Limit(Postfix, "", "default_process_limit = 5"),
    "haraka, 100 recipients in 2 s": Limit(Haraka, "450 ", "[rate_rcpt_sender]\nenabled=true\ndefault=100/2s\n"),
    "haraka, 5 connects in 2 s": Limit(Haraka, "421 ", "[rate_conn]\nenabled=true\n127=5/2s\ndefault=5/2s\n"),
    "aiosmtpd, 25 RCPT in a session": Limit(Aiosmtpd, "421 4.7.0 RCPT", calls_max("RCPT", 25), "connections_max = 2"),
    "aiosmtpd, 1 MAIL in a session": Limit(Aiosmtpd, "421 4.7.0 MAIL", calls_max("MAIL", 1), "connections_max = 2"),
}


@pytest.mark.parametrize(
    "limit",
    [pytest.param(limit, id=name) for name, limit in LIMITS.items()]
    + [pytest.param(limit, id=name, marks=pytest.mark.slow) for name, limit in MORE_LIMITS.items()],
)
async def test_a_limit_of_the_server_costs_no_email_a_try_and_each_arrives_once(fleet, limit):
    needs(limit.kind)
    async with limit.kind.running(limit.options) as server, wire(server) as between:
        defaults(fleet, between, limit.more)
        await post(fleet, people(limit.count))
        for _ in range(limit.relays):
            await fleet.start("relay")
        try:
            await settled(fleet, server, 180 + limit.count / 40)
            assert await assert_once_and_whole(fleet, await server.delivered(), limit.count) == 0
            assert {address: n for address, n in (await tries(fleet)).items() if n > 1} == {}
        finally:
            print(f"{between.connections} connections, {between.open_max} at once, {between.refusals}")  # noqa: T201
    assert not limit.says or any(limit.says in reply for reply in between.refusals), "the limit was not met"
    # All connections are opened at once, before the first reply says that they are too many.
    assert between.asks_to_slow_down <= limit.relays * CONNECTIONS_MAX + limit.count // 10


IDLE = {
    "exim": (Exim, "smtp_receive_timeout = 1s"),
    "postfix": (Postfix, "smtpd_timeout = 1s"),
    "smtp-server": (SmtpServer, '{"socketTimeout": 1000}'),
    "aiosmtpd": (Aiosmtpd, '{"timeout": 1}'),
}


@pytest.mark.parametrize(("kind", "options"), IDLE.values(), ids=IDLE)
async def test_a_server_that_closes_idle_connections_before_us_costs_no_email_a_try(fleet, kind, options):
    needs(kind)
    dice = random.Random(1)
    count = 12
    async with kind.running(options) as server, wire(server) as between:
        defaults(fleet, between)
        await fleet.relay()
        for email in people(count):
            await post(fleet, [email])
            await asyncio.sleep(dice.uniform(0.8, 1.2))  # the server's timeout is met before, at and after it
        await settled(fleet, server, 20)
        assert await assert_once_and_whole(fleet, await server.delivered(), count) == 0
    assert between.connections > 1, "the server closed none"
    assert {address: n for address, n in (await tries(fleet)).items() if n > 1} == {}


POSTSCREEN = """
postscreen_access_list =
postscreen_greet_wait = 1s
postscreen_pipelining_enable = yes
postscreen_non_smtp_command_enable = yes
postscreen_bare_newline_enable = yes
"""


async def test_postscreen_defers_a_whole_session_of_a_new_client_and_no_email_pays_for_it(fleet):
    """After its deep tests it answers every RCPT of that session with 450 4.3.2, and lets the next one in."""
    needs(Postfix)
    count = 100
    async with Postfix.running(POSTSCREEN) as server, wire(server) as between:
        defaults(fleet, between, "connections_max = 4")
        await post(fleet, people(count))
        await fleet.start("relay")
        try:
            await settled(fleet, server, 60)
        finally:
            print(f"{between.connections} connections, {between.open_max} at once, {between.refusals}")  # noqa: T201
        assert await assert_once_and_whole(fleet, await server.delivered(), count) == 0
    assert any(reply.startswith("450 4.3.2") for reply in between.refusals)
    assert {address: n for address, n in (await tries(fleet)).items() if n > 1} == {}


async def test_a_server_without_disk_space_costs_no_email_a_try(fleet):
    needs(Postfix)
    count = 50
    async with Postfix.running("queue_minfree = 1000000000000000") as server, wire(server) as between:
        defaults(fleet, between)
        await post(fleet, people(count))
        await fleet.start("relay")
        full = "452 4.3.1 Insufficient system storage"
        await until(lambda: any(full in reply for reply in between.refusals), "the server has refused mail")
        await server.stop()
        conf = server.base / "etc/main.cf"
        conf.write_text(conf.read_text().replace("queue_minfree = 1", "#"))
        await server.start()
        await settled(fleet, server, 60)
        assert await assert_once_and_whole(fleet, await server.delivered(), count) == 0
    assert {address: n for address, n in (await tries(fleet)).items() if n > 1} == {}
