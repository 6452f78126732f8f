import html
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from asyncpg import Range
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from outbox.errors import SourceError
from outbox.reports.language import ENGLISH
from outbox.reports.render import PACKAGED, Templates, explain

NAMES = (
    "the names that exist here are unsubscribe, report, title, period, recipient, rows, columns, link, sender, "
    "language, say, table, excerpt"
)
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


def test_a_long_table_is_cut_in_the_mail_and_whole_on_the_page():
    rows = [{"who": f"w{at}", "done": 1} for at in range(100)]
    rendered = Templates(None, "progress").render(context(rows))
    assert "… and 60 more rows in the full report" in rendered.html
    assert "… and 60 more rows in the full report" in rendered.text
    assert "w99" not in rendered.html
    assert "w99" in rendered.page
    assert "100" in rendered.text


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


def test_no_text_of_the_mail_has_the_colour_of_its_background():
    for markup in (Templates(None, name).render(context([], report=name)).html for name in ("progress", "digest")):
        (style,) = re.findall(r'<div style="(display:none[^"]*)"', markup)
        assert {"max-height:0", "overflow:hidden", "mso-hide:all"} <= set(style.split(";"))
        assert "color" not in style, "SpamAssassin's HTML_FONT_LOW_CONTRAST gives 0.7 points for it"
        backgrounds = set(re.findall(r'bgcolor="(#\w+)"', markup)) - {"#ffffff"}
        assert not backgrounds.intersection(re.findall(r"(?<!-)color:(#\w+)", markup))


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
        (b"ok {{ }}", "line 1: Expected an expression"),
        (b"ok\n\xff", "line 2: is not UTF-8; save the file as UTF-8"),
        (b"{{ x|nubmer }}", "No filter named 'nubmer' (did you mean number?)"),
        (b"{{ x|nosuch }}", "those of outbox are cell, humanise, lines, number, percent"),
        (b"{{ x is defind }}", "No test named 'defind' (did you mean defined?)"),
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
        ("a\n{{ recipient.nickname }}", "line 2: recipient has no nickname; it has key, email, name."),
        ("{{ recipient['nmae'] }}", "line 1: recipient has no nmae (did you mean name?); it has key, email, name."),
        (
            "{% for item in rows %}\n{{ item.dya }}{% endfor %}",
            "line 2: item has no dya; it has day, done.",
        ),
        ("{{ rows[0].dones }}", "line 1: rows[0] has no dones (did you mean done?); it has day, done."),
        ("{{ (rows|first).x }}", "line 1: the mapping has no x; it has day, done."),
        ("{{ rows.day }}", "line 1: rows is a list, so it has no day; it has 5 elements."),
        ("{{ rows[5].day }}", "line 1: rows has no element 5; it has 5 elements."),
        ("{{ rows[4].done.by }}", "line 1: rows[4].done is None (NULL in SQL), so it has no by."),
        ("{{ period.end }}", "line 1: period has no end; it has ends_at, key, label, starts_at."),
        (
            "{{ table.colums|length }}",
            "line 1: table has no colums (did you mean columns?); it has bars, columns, figures, ",
        ),
        ("{{ recipent.name }}", f"line 1: 'recipent' is undefined (did you mean recipient?); {NAMES}."),
        ("{% set mine = 1 %}{{ nothing|number }}", f"line 1: 'nothing' is undefined; {NAMES}, mine."),
        (
            "{{ say('helo') }}",
            "line 1: say: there is no phrase 'helo' (did you mean hello?); there are hello, hello nobody, ",
        ),
        ("{{ say('hello') }}", "line 1: say: the phrase 'hello' needs name; give it as say('hello', name=…)."),
        (
            "{{ say('digest more') }}",
            "line 1: say: the phrase 'digest more' needs a whole number n, not None; give it as n=3.",
        ),
        ("\n\n{{ 1 / 0 }}", "line 3: ZeroDivisionError: division by zero."),
        ("{% include 'gone.j2' %}", "line 1: there is no template gone.j2."),
        ("{% include 'email.txt' %}", "line 1: there is no template email.txt (did you mean progress/email.txt.j2?)."),
        (
            "{% include 'subject.txt.j2' %}",
            "line 1: there is no template subject.txt.j2 (did you mean outbox:subject.txt.j2?).",
        ),
        ("{% include ['a', 'b'] %}", "line 1: there is none of the templates a, b."),
        ("{{ 'abc'|number }}", 'line 1: number: "abc" is not a number; give a number, or use cell for other values.'),
        ("{{ true|percent }}", "line 1: percent: True is not a number; give a number, or use cell for other values."),
        ("{{ rows|number }}", "line 1: number: [{'day': "),
        ("{{ 1|number(-1) }}", "line 1: number: -1 is not a number of decimals; give a whole number from 0 to 30."),
        ("{{ 1|percent('x') }}", 'line 1: percent: "x" is not a number of decimals; give a whole number from 0 to 30.'),
    ],
)
def test_a_failure_while_rendering_is_explained_with_template_and_line(tmp_path, source, fault):
    (tmp_path / "progress").mkdir()
    path = tmp_path / "progress" / "email.txt.j2"
    path.write_text(source)
    templates = Templates(tmp_path, "progress")
    with pytest.raises(Exception) as raised:  # noqa: PT011 — any error of a template
        templates.render(context())
    said = explain(raised.value)
    assert said.startswith(f"{path}, {fault}")
    assert said == f"{path}, {fault}" or not fault.endswith(".")


def render_text(directory, source, **changes):
    (directory / "progress").mkdir(exist_ok=True)
    (directory / "progress" / "email.txt.j2").write_text(source)
    return Templates(directory, "progress").render(context(**changes)).text.strip()


def test_filters_take_numbers_as_text_and_null(tmp_path):
    shown = "{{ '12'|number }} {{ ' 1.50 '|number(2) }} {{ ''|number }} {{ none|number }} {{ 'NaN'|number }}"
    assert render_text(tmp_path, shown) == "12 1.50 \u2013 \u2013 \u2013"
    assert render_text(tmp_path, "{{ '0.42'|percent }} {{ none|percent }} {{ 1e300|percent }}") == "42% \u2013 1E+302%"
    rest = "{{ none|humanise }} {{ 5|humanise }} {{ none|lines }} {{ [1, 2]|lines }}"
    assert render_text(tmp_path, rest) == "\u2013 5 \u2013 1, 2"
    assert render_text(tmp_path, "{{ '1e999999'|percent }}{% include 'gone' ignore missing %}") == "\u2013"


def test_values_written_without_a_filter_read_as_text_and_not_as_python(tmp_path):
    row = {
        "tags": ["a", "b"], "none": None, "yes": True, "took": timedelta(hours=2), "spans": [Range(1, 5)],
        "n": Decimal("1.50"), "day": date(2026, 11, 16), "json": {"a": [1]},
    }  # fmt: skip
    each = "{% for name in columns %}{{ rows[0][name] }}; {% endfor %}"
    assert render_text(tmp_path, each, rows=[row]) == "a, b; \u2013; yes; 2 h; 1 \u2013 4; 1.50; 2026-11-16; a: (1);"
    assert render_text(tmp_path, "{{ language }} {{ table }}", rows=[{"a": "x"}]) == "en A\n-\nx"
    assert render_text(tmp_path, "{{ 'a' if none }}{{ rows[0].tags|join('+') }}", rows=[row]) == "a+b"


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
