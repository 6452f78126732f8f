"""Clocks that are wrong: of the servers, by an hour and in mid-run; of the database, past a boundary in mid-run.

The servers' clocks are shifted with libfaketime, wall clock only. Postgres runs under it, too, where its own clock
is to stand shortly before a boundary of a period.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from outbox.sandbox.postgres import Server, postgres
from outbox.testing.postgres import FAST
from tests.conftest import _make_template
from tests.support.fault_levers import all_sent, balance, delivery, post
from tests.support.fleet import Fleet, until

_numbers = itertools.count(1)

LIBRARY = next((str(found) for found in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime (Debian package: faketime)")


def shifted(by: str | Path) -> dict[str, str]:
    """The environment of a process whose wall clock is off by so much, or by what a file says at each moment."""
    told = {"FAKETIME_TIMESTAMP_FILE": str(by), "FAKETIME_NO_CACHE": "1"} if isinstance(by, Path) else {"FAKETIME": by}
    return {"LD_PRELOAD": LIBRARY or "", "FAKETIME_DONT_FAKE_MONOTONIC": "1", **told}


async def mails_are_dated_by_the_database(fleet: Fleet) -> None:
    """Within a minute of the row's own time, so not of a clock that is an hour off."""
    created = {
        row["message_id"]: row["created_at"]
        for row in await fleet.connection.fetch("SELECT message_id, created_at FROM outbox.email")
    }
    assert len(created) == len(fleet.sink.accepted)
    for accepted in fleet.sink.accepted:
        mail = message_from_bytes(accepted.message)
        said = parsedate_to_datetime(mail["Date"])
        assert abs((said - created[mail["Message-ID"]]).total_seconds()) < 60


async def nothing_is_off(fleet: Fleet) -> None:
    """No time in the database is from another clock than the database's."""
    off = await fleet.connection.fetch(
        "SELECT due_at, marked_at, settled_at FROM outbox.delivery"
        " WHERE greatest(due_at, marked_at, settled_at) > now() + interval '1 minute'"
        " OR least(due_at, marked_at, settled_at) < now() - interval '5 minutes'"
    )
    assert off == []


@pytest.mark.parametrize("by", ["+1h", "-1h"])
async def test_a_server_whose_clock_is_an_hour_off_makes_and_sends_as_any_other(fleet, by):
    await fleet.hire(10)
    ended = await fleet.run("generate", environment=shifted(by))
    assert (ended.code, ended.err) == (0, "")
    relay = await fleet.relay(environment=shifted(by))
    await all_sent(fleet, 10)
    await mails_are_dated_by_the_database(fleet)
    await nothing_is_off(fleet)
    straight = await fleet.run("generate")
    assert "0 made here, 10 already made" in straight.out
    assert relay.process.returncode is None
    await balance(fleet, 10)


async def test_a_clock_that_steps_in_mid_run_neither_hurries_nor_holds_up_a_relay(fleet):
    """An hour forward, then two back: leases, guard, retries and polls are on clocks that never step."""
    (clock := fleet.directory / "clock").write_text("+0")
    relay = await fleet.relay(environment=shifted(clock))
    for turn, by in enumerate(("+3600", "-3600", "+0")):
        await post(fleet, 10, first=1 + 20 * turn)
        await all_sent(fleet, 10 + 20 * turn)
        clock.write_text(by)
        await post(fleet, 10, first=11 + 20 * turn)
        await all_sent(fleet, 20 + 20 * turn)
    assert sum("holds its lock" in line for line in relay.log) == 1
    assert not any("guard" in line for line in relay.log)
    await nothing_is_off(fleet)
    assert fleet.twice == {}


async def test_a_deferred_mail_is_due_by_the_databases_clock(fleet):
    """A relay an hour ahead must not take what others have put off for later."""
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.delivery SET due_at = now() + interval '30 minutes'")
    await fleet.relay(environment=shifted("+1h"))
    await post(fleet, 1, first=2)
    await until(lambda: fleet.sink.messages == 1, "what is due is sent")
    assert set(fleet.sink.addresses) == {"p2@example.com"}
    assert (await delivery(fleet))["state"] == "pending"


# ── the database's clock passes a boundary ───────────────────────────────────────────────────────────────────────────


@dataclass
class Clock:
    """The clock of a Postgres: it runs on, from where it is set."""

    server: Server
    file: Path

    def set(self, moment: datetime) -> None:
        by_s = moment.timestamp() - time.time()
        (written := self.file.with_suffix(".new")).write_text(f"{by_s:+.3f}")
        written.chmod(0o644)
        written.rename(self.file)  # whole, whenever it is read


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    """A Postgres whose clock a test sets.

    The library comes in with the server's own program, by a script in front of it: whatever root has loaded before
    would leave a semaphore behind that the server's user cannot open.
    """
    with postgres(settings=FAST) as server:
        asyncio.run(_make_template(server))
        server.stop()
        real, there = server._binaries, server.data / "faked"
        there.mkdir()
        made = Clock(server, there / "clock")
        made.set(datetime.now(UTC))
        for name in ("initdb", "pg_isready"):
            (there / name).symlink_to(real / name)
        environment = " ".join(f"'{name}={value}'" for name, value in shifted(made.file).items())
        (there / "postgres").write_text(f'#!/bin/sh\nexec env {environment} "{real / "postgres"}" "$@"\n')
        (there / "postgres").chmod(0o755)
        server._binaries = there
        server.start()
        yield made


# A moment in UTC, and the period that a cron takes before and after it in New York. In the nights when clocks change
# an hour comes twice or is missing, on a Sunday at 2:00: no day begins or ends there, and two have 23 and 25 hours.
MOMENTS = {
    "day of 23 hours": ("daily", "2026-03-09T04:00Z", "2026-03-07", "2026-03-08"),
    "hour that comes twice": ("daily", "2026-11-01T06:00Z", "2026-10-31", "2026-10-31"),
    "day of 25 hours": ("daily", "2026-11-02T05:00Z", "2026-10-31", "2026-11-01"),
    "week": ("weekly", "2026-11-23T05:00Z", "2026-W46", "2026-W47"),
    "week of another year": ("weekly", "2027-01-04T05:00Z", "2026-W52", "2026-W53"),
}
PEOPLE = 12


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=[] if moment in ("day of 23 hours", "week of another year") else pytest.mark.slow)
        for moment in MOMENTS
    ],
)
async def test_crons_around_a_boundary_write_once_per_person_and_period(clock, sink, forks, tmp_path, moment):
    cadence, at, before, after = MOMENTS[moment]
    url, connection = await empty_database(clock)
    fleet = Fleet(url, connection, sink, tmp_path, report=f'cadence = "{cadence}"', top="lease_s = 3600", forks=forks)
    fleet.data = "select pg_sleep(0.05)::text as slept, :key as person"
    try:
        await cross(fleet, clock, datetime.fromisoformat(at))
        rows = await connection.fetch(
            "SELECT e.period, count(*) AS reports, count(DISTINCT r.recipient_key) AS people"
            " FROM outbox.edition e JOIN outbox.report r ON r.edition = e.id GROUP BY e.period ORDER BY 1"
        )
        periods = sorted({before, after})
        assert [tuple(row) for row in rows] == [(period, PEOPLE, PEOPLE) for period in periods]
        await fleet.start("relay")
        await all_sent(fleet, PEOPLE * len(periods))
        assert set(sink.addresses.values()) == {len(periods)}
        mails = {message_from_bytes(accepted.message)["Message-ID"] for accepted in sink.accepted}
        assert len(mails) == PEOPLE * len(periods)
    finally:
        await fleet.stop_all()
        await connection.close()


async def empty_database(clock: Clock) -> tuple[str, Any]:
    name = f"around_{next(_numbers)}"
    admin = await asyncpg.connect(clock.server.url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
    await admin.close()
    url = clock.server.database_url(name)
    return url, await asyncpg.connect(url)


async def test_relays_wait_for_a_tick_on_the_databases_clock_and_start_the_edition_then(clock, sink, forks, tmp_path):
    """At an hour that clocks jump over: it is started when they have, 03:00 in New York, by all relays at once."""
    at = datetime.fromisoformat("2026-03-08T07:00Z")
    url, connection = await empty_database(clock)
    report = 'cadence = "daily"\nschedule = "30 2 * * *"\ncatch_up = "1h"'
    fleet = Fleet(url, connection, sink, tmp_path, report=report, top="lease_s = 3600", forks=forks)
    try:
        await fleet.hire(PEOPLE)
        clock.set(at - timedelta(seconds=4))
        relays = [await fleet.relay() for _ in range(2)]
        for relay in relays:
            await relay.says("progress 2026-03-07: its schedule ticked at 2026-03-08 03:00 EDT, generating")
        await until(lambda: sink.messages == PEOPLE, "all are sent")
        assert set(sink.addresses.values()) == {1}
        await until(lambda: connection.fetchval("SELECT done_at FROM outbox.schedule"), "the tick is done")
        row = await connection.fetchrow(
            "SELECT tick_at, created_at FROM outbox.schedule JOIN outbox.edition USING (report)"
        )
        assert row["tick_at"] == at <= row["created_at"]
    finally:
        await fleet.stop_all()
        await connection.close()


async def cross(fleet: Fleet, clock: Clock, at: datetime) -> None:
    """Crons start one after the other from before the moment until after it; all of them succeed."""
    await fleet.hire(PEOPLE)
    clock.set(at - timedelta(minutes=10))
    crons = [await fleet.start("generate") for _ in range(2)]
    reports = "SELECT count(*) FROM outbox.report"
    await until(lambda: fleet.connection.fetchval(reports), "the first are at work", deadline_s=60)
    clock.set(at - timedelta(seconds=1.5))
    while not await fleet.connection.fetchval("SELECT now() > $1", at):
        if sum(cron.process.returncode is None for cron in crons) < 2:
            crons.append(await fleet.start("generate"))
        await asyncio.sleep(0.05)
    crons += [await fleet.start("generate") for _ in range(2)]
    for cron in crons:
        ended = await cron.ended(60)
        assert (ended.code, ended.err) == (0, ""), ended
