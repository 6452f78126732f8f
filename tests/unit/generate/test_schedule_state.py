"""State of schedules: the editions that ticks start, and what the fleet's rows say about them."""

from datetime import UTC, datetime, timedelta

import pytest

from outbox.generate.schedule_state import Row, Seen, Standing, caught_up_until, latest, passed_over, tick_of, upcoming
from outbox.settings import ReportSettings

NEW_YORK = "America/New_York"


def report(schedule, timezone=NEW_YORK, **more):
    return ReportSettings(
        link="{token}", recipients="select 1", data="select :key", timezone=timezone, schedule=schedule, **more
    )


def test_a_tick_starts_the_edition_of_its_own_moment_however_late_it_is():
    weekly = report("0 6 * * mon")
    monday = datetime(2026, 11, 23, 11, tzinfo=UTC)
    assert tick_of(weekly, monday).period == "2026-W47"
    late = latest(weekly, None, monday + timedelta(days=6, hours=23))
    assert (late.tick, late.standing) == (tick_of(weekly, monday), Standing.DUE)
    assert [tick.period for tick in upcoming(weekly, monday, 2)] == ["2026-W48", "2026-W49"]
    midnight = report("0 0 * * *", cadence="daily", covers="current")
    assert [tick.period for tick in upcoming(midnight, monday, 2)] == ["2026-11-24", "2026-11-25"]


@pytest.mark.parametrize(
    ("more", "tick", "until"),
    [
        ({}, "2026-10-26T10:00Z", "2026-11-02T11:00Z"),  # a week of civil time, in which clocks go back
        ({"cadence": "daily"}, "2026-11-01T06:30Z", "2026-11-02T06:30Z"),
        ({"cadence": "monthly"}, "2026-12-01T11:00Z", "2027-01-01T11:00Z"),
        ({"catch_up": "90min"}, "2026-10-26T10:00Z", "2026-10-26T11:30Z"),
    ],
)
def test_a_tick_is_caught_up_with_for_one_cadence_or_as_long_as_it_is_said(more, tick, until):
    written = report("0 6 * * mon", **more)
    assert caught_up_until(written, tick_of(written, datetime.fromisoformat(tick))) == datetime.fromisoformat(until)


MONDAY = datetime(2026, 11, 23, 11, tzinfo=UTC)
HOUR = timedelta(hours=1)


def row(tick_at, done_at=None, failures=0):
    return Row(tick_at, done_at, failures, tick_at, "why" if failures else None)


def followed_since(since):
    return Row(MONDAY, since, 0, since, None, since)


@pytest.mark.parametrize(
    ("known", "hours", "standing", "tick_at"),
    [
        (None, 1, Standing.DUE, MONDAY),
        (None, 13, Standing.NEW, MONDAY),
        (row(MONDAY - 168 * HOUR, MONDAY), 1, Standing.DUE, MONDAY),
        (row(MONDAY - 168 * HOUR, MONDAY), 13, Standing.MISSED, MONDAY),
        (row(MONDAY), 1, Standing.DUE, MONDAY),
        (row(MONDAY, failures=2), 1, Standing.FAILING, MONDAY),
        (row(MONDAY, failures=2), 13, Standing.MISSED, MONDAY),
        (row(MONDAY, MONDAY, failures=2), 13, Standing.DONE, MONDAY),
        # Another server's settings say a later hour, which the fleet follows; its clock was wrong, which nobody does.
        (row(MONDAY + HOUR), 2, Standing.DUE, MONDAY + HOUR),
        (row(MONDAY + 24 * 365 * HOUR, MONDAY), 1, Standing.DUE, MONDAY),
    ],
)
def test_a_tick_stands_as_the_fleets_row_and_the_databases_clock_say(known, hours, standing, tick_at):
    found = latest(report("0 6 * * mon", catch_up="12h"), known, MONDAY + hours * HOUR)
    assert (found.standing, found.tick.at) == (standing, tick_at)


WEDNESDAY = MONDAY + 48 * HOUR
NEXT_MONDAY = MONDAY + 168 * HOUR


@pytest.mark.parametrize(
    ("known", "is_new", "more", "now", "standing", "tick_at"),
    [
        (None, True, {}, WEDNESDAY, Standing.NEW, MONDAY),  # another system may have made it
        (None, True, {"first_tick": "latest"}, WEDNESDAY, Standing.DUE, MONDAY),
        (None, False, {}, WEDNESDAY, Standing.DUE, MONDAY),  # outbox has begun that edition
        # The fleet has followed it since Wednesday: the next tick is caught up with, even if all relays slept over it.
        (followed_since(WEDNESDAY), False, {}, WEDNESDAY + HOUR, Standing.NEW, MONDAY),
        (followed_since(WEDNESDAY), False, {"first_tick": "latest"}, WEDNESDAY + HOUR, Standing.NEW, MONDAY),
        (followed_since(WEDNESDAY), False, {}, NEXT_MONDAY + 60 * HOUR, Standing.DUE, NEXT_MONDAY),
        # The schedule was changed on Thursday: a tick on Tuesday was never followed, one on Thursday is.
        (
            followed_since(WEDNESDAY),
            False,
            {"at": "0 6 * * tue"},
            WEDNESDAY + 30 * HOUR,
            Standing.NEW,
            MONDAY + 24 * HOUR,
        ),
        (
            followed_since(WEDNESDAY),
            False,
            {"at": "0 6 * * thu"},
            WEDNESDAY + 30 * HOUR,
            Standing.DUE,
            MONDAY + 72 * HOUR,
        ),
    ],
)
def test_a_report_that_is_new_to_outbox_starts_with_its_next_tick(known, is_new, more, now, standing, tick_at):
    more = dict(more)
    found = latest(report(more.pop("at", "0 6 * * mon"), **more), known, now, is_new=is_new)
    assert (found.standing, found.tick.at) == (standing, tick_at)


@pytest.mark.parametrize(
    ("made", "standing"),
    [(["2026-W47"], Standing.DUE), (["2026-W46"], Standing.NEW), ([], Standing.NEW)],
)
def test_a_new_schedule_finishes_the_edition_that_outbox_has_begun_and_no_other(made, standing):
    """An older edition may be of a trial: the old cron job has sent the latest one all the same."""
    seen = Seen(WEDNESDAY, {}, {"progress": frozenset(made)})
    assert seen.latest("progress", report("0 6 * * mon", covers="previous")).standing is standing


def test_periods_that_nobody_catches_up_with_are_named():
    weekly = report("0 6 * * mon,thu")
    tick = tick_of(weekly, MONDAY)
    assert tick.period == "2026-W47"
    assert passed_over(weekly, row(MONDAY - 168 * HOUR, MONDAY), tick) == []
    assert passed_over(weekly, row(MONDAY - 168 * HOUR), tick) == ["2026-W46"]
    assert passed_over(weekly, row(MONDAY - 4 * 168 * HOUR, MONDAY), tick) == ["2026-W44", "2026-W45", "2026-W46"]
    every_minute = report("* * * * *")
    assert len(passed_over(every_minute, row(MONDAY - 9000 * HOUR), tick)) == 10


@pytest.mark.parametrize(
    ("known", "hours", "is_early"),
    [
        (None, 0, True),  # the report is due
        (row(MONDAY, failures=1), 0, True),
        (row(MONDAY, failures=1), 1, False),  # it fails for an hour
        (row(MONDAY, MONDAY), 0, False),
    ],
)
def test_a_digest_waits_for_the_reports_that_it_names_but_not_long_for_one_that_fails(known, hours, is_early):
    collected = report("0 6 * * mon", deliver="digest")
    digest = latest(report("0 6 * * mon"), None, MONDAY)
    seen = Seen(MONDAY + hours * HOUR, {} if known is None else {"progress": known}, {})
    assert seen.is_too_early_for_digest(digest, {"progress": collected}) is is_early
    assert not seen.is_too_early_for_digest(digest, {"progress": report("0 6 * * mon")})
