import io
import json
import sys

import pytest

from outbox.cli.output import printable, table, to_json, zone_of
from outbox.settings import Settings


def test_a_table_says_nothing_that_a_terminal_would_obey():
    lines = table(["key", "said"], [["a\x1b[31m", "\x07\n"], ["long enough", "x"]])
    assert lines[1:] == ["a\ufffd[31m       \ufffd\ufffd", "long enough  x"]


def test_columns_are_aligned_and_the_last_has_any_width():
    lines = table(["key", "state", "reply"], [["a", "sent", "x" * 200], ["long/key", "dead", ""]])
    assert lines[1:] == [f"a         sent   {'x' * 200}", "long/key  dead"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_json_is_the_same_in_any_encoding_and_has_no_terminal_control_characters(monkeypatch, encoding):
    found = {"key": "é中\x1b[31m\x9b\u202e", "n": None}
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    line = to_json(found)
    assert json.loads(line.encode(encoding)) == found
    assert printable(line) == line


def test_a_time_of_an_unknown_report_has_no_timezone():
    report = {"source": "a:B", "link": "https://x/{token}", "timezone": "Europe/Berlin"}
    settings = Settings.model_validate({"reports": {"weekly": report}})
    assert str(zone_of(settings, "weekly")) == "Europe/Berlin"
    assert zone_of(settings, "other") is None
    assert zone_of(settings, None) is None
