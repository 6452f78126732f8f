import pytest

from outbox.settings.keys import quoted, table_of, variable


def test_a_key_has_a_variable():
    assert variable("smtp_url") == "OUTBOX_SMTP_URL"


@pytest.mark.parametrize(
    ("report", "table"), [("progress", "reports.progress"), ("My Report", 'reports."My Report"'), ("digest", "digest")]
)
def test_a_report_has_a_table_as_toml_spells_it(report, table):
    assert table_of(report) == table


@pytest.mark.parametrize("part", ["a.b", "é", "", "a b"])
def test_a_part_that_is_no_bare_key_is_quoted(part):
    assert quoted(part) == f'"{part}"'
