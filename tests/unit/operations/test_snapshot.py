from outbox.operations.snapshot import Edition, EditionOutcome, counted


def test_an_edition_that_is_not_counted_has_no_outcome():
    one, two = Edition(1, "r", "2026-W47", 3), Edition(2, "r", "2026-W48", 3)
    seen = counted([one, two], {1: EditionOutcome(made=3), 2: None})
    assert [edition.outcome for edition in seen] == [EditionOutcome(made=3), None]
    assert one.outcome is None
