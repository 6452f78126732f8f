"""Counts of a run."""

import pytest

from outbox.generate.batch_writer import Written
from outbox.generate.edition import Edition
from outbox.generate.recipients import Recipient, SharedAddresses, Window
from outbox.generate.result import Result
from outbox.reports.period import Cadence, period_of
from outbox.settings import ReportSettings

REPORT = ReportSettings(link="{token}", recipients="select 1", data="select :key")
EDITION = Edition(1, "progress", period_of("2026-W48", cadence=Cadence.WEEKLY, timezone=REPORT.zone))


def window(*keys, failed=()):
    rows = [Recipient(key, f"{key}@example.com") for key in keys] + [Recipient(key, "") for key in failed]
    return Window.of(rows, (), SharedAddresses())


def test_each_window_adds_what_was_there_at_its_first_look():
    result = Result(EDITION)
    for keys, missing in ((("1", "2", "3"), ["3"]), (("4", "5"), ["4", "5"])):
        result.begin_window(found := window(*keys))
        result.note_look(found.wanted, missing)
        result.note_written(Written(len(missing)))
        result.note_look(found.wanted, [])
    assert (result.expected, result.found, result.present, result.made) == (5, 2, 5, 3)
    assert (result.already, result.elsewhere) == (2, 2)


def test_a_recipient_who_failed_counts_as_present_once_another_server_has_made_the_report():
    result = Result(EDITION)
    result.begin_window(found := window("1", failed=["2"]))
    assert result.note_look(found.wanted, ["1"]) == 0
    result.note_failed({"1": "why"})
    assert result.note_look(found.wanted, []) == 1
    assert (result.expected, result.present, sorted(result.failed)) == (2, 0, ["1", "2"])
    result.note_made_elsewhere(["1"])
    assert (result.present, sorted(result.failed), result.elsewhere) == (1, ["2"], 1)


@pytest.mark.parametrize(("looked", "found"), [(True, 2), (False, 3)])
def test_what_an_earlier_pass_made_is_not_found_by_the_next_one(looked, found):
    earlier = Result(EDITION)
    if looked:
        earlier.begin_window(first := window("1", "2", "3"))
        earlier.note_look(first.wanted, ["3"])
        earlier.note_written(Written(1))
    result = earlier.resumed(EDITION)
    result.begin_window(again := window("1", "2", "3"))
    result.note_look(again.wanted, [])
    assert (result.expected, result.made, result.found) == (3, int(looked), found)
