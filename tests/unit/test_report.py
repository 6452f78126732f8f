import html
import re
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from types import SimpleNamespace
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from outbox.errors import SourceError
from outbox.language import ENGLISH
from outbox.report import PACKAGED, Templates, explain
from outbox.table import cell, humanise, table_of

ZONE = ZoneInfo("America/New_York")
MONDAY = datetime(2026, 11, 16, tzinfo=ZONE)
DAYS = [{"day": date(2026, 11, 16) + timedelta(at), "done": done} for at, done in enumerate([5, 9, 0, 12, None])]
MARK = "<script>alert('x')</script>"


def context(rows=DAYS, **changes):
    ends_at = datetime(2026, 11, 23, tzinfo=ZONE)
    given = {
        "report": "progress",
        "title": "Progress",
        "period": SimpleNamespace(
            key="2026-W47", label=ENGLISH.label(MONDAY, ends_at, "weekly"), starts_at=MONDAY, ends_at=ends_at
        ),
        "recipient": {"key": "1", "email": "ann@example.com", "name": "Ann"},
        "rows": rows,
        "columns": list(rows[0]) if rows else [],
        "link": "https://reports.example.com/r/3f9a",
        "sender": "Progress reports",
    }
    return given | changes


def table(rows, **changes):
    return table_of(list(rows[0]), rows, starts_at=MONDAY, **changes)


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):  # noqa: ARG002 — the base class calls it so
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("starts", "ends", "cadence", "said"),
    [
        ((2026, 11, 16), (2026, 11, 23), "weekly", "16 \u2013 22 November 2026"),
        ((2026, 11, 30), (2026, 12, 7), "weekly", "30 November \u2013 6 December 2026"),
        ((2026, 12, 28), (2027, 1, 4), "weekly", "28 December 2026 \u2013 3 January 2027"),
        ((2026, 11, 24), (2026, 11, 25), "daily", "24 November 2026"),
        ((2026, 11, 1), (2026, 12, 1), "monthly", "November 2026"),
    ],
)
def test_a_period_is_said_as_a_person_says_it(starts, ends, cadence, said):
    assert ENGLISH.label(datetime(*starts, tzinfo=ZONE), datetime(*ends, tzinfo=ZONE), cadence) == said


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"), (True, "yes"), (False, "no"), (0, "0"), (2026, "2026"),
        (1234567, "1\u202f234\u202f567"),
        (-3, "\u22123"), (2.0, "2"), (0.1 + 0.2, "0.3"), (1234.5, "1234.5"), (0.00123, "0.0012"),
        (1e-9, "0"), (-1e-9, "0"), (float("nan"), "\u2013"), (float("inf"), "\u2013"),
        (Decimal("12.50"), "12.5"),
        (Decimal("1E+6"), "1\u202f000\u202f000"), (date(2026, 11, 16), "Mon 16 Nov"),
        (date(2025, 11, 16), "16 Nov 2025"), (datetime(2026, 11, 16, 9, 5), "Mon 16 Nov 09:05"),  # noqa: DTZ001
        (datetime(2026, 11, 16, 3, 0, tzinfo=UTC), "Sun 15 Nov 22:00"),
        (time(9, 5), "09:05"),
        (datetime.max.replace(tzinfo=UTC), "31 Dec 9999 23:59"),
        (timedelta(hours=26, minutes=5), "26 h 5 min"),
        (timedelta(seconds=-61), "\u22121 min 1 s"), (timedelta(0), "0 s"),
        ("text", "text"), (b"abc", "3 bytes"),
        ({"a": [1, "ü"]}, '{"a": [1, "ü"]}'), (UUID(int=0), "00000000-0000-0000-0000-000000000000"),
    ],
)  # fmt: skip
def test_any_value_is_shown_in_a_way_a_person_reads(value, shown):
    assert cell(value, ZONE, 2026) == shown


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


def test_a_long_table_is_cut_in_the_mail_and_whole_on_the_page():
    rows = [{"who": f"w{at}", "done": 1} for at in range(100)]
    rendered = Templates(None, "progress").render(context(rows))
    assert "… and 60 more rows in the full report" in rendered.html
    assert "… and 60 more rows in the full report" in rendered.text
    assert "w99" not in rendered.html
    assert "w99" in rendered.page
    assert "100" in rendered.text


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


def test_markup_is_escaped_in_html_and_left_alone_in_text():
    rows = [{"who": MARK, "done": 1}, {"who": "b", "done": 2}]
    recipient = {"key": "1", "email": "a@example.com", "name": MARK}
    rendered = Templates(None, "progress").render(context(rows, title=MARK, recipient=recipient))
    assert "<script" not in rendered.html + rendered.page
    assert "&lt;script&gt;" in rendered.html
    assert "&lt;script&gt;" in rendered.page
    assert MARK in rendered.text
    assert rendered.subject.startswith(MARK)


def test_the_mail_greets_by_name_and_carries_the_link_on_a_line_of_its_own():
    rendered = Templates(None, "progress").render(context())
    assert "Hello Ann," in rendered.text
    assert "Hello Ann," in rendered.html
    assert "\nhttps://reports.example.com/r/3f9a\n" in rendered.text
    assert 'href="https://reports.example.com/r/3f9a"' in rendered.html


def test_without_a_name_or_rows_the_mail_is_still_friendly():
    rendered = Templates(None, "progress").render(context([], recipient={"key": "1", "email": "x@y", "name": None}))
    assert "Hello,\n" in rendered.text
    assert "Nothing was recorded" in rendered.text
    assert max(map(len, rendered.text.splitlines())) <= 76
    for markup in (rendered.html, rendered.page):
        assert "Nothing was recorded" in markup
        Balance(markup)


def test_the_page_needs_nothing_from_elsewhere():
    page = Templates(None, "progress").render(context()).page
    assert not any(word in page for word in ("<script", "<link", "src=", "url(", "@import", "http"))


def test_layout_tables_say_that_they_are_none():
    html = Templates(None, "progress").render(context()).html
    assert html.count("<table") - html.count('<table role="presentation"') == 1
    assert '<html lang="en"' in html


def test_a_template_of_the_user_replaces_only_its_own(tmp_path):
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "subject.txt.j2").write_text("{{ rows|length }}\nrows,\r\n {{ rows[0].day|cell }} ")
    rendered = Templates(tmp_path, "progress").render(context())
    assert rendered.subject == "5 rows, Mon 16 Nov"
    assert rendered.html == Templates(None, "progress").render(context()).html
    assert Templates(tmp_path, "other").render(context()).subject.startswith("Progress:")


def test_a_template_beside_the_reports_serves_all_of_them(tmp_path):
    (tmp_path / "subject.txt.j2").write_text("{{ report }}")
    assert Templates(tmp_path, "progress").render(context()).subject == "progress"


def test_a_template_can_build_upon_the_packaged_one(tmp_path):
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "subject.txt.j2").write_text('Fwd: {% include "outbox:subject.txt.j2" %}')
    assert Templates(tmp_path, "outbox").render(context()).subject.startswith("Fwd: Progress:")


def test_a_subject_has_one_line(tmp_path):
    rendered = Templates(None, "progress").render(context(title="a\r\nBcc: spy@example.com\u2028\x85x"))
    assert rendered.subject.startswith("a Bcc: spy@example.com x:")


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (b"ok\n{% if %}", "line 2"),
        (b"ok\n\n{{ x|nosuch }}", "line 3: No filter named 'nosuch'"),
        (b"{{ x", "line 1"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)
def test_a_broken_template_is_named_with_line_and_fault(tmp_path, source, fault):
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "email.html.j2").write_bytes(source)
    with pytest.raises(SourceError) as raised:
        Templates(tmp_path, "progress")
    sentence = str(raised.value)
    assert fault in sentence
    assert "email.html.j2" in sentence
    assert "report progress" in sentence
    assert sentence.count("\n") == 0
    assert "line" not in fault or str(tmp_path / "progress" / "email.html.j2") in sentence


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("a\n{{ recipient.nmae }}", "line 2: 'dict object' has no attribute 'nmae'."),
        ("{{ nothing }}", "line 1: 'nothing' is undefined."),
        ("\n\n{{ 1 / 0 }}", "line 3: ZeroDivisionError: division by zero."),
        ("{% include 'gone.j2' %}", "line 1: there is no template gone.j2."),
    ],
)
def test_a_failure_while_rendering_is_explained_with_template_and_line(tmp_path, source, fault):
    (tmp_path / "progress").mkdir()
    path = tmp_path / "progress" / "email.txt.j2"
    path.write_text(source)
    templates = Templates(tmp_path, "progress")
    with pytest.raises(Exception) as raised:  # noqa: PT011 — any error of a template
        templates.render(context())
    assert explain(raised.value) == f"{path}, {fault}"


def test_an_error_from_elsewhere_is_explained_without_a_place():
    assert explain(UndefinedError("x is undefined")) == "x is undefined."


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.decimals(), st.text(max_size=20),
    st.dates(), st.times(),
    st.datetimes(), st.datetimes(timezones=st.just(UTC)), st.timedeltas(), st.binary(max_size=3), st.uuids(),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


@settings(deadline=None)  # the first example compiles the templates
@given(
    rows=st.lists(st.text(min_size=1, max_size=12), max_size=6, unique=True).flatmap(
        lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, VALUES)), max_size=5)
    )
)
def test_rows_of_any_shape_render_to_well_formed_markup(rows):
    rendered = Templates(None, "progress").render(context(rows))
    Balance(rendered.html)
    Balance(rendered.page)
    assert rendered.text.endswith("\n")


def test_a_digest_shows_every_report_and_its_link_in_both_bodies_and_on_the_page():
    rows = [
        {"id": n, "report": "sales", "title": f"Sales {MARK} {n}", "period": "2026-W47", "made_at": MONDAY,
         "waiting": 101, "link": f"https://reports.example.com/r/{n:022}?a=1&b=2"} for n in range(100)
    ]  # fmt: skip
    rendered = Templates(None, "digest").render(context(rows, report="digest", title="Your reports"))
    assert rendered.subject == "Your reports: 16 \u2013 22 November 2026"
    assert [line for line in rendered.text.splitlines() if line.startswith("https://")] == [
        *(row["link"] for row in rows), "https://reports.example.com/r/3f9a",
    ]  # fmt: skip
    for markup in (rendered.html, rendered.page):
        Balance(markup)
        assert "<script" not in markup
        hrefs = [html.unescape(href) for href in re.findall(r'href="([^"]*)"', markup)]
        assert hrefs[:100] == [row["link"] for row in rows]
    assert "1 more waits for the next email" in rendered.text
    assert "1 more waits for the next email" in rendered.html
    one = Templates(None, "digest").render(context([rows[0] | {"waiting": 1}], report="digest", link=""))
    assert "This report is ready for you." in one.text
    assert "more" not in one.text + one.page
    assert "Nothing waits for you." in Templates(None, "digest").render(context([], report="digest")).text


def test_the_packaged_templates_are_all_there():
    for directory in (PACKAGED, PACKAGED / "digest"):
        assert sorted(path.name for path in directory.glob("*.j2")) == [
            "email.html.j2",
            "email.txt.j2",
            "report.html.j2",
            "subject.txt.j2",
        ]
