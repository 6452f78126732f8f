from datetime import UTC, datetime

from outbox.operations.email_counts import Waiting, waiting_of

NOW = datetime(2026, 11, 23, 11, 4, 12, tzinfo=UTC)


def test_rows_become_reasons_and_relays():
    rows = [
        {"why": "due", "relay": None, "paused": None, "n": 5, "first_at": NOW},
        {"why": "held", "relay": 3, "paused": None, "n": 2, "first_at": NOW},
        {"why": "sending", "relay": 3, "paused": None, "n": 1, "first_at": NOW},
        {"why": "paused", "relay": None, "paused": "progress", "n": 9, "first_at": None},
        {"why": "in_doubt", "relay": None, "paused": None, "n": 4, "first_at": None},
    ]
    assert waiting_of(rows) == Waiting(5, NOW, {3: 3}, 0, None, 4, {"progress": 9})
