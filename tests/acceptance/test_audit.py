"""`outbox audit`: what a Monday-morning check learns of an edition, by name, and that looking changes nothing."""

import json

import pytest

from outbox.operations import audit as rooms
from outbox.sandbox.smtp_sink import Reply, Stage, Stall
from outbox.settings import load
from tests.support.fault_levers import in_state
from tests.support.fleet import until

WEEK = "2026-W47"
KINDS = ("in_doubt", "failed", "waiting", "missing", "suppressed", "cancelled", "waived")
COUNTS = ("expected", "generated", "sent", *KINDS, "no_longer_expected")


async def look(fleet, *words, code):
    ended = await fleet.run("audit", "progress", WEEK, "--json", *words)
    assert (ended.code, ended.err) == (code, ""), ended
    found = json.loads(ended.out)
    assert found["is_well"] is (code == 0)
    assert (found["report"], found["period"]) == ("progress", WEEK)
    return found


def counts(found):
    """What is not zero of the counts; every expected recipient is in exactly one of them."""
    assert sum(found[kind] for kind in ("sent", *KINDS)) == found["expected"]
    assert found["generated"] == found["expected"] - found["missing"] - found["waived"]
    return {word: found[word] for word in COUNTS if found[word]}


def named(found, kind):
    return {one["key"]: (one["address"], one["state"], one["said"]) for one in found["names"][kind]}


async def generated(fleet):
    ended = await fleet.run("generate", "--period", WEEK)
    assert ended.code == 0, ended


async def written(connection):
    """All that the database holds of ours and of the company's."""
    tables = ("definition", "edition", "report", "email", "delivery", "attempt", "relay", "operation")
    rows = {name: await connection.fetch(f"SELECT t::text FROM outbox.{name} t ORDER BY 1") for name in tables}
    return rows | {name: await connection.fetch(f"SELECT t::text FROM {name} t ORDER BY 1") for name in ("build",)}


@pytest.fixture
async def muddled(fleet):
    """Ten people: 1 refused, 2 in doubt by a kill, 3 cancelled, 4 expired, 5 left, 9 pending, 10 came later."""
    await fleet.hire(8)
    await generated(fleet)
    for state, key in (("cancelled", "3"), ("expired", "4")):
        await fleet.connection.execute(
            "UPDATE outbox.delivery d SET state = $1, settled_at = now() FROM outbox.email m"
            " WHERE m.id = d.email AND m.key = $2",
            state,
            f"progress/{WEEK}/{key}",
        )

    def script(stage, visit):
        to = visit.recipients[-1] if visit.recipients else None
        if (stage, to) == (Stage.RCPT, "p1@example.com"):
            return Reply(b"550 5.1.1 no such user\r\n")
        return Stall() if (stage, to) == (Stage.DOT, "p2@example.com") else None

    fleet.sink.script = script
    relay = await fleet.relay()
    for key in ("5", "6", "7", "8"):
        await in_state(fleet, "sent", f"progress/{WEEK}/{key}")
    await in_state(fleet, "dead", f"progress/{WEEK}/1")
    await in_state(fleet, "sending", f"progress/{WEEK}/2")
    await relay.kill()
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 4, "dead": 1, "in_doubt": 1, "cancelled": 1, "expired": 1}
    await fleet.hire(1, first=9)
    await generated(fleet)
    await fleet.hire(1, first=10)
    await fleet.connection.execute("UPDATE people SET active = false WHERE id = 5")
    return fleet


async def test_each_recipient_is_counted_once_and_named_by_what_became_of_the_email(muddled):
    found = await look(muddled, code=1)
    expected = {
        "expected": 9, "generated": 8, "sent": 3, "in_doubt": 1, "failed": 2, "waiting": 1, "missing": 1,
        "cancelled": 1, "no_longer_expected": 1,
    }  # fmt: skip
    assert counts(found) == expected
    assert {kind: list(named(found, kind)) for kind in found["names"]} == {
        "in_doubt": ["2"], "failed": ["1", "4"], "waiting": ["9"], "missing": ["10"],
        "suppressed": [], "cancelled": ["3"], "waived": [], "bounced": [],
    }  # fmt: skip
    address, state, said = named(found, "failed")["1"]
    assert (address, state) == ("p1@example.com", "dead")
    assert "5.1.1 no such user" in said
    assert "between its mark and its settle" in named(found, "in_doubt")["2"][2]
    assert [state for _, state, _ in named(found, "failed").values()] == ["dead", "expired"]
    assert named(found, "waiting")["9"][1] == "pending"
    assert named(found, "missing")["10"] == ("p10@example.com", "missing", "")

    muddled.sink.script = lambda stage, _: Stall() if stage is Stage.DOT else None
    await muddled.relay()
    await in_state(muddled, "sending", f"progress/{WEEK}/9")
    found = await look(muddled, code=1)
    assert counts(found) == expected
    assert named(found, "waiting")["9"] == ("p9@example.com", "sending", "")


async def test_people_read_the_same_and_the_last_line_says_whether_all_is_well(muddled):
    ended = await muddled.run("audit", "progress", WEEK)
    assert (ended.code, ended.err) == (1, "")
    lines = ended.out.splitlines()
    assert lines[0] == (
        f"progress {WEEK}: 9 expected, 8 generated, 3 sent, 1 in doubt, 2 failed, 1 waiting, 1 missing, 1 cancelled."
    )
    assert lines[1] == "No longer expected: 1 who have a report and are not named by the source now."
    for heading, name in {
        "in doubt: 1": "  2 <p2@example.com>: in doubt, ",
        "failed: 2": "  1 <p1@example.com>: dead, 550 5.1.1 no such user",
        "waiting: 1": "  9 <p9@example.com>: pending.",
        "cancelled: 1": "  3 <p3@example.com>: cancelled.",
        "missing: 1": "  10 <p10@example.com>",
    }.items():
        assert lines[lines.index(heading) + 1].startswith(name), lines
    assert lines[-1] == (
        f"Not well: 5 of 9 emails of progress {WEEK} are not sent: 1 in doubt, 2 failed, 1 waiting, 1 missing."
    )


async def test_all_is_well_only_while_each_recipient_that_the_source_names_is_sent(fleet):
    await fleet.hire(3)
    assert (await fleet.run("generate")).code == 0
    assert (await fleet.run("relay", "--until-empty")).code == 0
    period = await fleet.connection.fetchval("SELECT period FROM outbox.edition")

    ended = await fleet.run("audit", "progress")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == f"All is well: progress {period} is sent to all of its 3 recipients."

    await fleet.hire(1, first=4)
    ended = await fleet.run("audit", "progress")
    assert (ended.code, ended.out.splitlines()[-1]) == (
        1,
        f"Not well: 1 of 4 emails of progress {period} are not sent: 1 missing.",
    )

    await fleet.connection.execute("UPDATE people SET active = false WHERE id IN (2, 4)")
    ended = await fleet.run("audit", "progress", period, "--json")
    found = json.loads(ended.out)
    assert (ended.code, counts(found)) == (0, {"expected": 2, "generated": 2, "sent": 2, "no_longer_expected": 1})


async def test_of_an_edition_that_was_never_made_everybody_is_missing_and_looking_does_not_make_it(fleet):
    await fleet.hire(1244)
    before = await written(fleet.connection)
    ended = await fleet.run("audit", "progress", WEEK)
    assert (ended.code, ended.err) == (1, "")
    lines = ended.out.splitlines()
    assert lines[-1] == (
        f"Not well: progress {WEEK} was never generated; run `outbox generate progress --period {WEEK}`."
    )
    assert sum(line.endswith("@example.com>") for line in lines) == 10
    assert "  \N{HORIZONTAL ELLIPSIS} and 1,234 more" in lines
    found = await look(fleet, code=1)
    assert counts(found) == {"expected": 1244, "missing": 1244}
    assert list(named(found, "missing")) == [str(n) for n in range(1, 1245)]
    assert await written(fleet.connection) == before


async def test_nobody_expected_is_well_only_if_the_settings_allow_it_and_a_run_has_found_it_so(fleet):
    found = await look(fleet, code=1)
    assert counts(found) == {}
    assert "never generated" in found["sentence"]
    assert (await fleet.run("generate", "--period", WEEK)).code == 1
    found = await look(fleet, code=1)
    assert counts(found) == {}
    assert "names no recipient, and its settings do not allow that" in found["sentence"]
    fleet.report = "may_be_empty = true"
    await generated(fleet)
    found = await look(fleet, code=0)
    assert counts(found) == {}
    assert found["sentence"] == (
        f"All is well: the source of progress {WEEK} names no recipient, so nothing was to be sent."
    )


async def test_a_report_or_period_that_cannot_be_is_refused_with_2(fleet):
    await fleet.hire(1)
    await generated(fleet)
    for words, sentence in {
        ("progres",): "reports.progres: is not configured; write one of progress (did you mean progress?).",
        ("progress", "2026-48"): (
            "PERIOD, for report progress: '2026-48' is not a weekly period; write one like 2026-W48."
        ),
    }.items():
        ended = await fleet.run("audit", *words)
        assert (ended.code, ended.out, ended.sentences) == (2, "", [sentence])
    fleet.timezone = "Asia/Tokyo"
    ended = await fleet.run("audit", "progress")
    assert (ended.code, ended.out) == (2, "")
    assert "the fleet generates this report with timezone = 'America/New_York'" in ended.sentences[0]


async def test_an_edition_of_an_earlier_cadence_is_still_found_by_its_period(fleet):
    await fleet.hire(1)
    await generated(fleet)
    fleet.report = 'cadence = "daily"'
    assert (await fleet.run("init", "--redefine", "progress")).code == 0
    assert counts(await look(fleet, code=1)) == {"expected": 1, "generated": 1, "waiting": 1}


async def test_a_recipient_who_cannot_have_a_report_is_missing_with_the_reason(fleet):
    fleet.recipients = (
        "select * from (values ('1', 'p1@example.com'), ('2', 'no address'), ('', 'p3@example.com'),"
        " ('1', 'p1@example.com')) as v (key, email)"
    )
    assert (await fleet.run("generate", "--period", WEEK)).code == 1
    found = await look(fleet, code=1)
    assert counts(found) == {"expected": 3, "generated": 1, "waiting": 1, "missing": 2}
    missing = named(found, "missing")
    assert list(missing) == ["(no key)", "2"]
    assert "'no address' is no email address" in missing["2"][2]
    assert missing["(no key)"][0] == "p3@example.com"
    assert "the key is empty" in missing["(no key)"][2]
    assert "  2 <no address>: 'no address' is no email address: " in (await fleet.run("audit", "progress", WEEK)).out


async def test_an_email_whose_report_retention_took_away_counts_by_its_delivery(fleet):
    await fleet.hire(2)
    await generated(fleet)
    await fleet.connection.execute("UPDATE outbox.email SET report = NULL")
    await fleet.connection.execute("DELETE FROM outbox.report")
    assert counts(await look(fleet, code=1)) == {"expected": 2, "generated": 2, "waiting": 2}
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert counts(await look(fleet, code=0)) == {"expected": 2, "generated": 2, "sent": 2}


WRONG = {
    "recipient = 'mallory@example.com'": ("misaddressed", "goes to mallory@example.com and not to p2@example.com"),
    "recipient = 'P2@example.com'": ("misaddressed", "goes to P2@example.com and not to p2@example.com"),
    "sender = 'mallory@example.com'": ("misaddressed", "is from mallory@example.com and not from reports@example.com"),
    "report = NULL": ("without its report", "belongs to no report"),
    "report = (SELECT id FROM outbox.report WHERE recipient_key = '1')": ("without its report", "to another report"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_an_email_under_a_reports_key_that_is_not_the_reports_is_not_well_and_is_named(fleet, wrong):
    await fleet.hire(3)
    await generated(fleet)
    await fleet.connection.execute(f"UPDATE outbox.email SET {wrong} WHERE key = 'progress/{WEEK}/2'")
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 3}
    found = await look(fleet, code=1)
    assert counts(found) == {"expected": 3, "generated": 3, "sent": 2, "failed": 1}
    state, reason = WRONG[wrong]
    assert named(found, "failed").keys() == {"2"}
    address, *said = named(found, "failed")["2"]
    assert (address, said[0]) == ("p2@example.com", state)
    assert f"the email progress/{WEEK}/2 (sent) " in said[1]
    assert reason in said[1]
    people = await fleet.run("audit", "progress", WEEK)
    assert (people.code, f"  2 <p2@example.com>: {state}, the email progress/{WEEK}/2 (sent) " in people.out) == (
        1,
        True,
    )


@pytest.mark.parametrize(
    "envelope", [("reports@example.com", "mallory@example.com"), ("a@b.example", "p2@example.com")]
)
async def test_an_email_that_was_there_before_generate_does_not_make_all_well(fleet, envelope):
    """The attack: somebody takes a report's key before its report is made."""
    await fleet.hire(2)
    await fleet.connection.execute(
        "WITH mail AS (INSERT INTO outbox.email (key, sender, recipient, message_id, message)"
        " VALUES ($1, $2, $3, '<1@example.com>', 'Subject: x') RETURNING id)"
        " INSERT INTO outbox.delivery (email) SELECT id FROM mail",
        f"progress/{WEEK}/2",
        *envelope,
    )
    ended = await fleet.run("generate", "--period", WEEK)
    assert (ended.code, ended.out) == (
        1, f"progress {WEEK}: 1 made here, 0 elsewhere, 1 failed, of 2 recipients.\n",
    )  # fmt: skip
    assert f"recipient 2: its email's key progress/{WEEK}/2 belongs to an email" in ended.sentences[0]
    assert (await fleet.run("relay", "--until-empty")).code == 0
    found = await look(fleet, code=1)
    assert counts(found) == {"expected": 2, "generated": 2, "sent": 1, "failed": 1}
    assert list(named(found, "failed")) == ["2"]


async def test_a_report_that_waits_for_a_digest_or_is_in_one_is_judged_by_the_digests_email(fleet):
    fleet.report = 'deliver = "digest"\n[digest]\nlink = "https://reports.example.com/d/{token}"'
    await fleet.hire(2)
    await generated(fleet)
    assert (await fleet.run("digest", "--period", WEEK)).code == 0
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert counts(await look(fleet, code=0)) == {"expected": 2, "generated": 2, "sent": 2}
    await fleet.connection.execute(
        "UPDATE outbox.email SET recipient = 'mallory@example.com' WHERE recipient = 'p2@example.com'"
    )
    found = await look(fleet, code=1)
    assert named(found, "failed")["2"][1] == "misaddressed"


async def test_a_report_without_a_delivery_is_not_taken_for_sent(fleet):
    await fleet.hire(1)
    await generated(fleet)
    await fleet.connection.execute("DELETE FROM outbox.delivery")
    found = await look(fleet, code=1)
    assert counts(found) == {"expected": 1, "generated": 1, "failed": 1}
    assert named(found, "failed")["1"][1] == "without a delivery"


async def test_a_recipients_query_that_would_write_is_refused(fleet):
    await fleet.connection.execute(
        "CREATE FUNCTION counted() RETURNS text LANGUAGE sql AS"
        " $$ INSERT INTO build (key) VALUES ('read') RETURNING 'p1@example.com' $$"
    )
    fleet.recipients = "select '1' as key, counted() as email"
    before = await written(fleet.connection)
    ended = await fleet.run("audit", "progress", WEEK)
    (sentence,) = ended.sentences
    assert (ended.code, ended.out) == (1, "")
    assert sentence.startswith("reports.progress.recipients: Postgres refuses the query (")
    assert "read-only transaction" in sentence
    assert await written(fleet.connection) == before


async def test_an_audit_is_one_look_whatever_happens_while_the_source_is_read(fleet):
    await fleet.hire(1)
    (fleet.directory / "mine.py").write_text(
        "import asyncpg\n"
        "class Mine:\n"
        "    async def recipients(self, period):\n"
        f"        other = await asyncpg.connect({fleet.database!r})\n"
        "        await other.execute(\"UPDATE outbox.delivery SET state = 'sent', attempt = 1, settled_at = now()\")\n"
        "        await other.execute('INSERT INTO outbox.report (edition, recipient_key, token, title, html)"
        " SELECT id, $$2$$, $$t$$, $$t$$, $$h$$ FROM outbox.edition')\n"
        "        await other.close()\n"
        "        return [{'key': key, 'email': f'p{key}@example.com'} for key in (1, 2)]\n"
        "    def build(self, recipient, period):\n"
        "        return []\n"
    )
    await generated(fleet)
    fleet.source = "mine:Mine"
    assert counts(await look(fleet, code=1)) == {"expected": 2, "generated": 1, "waiting": 1, "missing": 1}
    assert await fleet.states() == {"sent": 1}


async def test_windows_change_no_figure(fleet, monkeypatch):
    await fleet.hire(23)
    await generated(fleet)
    await fleet.connection.execute("UPDATE people SET active = false WHERE id IN (3, 17)")
    await fleet.hire(2, first=24)
    settings = load(fleet.write_settings())
    for size in (10_000, 5, 1):
        monkeypatch.setattr(rooms, "WINDOW_MAX", size)
        found = await rooms.audit(settings, "progress", WEEK, names_max=4)
        assert counts(found.as_json()) == {
            "expected": 23, "generated": 21, "waiting": 21, "missing": 2, "no_longer_expected": 2,
        }  # fmt: skip
        assert [one.key for one in found.unsent["waiting"].named] == ["1", "2", "4", "5"]


async def test_a_database_that_is_away_or_goes_away_is_one_sentence_and_no_verdict(fleet):
    await fleet.hire(1)
    await generated(fleet)
    fleet.recipients = "select id::text as key, email, pg_sleep(60)::text as waited from people"
    audit = await fleet.start("audit", "progress", WEEK)

    async def cut_off():
        return await fleet.connection.fetchval(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox audit'"
            " AND datname = current_database() AND wait_event = 'PgSleep'"
        )

    await until(cut_off, "the audit reads its recipients")
    ended = await audit.ended()
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.sentences) == 1
    assert "was lost" in ended.sentences[0]

    fleet.database = "postgresql://nobody@127.0.0.1:1/nowhere"
    ended = await fleet.run("audit", "progress", WEEK)
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.sentences) == 1
    assert "does not answer" in ended.sentences[0]
