import io

from outbox.cli.email_options import print_outcome, problems_of, twice
from outbox.operations.email_filter import Selection


def test_a_decision_about_many_wants_a_reason_and_a_yes_and_words_that_go_together(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    keys, edition = ("mail3",), "progress 2026-W48"
    for selection, why, yes, sentence in [
        (Selection(), "", True, "Name keys, as `outbox list` shows them, or say"),
        (Selection(keys, to="x"), "x", True, "--to decides about all that fit; name keys or say --to, not both."),
        (
            Selection(keys, states=("dead",)),
            "",
            True,
            "--state picks among emails that are not named; ",
        ),
        (Selection(report="a"), " ", True, "--why: say why, "),
        (Selection(report="a"), "x", False, "--report decides about many emails at once and nobody can be asked here"),
        (Selection((), edition, "a"), "x", True, "--edition says report and period already; take --report out."),
    ]:
        (said,) = problems_of(selection, why, yes=yes)
        assert said.startswith(sentence)
    assert problems_of(Selection(keys), "", yes=False) == []
    assert problems_of(Selection(to="x"), "x", yes=True) == []


def test_what_was_done_is_printed_by_name_and_what_was_not_is_an_error(capsys):
    assert print_outcome(["a\x1b"], 3, "cancelled", []) == 0
    assert capsys.readouterr() == ("a\ufffd: cancelled\n… and 2 more: cancelled\n", "")
    assert print_outcome([], 0, "cancelled", ["b is sent."]) == 1
    assert capsys.readouterr() == ("", "outbox: b is sent.\n")


def test_a_key_that_is_named_twice_counts_once():
    assert twice(["a", "b", "a", "a"]) == ["a was named twice; it counts once."]
