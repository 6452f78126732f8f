"""`outbox prune`: what an operator sees of it, and that an old edition whose messages are gone sends nothing again."""

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import sys
from datetime import UTC, datetime, timedelta

import pytest

from outbox.mail.removed_message import PRUNED
from outbox.sandbox.smtp_sink import Reply, Stage
from tests.support.fault_levers import At, all_sent, delivery, post, status, trail
from tests.support.fleet import until

WEEK = "2025-W03"
KEEP = ("--keep", "400d")
REFUSED = Reply(b"550 5.1.1 no such user\r\n")


async def age(fleet, days=500):
    """All that is there was made so many days ago."""
    for table in ("report", "email"):
        await fleet.connection.execute(
            f"UPDATE outbox.{table} SET created_at = created_at - $1 * interval '1 day'", float(days)
        )


async def bodies(fleet):
    """How many emails have a body, and how many pages there are."""
    return tuple(
        await fleet.connection.fetchrow(
            "SELECT (SELECT count(*) FROM outbox.email WHERE message <> $1),"
            " (SELECT count(*) FROM outbox.report WHERE html <> '')",
            PRUNED,
        )
    )


async def put_settled(fleet, count):
    """Old emails that are sent, without reports."""
    await fleet.put_emails(count)
    await fleet.connection.execute("UPDATE outbox.delivery SET state = 'sent', attempt = 1, settled_at = now()")
    await age(fleet)


async def slow_batches(fleet, seconds):
    await fleet.connection.execute(
        "CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;"
        "CREATE OR REPLACE TRIGGER slow AFTER UPDATE ON outbox.email FOR EACH STATEMENT EXECUTE FUNCTION slow()"
    )


async def batches_done(fleet, count):
    async def are_done():
        return (await bodies(fleet))[0] <= 3000 - count * 1000

    await until(are_done, f"{count} batches are done")


@pytest.fixture
async def edition(fleet):
    """An old edition of four people: three were sent it, number 4 was refused."""
    await fleet.hire(4)
    assert (await fleet.run("generate", "--period", WEEK)).code == 0
    fleet.sink.script = At(Stage.RCPT, REFUSED, when=lambda visit: visit.recipients[-1] == "p4@example.com")
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert await fleet.states() == {"sent": 3, "dead": 1}
    await age(fleet)
    return fleet


async def test_what_went_is_said_in_one_line_with_the_date_in_utc(edition):
    would = await edition.run("prune", *KEEP, "--dry-run")
    assert (would.code, would.err) == (0, "")
    assert re.fullmatch(
        r"Would prune 4 emails, 3 attempts and 4 pages from before \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\.\n", would.out
    )
    assert await bodies(edition) == (4, 4)
    ended = await edition.run("prune", *KEEP)
    assert (ended.code, ended.err) == (0, "")
    at = re.fullmatch(r"Pruned 4 emails, 3 attempts and 4 pages from before (.*) UTC\.\n", ended.out)[1]
    cut = datetime.strptime(at, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - timedelta(days=400) - cut) < timedelta(minutes=5)
    assert await bodies(edition) == (0, 0)
    again = await edition.run("prune", *KEEP)
    assert (again.code, again.out.split(" from ")[0]) == (0, "Pruned 0 emails, 0 attempts and 0 pages")


async def test_scripts_get_json(edition):
    await edition.put_emails(2)
    await age(edition, 10)
    ended = await edition.run("prune", *KEEP, "--dry-run", "--json")
    assert json.loads(ended.out)["dry_run"] is True
    await edition.connection.execute("UPDATE outbox.email SET created_at = '2020-01-01' WHERE key = 'mail1'")
    ended = await edition.run("prune", "--keep", "52w", "--json")
    found = json.loads(ended.out)
    assert datetime.fromisoformat(found.pop("before")).utcoffset() == timedelta(0)
    assert found == {"emails": 4, "attempts": 3, "pages": 4, "unsettled": 1, "dry_run": False, "stopped": False}
    line = await edition.run("prune", *KEEP)
    assert line.out.endswith(" UTC; 1 emails stay that are not settled.\n")


async def test_an_old_edition_that_is_generated_again_sends_nothing(edition):
    assert (await edition.run("prune", *KEEP)).code == 0
    mails = dict(edition.sink.addresses)
    ended = await edition.run("generate", "--period", WEEK)
    assert (ended.code, ended.out) == (0, f"progress {WEEK}: 0 made here, 4 already made, 0 failed, of 4 recipients.\n")
    assert (await edition.run("relay", "--until-empty")).code == 0
    assert (dict(edition.sink.addresses), await edition.states()) == (mails, {"sent": 3, "dead": 1})
    assert await bodies(edition) == (0, 0)
    assert mails == {f"p{n}@example.com": 1 for n in (1, 2, 3)}

    await edition.hire(1, first=5)
    ended = await edition.run("generate", "--period", WEEK)
    assert ended.out == f"progress {WEEK}: 1 made here, 4 already made, 0 failed, of 5 recipients.\n"
    assert (await edition.run("relay", "--until-empty")).code == 0
    assert dict(edition.sink.addresses) == {**mails, "p5@example.com": 1}


async def test_an_audit_of_an_old_edition_knows_what_was_sent_and_why_the_rest_was_not(edition):
    before = await edition.run("audit", "progress", WEEK, "--json")
    await edition.run("prune", *KEEP)
    assert (await edition.run("audit", "progress", WEEK, "--json")).out == before.out
    assert json.loads(before.out)["names"]["failed"][0]["said"].startswith("550 5.1.1 no such user")


async def test_a_dead_letter_whose_message_is_pruned_is_not_sent_again(edition):
    await edition.run("prune", *KEEP)
    key = f"progress/{WEEK}/4"
    (trouble,) = (await status(edition))["troubles"]
    assert (trouble["key"], trouble["command"]) == (key, f"outbox show {key}")
    assert [choice["command"] for choice in trouble["choices"]] == [f"outbox resolve {key} --discard"]
    assert trouble["said"].startswith("550 5.1.1 no such user")
    ended = await edition.run("resolve", key, "--resend")
    assert (ended.code, ended.out) == (1, "")
    assert ended.sentences == [
        f"{key} cannot be sent: `outbox prune` removed its message by its age, and only its envelope is kept."
    ]
    assert (await delivery(edition, key))["state"] == "dead"
    assert (await edition.run("resolve", key, "--discard")).code == 0
    assert (await status(edition))["troubles"] == []


async def test_a_dead_letter_about_which_a_person_decided_is_not_asked_about_again(edition):
    assert (await edition.run("resolve", f"progress/{WEEK}/4", "--discard")).code == 0
    await edition.run("prune", *KEEP)
    assert (await status(edition))["troubles"] == []


async def test_a_stretch_of_time_that_is_none_or_too_short_is_refused(fleet):
    for keep, sentence in {
        "12h": "--keep: 12h is too short; keep at least 1d.",
        "soon": "--keep: 'soon' is no stretch of time; write one such as 400d, 52w or 48h.",
    }.items():
        ended = await fleet.run("prune", "--keep", keep)
        assert (ended.code, ended.out, ended.sentences) == (2, "", [sentence])
    assert (await fleet.run("prune")).code == 2, "there is no default"


async def test_two_at_once_are_refused_in_a_sentence(fleet):
    await put_settled(fleet, 3000)
    await slow_batches(fleet, 0.5)
    one = await fleet.start("prune", *KEEP)
    await batches_done(fleet, 1)
    other = await fleet.run("prune", *KEEP)
    assert (other.code, other.out) == (1, "")
    assert other.sentences == ["Another `outbox prune` runs in this database; let it finish, one at a time is enough."]
    ended = await one.ended()
    assert (ended.code, ended.out.split(" emails")[0]) == (0, "Pruned 3,000")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
async def test_a_signal_ends_it_after_the_batch_and_a_later_run_goes_on(fleet, signum, code):
    await put_settled(fleet, 3000)
    await slow_batches(fleet, 0.5)
    one = await fleet.start("prune", *KEEP)
    await batches_done(fleet, 1)
    one.send(signum)
    ended = await one.ended()
    assert (ended.code, ended.err) == (code, "")
    left = (await bodies(fleet))[0]
    assert left in (1000, 2000)
    assert ended.out.startswith(f"Pruned {3000 - left:,} emails, ")
    assert ended.out.endswith(" UTC; stopped early, run it again to go on.\n")
    await slow_batches(fleet, 0)
    assert (await fleet.run("prune", *KEEP)).out.startswith(f"Pruned {left:,} emails, ")


async def test_a_second_signal_ends_it_at_once(fleet):
    await put_settled(fleet, 3000)
    await slow_batches(fleet, 5)
    one = await fleet.start("prune", *KEEP)

    async def is_in_a_batch():
        return await fleet.connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")

    await until(is_in_a_batch, "a batch is under way")
    one.send(signal.SIGTERM)
    with pytest.raises(TimeoutError):
        await one.ended(0.5)
    one.send(signal.SIGTERM)
    ended = await one.ended(2)
    assert (ended.code, ended.out) == (143, "")


async def test_a_lost_postgres_is_one_sentence_and_a_later_run_goes_on(fleet):
    await put_settled(fleet, 3000)
    await slow_batches(fleet, 0.5)
    one = await fleet.start("prune", *KEEP)
    await batches_done(fleet, 1)
    await fleet.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox prune'"
    )
    ended = await one.ended()
    assert (ended.code, ended.out) == (1, "")
    (sentence,) = ended.sentences
    assert re.fullmatch(
        r"The session with Postgres at \S+ was lost \(.+\); run `outbox prune` again when it is back, it goes on from "
        r"there\.",
        sentence,
    )
    await slow_batches(fleet, 0)
    assert (await fleet.run("prune", *KEEP)).code == 0
    assert await bodies(fleet) == (0, 0)


async def test_without_postgres_or_its_schema_it_says_so(fleet):
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    ended = await fleet.run("prune", *KEEP)
    assert (ended.code, ended.sentences) == (1, ["The database has no outbox schema yet; run `outbox init`."])
    fleet.database = "postgresql://postgres@127.0.0.1:1/nowhere"
    ended = await fleet.run("prune", *KEEP)
    assert ended.code == 1
    assert ended.sentences[0].startswith("Postgres at postgresql://postgres@127.0.0.1:1/nowhere does not answer (")


async def test_a_relay_that_sends_meanwhile_is_not_hurt(fleet):
    await put_settled(fleet, 3000)
    await fleet.relay()
    pruning = await fleet.start("prune", *KEEP)
    for first in range(3001, 3301, 100):
        await post(fleet, 100, first=first)
    ended = await pruning.ended()
    assert ended.code == 0, ended
    await all_sent(fleet, 3300)
    assert fleet.twice == {}
    assert fleet.sink.messages == 300
    assert await bodies(fleet) == (300, 0)
    assert await trail(fleet, "mail3300") == ["accepted"]


def _shown(terminal):
    """All that was written to it, until nobody can write any more."""
    pieces = []
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    return b"".join(pieces).decode()


async def test_a_bar_shows_on_a_terminal(fleet):
    await put_settled(fleet, 2000)
    await slow_batches(fleet, 0.3)
    fleet.write_settings()
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "outbox", "prune", *KEEP,
        cwd=fleet.directory, stdout=asyncio.subprocess.PIPE, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    showing = asyncio.create_task(asyncio.to_thread(_shown, ours))
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
        shown = await showing
    os.close(ours)
    assert process.returncode == 0
    assert said.decode().startswith("Pruned 2,000 emails, 0 attempts and 0 pages from before ")
    assert "pruning emails" in shown
    assert "%" in shown


async def test_a_kill_costs_the_batch_under_way_at_most(fleet):
    await put_settled(fleet, 3000)
    await slow_batches(fleet, 0.5)
    one = await fleet.start("prune", *KEEP)
    await batches_done(fleet, 1)
    await one.kill()
    await slow_batches(fleet, 0)

    async def goes_on():
        return (await fleet.run("prune", *KEEP)).code == 0

    await until(goes_on, "the killed one's session has ended, and the next goes on")
    assert await bodies(fleet) == (0, 0)
