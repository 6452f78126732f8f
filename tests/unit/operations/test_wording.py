from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from outbox.operations.email_counts import Waiting
from outbox.operations.snapshot import Attention, EditionOutcome, Snapshot
from outbox.operations.wording import Frame, Level, duration_label, progress_of, reasons

NOW = datetime(2026, 11, 23, 11, 4, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "said"), [(-1, "0 s"), (59.6, "60 s"), (100, "2 min"), (3660, "1 h 1 min"), (7200, "2 h"), (2e5, "2 d")]
)
def test_a_duration_has_two_units_at_most(seconds, said):
    assert duration_label(seconds) == said


def test_red_is_what_needs_a_person_and_what_is_not_counted_is_a_remark():
    seen = Snapshot(NOW, attention=[Attention("failed", "", "", 1)])
    levels = [level for _, level in reasons(seen, Frame(), per_s=0.0)]
    assert levels == [Level.BAD, Level.SOFT]


def test_what_is_due_says_how_long_it_takes_only_if_something_is_sent():
    seen = Snapshot(NOW, waiting=Waiting(due=120, oldest_due_at=NOW))
    (still, _), (sending, _) = (next(reasons(seen, Frame(), per_s=per_s)) for per_s in (0.0, 2.0))
    assert still == "120 due, the oldest for 0 s"
    assert sending == "120 due, the oldest for 0 s; at 2.0/s about 60 s more"


def test_progress_names_only_what_there_is():
    assert list(progress_of(EditionOutcome(made=5, sent=3, failed=2))) == [(2, "failed")]


def test_the_fleet_has_a_timezone_if_its_reports_have_one_in_common():
    york, berlin = ZoneInfo("America/New_York"), ZoneInfo("Europe/Berlin")
    assert Frame({"a": york, "b": york}).zone("") == york
    assert Frame({"a": york, "b": berlin}).zone("") is None
    assert Frame({"a": york, "b": berlin}).zone("b") == berlin
