"""Schedules: relays start the editions, as crons would, and come back to what they missed or what failed."""

import asyncio
import json
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from tests.support.fleet import COUNTING_DATA, until

ZONE = ZoneInfo("America/New_York")
DAILY = 'cadence = "daily"\ncovers = "current"\n'


def ticked(ago: timedelta) -> str:
    """A daily schedule whose latest tick is so long ago, rounded up to a minute, and is the first that is followed."""
    at = datetime.now(UTC).astimezone(ZONE) - ago
    return f'schedule = "{at.minute} {at.hour} * * *"\nfirst_tick = "latest"\n'


async def agenda(fleet):
    ended = await fleet.run("schedule", "--json", "--count", "2")
    assert (ended.code, ended.err) == (0, ""), ended
    (found,) = json.loads(ended.out)["schedules"]
    return found


async def generating(fleet) -> int:
    """How many sessions of generate there are."""
    return await fleet.connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name LIKE 'outbox generate%' AND datname = current_database()"
    )


async def is_done(fleet):
    return await fleet.connection.fetchval("SELECT done_at FROM outbox.schedule WHERE report = 'progress'")


async def test_relays_start_the_edition_and_everybody_gets_one_email_beside_a_cron(fleet):
    fleet.report, fleet.data = DAILY + ticked(timedelta(minutes=3)), COUNTING_DATA
    await fleet.hire(20)
    assert (await agenda(fleet))["last"]["state"] == "due"
    relays = [await fleet.start("relay") for _ in range(3)]
    await until(lambda: fleet.sink.messages == 20, "all are sent")
    await until(lambda: is_done(fleet), "the tick is done")
    found = await agenda(fleet)
    last, following = found["last"], found["next"]
    cron = await fleet.run("generate", "--period", last["period"])
    assert ", 20 already made, 0 failed" in cron.out
    assert fleet.twice == {}
    assert await fleet.connection.fetchval("SELECT count(*) FROM build") == 20

    assert (last["state"], last["failures"], last["said"]) == ("done", 0, None)
    tick_at, *ahead = (datetime.fromisoformat(tick["tick_at"]) for tick in (last, *following))
    assert last["period"] == tick_at.astimezone(ZONE).date().isoformat()
    assert ahead[0].astimezone(ZONE).date() == tick_at.astimezone(ZONE).date() + timedelta(days=1)
    text = (await fleet.run("schedule", "progress")).out
    assert f"{tick_at.astimezone(ZONE):%a %Y-%m-%d %H:%M} E" in text
    assert " done " in text
    assert text.count(" in ") == 3
    for relay in relays:
        relay.send(signal.SIGTERM)
    assert [(await relay.ended()).code for relay in relays] == [0, 0, 0]
    assert sum("20 recipients" in line for relay in relays for line in relay.log) >= 1


async def test_what_a_relay_leaves_when_it_is_stopped_or_killed_another_finishes(fleet):
    """Its generate ends with it, whatever it dies of."""
    fleet.report, fleet.top = DAILY + ticked(timedelta(minutes=3)), "lease_s = 3\nguard_s = 1"
    fleet.data = COUNTING_DATA.replace("1 as done", "pg_sleep(0.03)::text as done")
    await fleet.hire(80)
    fleet.smtp = "smtp://127.0.0.1:1"  # nobody can send yet
    for turn, signum in enumerate((signal.SIGTERM, signal.SIGKILL), 1):
        relay = await fleet.start("relay")
        await until(lambda least=4 * turn: _made(fleet, least), "its generate is at work")
        relay.send(signum)
        await relay.process.wait()
        await until(lambda: _none(fleet), "its generate is gone, too", 3)
        assert not await is_done(fleet)
    assert not await _made(fleet, 80)
    fleet.smtp = None
    await fleet.start("relay")
    await until(lambda: is_done(fleet), "another finishes it")
    await until(lambda: fleet.sink.messages == 80, "all are sent")
    assert fleet.twice == {}
    assert await fleet.connection.fetchval("SELECT failures FROM outbox.schedule") == 0


async def _made(fleet, least):
    return await fleet.connection.fetchval("SELECT count(*) >= $1 FROM outbox.report", least)


async def _none(fleet):
    return await generating(fleet) == 0


async def _held(fleet, relays):
    return await fleet.connection.fetchval(
        "SELECT count(DISTINCT pid) = $1 FROM pg_locks WHERE relation = 'people'::regclass AND NOT granted", relays
    )


async def test_a_generate_that_fails_is_said_and_tried_again_and_the_relay_goes_on(fleet):
    fleet.report, fleet.data = DAILY + ticked(timedelta(minutes=3)), "select day from late where :key > ''"
    await fleet.hire(2)
    await fleet.put_emails(1)

    async def failures():
        return await fleet.connection.fetchval("SELECT failures FROM outbox.schedule")

    async with fleet.connection.transaction():  # both wait for it, so that they fail at once
        await fleet.connection.execute("LOCK people")
        relays = [await fleet.relay(), await fleet.relay()]
        await until(lambda: _held(fleet, 2), "both read the recipients")
    for relay in relays:
        await relay.says("late")
    await until(lambda: _none(fleet), "both have tried")
    await until(failures, "the failure is written")
    found = (await agenda(fleet))["last"]
    assert (found["state"], found["failures"]) == ("failing", 1)
    assert "late" in found["said"]
    waits = datetime.fromisoformat(found["retry_at"]) - datetime.now(UTC)
    assert timedelta(seconds=30) < waits <= timedelta(minutes=2)
    text = (await fleet.run("schedule")).out
    assert "late" in text
    assert "tried again" in text
    (trouble,) = json.loads((await fleet.run("status", "--json")).out)["schedules"]
    assert (trouble["report"], trouble["said"]) == ("progress", found["said"])
    assert found["said"] in (await fleet.run("status")).out
    checks = json.loads((await fleet.run("doctor", "--json")).out)["checks"]
    assert [check["grade"] for check in checks if check["check"] == "schedules"] == ["fault"]

    await fleet.connection.execute("CREATE TABLE late (day int); INSERT INTO late VALUES (1)")
    await fleet.relay()  # has not tried yet, so it does not wait
    await until(lambda: fleet.sink.messages == 3, "all are sent")
    await until(lambda: is_done(fleet), "the tick is done")


async def test_a_tick_that_is_too_old_is_missed_and_said_and_a_relay_outlives_what_it_cannot_read(fleet):
    at = datetime.now(UTC).astimezone(ZONE) - timedelta(days=1, minutes=10)
    days = ",".join(str((at - timedelta(days=n)).day) for n in range(3))  # none of them is today
    schedule = f'{DAILY}schedule = "{at.minute} {at.hour} {days} * *"\n'
    fleet.report = schedule + 'catch_up = "5min"\n'
    await fleet.hire(2)
    assert (await agenda(fleet))["last"]["state"] == "new"
    assert "before the schedule was followed" in (await fleet.run("schedule")).out
    # Since then the fleet slept through a day, and another tick.
    await fleet.connection.execute("INSERT INTO outbox.schedule (report, tick_at, done_at) VALUES ('progress', $1, $1)",
                                   datetime.now(UTC) - timedelta(days=3))  # fmt: skip
    await fleet.connection.execute("ALTER TABLE outbox.schedule RENAME TO hidden")
    relay = await fleet.relay()
    await relay.says("the schedules cannot be looked at, trying again: relation")
    await fleet.connection.execute("ALTER TABLE outbox.hidden RENAME TO schedule")
    await relay.says("so it is missed")
    assert "missed, too late since" in (await fleet.run("schedule")).out
    checks = json.loads((await fleet.run("doctor", "--json")).out)["checks"]
    assert [check["grade"] for check in checks if check["check"] == "schedules"] == ["note"]
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.edition") == 0

    fleet.report = schedule + 'catch_up = "3d"\n'
    await (relay := await fleet.relay()).says("only the latest tick is caught up with")
    skipped = next(line for line in relay.log if "only the latest tick" in line)
    assert f"for {(at - timedelta(days=1)).date()};" in skipped
    await until(lambda: fleet.sink.messages == 2, "the latest edition is sent")
    periods = [row["period"] for row in await fleet.connection.fetch("SELECT period FROM outbox.edition")]
    assert periods == [at.date().isoformat()]  # that of the tick, not today's


async def schedules_of(fleet):
    """The grade and the words of the doctor's line."""
    checks = json.loads((await fleet.run("doctor", "--json")).out)["checks"]
    (found,) = [check for check in checks if check["check"] == "schedules"]
    return found["grade"], found["found"]


async def test_the_first_relay_makes_nothing_of_the_tick_before_it_and_a_later_one_catches_up(fleet):
    """Another system may have sent the latest edition; from then on the fleet is the one that sends them."""
    fleet.report = DAILY + ticked(timedelta(minutes=3)).replace('first_tick = "latest"', "")
    await fleet.hire(2)
    last, following = (await agenda(fleet))["last"], (await agenda(fleet))["next"][0]
    assert last["state"] == "new"
    at = f"{datetime.fromisoformat(following['tick_at']):%Y-%m-%d %H:%M}"
    starts = f"progress is new: relays start with {following['period']} at {at} UTC, and do not make"
    assert await schedules_of(fleet) == ("ok", f"{starts} {last['period']}")
    relay = await fleet.relay()
    await relay.says("its schedule is followed from now on")
    await relay.says(f"progress {last['period']}: no relay makes it")
    relay.send(signal.SIGTERM)
    assert (await relay.ended()).code == 0
    assert (await agenda(fleet))["last"]["state"] == "new"
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.edition") == 0

    # All of it a day ago: since then the relays have slept through a tick.
    await fleet.connection.execute(
        "UPDATE outbox.schedule SET tick_at = tick_at - interval '1 day',"
        " since = since - interval '1 day', done_at = done_at - interval '1 day'"
    )
    grade, found = await schedules_of(fleet)
    assert (grade, found.partition(", since")[0]) == ("note", f"a relay makes progress {last['period']} at once")
    await fleet.relay()
    await until(lambda: fleet.sink.messages == 2, "they catch up with it")
    assert fleet.twice == {}


async def test_a_tick_whose_edition_another_system_made_is_done_and_nothing_is_sent(fleet):
    fleet.report = DAILY + ticked(timedelta(minutes=3))
    await fleet.hire(2)
    period = (await agenda(fleet))["last"]["period"]
    marked = await fleet.run("mark-done", "progress", period, "--why", "sent by the old cron")
    assert (marked.code, marked.err) == (0, "")
    relay = await fleet.relay()
    await relay.says("(sent by the old cron); nothing is made")
    await until(lambda: is_done(fleet), "the tick is done")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 0
    by_hand = await fleet.run("generate", "--period", period)
    assert (by_hand.code, by_hand.err) == (0, "")
    assert by_hand.out.startswith(f"progress {period}: declared as done elsewhere by ")
    status = await fleet.run("status", environment={"COLUMNS": "20"})
    assert f"\nprogress  {period}         0 " in status.out, "a table in a file is not folded"
    assert f"\nprogress {period}: done elsewhere, as declared on " in status.out
    audit = await fleet.run("audit", "progress", period)
    assert (audit.code, audit.err) == (0, "")
    assert "missing" not in audit.out
    assert audit.out.splitlines()[-1].startswith(f"All is well: progress {period} was done elsewhere")
    faults = await fleet.run("mark-done", "progress", "2026-40"), await fleet.run("mark-done", "nobody", period)
    assert [(one.code, len(one.sentences)) for one in faults] == [(2, 1), (2, 1)]


async def test_an_empty_edition_of_a_schedule_fails_and_is_said(fleet):
    fleet.report = DAILY + ticked(timedelta(minutes=3))
    relay = await fleet.relay()
    await relay.says("the recipients query returns no row, so nobody gets an email")
    await until(lambda: fleet.connection.fetchval("SELECT failures FROM outbox.schedule"), "the failure is written")
    assert (await agenda(fleet))["last"]["state"] == "failing"
    assert "returns no row" in (await fleet.run("status")).out
    assert await fleet.connection.fetchval("SELECT completed_at FROM outbox.edition") is None


async def test_where_nothing_is_scheduled_or_settings_are_missing_a_sentence_says_so(fleet):
    ended = await fleet.run("schedule")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("No report has a schedule")
    ended = await fleet.run("schedule", "progress")
    assert (ended.code, ended.sentences) == (
        2, ['reports.progress: has no schedule; write one like schedule = "0 6 * * mon".']
    )  # fmt: skip
    fleet.report = ticked(timedelta(minutes=3))
    fleet.settings = fleet._settings().replace("\nsender", "\n# sender")
    relay, schedule, drained = await asyncio.gather(
        fleet.run("relay"),
        fleet.run("schedule", environment={"OUTBOX_DATABASE_URL": "postgresql://127.0.0.1:1/x"}),
        fleet.run("relay", "--until-empty"),
    )
    assert (relay.code, len(relay.sentences)) == (2, 1)
    assert "sender: is not set" in relay.err
    assert (schedule.code, len(schedule.sentences)) == (1, 1)
    assert "does not answer" in schedule.err
    assert drained.code == 0
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.schedule") == 0


async def test_relays_close_a_digest_once_the_reports_are_made_that_ticked_before_it(fleet):
    """After an outage both are due at once; a digest that was closed first would tell of nothing."""
    fleet.report = 'deliver = "digest"\n' + DAILY + ticked(timedelta(minutes=4))
    fleet.top = '[digest]\nlink = "https://reports.example.com/d/{token}"\ntimezone = "America/New_York"\n'
    fleet.top += DAILY + ticked(timedelta(minutes=3))
    fleet.data = COUNTING_DATA.replace("1 as done", "pg_sleep(0.05)::text as done")
    await fleet.hire(10)
    for _ in range(2):
        await fleet.start("relay")
    await until(lambda: fleet.sink.messages == 10, "each is told of the report")
    done = "SELECT min(done_at) < max(done_at) AND count(done_at) = 2 FROM outbox.schedule"
    await until(lambda: fleet.connection.fetchval(done), "both are done, one after the other")
    assert fleet.twice == {}
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.digest_item WHERE digest IS NULL") == 0


async def test_a_generate_that_hangs_is_ended_with_its_catch_up(fleet):
    """Else it would hold one of the places for generates for ever."""
    ago = timedelta(minutes=2)
    since_s = (ago + timedelta(seconds=datetime.now(UTC).second)).total_seconds()
    fleet.report = DAILY + ticked(ago) + f'catch_up = "{since_s + 9:.0f}s"'
    fleet.data = COUNTING_DATA.replace("1 as done", "pg_sleep(600)::text as done")
    await fleet.hire(1)
    relay = await fleet.start("relay")
    await until(lambda: generating(fleet), "it hangs")
    said = "SELECT said FROM outbox.schedule"
    why = await until(lambda: fleet.connection.fetchval(said), "it is ended, and that is written down")
    assert why == "it was not done when catch_up was over, and was ended"
    await relay.says("so it is missed")
    assert _children(relay.pid) == ""


def _children(pid: int) -> str:
    """Its child processes, where the kernel tells."""
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return told.read_text() if told.exists() else ""
