"""`outbox generate` as cron runs it: on every server at once, again, killed, paused, cut off, and in bulk."""

import asyncio
import random
import re
import signal

import asyncpg

from outbox.database.locks import BUCKET_LOCKS
from tests.support.fleet import COUNTING_DATA, until

WHOLE = """
SELECT (SELECT count(*) FROM outbox.report) AS reports,
       (SELECT count(DISTINCT recipient_key) FROM outbox.report) AS recipients,
       (SELECT count(*) FROM outbox.email) AS emails,
       (SELECT count(*) FROM outbox.delivery) AS deliveries,
       (SELECT count(*) FROM outbox.report r LEFT JOIN outbox.email e ON e.report = r.id
                              LEFT JOIN outbox.delivery d ON d.email = e.id WHERE d.email IS NULL) AS halves
"""


def slowly(seconds):
    """The counting query, so slow that faults hit a run in its middle."""
    return COUNTING_DATA + f", pg_sleep({seconds})"


async def whole(fleet):
    """How many reports there are, when all of them are whole: one recipient, one email, one delivery each."""
    found = await fleet.connection.fetchrow(WHOLE)
    assert found["reports"] == found["recipients"] == found["emails"] == found["deliveries"], dict(found)
    assert found["halves"] == 0
    return found["reports"]


async def builds(fleet):
    return await fleet.connection.fetchval("SELECT count(*) FROM build")


async def sessions(fleet):
    """Server processes of generate's sessions that hold a bucket at this moment."""
    rows = await fleet.connection.fetch(
        "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::bigint = $1"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        BUCKET_LOCKS,
    )
    return {row["pid"] for row in rows}


async def test_eight_crons_and_four_relays_send_one_email_per_person(fleet):
    fleet.data = COUNTING_DATA
    await fleet.hire(40)
    relays = [await fleet.relay() for _ in range(4)]
    crons = await asyncio.gather(*(fleet.start("generate") for _ in range(8)))
    ends = [await cron.ended() for cron in crons]
    assert [end.code for end in ends] == [0] * 8, ends
    assert (await fleet.settled()) == {"sent": 40}
    assert len(fleet.sink.addresses) == 40
    assert fleet.twice == {}
    assert await builds(fleet) == 40
    assert await whole(fleet) == 40

    again = await fleet.run("generate")
    assert again.code == 0
    await fleet.hire(1, first=41)
    assert (await fleet.run("generate")).code == 0
    assert (await fleet.settled()) == {"sent": 41}
    assert len(fleet.sink.accepted) == 41
    for relay in relays:
        relay.send(signal.SIGTERM)
        assert (await relay.ended()).code == 0


async def test_eight_crons_share_a_thousand_people_and_compute_no_report_twice(fleet):
    fleet.data = COUNTING_DATA
    await fleet.hire(1000)
    crons = await asyncio.gather(*(fleet.start("generate") for _ in range(8)))
    ends = [await cron.ended(60) for cron in crons]
    assert [end.code for end in ends] == [0] * 8, ends
    assert await builds(fleet) == 1000
    assert await whole(fleet) == 1000
    made = [int(end.out.split(": ")[1].split(" made here")[0]) for end in ends]
    assert sum(made) == 1000
    assert sum(n > 0 for n in made) > 1, made
    for end, n in zip(ends, made, strict=True):
        others = [int(count) for count in re.findall(r"(\d+) (?:elsewhere|already made)", end.out)]
        assert sum(others) == 1000 - n
        assert end.out.endswith(", 0 failed, of 1000 recipients.\n")


async def test_a_second_run_adds_nothing_and_a_new_person_exactly_one(fleet):
    fleet.data = COUNTING_DATA
    await fleet.hire(40)
    assert "40 made here, 0 elsewhere, 0 failed, of 40 recipients." in (await fleet.run("generate")).out
    again = await fleet.run("generate")
    assert (again.code, again.err) == (0, "")
    assert "0 made here, 40 already made, 0 failed, of 40 recipients." in again.out
    await fleet.hire(1, first=41)
    assert "1 made here, 40 already made, 0 failed, of 41 recipients." in (await fleet.run("generate")).out
    assert await whole(fleet) == 41
    assert await builds(fleet) == 41


async def test_somebody_who_has_left_keeps_the_report_that_was_made(fleet):
    await fleet.hire(3)
    await fleet.run("generate")
    await fleet.connection.execute("UPDATE people SET active = false WHERE id = 1")
    again = await fleet.run("generate")
    assert (again.code, await whole(fleet)) == (0, 3)
    assert "of 2 recipients." in again.out


async def test_kills_at_random_moments_leave_whole_reports_and_the_next_run_makes_the_rest(fleet):
    chance = random.Random(2026)
    fleet.data = slowly(0.012)
    await fleet.hire(300)
    before, progressed = 0, 0
    for turn in range(15):
        cron = await fleet.start("generate")

        async def committed_or_done(cron=cron, before=before):
            return await whole(fleet) > before or cron.process.returncode is not None

        try:
            if turn % 2:  # in its middle for certain; else anywhere, the start of the process included
                await until(committed_or_done, "it has committed something")
            await cron.ended(chance.uniform(0, 0.3) if turn % 2 else chance.uniform(0.2, 1.5))
        except TimeoutError:
            await cron.kill()
        now = await whole(fleet)
        progressed += before < now < 300
        before = now
    assert progressed >= 3, "the kills must fall into the middle of the work"
    ended = await fleet.run("generate")
    assert ended.code == 0, ended
    assert await whole(fleet) == 300
    assert await fleet.connection.fetchval("SELECT expected FROM outbox.edition") == 300


async def test_two_servers_of_four_die_in_mid_run_and_the_others_finish_the_edition(fleet):
    fleet.data = slowly(0.01)
    await fleet.hire(240)
    crons = await asyncio.gather(*(fleet.start("generate") for _ in range(4)))

    async def all_at_work():
        return len(await sessions(fleet)) == 4

    await until(all_at_work, "all four hold buckets")
    await asyncio.gather(crons[0].kill(), crons[1].kill())
    assert await whole(fleet) < 240
    ends = [await cron.ended() for cron in crons[2:]]
    assert [end.code for end in ends] == [0, 0], ends
    assert await whole(fleet) == 240
    assert all("0 failed, of 240 recipients." in end.out for end in ends)


async def test_no_server_exits_before_the_edition_is_whole(fleet):
    """One person's query waits for a lock that the test holds: one server stands there, the other waits for it."""
    fleet.data = "select case when :key = '7' then pg_advisory_xact_lock_shared(7)::text end as waited"
    await fleet.hire(40)
    other = await asyncpg.connect(fleet.database)
    await other.execute("SELECT pg_advisory_lock(7)")
    crons = [await fleet.start("generate"), await fleet.start("generate")]

    async def one_stands():
        return await fleet.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox generate'"
            " AND datname = current_database() AND wait_event_type = 'Lock'"
        )

    await until(one_stands, "one of them stands")
    ending = [asyncio.create_task(cron.ended()) for cron in crons]
    ended, _ = await asyncio.wait(ending, timeout=1.5)
    assert not ended, "an exit before the edition is whole"
    assert 20 < await whole(fleet) < 40
    await other.close()
    assert [end.code for end in await asyncio.gather(*ending)] == [0, 0]
    assert await whole(fleet) == 40


async def test_a_server_that_is_stopped_for_longer_than_its_lease_loses_its_buckets_to_the_other(fleet):
    fleet.top = "lease_s = 2\nguard_s = 1"
    fleet.data = slowly(0.01)
    await fleet.hire(200)
    stopped = await fleet.start("generate")
    (backend,) = await until(lambda: sessions(fleet), "the first holds a bucket")
    other = await fleet.start("generate")

    async def both_at_work():
        return len(await sessions(fleet)) == 2

    await until(both_at_work, "both hold buckets")
    stopped.send(signal.SIGSTOP)
    ended = await other.ended()
    assert ended.code == 0, ended
    assert await whole(fleet) == 200
    assert backend not in await sessions(fleet)
    stopped.send(signal.SIGCONT)
    woken = await stopped.ended()
    assert woken.code == 0, woken
    assert await whole(fleet) == 200
    assert "0 failed, of 200 recipients." in woken.out


STANDING = """
import pathlib, time
HERE = pathlib.Path(__file__).parent

class Standing:
    def recipients(self, period):
        return [{"key": n, "email": f"p{n}@example.com"} for n in range(40)]

    def build(self, recipient, period):
        (HERE / "reached").touch()
        while not (HERE / "go").exists():
            time.sleep(0.01)
        return [{"n": recipient.key}]
"""


async def test_a_server_that_is_stopped_between_two_statements_loses_its_buckets_as_well(fleet):
    """No transaction is open in a build, so the session is idle: another of Postgres' timeouts has to end it."""
    fleet.top = "lease_s = 2\nguard_s = 1"
    fleet.source = "standing:Standing"
    (fleet.directory / "standing.py").write_text(STANDING)
    stopped = await fleet.start("generate")
    await until((fleet.directory / "reached").exists, "the first builds")
    stopped.send(signal.SIGSTOP)
    (fleet.directory / "go").touch()
    ended = await fleet.run("generate", deadline_s=15)
    assert (ended.code, ended.err) == (0, ""), ended
    assert "40 made here" in ended.out
    stopped.send(signal.SIGCONT)
    woken = await stopped.ended()
    assert woken.code == 0, woken
    assert "0 made here, 40 elsewhere, 0 failed, of 40 recipients." in woken.out
    assert await whole(fleet) == 40


async def test_a_run_whose_backend_is_terminated_reconnects_and_finishes(fleet):
    fleet.data = slowly(0.01)
    await fleet.hire(150)
    cron = await fleet.start("generate")
    for least in (1, 40, 80):

        async def far_enough(least=least):
            return await whole(fleet) >= least and await sessions(fleet)

        await until(far_enough, f"{least} reports are made")
        terminated = await fleet.connection.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'outbox generate' AND datname = current_database()"
        )
        assert terminated == 1
    ended = await cron.ended()
    assert ended.code == 0, ended
    assert await whole(fleet) == 150
    assert ended.out.endswith("0 failed, of 150 recipients.\n")
    assert len(ended.sentences) == 3, ended.err


async def test_a_row_that_somebody_else_commits_meanwhile_has_the_last_word(fleet):
    """The unique key, not the bucket lock: another version, or a hand in psql, may not know of the locks."""
    await fleet.hire(20)
    await fleet.run("generate")
    await fleet.connection.execute("TRUNCATE outbox.report, outbox.email, outbox.delivery")
    other = await asyncpg.connect(fleet.database)
    transaction = other.transaction()
    await transaction.start()
    await other.execute(
        "WITH report AS (INSERT INTO outbox.report (edition, recipient_key, token, title, html)"
        " SELECT id, '7', 'token', 'title', 'html' FROM outbox.edition RETURNING id), email AS ("
        " INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)"
        " SELECT 'by hand', id, 'a@example.com', 'p7@example.com', '<7@example.com>', '' FROM report RETURNING id)"
        " INSERT INTO outbox.delivery (email) SELECT id FROM email"
    )
    cron = await fleet.start("generate")

    async def it_waits():
        return await fleet.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox generate'"
            " AND datname = current_database() AND wait_event_type = 'Lock'"
        )

    await until(it_waits, "generate waits for the other transaction")
    await transaction.commit()
    await other.close()
    ended = await cron.ended()
    assert (ended.code, ended.err) == (0, ""), ended
    assert "19 made here, 1 elsewhere, 0 failed, of 20 recipients." in ended.out
    assert await whole(fleet) == 20


async def test_an_email_that_is_too_large_or_has_too_long_a_key_fails_alone(fleet):
    await fleet.hire(3)
    fleet.top += "\nmessage_bytes_max = 100000"
    await fleet.run("init")
    await fleet.connection.execute(
        "ALTER TABLE people ADD COLUMN code text; UPDATE people SET code = id::text;"
        " UPDATE people SET code = repeat('k', 990) WHERE id = 2"
    )
    fleet.recipients = "select code as key, email, name from people"
    fleet.data = "select repeat('x ', case :key when '3' then 100000 else 1 end) as text"
    template = fleet.directory / "templates/progress/email.txt.j2"
    template.parent.mkdir(parents=True)
    template.write_text("{{ rows[0].text }}")
    ended = await fleet.run("generate")
    assert ended.code == 1
    assert "1 made here, 0 elsewhere, 2 failed, of 3 recipients." in ended.out
    assert "more than message_bytes_max (100,000)" in ended.err
    assert "more than 1000 octets" in ended.err


async def test_the_other_reports_are_made_when_one_cannot_be(fleet):
    fleet.report = """
[reports.broken]
timezone = "America/New_York"
recipients = "select nonsense"
data = "select :key as key"
link = "https://reports.example.com/r/{token}"
[reports.third]
cadence = "daily"
recipients = "select id::text as key, email from people"
data = "select :key as key"
link = "https://reports.example.com/r/{token}"
"""
    await fleet.hire(2)
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert sentence.startswith("reports.broken.recipients: ")
    assert [line.split()[0] for line in ended.out.splitlines()] == ["progress", "third"]
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 4


async def test_only_the_reports_that_are_named_are_made(fleet):
    fleet.report = """
[reports.other]
recipients = "select id::text as key, email from people"
data = "select :key as key"
link = "https://reports.example.com/r/{token}"
"""
    await fleet.hire(2)
    assert (await fleet.run("generate", "other")).code == 0
    assert await fleet.connection.fetchval("SELECT array_agg(report) FROM outbox.edition") == ["other"]


BULK = """
from outbox import Recipient

class Bulk:
    async def recipients(self, period):
        for n in range(5000):
            yield Recipient(f"k{n}", f"b{n}@example.com", f"Bulk {n}", {"n": n})

    async def build(self, recipient, period):
        return [{"n": recipient.columns["n"]}]
"""


async def test_five_thousand_recipients_of_a_python_source_are_made_in_one_run(fleet):
    fleet.source = "bulk:Bulk"
    (fleet.directory / "bulk.py").write_text(BULK)
    ended = await fleet.run("generate")
    assert (ended.code, ended.err) == (0, ""), ended
    assert "5000 made here, 0 elsewhere, 0 failed, of 5000 recipients." in ended.out
    assert await whole(fleet) == 5000
