"""`outbox relay --http`: what is measured, and who lives and is ready. Alerts and dashboard name what there is."""

import asyncio
import contextlib
import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import asyncpg
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from outbox.monitoring import health
from outbox.monitoring.endpoints import Endpoints
from outbox.monitoring.fleet import FleetReader
from outbox.monitoring.health import Health
from outbox.monitoring.systemd import Notifier
from outbox.relay.supervisor import Relays
from outbox.sandbox.smtp_sink import Reply, Stage
from outbox.settings import Settings
from tests.support.fault_levers import At, all_sent, post, terminate_session
from tests.support.fleet import until

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"


def get(url, method="GET"):
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request, timeout=15) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def asked(url, method="GET"):
    return await asyncio.to_thread(get, url, method)


async def measured(place):
    """Every sample at /metrics, by its name and labels."""
    status, text = await asked(f"{place}/metrics")
    assert status == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def place_of(relay):
    await relay.says("http_listening")
    (line,) = [line for line in relay.log if "http_listening" in line]
    return "http://" + json.loads(line)["place"]


def expressions():
    """Every PromQL expression of the examples."""
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule
            assert rule["annotations"]["summary"]
            yield rule["expr"]
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "5m")


def names_in(expression):
    """The metrics that an expression asks for; it must parse."""
    promql_parser.parse(expression)
    return set(re.findall(r"\b(?:outbox|process)_\w+", expression))


async def test_what_is_measured_is_what_was_sent_and_the_examples_ask_for_nothing_else(fleet):
    await fleet.hire(3)
    assert (await fleet.run("generate")).code == 0
    fleet.sink.script = At(Stage.RCPT, Reply("550 no such user"), times=1)
    relay = await fleet.relay("--http", "127.0.0.1:0")
    place = await place_of(relay)
    await fleet.settled()  # before the first look at the fleet, which is kept for seconds

    async def all_judged():
        found = await measured(place)
        settled = {verdict: found["outbox_emails_settled_total", verdict] for verdict in ("accepted", "dead")}
        return found if settled == {"accepted": 2, "dead": 1} else None

    found = await until(all_judged, "it says what became of the emails")
    assert found["outbox_smtp_reply_seconds_count",] == 2
    assert found["outbox_smtp_reply_seconds_bucket", "+Inf"] == 2
    assert found["outbox_claim_to_settle_seconds_count",] == 3
    assert found["outbox_tick_seconds_count",] >= 2
    assert 0 < found["outbox_claim_to_settle_seconds_sum",] < 60
    assert found["outbox_relays",] == found["outbox_database_up",] == found["outbox_session_held",] == 1
    assert [value for (name, *_), value in found.items() if name == "outbox_edition_made"] == [3]
    assert [value for (name, *_), value in found.items() if name == "outbox_edition_complete"] == [0]
    assert found["outbox_deliveries", "pending"] == found["outbox_oldest_due_seconds",] == 0
    there = {name for name, *_ in found}
    for expression in expressions():
        assert names_in(expression), expression
        assert names_in(expression) <= there, f"{expression} asks for {names_in(expression) - there}"

    assert await asked(f"{place}/livez") == (200, '{"live": true, "reasons": []}\n')
    assert await asked(f"{place}/metrics", "HEAD") == (200, "")
    assert (await asked(f"{place}/metrics", "POST"))[0] == 405
    assert (await asked(f"{place}/nothing"))[0] == 404


async def test_ready_is_who_holds_a_session_on_a_fitting_schema_and_reaches_the_mail_server(fleet, outbox_postgres):
    fleet.top = 'http = "127.0.0.1:0"\nlease_s = 2\nguard_s = 1'
    relay = await fleet.relay()
    place = await place_of(relay)

    async def ready():
        status, said = await asked(f"{place}/readyz")
        assert (status == 200) == json.loads(said)["ready"]
        return json.loads(said)["reasons"] or status == 200

    async def is_ready():
        return await ready() is True

    async def is_hindered(words):
        async def hindered():
            reasons = await ready()
            return reasons is not True and words in " ".join(reasons)

        await until(hindered, f"/readyz says {words!r}")

    await until(is_ready, "it is ready")
    trouble = fleet.sink.script = At(Stage.CONNECT, Reply("421 4.3.2 closed today"))
    await post(fleet, 1)
    await is_hindered("closed today")
    assert (await measured(place))["outbox_relay_ready",] == 0
    trouble.on = False
    await until(is_ready, "it is ready again")
    await all_sent(fleet, 1)
    # Postgres lets nobody in: the relay lives, and waits with tries.
    admin = await asyncpg.connect(outbox_postgres.url)
    name = await fleet.connection.fetchval("SELECT current_database()")
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await terminate_session(fleet)
    await is_hindered("it holds no session with Postgres")
    assert (await asked(f"{place}/livez"))[0] == 200
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await admin.close()
    await until(is_ready, "it is ready with its next session")
    assert (await measured(place))["outbox_sessions_lost_total",] == 1


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"])
async def test_clients_that_hold_connections_keep_out_no_probe_and_the_relay_sends_on(fleet, sent):
    relay = await fleet.relay("--http", "127.0.0.1:0")
    place = await place_of(relay)
    host, port = place.removeprefix("http://").split(":")
    crowd = [await asyncio.to_thread(socket.create_connection, (host, int(port)), 10) for _ in range(200)]
    try:
        for client in crowd:
            with contextlib.suppress(OSError):  # it was cut already
                client.sendall(sent)
        await fleet.put_emails(50)
        began_at = time.monotonic()
        for _ in range(5):
            assert (await asked(f"{place}/livez"))[0] == 200
        assert time.monotonic() - began_at < 5
        assert await fleet.settled() == {"sent": 50}
    finally:
        for client in crowd:
            client.close()


async def test_a_place_where_nobody_can_listen_is_one_sentence_and_exit_2(fleet):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, environment, words in (
            (["--http", f"127.0.0.1:{port}"], {}, f"http: cannot listen on 127.0.0.1:{port} (Address already"),
            (["--http", "localhost"], {}, '--http: is no host and port; write them like "127.0.0.1:9464"'),
            ([], {"OUTBOX_HTTP": "9464"}, "OUTBOX_HTTP: is no host and port; write them like"),
        ):
            ended = await fleet.run("relay", *arguments, environment=environment)
            assert ended.code == 2
            (sentence,) = ended.sentences
            assert sentence.startswith(words)


def test_a_relay_whose_loop_or_corridor_hangs_is_not_alive_and_says_so_itself(monkeypatch):
    monkeypatch.setattr(health, "LOOP_HUNG_S", 0.3)
    settings = Settings.model_validate(
        {"database_url": "postgresql://nobody@127.0.0.1:1/none", "smtp_url": "smtp://127.0.0.1:1"}
    )
    relays = Relays(settings)
    (relay,) = relays.each
    watched = Health(relays, Notifier({}))
    with Endpoints("[::1]:0") as endpoints:
        endpoints.serve(lambda _: ("text/plain", b""), watched, FleetReader(relays.database_url))
        place = f"http://{endpoints.address}"
        assert get(f"{place}/livez")[0] == 200
        time.sleep(0.35)  # no loop runs here at all
        assert get(f"{place}/livez")[0] == 503
        assert "event loop has not turned" in get(f"{place}/readyz")[1]
        watched._beat_at = time.monotonic() + 60
        assert watched.faults() == []
        relay.sessions.turned_at -= 41  # the corridor's last turn: more than four leases ago
        assert watched.faults() == ["the relay has made no progress for 41 s"]


@pytest.mark.parametrize("text", ["nonsense", "127.0.0.1", "127.0.0.1:99999", "::1:9464", "http://127.0.0.1:1"])
def test_what_is_no_host_and_port_is_refused(text):
    with pytest.raises(ValueError, match="http"):
        Settings.model_validate({"http": text})
