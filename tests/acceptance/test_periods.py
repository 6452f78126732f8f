"""Which period `outbox generate` takes, from whose clock, and that the whole fleet agrees on it."""

import pytest

from outbox.generate.run import generate
from outbox.monitoring.fleet import read_fleet
from outbox.settings import load
from outbox.settings.urls import DatabaseUrl

CIVIL = """
WITH t AS (SELECT date_trunc($1, now() AT TIME ZONE $2) AS this)
SELECT to_char(CASE WHEN $3 THEN this ELSE this - ('1 ' || $1)::interval END, $4) AS key,
       CASE WHEN $3 THEN this ELSE this - ('1 ' || $1)::interval END AT TIME ZONE $2 AS starts_at,
       CASE WHEN $3 THEN this + ('1 ' || $1)::interval ELSE this END AT TIME ZONE $2 AS ends_at
  FROM t
"""
UNITS = {"weekly": ("week", 'IYYY"-W"IW'), "daily": ("day", "YYYY-MM-DD"), "monthly": ("month", "YYYY-MM")}


async def editions(fleet):
    rows = await fleet.connection.fetch("SELECT period, starts_at, ends_at FROM outbox.edition ORDER BY id")
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("covers", ["previous", "current"])
@pytest.mark.parametrize("cadence", UNITS)
async def test_the_period_is_the_civil_one_of_the_reports_timezone_by_the_databases_clock(fleet, cadence, covers):
    """Postgres computes it too. The two zones are 26 hours apart: their days always differ."""
    timezone = {"previous": "Pacific/Kiritimati", "current": "Etc/GMT+12"}[covers]
    fleet.timezone = timezone
    fleet.report = f'cadence = "{cadence}"\ncovers = "{covers}"\nmay_be_empty = true'
    unit, spelling = UNITS[cadence]
    looks = [await fleet.connection.fetchrow(CIVIL, unit, timezone, covers == "current", spelling)]
    ended = await fleet.run("generate", environment={"TZ": "Asia/Tokyo"})
    looks.append(await fleet.connection.fetchrow(CIVIL, unit, timezone, covers == "current", spelling))
    assert (ended.code, ended.err) == (0, "")
    (found,) = await editions(fleet)
    assert found in [tuple(look) for look in looks]
    assert ended.out.startswith(f"progress {found[0]}: ")


async def test_the_database_clock_decides_and_the_servers_clock_does_not(fleet, monkeypatch):
    """A `now()` of the test's own, before pg_catalog's on the search path, is a database whose clock is elsewhere."""
    monkeypatch.setattr("outbox.database.connection.TRUSTED_PATH", "clock, pg_catalog, pg_temp")
    fleet.report = "may_be_empty = true"
    settings = load(fleet.write_settings())
    found = []
    for now in ("2027-01-04 04:59:59 UTC", "2027-01-04 05:00:00 UTC"):
        await fleet.connection.execute(
            "CREATE SCHEMA IF NOT EXISTS clock;"
            "CREATE OR REPLACE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE AS"
            f" $$ SELECT timestamptz '{now}' $$"
        )
        await generate(settings, "progress")
        found.append([period for period, *_ in await editions(fleet)])
    assert found == [["2026-W52"], ["2026-W52", "2026-W53"]]


@pytest.mark.parametrize(
    "cadence, period, hours",
    [
        ("weekly", "2025-W44", 169),  # clocks go back on 2 November in New York
        ("daily", "2025-03-09", 23),
        ("monthly", "2025-11", 721),
        ("weekly", "2020-W53", 168),
    ],
)
async def test_a_period_that_is_named_is_made_with_its_civil_hours(fleet, cadence, period, hours):
    fleet.report = f'cadence = "{cadence}"'
    await fleet.hire(1)
    ended = await fleet.run("generate", "--period", period)
    assert (ended.code, ended.err) == (0, "")
    ((found, starts_at, ends_at),) = await editions(fleet)
    assert (found, (ends_at - starts_at).total_seconds() / 3600) == (period, hours)


NO_PERIODS = {
    "weekly": ("2026-48", "2026-W54", "2027-W53", "2026-W48 ", "", "'; drop schema outbox"),
    "daily": ("2026-W48", "2026-02-30", "20261124"),
    "monthly": ("2026-13", "2026-1"),
}


@pytest.mark.parametrize("cadence", NO_PERIODS)
async def test_a_period_that_is_none_is_refused_in_one_sentence_and_nothing_is_written(fleet, cadence):
    fleet.report = f'cadence = "{cadence}"'
    await fleet.hire(1)
    crons = [await fleet.start("generate", "--period", period) for period in NO_PERIODS[cadence]]
    for cron in crons:
        ended = await cron.ended()
        assert (ended.code, ended.out) == (2, "")
        (sentence,) = ended.sentences
        assert sentence.startswith("--period, for report progress: ")
        assert sentence.endswith(f"is not a {cadence} period; write one like " + _example(cadence))
    assert await nothing_written(fleet)


def _example(cadence):
    return {"weekly": "2026-W48.", "daily": "2026-11-24.", "monthly": "2026-11."}[cadence]


async def nothing_written(fleet):
    tables = ("definition", "edition", "report", "email", "delivery")
    return [await fleet.connection.fetchval(f"SELECT count(*) FROM outbox.{table}") for table in tables] == [0] * 5


async def test_a_period_that_is_not_over_is_made_only_if_that_is_asked_for(fleet):
    await fleet.hire(2)
    ended = await fleet.run("generate", "--period", "9998-W10")
    assert (ended.code, ended.out) == (2, "")
    (sentence,) = ended.sentences
    assert sentence.startswith("--period, for report progress: 9998-W10 has not begun (9998-03-02 00:00 to 9998-03-09 ")
    assert "add --early" in sentence
    assert await nothing_written(fleet)
    shown = await fleet.run("preview", "progress", "--period", "9998-W10", "--out", str(fleet.directory / "shown"))
    assert "`outbox generate` does not make it yet: 9998-W10 has not begun" in shown.out
    alone = await fleet.run("generate", "--early")
    assert (alone.code, alone.sentences[0].partition(":")[0]) == (2, "--early")

    early = await fleet.run("generate", "--period", "9998-W10", "--early")
    assert (early.code, early.err) == (0, "")
    assert "2 made here" in early.out
    usual = await fleet.run("generate")
    assert (usual.code, usual.err) == (0, "")
    (newest,) = (await read_fleet(DatabaseUrl.parse(fleet.database))).editions
    assert newest.period == usual.out.split()[1].rstrip(":"), "not the one of the future"


async def test_each_period_has_a_report_of_its_own(fleet):
    await fleet.hire(3)
    for period in ("2026-W46", "2026-W47", "2026-W46"):
        assert (await fleet.run("generate", "--period", period)).code == 0
    assert [period for period, *_ in await editions(fleet)] == ["2026-W46", "2026-W47"]
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 6


# ── the fleet's definition ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key, other",
    [("timezone", "Europe/Berlin"), ("cadence", "daily"), ("covers", "current")],
)
async def test_a_server_with_other_settings_is_refused_until_somebody_redefines_them_for_the_fleet(fleet, key, other):
    await fleet.hire(2)
    assert (await fleet.run("generate", "--period", "2026-W40")).code == 0
    before = (await editions(fleet), await fleet.connection.fetchval("SELECT count(*) FROM outbox.email"))
    if key == "timezone":
        fleet.timezone = other
    else:
        fleet.report = f'{key} = "{other}"'

    refused = await fleet.run("generate")
    assert refused.code == 2
    (sentence,) = refused.sentences
    assert sentence.startswith("reports.progress: ")
    assert f"{key} = " in sentence
    assert repr(other) in sentence
    assert "outbox init --redefine progress" in sentence
    assert (await editions(fleet), await fleet.connection.fetchval("SELECT count(*) FROM outbox.email")) == before

    mended = await fleet.run("init", "--redefine", "progress")
    assert (mended.code, mended.err) == (0, "")
    assert other in mended.out
    assert (await fleet.run("generate")).code == 0


async def test_of_two_servers_that_disagree_from_the_start_exactly_one_is_refused(fleet):
    await fleet.hire(5)
    fleet.report = 'cadence = "daily"'
    other = (fleet.write_settings()).rename(fleet.directory / "other.toml")
    fleet.report = ""
    crons = [await fleet.start("generate"), await fleet.start("--config", str(other), "generate")]
    ends = [await cron.ended() for cron in crons]
    assert sorted(end.code for end in ends) == [0, 2], ends
    assert len(await editions(fleet)) == 1
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 5


async def test_redefining_an_unknown_report_is_refused(fleet):
    ended = await fleet.run("init", "--redefine", "progres")
    assert ended.code == 2
    (sentence,) = ended.sentences
    assert "progress" in sentence


@pytest.mark.parametrize("zone", ["Pacific/Auckland", "Europe/Berlin", "UTC", "America/New_York"])
async def test_a_date_column_gives_the_civil_week_east_and_west_of_utc(fleet, zone):
    await fleet.connection.execute(
        "CREATE TABLE daily AS SELECT d::date AS day, 1 AS done"
        " FROM generate_series('2026-11-09'::date, '2026-11-29', interval '1 day') d;"
        "INSERT INTO people VALUES (1, 'p1@example.com', 'One')"
    )
    fleet.data = "select day, done from daily where day >= :starts_at and day < :ends_at and :key <> '' order by day"
    path = fleet.write_settings()
    path.write_text(path.read_text().replace("America/New_York", zone))
    fleet.write_settings = lambda: path
    ended = await fleet.run("generate", "--period", "2026-W47")
    assert ended.code == 0, ended
    page = await fleet.connection.fetchval("SELECT html FROM outbox.report")
    assert [day for day in range(9, 30) if f" {day} Nov" in page.split("<table", 1)[1]] == list(range(16, 23))
