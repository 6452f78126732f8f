"""Templates as files: what is escaped, byte order marks, and what cannot be read. Reports and `Email` alike."""

import pytest
from markupsafe import Markup

from outbox import Email
from outbox.errors import SourceError, TemplateUseError
from outbox.reports.render import Templates
from outbox.reports.template_errors import explain
from tests.unit.reports.test_render import MARK, context

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
SAFE = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"
# The same files for HTML and for text. Their names say nothing about what is escaped.
FILES = {
    "partials/rows.html": "{{ mark }}",
    "partials/rows.j2": "{{ mark }}",
    "partials/rows.txt": "{{ mark }}",
    "partials/rows.txt.j2": "{{ mark }}",
    "partials/rows.html.j2": "{{ mark }}",
    "rows": "{{ mark }}",
    "nested.txt": "{% include 'partials/rows.txt' %}",
    "layout.j2": "<{% block body %}{{ mark }}{% endblock %}>",
    "middle.txt": "{% extends 'layout.j2' %}{% block body %}{{ super() }}+{{ mark }}{% endblock %}",
    "macros.j2": "{% macro b(x) %}<b>{{ x }}</b>{% endmacro %}{% macro box() %}[{{ caller() }}]{% endmacro %}",
}


def write(directory, files):
    for name, source in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())


def render(directory, source, name, files=FILES, **changes):
    """The body that a report makes of this template, and the one that an `Email` makes of it."""
    write(directory, {**files, f"progress/{name}": source})
    values = {"mark": MARK, "markup": Markup("<i>"), **changes}
    report = Templates(directory, "progress").render(context(**values))
    email = Email(
        key="k", sender="a@example.com", to="b@example.com", subject="s", template="progress", templates=directory,
        context=values,
    )  # fmt: skip
    made = email._rendered()
    return (
        [report.html.strip(), made["html"].strip()] if "html" in name else [report.text.strip(), made["text"].strip()]
    )


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        *((f"{{% include '{name}' %}}", "M") for name in FILES if name.startswith(("partials", "rows"))),
        ("{% include 'nested.txt' %}", "M"),
        ("{% include ['gone', 'nested.txt'] %}", "M"),
        ("{% set name = 'rows' %}{% include name %}", "M"),
        ("{% extends 'layout.j2' %}", "<M>"),
        ("{% extends 'middle.txt' %}", "<M+M>"),
        ("{% extends 'middle.txt' %}{% block body %}{{ super() }}{{ self.t() }}{% endblock %}"  # noqa: ISC004
         "{% block t %}{{ mark }}{% endblock %}", "<M+MM>"),
        ("{% import 'macros.j2' as m %}{{ m.b(mark) }}", "<b>M</b>"),
        ("{% from 'macros.j2' import b %}{{ b(mark) }}{{ b(b('x')) }}", "<b>M</b><b><b>x</b></b>"),
        ("{% from 'macros.j2' import box with context %}{% call box() %}<u>{{ mark }}</u>{% endcall %}", "[<u>M</u>]"),
        ("{% macro own(x) %}<b>{{ x }}</b>{% endmacro %}{{ own(mark) }}", "<b>M</b>"),
        ("{% set x %}<b>{{ mark }}</b>{% endset %}{{ x }}", "<b>M</b>"),
        ("{{ mark|trim }}{{ [mark, mark]|join('<')|trim }}", None),
        ("{{ [mark] }} {{ {'a': mark} }}", "M a: M"),
    ],
)  # fmt: skip
def test_html_is_escaped_and_text_is_not_whatever_the_files_in_between_are_called(tmp_path, source, shown):
    for body in render(tmp_path / "html", source, "email.html.j2"):
        assert MARK not in body
        assert shown is None or body == shown.replace("M", SAFE) or ("[" in source and SAFE in body)
    for body in render(tmp_path / "text", source, "email.txt.j2"):
        assert "&lt;" not in body
        assert shown is None or body == shown.replace("M", MARK) or ("[" in source and MARK in body)


@pytest.mark.parametrize(
    ("source", "html", "text"),
    [
        ("{{ mark|safe }}", MARK, MARK),
        ("{{ markup }}{{ markup + mark }}", f"<i><i>{SAFE}", None),
        ("{{ mark|e }}", SAFE, SAFE),
        ("{% autoescape false %}{{ mark }}{% endautoescape %}", MARK, MARK),
        ("{% autoescape true %}{{ mark }}{% endautoescape %}", SAFE, SAFE),
        ("{% autoescape false %}{% include 'rows' %}{% endautoescape %}", SAFE, MARK),
    ],
)
def test_what_the_author_says_about_escaping_holds(tmp_path, source, html, text):
    assert render(tmp_path / "html", source, "email.html.j2") == [html] * 2
    for body in render(tmp_path / "text", source, "email.txt.j2"):
        assert text is None or body == text


def test_the_packaged_templates_escape_in_html_that_extends_them_and_not_in_text(tmp_path):
    source = '{% extends "outbox:email.ENDING.j2" %}{% block before %}{% include "rows" %}{% endblock %}'
    for ending, wanted, other in (("html", SAFE, MARK), ("txt", MARK, SAFE)):
        write(tmp_path, {**FILES, f"progress/email.{ending}.j2": source.replace("ENDING", ending)})
        rendered = Templates(tmp_path, "progress").render(context(mark=MARK, title=MARK))
        body = rendered.html if ending == "html" else rendered.text
        assert body.count(wanted) >= 2
        assert other not in body


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_what_is_written(tmp_path, newline):
    files = {
        "progress/subject.txt.j2": f"{BOM}Your week{newline}{{{{ mark }}}}{newline}",
        "progress/email.txt.j2": f"{BOM}{{% include 'part' %}} {newline}{{{{ mark }}}}{newline}",
        "progress/email.html.j2": f"{BOM}{{% extends 'base' %}}{newline}",
        "part": f"{BOM}part{newline}",
        "base": f"{BOM}base{newline}",
    }
    write(tmp_path, files)
    rendered = Templates(tmp_path, "progress").render(context(mark="m"))
    assert (rendered.subject, rendered.text.split(), rendered.html) == ("Your week m", ["part", "m"], "base\n")
    made = Email(
        key="k",
        sender="a@example.com",
        to="b@example.com",
        template="progress",
        templates=tmp_path,
        context={"mark": "m"},
    )._rendered()
    assert (made["subject"], made["text"].split(), made["html"].strip()) == ("Your week m", ["part", "m"], "base")


def test_an_included_file_that_cannot_be_read_is_named_with_its_line(tmp_path):
    write(tmp_path, {"progress/email.txt.j2": "{% include 'part' %}", "part": b"ok\nJ\xfcrgen"})
    with pytest.raises(Exception) as raised:  # noqa: PT011 - any error of a template
        Templates(tmp_path, "progress").render(context())
    assert f"{tmp_path / 'part'}, line 2: is not UTF-8; save the file as UTF-8." in explain(raised.value)


def test_a_template_that_is_too_deep_or_computes_too_much_is_a_sentence(tmp_path):
    write(tmp_path, {"progress/email.txt.j2": "{{ 10 ** 5000 }}"})
    with pytest.raises(
        SourceError, match=r"The template email\.txt\.j2 of the report progress cannot be used: ValueError"
    ):
        Templates(tmp_path, "progress")
    write(tmp_path, {"progress/email.txt.j2": "{% include 'progress/email.txt.j2' %}"})
    with pytest.raises(RecursionError) as raised:
        Templates(tmp_path, "progress").render(context())
    assert explain(raised.value).startswith(f"{tmp_path}/progress/email.txt.j2, line 1: RecursionError: ")


def test_an_error_in_the_template_of_an_email_names_file_line_and_the_names_there_are(tmp_path):
    def said(source):
        write(tmp_path, {"welcome/email.txt.j2": source})
        with pytest.raises(ValueError, match=r".") as raised:
            Email(
                key="k", sender="a@example.com", to="b@example.com", subject="s", template="welcome",
                templates=tmp_path, context={"user": {"name": "Ann", "city": "Ulm"}, "shop": "Acme"},
            )  # fmt: skip
        return str(raised.value)

    path = tmp_path / "welcome/email.txt.j2"
    assert said("\n{{ user.nmae }}") == (
        f"The template welcome failed: {path}, line 2: user has no nmae (did you mean name?); it has name, city."
    )
    assert said("{{ shopp }}") == (
        f"The template welcome failed: {path}, line 1: 'shopp' is undefined (did you mean shop?); "
        "the names that exist here are user, shop."
    )
    assert said("{{ user|nosuch }}").startswith(f"The template welcome cannot be used: {path}, line 1: No filter named")
    assert said("{{ user|humanise }}").endswith(
        "line 1: the filter 'humanise' exists in the templates of reports only, not in those of an Email."
    )


@pytest.mark.parametrize("source", ["{{ recipient.items }}", "{{ recipient.keys }}", "{{ say }}"])
def test_a_function_is_never_written_out_but_named_with_the_fix(tmp_path, source):
    write(tmp_path, {"progress/subject.txt.j2": source})
    with pytest.raises(
        TemplateUseError, match=r"is a function here; write \w+\(\) to call it, or \['\w+'\] for a column"
    ):
        Templates(tmp_path, "progress").render(context(recipient={"key": "1", "name": "n", "items": 3}))
    write(tmp_path, {"progress/subject.txt.j2": "{{ recipient['items'] }}"})
    assert (
        Templates(tmp_path, "progress").render(context(recipient={"key": "1", "name": "n", "items": 3})).subject == "3"
    )
