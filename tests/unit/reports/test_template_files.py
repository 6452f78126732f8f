"""Misspelt template files are named with what was meant; files that something uses are not."""

import os

import pytest

from outbox import Email
from outbox.reports.template_files import ignored
from tests.unit.reports.test_jinja import write

REPORTS = ("progress", "weekly_sales", "digest")
UNKNOWN = "since no report has this name"
UNUSED = (
    "is not used, since no template includes it; the templates of a report are subject.txt.j2, email.txt.j2, "
    "email.html.j2 and report.html.j2."
)
PROGRESS = "templates/progress/"


@pytest.mark.parametrize(
    ("file", "path", "reason"),
    [
        ("templates/progess/email.html.j2", "templates/progess/", f"{UNKNOWN} (did you mean progress?); rename it."),
        ("templates/Progress/subject.txt.j2", "templates/Progress/", f"{UNKNOWN} (did you mean progress?); rename it."),
        ("templates/weekly-sales/email.txt.j2", "templates/weekly-sales/", f"{UNKNOWN} (did you mean weekly_sales?)"),
        ("templates/digests/email.txt.j2", "templates/digests/", f"{UNKNOWN} (did you mean digest?); rename it."),
        ("templates/monthly/report.html.j2", "templates/monthly/",
         f"{UNKNOWN}; the reports are digest, progress, weekly_sales; rename it."),
        ("templates/reports/progress/email.txt.j2", "templates/reports/progress/", "(did you mean templates/progress"),
        (f"{PROGRESS}emial.html.j2", None, "(did you mean email.html.j2?); rename it."),
        (f"{PROGRESS}email.html", None, "(did you mean email.html.j2?); rename it."),
        (f"{PROGRESS}email.htm.j2", None, "(did you mean email.html.j2?); rename it."),
        (f"{PROGRESS}email.html.jinja2", None, "(did you mean email.html.j2?); rename it."),
        (f"{PROGRESS}Subject.txt.j2", None, "(did you mean subject.txt.j2?); rename it."),
        (f"{PROGRESS}subject.j2", None, "(did you mean subject.txt.j2?); rename it."),
        ("templates/emial.txt.j2", None, "(did you mean email.txt.j2?); rename it."),
        (f"{PROGRESS}body.j2", None, UNUSED),
        (f"{PROGRESS}de/email.txt.j2", None, UNUSED),
        ("template/progress/email.txt.j2", "template/", "(did you mean templates?); rename it."),
        ("Templates/email.txt.j2", "Templates/", "(did you mean templates?); rename it."),
        ("progress/email.txt.j2", "progress/", "(did you mean templates/progress?); move it."),
        ("email.html.j2", None, "(did you mean templates/email.html.j2?); move it."),
    ],
)  # fmt: skip
def test_a_template_in_a_place_where_none_is_read_is_named_with_what_was_meant(tmp_path, file, path, reason):
    write(tmp_path, {file: "x"})
    (sentence,) = ignored(tmp_path, REPORTS)
    assert sentence.startswith(f"{tmp_path / (path or file)}{'/' if path else ''}: is not used")
    assert reason in sentence


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"progress/email.html.j2": "x", "subject.txt.j2": "x", "digest/report.html.j2": "x"},
        {"welcome/email.html.j2": "x", "welcome/row.html.j2": "x"},
        {"progress/email.html.j2": "{% include 'progress/emails.html.j2' %}", "progress/emails.html.j2": "x"},
        {"progress/subject.txt.j2": "{% import 'progress/a.j2' as m %}",
         "progress/a.j2": "{% from 'progress/b.j2' import x %}", "progress/b.j2": "x"},
        {"email.html.j2": "{% extends 'emial.html.j2' %}", "emial.html.j2": "{% include 'shared/a' %}", "shared/a": ""},
        {"progress/email.html.j2": "{% include 'progres/email.html.j2' %}", "progres/email.html.j2": "x"},
        {"progress/email.html.j2": "x", "progres/email.html.j2": "an Email's"},
        {"progress/email.html.j2": "{% include 'a/progress/email.txt.j2' %}", "a/progress/email.txt.j2": "x"},
        {"progress/email.html.j2": "{% include 'progress/' ~ language ~ '.j2' %}", "progress/de.j2": "x"},
        {"progress/email.html.j2": "{% if %}", "progress/part.j2": "x"},
        {"progress/email.html.j2": "x", "progress/email.html.j2~": "x", "progress/.email.txt.j2.swp": "x",
         "progress/subject.txt.j2.bak": "x", "progress/email_old.html.j2": "x", "progress/README.md": "x"},
        {"email.txt.j2": "x", "../templates_old/email.txt.j2": "x", "../templates.bak/email.txt.j2": "x"},
        {"site/index.html": "x", "base.html": "x", "../template/readme.txt": "x", "../progress/__init__.py": "x"},
    ],
)  # fmt: skip
def test_what_is_used_or_may_belong_to_something_else_is_not_called_misspelt(tmp_path, files):
    (tmp_path / "templates").mkdir()
    write(tmp_path / "templates", files)
    assert ignored(tmp_path, REPORTS) == []


def test_each_directory_is_named_once_and_a_broken_link_is_named(tmp_path):
    write(tmp_path, {f"templates/progess/{name}.j2": "x" for name in ("email.html", "email.txt", "subject.txt")})
    assert len(ignored(tmp_path, REPORTS)) == 1
    (tmp_path / "templates/progress").mkdir()
    (tmp_path / "templates/progress/email.txt.j2").symlink_to("gone")
    directory, sentence = ignored(tmp_path, REPORTS)
    assert "progess/" in directory
    assert sentence.endswith(
        "progress/email.txt.j2: is not used, since it is a link to a file that does not exist; correct it."
    )


def test_a_directory_without_end_or_without_rights_raises_nothing(tmp_path, monkeypatch):
    write(tmp_path, {"templates/progress/email.txt.j2": "x"})
    (tmp_path / "templates/progress/loop").symlink_to("..")
    assert ignored(tmp_path, REPORTS) == []
    assert ignored(tmp_path / "nowhere", REPORTS) == []
    refused = os.scandir

    def scandir(path):
        if str(path).endswith("progress"):
            raise PermissionError(13, "Permission denied", str(path))
        return refused(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (sentence,) = ignored(tmp_path, REPORTS)
    assert (
        sentence == f"{tmp_path}/templates/progress: cannot be read (Permission denied), so its templates are not used."
    )


def test_a_misspelt_template_of_an_email_is_refused_and_a_part_that_it_includes_is_not(tmp_path):
    def email(template="welcome"):
        return Email(
            key="k", sender="a@example.com", to="b@example.com", subject="s", template=template, templates=tmp_path
        )

    write(tmp_path, {"welcome/email.txt.j2": "hello", "welcome/email.htm.j2": "<p>hello"})
    with pytest.raises(ValueError, match=r"email\.htm\.j2: outbox reads no .* \(did you mean email\.html"):
        email()
    with pytest.raises(ValueError, match=r"There is no template welcom in .* \(did you mean welcome\?\); write"):
        email("welcom")
    write(tmp_path, {"welcome/email.txt.j2": "{% include 'welcome/email.htm.j2' %}"})
    email()
