"""docs/security.md: every boundary names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/security.md"
COLUMNS = ["role or boundary", "may", "must not be able to", "shown by"]


def rows(text):
    """The cells of each row of the table of boundaries."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[0] == COLUMNS
    assert set("".join(table[1])) == {"-"}
    return table[2:]


def names_in(path):
    """The names of the tests in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_boundary_is_shown_by_tests_that_exist():
    found = rows(PAGE.read_text())
    assert len(found) > 10
    for row in found:
        assert len(row) == len(COLUMNS), row
        assert all(row), row
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[3])
        assert named, f"{row[0]}: no test is named"
        assert not re.sub(r"`[^`]*`|[, ]", "", row[3]), f"{row[0]}: something else than tests is named"
        for file, name in named:
            assert (ROOT / file).is_file(), f"{row[0]}: {file} does not exist"
            assert name in names_in(ROOT / file), f"{row[0]}: {file} has no {name}"


def test_no_boundary_is_there_twice():
    names = [row[0] for row in rows(PAGE.read_text())]
    assert len(names) == len(set(names))


def test_the_way_to_report_is_private_and_linked():
    text = (ROOT / "SECURITY.md").read_text()
    assert "Report a vulnerability" in text
    assert not re.search(r"[\w.]+@[\w.]+", text), "an address that nobody may read"
    for page, link in (
        ("README.md", "SECURITY.md"),
        ("README.md", "docs/security.md"),
        ("docs/security.md", "../SECURITY.md"),
    ):
        assert f"({link})" in (ROOT / page).read_text(), page
