from datetime import UTC, datetime, time, timedelta
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo, available_timezones

from hypothesis import example, given, settings
from hypothesis import strategies as st

from outbox.reports.schedule import Schedule, fault_of

zones = st.sampled_from(sorted(available_timezones())).map(ZoneInfo)
DAY = timedelta(days=1)


@st.composite
def moments(draw):
    """A zone and an instant, mostly near a change of its clocks, which chance alone would not meet."""
    zone, now = draw(zones), draw(st.datetimes(datetime(1975, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
    days = [(now + n * DAY).astimezone(zone) for n in range(366)]
    changes = [day for eve, day in pairwise(days) if eve.utcoffset() != day.utcoffset()]
    if changes:
        now = draw(st.sampled_from(changes)).astimezone(UTC) + draw(st.timedeltas(-2 * DAY, DAY))
    return zone, now


def field(least, most):
    number = st.integers(least, most).map(str)
    return st.one_of(
        st.just("*"),
        number,
        st.lists(number, min_size=1, max_size=3).map(",".join),
        st.integers(1, most).map("*/{}".format),
    )


expressions = st.tuples(
    field(0, 59), field(0, 23), st.sampled_from(["*", "*", "1-7", "L", "13"]), st.just("*"), st.just("*") | field(0, 6)
).map(" ".join)

NEW_YORK = (ZoneInfo("America/New_York"), datetime(2026, 11, 1, 6, 15, tzinfo=UTC))
LORD_HOWE = (ZoneInfo("Australia/Lord_Howe"), datetime(2026, 4, 4, 15, 10, tzinfo=UTC))
APIA = (ZoneInfo("Pacific/Apia"), datetime(2011, 12, 30, 9, 59, tzinfo=UTC))
SAO_PAULO = (ZoneInfo("America/Sao_Paulo"), datetime(2018, 11, 4, 2, 50, tzinfo=UTC))
ST_JOHNS = (ZoneInfo("America/St_Johns"), datetime(2010, 11, 7, 2, 45, tzinfo=UTC))


@settings(deadline=None)
@given(moments(), expressions)
@example(NEW_YORK, "45 1 * * *")
@example(LORD_HOWE, "*/20 1,2 * * *")
@example(APIA, "0 6,12 * * *")
@example(SAO_PAULO, "0,30 0 * * *")
@example(ST_JOHNS, "30 23 * * *")
def test_ticks_grow_and_the_latest_one_is_the_one_before_the_next(moment, expression):
    zone, now = moment
    assert fault_of(expression) is None
    schedule = Schedule(expression, zone)
    following = list(islice(schedule.after(now), 5))
    assert all(one < other for one, other in pairwise([now, *following]))
    for tick in following:
        assert schedule.latest(tick) == tick
        assert schedule.latest(tick + timedelta(microseconds=1)) == tick
    latest = schedule.latest(now)
    assert latest <= now
    assert next(schedule.after(latest)) == following[0]
    assert next(schedule.after(latest - timedelta(microseconds=1))) == latest


@settings(deadline=None, max_examples=40)
@given(moments(), st.integers(0, 23), st.integers(0, 59))
@example(NEW_YORK, 1, 45)
@example(LORD_HOWE, 1, 45)
@example(APIA, 6, 0)
@example(SAO_PAULO, 0, 0)
@example(ST_JOHNS, 0, 0)
def test_each_civil_day_ticks_once_as_soon_as_its_clock_shows_the_hour(moment, hour, minute):
    """Against a walk through all minutes of those days: the first that shows the hour or, after a jump, a later one."""
    zone, now = moment
    start = now.replace(second=0, microsecond=0) - DAY
    shown = [(start + timedelta(minutes=n)).astimezone(zone) for n in range(3 * 1440)]
    length = (shown[-1].date() - shown[0].date()).days
    days = [shown[0].date() + n * DAY for n in range(length + 1)]  # one of them may not exist
    expected = set()
    for day in days:
        wanted = datetime.combine(day, time(hour, minute))
        reached = next((at for at in shown if at.replace(tzinfo=None, fold=0) >= wanted), None)
        if reached is not None and reached is not shown[0]:
            expected.add(reached.astimezone(UTC))
    schedule = Schedule(f"{minute} {hour} * * *", zone)
    end = shown[-1].astimezone(UTC)
    assert set(takewhile(lambda tick: tick <= end, schedule.after(start))) == expected
