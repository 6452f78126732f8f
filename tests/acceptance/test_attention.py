"""One rule decides what needs a person, and every surface says the same; what a person decides ends it everywhere."""

import asyncio
import json
import re
from html import unescape

import pytest

from outbox.monitoring.completion import Candidate, is_complete
from outbox.operations.attention import Kind, concerns_of
from outbox.operations.email_filter import Selection, find
from outbox.operations.resolve import UNDECIDED, Decision, resolve
from outbox.operations.snapshot import read_snapshot
from outbox.sandbox.smtp_sink import Cut, Reply, Stage
from tests.acceptance.test_board import hidden, signed_in
from tests.acceptance.test_http import asked, measured, place_of
from tests.support.fleet import until
from tests.support.http_receiver import receiver

NOTHING = "Nothing needs a person."


@pytest.fixture
async def troubled(fleet):
    """An edition of six: 1 has no address, 2 is refused, 3 is in doubt, 4 to 6 are sent."""
    await fleet.hire(6)
    await fleet.connection.execute("UPDATE people SET email = 'nowhere' WHERE id = 1")

    def script(stage, visit):
        to = visit.recipients[-1] if visit.recipients else None
        if (stage, to) == (Stage.RCPT, "p2@example.com"):
            return Reply("550 5.1.1 no such user")
        return Cut() if (stage, to) == (Stage.DOT, "p3@example.com") else None

    fleet.sink.script = script
    assert (await fleet.run("generate")).code == 1
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 3, "dead": 1, "in_doubt": 1}
    fleet.period = await fleet.connection.fetchval("SELECT period FROM outbox.edition")
    return fleet


async def surfaces(fleet, anna, place):
    """What each surface says that needs a person, as the same titles; and the exit codes of doctor and audit."""
    status = json.loads((await fleet.run("status", "--json")).out)
    text = (await fleet.run("status")).out
    doctor = await fleet.run("doctor", "--json")
    lines = [one for one in json.loads(doctor.out)["checks"] if one["check"] == "deliveries"]
    audit = json.loads((await fleet.run("audit", "progress", fleet.period, "--json")).out)
    listed = json.loads((await fleet.run("list", "--json")).out)["emails"]

    async def board():
        body = unescape((await anna.get("/")).body)
        return body if "Not counted" not in body and "Looking" not in body else None

    body = await until(board, "the board has looked")
    said = status["attention"]
    assert said in text
    assert "`outbox status`" not in text, "it points to itself"
    sentences = [one["sentence"] for one in status["concerns"]]
    assert [f"{one['found']}." for one in lines if one["grade"] == "fault"] == (
        [" ".join(sentences)] if sentences else []
    )
    assert all(sentence in body for sentence in sentences)
    assert (re.search(r"<h2>(.*?)</h2>", body)[1] in ("All is well", "Sending")) == (not sentences)
    counts = {one["kind"]: one["count"] for one in status["concerns"]}

    async def counted():
        samples = await measured(place)
        found = {name[1]: value for name, value in samples.items() if name[0] == "outbox_attention" and value}
        return found == counts

    await until(counted, "the metrics say the same", 60)  # a look is kept for a while
    assert audit["is_well"] == (not sentences)
    assert sum(one["needs_person"] for one in listed) == counts.get("failed", 0) + counts.get("in_doubt", 0)
    return said


async def test_every_surface_says_the_same_until_a_person_has_decided(troubled):
    fleet, period = troubled, troubled.period
    with receiver() as called:
        fleet.top = f'dead_man_url = "{called.url}/done"\nhttp = "127.0.0.1:0"'
        _, anna = await signed_in(fleet)
        relay = await fleet.relay()
        place = await place_of(relay)
        assert await surfaces(fleet, anna, place) == (
            "Needs a person: 1 email is in doubt; 1 email failed; 1 recipient has no report."
        )
        status = json.loads((await fleet.run("status", "--json")).out)
        key = f"progress/{period}"
        assert [(one["key"], one["state"]) for one in status["troubles"]] == [
            (f"{key}/3", "in_doubt"), (f"{key}/2", "dead"), (f"{key}/1", "missing"),
        ]  # fmt: skip
        assert [choice["command"] for choice in status["troubles"][2]["choices"]] == [f"outbox waive {key}/1"]
        shown = await fleet.run("show", f"{key}/1")
        assert "'nowhere' is no email address" in shown.err
        assert f"`outbox waive {key}/1`" in shown.err

        assert (await fleet.run("resolve", f"{key}/3", "--discard")).code == 0
        assert (await fleet.run("resolve", f"{key}/2", "--discard")).code == 0
        assert await fleet.connection.fetchval("SELECT completed_at FROM outbox.edition") is None
        waived = await fleet.run("waive", f"{key}/1", "--why", "left")
        assert (waived.code, waived.out) == (0, f"{key}/1: nothing is owed\n")
        assert (await fleet.run("generate")).code == 0
        # A relay looks for complete editions when emails are settled, else every five minutes.
        await fleet.put_emails(1, first=4)
        await until(lambda: called.paths, "the dead man's switch is called")
        await until(
            lambda: fleet.connection.fetchval("SELECT completed_at FROM outbox.edition"), "the edition is complete"
        )

        async def settled():
            return (await surfaces(fleet, anna, place)) == NOTHING

        await until(settled, "all surfaces say that nothing needs a person")
        audit = await fleet.run("audit", "progress", period)
        assert audit.code == 0
        assert audit.out.startswith(f"progress {period}: 6 expected, 5 generated, 3 sent,")
        assert audit.out.splitlines()[-1] == (
            f"All is well: progress {period} is sent to all but 3 of its 6 recipients: 2 cancelled, 1 waived."
        )


async def test_the_board_waives_as_the_command_does(troubled):
    _, anna = await signed_in(troubled)
    page = await anna.get("/editions/1")
    assert "Without a report" in page.body
    assert "&#39;nowhere&#39; is no email address" in page.body
    shown = await anna.confirmed(act="waive", report="progress", period=troubled.period, recipient="1")
    assert f"progress/{troubled.period}/1" in shown.body
    assert "1 recipient of" in shown.body
    missing_why = await anna.post("/decide", **hidden(shown))
    assert "Say why" in missing_why.body
    done = await anna.post("/decide", **hidden(shown), why="left")
    assert "1 owed nothing." in done.body
    assert "Without a report" not in (await anna.get("/editions/1")).body
    rows = await troubled.connection.fetch("SELECT what, target, why, emails FROM outbox.operation")
    assert [tuple(row) for row in rows] == [("waive", f"progress/{troubled.period}/1", "left", 1)]
    again = await anna.post("/decide", **hidden(shown), why="left")
    assert "has decided already that nothing is owed" in again.body
    nobody = await anna.confirmed(act="waive", report="progress", period=troubled.period)
    assert nobody.status == 400


async def test_a_whole_edition_is_waived_only_with_a_reason_and_a_yes(troubled):
    edition = f"progress {troubled.period}"
    for words, sentence in {
        ("--edition", edition, "--yes"): "--why: say why",
        ("--edition", edition, "--why", "x"): "cannot ask here; add --yes",
        ("--edition", edition, "--why", "x", "--yes", "a/b/c"): "name keys or say --edition, not both",
        ("--edition", edition, "--why", "x", "--yes", "--undo"): "--undo takes keys",
        ("mail1",): "mail1: is not REPORT/PERIOD/RECIPIENT",
        (): "Name keys",
    }.items():
        ended = await troubled.run("waive", *words)
        assert (ended.code, ended.out) == (2, ""), words
        assert sentence in ended.err
    ended = await troubled.run("waive", "--edition", edition, "--why", "left", "--yes")
    assert (ended.code, ended.out) == (0, f"progress/{troubled.period}/1: nothing is owed\n")
    ended = await troubled.run("waive", "--edition", edition, "--why", "left", "--yes")
    assert (ended.code, ended.out) == (0, f"No recipient of {edition} is without a report and undecided.\n")
    ended = await troubled.run("waive", "--undo", f"progress/{troubled.period}/1")
    assert (ended.code, ended.err) == (0, "")
    assert (await troubled.run("generate")).code == 1


EDITION = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected, created_at)
VALUES ('progress', '2026-W48', '2026-11-23', '2026-11-30', $1, now() - $2::text::interval) RETURNING id
"""
MAIL = """
WITH m AS (INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
           VALUES ($1, $2, 'a@example.com', 'b@example.com', '<1@example.com>', 'x') RETURNING id)
INSERT INTO outbox.delivery (email, state, attempt, settled_at, marked_at, doubted_at, relay, due_at)
SELECT id, $3, 1, CASE WHEN $3 NOT IN ('pending', 'sending', 'in_doubt') THEN now() END, now(),
       CASE WHEN $3 = 'in_doubt' THEN now() END, 1, now() - interval '30 s' FROM m
"""


async def kinds(connection):
    return [(one.kind, one.count) for one in concerns_of(await read_snapshot(connection))]


@pytest.mark.parametrize(
    ("state", "of_report", "found"),
    [
        ("pending", True, []), ("sent", True, []), ("cancelled", True, []), ("in_doubt", True, [(Kind.IN_DOUBT, 1)]),
        ("in_doubt", False, [(Kind.IN_DOUBT, 1)]), ("dead", True, [(Kind.FAILED, 1)]),
        ("dead", False, [(Kind.FAILED, 1)]), ("expired", True, [(Kind.FAILED, 1)]), ("expired", False, []),
    ],
)  # fmt: skip
async def test_an_email_needs_a_person_by_its_state_alone(connection, state, of_report, found):
    edition = await connection.fetchval(EDITION, 1, "1 day")
    report = await connection.fetchval(
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, '1', 't', '', '')"
        " RETURNING id",
        edition,
    )
    await connection.execute(MAIL, "progress/2026-W48/1", report if of_report else None, state)
    assert await kinds(connection) == found
    await connection.execute("UPDATE outbox.delivery SET state = 'dead', settled_at = now(), doubted_at = NULL")
    assert await kinds(connection) == [(Kind.FAILED, 1)]
    await connection.execute("UPDATE outbox.delivery SET state = 'pending', settled_at = NULL, relay = NULL")
    assert await kinds(connection) == []
    await connection.execute("DELETE FROM outbox.delivery")
    await connection.execute("UPDATE outbox.email SET report = $1", report)
    await connection.execute(
        "INSERT INTO outbox.delivery (email, state, settled_at) SELECT id, 'expired', now() FROM outbox.email"
    )
    assert await kinds(connection) == [(Kind.FAILED, 1)], "an insert counts as an update does"


@pytest.mark.parametrize(
    ("expected", "age", "found"),
    [
        (None, "2 hours", [(Kind.UNFINISHED, 1)]),
        (None, "10 minutes", []),
        (0, "2 hours", [(Kind.EMPTY, 1)]),
        (None, "41 days", []),
    ],
)
async def test_an_edition_that_no_run_has_finished_needs_a_person_after_an_hour(connection, expected, age, found):
    await connection.execute(EDITION, expected, age)
    assert await kinds(connection) == found


AGAIN = {  # as a relay ends an email that is pending, without another try
    "dead": "UPDATE outbox.delivery SET state = 'dead', settled_at = now()",
    "expired": "UPDATE outbox.delivery SET state = 'expired', settled_at = now()",
}


@pytest.mark.parametrize("state", AGAIN)
async def test_a_decision_to_send_again_does_not_hide_that_it_failed_then(connection, state):
    edition = await connection.fetchval(EDITION, 1, "1 day")
    report = await connection.fetchval(
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, '1', 't', '', '')"
        " RETURNING id",
        edition,
    )
    key = "progress/2026-W48/1"
    await connection.execute(MAIL, key, report, "in_doubt")
    assert await resolve(connection, [key], Decision.RESEND) == [key]
    await connection.execute(AGAIN[state])
    assert await kinds(connection) == [(Kind.FAILED, 1)]
    assert not await is_complete(connection, Candidate(edition, "progress", "2026-W48", 1))
    if state == "dead":
        assert await find(connection, Selection(edition="progress 2026-W48"), UNDECIDED) != []
        assert await resolve(connection, [key], Decision.DISCARD) == [key]
        assert await resolve(connection, [key], Decision.DISCARD) == []
        assert await kinds(connection) == []
        assert await is_complete(connection, Candidate(edition, "progress", "2026-W48", 1))


@pytest.mark.parametrize(("age", "found"), [("39 days", [(Kind.FAILED, 2)]), ("41 days", [])])
async def test_emails_that_failed_in_an_edition_that_is_history_need_nobody(connection, age, found):
    edition = await connection.fetchval(EDITION, 2, age)
    for key, state in {"1": "dead", "2": "expired"}.items():
        report = await connection.fetchval(
            "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, $2, $2, '', '')"
            " RETURNING id",
            edition,
            key,
        )
        await connection.execute(MAIL, f"progress/2026-W48/{key}", report, state)
    assert await kinds(connection) == found


async def test_who_has_no_report_by_the_look_of_an_older_version_counts_though_nobody_is_named(connection):
    """Its generate has recorded that there are three recipients; two have a report, and one of the two is waived."""
    edition = await connection.fetchval(EDITION, 3, "1 day")
    await connection.execute(
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html)"
        " SELECT $1, n, n, '', '' FROM unnest('{1,2}'::text[]) n",
        edition,
    )
    await connection.execute("INSERT INTO outbox.waiver VALUES ($1, '2', now(), 'ann', '')", edition)
    assert await kinds(connection) == [(Kind.MISSING, 1)]
    await connection.execute("UPDATE outbox.edition SET looked_at = now()")
    assert await kinds(connection) == [], "a look of this version names each"
    await connection.execute("UPDATE outbox.edition SET looked_at = NULL, completed_at = now()")
    assert await kinds(connection) == []


async def test_recipients_without_a_report_count_until_they_have_one_or_a_waiver(connection):
    edition = await connection.fetchval(EDITION, 3, "1 day")
    await connection.execute(
        "INSERT INTO outbox.unreached (edition, recipient_key, reason)"
        " SELECT $1, n, 'x' FROM unnest('{1,2,3}'::text[]) n",
        edition,
    )
    assert await kinds(connection) == [(Kind.MISSING, 3)]
    await connection.execute(
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, '1', 't', '', '')", edition
    )
    await connection.execute("INSERT INTO outbox.waiver VALUES ($1, '2', now(), 'ann', '')", edition)
    assert await kinds(connection) == [(Kind.MISSING, 1)]
    (concern,) = concerns_of(await read_snapshot(connection))
    assert "`outbox generate progress --period 2026-W48`" in concern.fix
    assert "`outbox waive --edition 'progress 2026-W48' --why …`" in concern.fix
    await connection.execute("UPDATE outbox.edition SET done_elsewhere_at = now()")
    assert await kinds(connection) == []


async def test_no_relay_is_a_matter_for_a_person_only_once_an_email_has_waited(connection):
    await connection.execute(MAIL, "mail1", None, "pending")
    assert await kinds(connection) == []
    await connection.execute("UPDATE outbox.delivery SET due_at = now() - interval '61 s'")
    assert await kinds(connection) == [(Kind.NO_RELAY, 0)]


async def test_a_route_and_a_schedule_in_trouble_need_a_person(connection):
    await connection.execute(
        "INSERT INTO outbox.route (name, reason, retry_at) VALUES ('mx:25', 'mx:25: 421 closing', now())"
    )
    await connection.execute(
        "INSERT INTO outbox.schedule (report, tick_at, failures, said) VALUES ('progress', now(), 2, 'no table.')"
    )
    found = concerns_of(await read_snapshot(connection))
    assert [one.kind for one in found] == [Kind.ROUTE, Kind.SCHEDULE]
    assert "421 closing." in found[0].sentence
    assert found[1].sentence == "The schedule of progress failed twice: no table."


async def test_a_server_that_defers_everybody_is_loud_everywhere_and_loses_nothing(fleet):
    """The reply of a real Postfix whose access table is missing."""
    reply = "451 4.3.5 Server configuration error"
    await fleet.put_emails(12)
    fleet.sink.script = lambda at, _: Reply(reply) if at is Stage.RCPT else None
    fleet.top = 'http = "127.0.0.1:0"'
    _, anna = await signed_in(fleet)
    relay = await fleet.relay()
    place = await place_of(relay)

    async def is_not_ready():
        code, body = await asked(f"{place}/readyz")
        return code == 503 and f"the mail server defers every email: {reply}" in body

    await until(is_not_ready, "/readyz says why")

    async def all_tried():
        status = json.loads((await fleet.run("status", "--json")).out)
        return [(one["count"], one["reply"]) for one in status["deferrals"]] == [(12, f"{reply} (to RCPT)")]

    await until(all_tried, "all were deferred", 30)
    text = (await fleet.run("status")).out
    assert f"12 deferred: {reply} (to RCPT)" in text
    assert "Needs a person: a relay makes no progress." in text
    assert "emails a second" not in text, "it takes none"
    doctor = json.loads((await fleet.run("doctor", "--json")).out)["checks"]
    grades = {one["check"]: one["grade"] for one in doctor if reply in one["found"]}
    assert grades["relays"] == "fault"
    assert grades["deferred"] == "note"

    async def board():
        body = unescape((await anna.get("/")).body)
        return "A relay makes no progress" in body and f"12 deferred: {reply}" in body

    await until(board, "the board shows the reply and the count")

    async def counted():
        samples = await measured(place)
        return (samples["outbox_emails_deferred",], samples["outbox_attention", "relay"]) == (12, 1)

    await until(counted, "the metrics show it", 60)  # a look is kept for a while
    samples = await measured(place)
    assert [value for name, value in samples.items() if name[0] == "outbox_route_deferring"] == [1]
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE attempt - withdrawn > 2") == 0

    fleet.sink.script = None
    assert await fleet.settled() == {"sent": 12}

    async def is_ready():
        return (await asked(f"{place}/readyz"))[0] == 200

    await until(is_ready, "it is ready again")
    await asyncio.gather(relay.kill())


async def test_a_server_that_defers_every_sender_is_loud_too(fleet):
    await fleet.put_emails(5)
    fleet.sink.script = lambda at, _: Reply("451 4.3.5 Server configuration error") if at is Stage.MAIL else None
    relay = await fleet.relay("--http", "127.0.0.1:0")
    place = await place_of(relay)

    async def is_not_ready():
        code, body = await asked(f"{place}/readyz")
        return code == 503 and "defers every email: 451 4.3.5 Server configuration error (to MAIL)" in body

    await until(is_not_ready, "/readyz says why")

    async def is_said():
        return "Needs a person: a relay makes no progress." in (await fleet.run("status")).out

    await until(is_said, "status says so")
    fleet.sink.script = None
    assert await fleet.settled(60) == {"sent": 5}
