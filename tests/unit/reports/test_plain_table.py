"""Tables in plain text."""

from datetime import UTC, datetime

from outbox.reports.table import table_of

MONDAY = datetime(2026, 11, 16, tzinfo=UTC)


def table(rows):
    return table_of(list(rows[0]), rows, starts_at=MONDAY)


def test_the_text_table_is_aligned_by_what_is_seen():
    shown = table([{"who": "田中", "done": 5}, {"who": "e\u0301", "done": 10}])
    assert shown.text.splitlines() == [
        "Who    Done",
        "-----------",
        "田中      5  ████████████",
        "e\u0301        10  ████████████████████████",
        "-----------",
        "Total    15",
    ]


def test_a_table_too_wide_for_text_becomes_blocks():
    shown = table([{"note": "x" * 90, "done": 5}, {"note": "a\nb", "done": 2}])
    assert shown.text == f"Note: {'x' * 90}\nDone: 5\n\nNote: a b\nDone: 2\n\nTotal\nDone: 7"
