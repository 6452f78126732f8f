"""Tables: totals, bars, excerpts."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from outbox.reports.table import excerpt_of, table_of

MONDAY = datetime(2026, 11, 16, tzinfo=UTC)


def table(rows, **changes):
    return table_of(list(rows[0]), rows, starts_at=MONDAY, **changes)


def test_numbers_of_a_column_share_their_decimals_and_are_summed():
    shown = table([{"who": "a", "hours": 1.5}, {"who": "b", "hours": Decimal("20.25")}, {"who": "c", "hours": 3}])
    assert [row.cells[1] for row in shown.rows] == ["1.50", "20.25", "3.00"]
    assert shown.totals == ["Total", "24.75"]
    assert [column.numeric for column in shown.columns] == [False, True]


def test_a_single_row_has_no_totals():
    assert table([{"who": "a", "done": 1}]).totals == []


@pytest.mark.parametrize("name", ["done_percent", "avg_minutes", "done_per_day", "price"])
def test_rates_are_not_summed(name):
    shown = table([{"who": "a", name: 1}, {"who": "b", name: 2}])
    assert shown.columns[1].numeric
    assert shown.totals == []


def test_figures_that_name_something_are_not_quantities():
    shown = table([{"order_id": 123456, "done": 1}, {"order_id": 123457, "done": 2}])
    assert shown.rows[0].cells == ["123456", "1"]
    assert shown.totals == ["Total", "3"]
    assert shown.bars == 1


def test_bars_are_scaled_to_the_largest_and_anything_above_nothing_shows():
    shown = table([{"day": "a", "done": done} for done in (1000, 500, 1, 0, None, -5)])
    assert shown.bars == 1
    assert [row.percent for row in shown.rows] == [100, 50, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": "x", "b": "y", "n": 1}] * 2,  # two columns of labels
        [{"n": 1, "m": 2}] * 2,  # none
        [{"a": "x", "n": 1}],  # one row
        [{"a": "x", "n": 0}] * 2,  # nothing to draw
        [{"a": "x", "b": True}] * 2,  # no numbers
    ],
)
def test_other_shapes_have_no_bars(rows):
    assert table(rows).bars is None


def test_immense_numbers_are_summed():
    assert table([{"who": "a", "n": Decimal("9e999999")}, {"who": "b", "n": Decimal("9e999999")}]).totals
    assert table([{"who": "a", "n": 10**5000}, {"who": "b", "n": 10**5000}]).totals == ["Total", "2E+5000"]


def test_an_excerpt_is_the_table_itself_where_that_is_short():
    rows = [{"who": "a", "n": 1}, {"who": "b", "n": 2}]
    whole = table(rows)
    assert excerpt_of(whole, ["who", "n"], rows, starts_at=MONDAY) is whole


def test_an_excerpt_has_fewer_rows_shorter_texts_and_the_totals_of_all():
    rows = [{"who": "x" * 500, "n": 1} for _ in range(100)]
    found = excerpt_of(table(rows), ["who", "n"], rows, starts_at=MONDAY)
    assert (len(found.rows), found.more, found.totals) == (40, 60, ["Total", "100"])
    assert found.rows[0].cells[0] == "x" * 159 + "…"


def test_the_headline_is_the_first_totals_or_the_numbers_of_the_only_row():
    two = table([{"who": "a", "done": 1, "open": 2}, {"who": "b", "done": 3, "open": 4}])
    assert [(one.title, one.total) for one in two.headline] == [("Done", "4"), ("Open", "6")]
    assert two.figures == '[["Done", 4.0], ["Open", 6.0]]'
    assert [(one.title, one.total) for one in table([{"who": "a", "done": 1}]).headline] == [("Done", "1")]
