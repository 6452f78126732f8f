"""Editions: when a period may be made."""

from datetime import timedelta

import pytest

from outbox.generate.edition import too_early
from outbox.reports.period import Cadence, period_of
from outbox.settings import ReportSettings


@pytest.mark.parametrize(
    ("covers", "hours_after_start", "state"),
    [
        ("previous", -1, "has not begun"),
        ("previous", 0, "is not over"),
        ("previous", 167, "is not over"),
        ("previous", 168, None),
        ("current", -1, "has not begun"),
        ("current", 0, None),
        ("current", 169, None),
    ],
)
def test_a_period_is_too_early_until_it_is_over_or_has_begun_where_the_current_one_is_covered(
    covers, hours_after_start, state
):
    report = ReportSettings(link="{token}", recipients="select 1", data="select :key", covers=covers)
    week = period_of("2026-W48", cadence=Cadence.WEEKLY, timezone=report.zone)
    said = too_early(report, week, week.starts_at + timedelta(hours=hours_after_start))
    assert (said is None) if state is None else said.startswith(f"2026-W48 {state} (2026-11-23 00:00 to ")
