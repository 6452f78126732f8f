"""Columns: headings, quantities, totals."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from outbox.reports.columns import column_of, humanise
from outbox.reports.language import ENGLISH

MONDAY = datetime(2026, 11, 16, tzinfo=UTC)


def column(name, *values):
    return column_of(name, values, len(values), MONDAY, ENGLISH)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("done_count", "Done count"),
        ("person_id", "Person ID"),
        ("DONE", "DONE"),
        ("?column?", "?column?"),
        ("_", "_"),
    ],
)
def test_a_column_name_becomes_a_heading(name, title):
    assert humanise(name) == title


def test_numbers_of_a_column_share_their_decimals_and_are_summed():
    head, cells = column("hours", 1.5, Decimal("20.25"), 3, None)
    assert cells == ["1.50", "20.25", "3.00", "\N{EN DASH}"]
    assert (head.numeric, head.total, head.figure) == (True, "24.75", Decimal("24.75"))


def test_a_single_number_has_no_total_and_is_the_figure():
    head, _ = column("done", 7)
    assert (head.total, head.figure) == ("", Decimal(7))


@pytest.mark.parametrize("name", ["done_percent", "avg_minutes", "done_per_day", "price"])
def test_rates_are_quantities_that_do_not_add_up(name):
    head, _ = column(name, 1, 2)
    assert (head.numeric, head.total) == (True, "")


@pytest.mark.parametrize("values", [(True, False), (1, "x"), (None, None), ()])
def test_a_column_that_is_not_of_numbers_alone_is_no_quantity(values):
    assert not column("done", *values)[0].numeric


def test_a_number_that_names_something_is_written_without_grouping():
    assert column("order_id", 1234567, 1234568)[1] == ["1234567", "1234568"]


def test_only_a_word_without_a_space_must_be_broken():
    assert column("note", "x" * 25)[0].breaks
    assert not column("note", "word " * 9)[0].breaks
