from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

from hypothesis import example, given, settings
from hypothesis import strategies as st

from outbox.reports.period import Cadence, Covers, Period, period_at, period_of

cadences = st.sampled_from(Cadence)
zones = st.sampled_from(sorted(available_timezones())).map(ZoneInfo)
instants = st.datetimes(datetime(1970, 1, 1), datetime(2100, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001


@st.composite
def moments(draw):
    """A zone and an instant, mostly near a change of its clocks, which chance alone would not meet."""
    zone, now = draw(zones), draw(instants)
    days = [(now + timedelta(days=n)).astimezone(zone) for n in range(366)]
    changes = [day for eve, day in pairwise(days) if eve.utcoffset() != day.utcoffset()]
    if changes:
        off = draw(st.timedeltas(timedelta(days=-3), timedelta(days=3)))
        now = draw(st.sampled_from(changes)).astimezone(UTC) + off
    return zone, now


def current(zone: ZoneInfo, now: datetime, cadence: Cadence) -> Period:
    return period_at(now, cadence=cadence, timezone=zone, covers=Covers.CURRENT)


def previous(zone: ZoneInfo, now: datetime, cadence: Cadence) -> Period:
    return period_at(now, cadence=cadence, timezone=zone, covers=Covers.PREVIOUS)


APIA = (ZoneInfo("Pacific/Apia"), datetime(2011, 12, 30, 10, tzinfo=UTC))
KWAJALEIN = (ZoneInfo("Pacific/Kwajalein"), datetime(1993, 8, 21, 12, tzinfo=UTC))
ST_JOHNS = (ZoneInfo("America/St_Johns"), datetime(2010, 11, 7, 2, 45, tzinfo=UTC))
SAO_PAULO = (ZoneInfo("America/Sao_Paulo"), datetime(2018, 11, 4, 3, tzinfo=UTC))


@settings(deadline=None)  # the first use of a zone reads its file
@given(moments(), cadences)
@example(APIA, Cadence.DAILY)
@example(KWAJALEIN, Cadence.DAILY)
@example(ST_JOHNS, Cadence.DAILY)
@example(SAO_PAULO, Cadence.DAILY)
def test_the_current_period_contains_now(moment, cadence):
    zone, now = moment
    period = current(zone, now, cadence)
    assert period.starts_at <= now < period.ends_at


@settings(deadline=None)
@given(moments(), cadences)
@example(APIA, Cadence.DAILY)
@example(KWAJALEIN, Cadence.DAILY)
@example(ST_JOHNS, Cadence.DAILY)
def test_periods_tile_time(moment, cadence):
    zone, now = moment
    periods = [current(zone, now, cadence)]
    for _ in range(4):
        periods.append(current(zone, periods[-1].ends_at, cadence))
    for one, other in pairwise(periods):
        assert one.ends_at == other.starts_at
        assert one.starts_at < one.ends_at


@settings(deadline=None)
@given(moments(), cadences)
@example(APIA, Cadence.DAILY)
@example(KWAJALEIN, Cadence.DAILY)
def test_the_previous_period_is_complete_and_right_before_the_current_one(moment, cadence):
    zone, now = moment
    period = previous(zone, now, cadence)
    assert period.starts_at < period.ends_at <= now
    assert period.ends_at == current(zone, now, cadence).starts_at
    assert period == current(zone, period.starts_at, cadence)


@settings(deadline=None)
@given(moments(), cadences)
def test_every_instant_of_a_period_is_given_the_same_period(moment, cadence):
    zone, now = moment
    period = current(zone, now, cadence)
    for inside in (period.starts_at, period.ends_at - timedelta(microseconds=1)):
        assert current(zone, inside, cadence) == period


@settings(deadline=None)
@given(moments(), cadences, st.sampled_from(Covers))
def test_a_key_leads_back_to_its_period(moment, cadence, covers):
    zone, now = moment
    period = period_at(now, cadence=cadence, timezone=zone, covers=covers)
    assert period_of(period.key, cadence=cadence, timezone=zone) == period


@settings(deadline=None)
@given(zones, instants, instants, cadences)
def test_keys_sort_in_the_order_of_time(zone, one, other, cadence):
    a, b = current(zone, one, cadence), current(zone, other, cadence)
    assert (a.key < b.key) == (a.starts_at < b.starts_at)
    assert (a.key == b.key) == (a == b)


@settings(deadline=None)
@given(moments(), cadences)
def test_the_name_of_the_zone_that_now_is_told_in_changes_nothing(moment, cadence):
    zone, now = moment
    assert current(zone, now.astimezone(zone), cadence) == current(zone, now, cadence)
