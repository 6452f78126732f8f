"""The shape of the code: what packages list, the size of modules and classes, and the names of tests and in pages."""

import ast
import re
from pathlib import Path

import pytest

import outbox

PACKAGE = Path(outbox.__file__).parent
ROOT = PACKAGE.parent
CODE = sorted(
    path for folder in (PACKAGE, ROOT / "bench", ROOT / "scripts") for path in folder.rglob("*.py") if path.is_file()
)

MODULE_LINES_MAX = 450
CLASS_LINES_MAX = 300
# Larger ones, each with the reason.
LARGE_MODULES = {
    "outbox/smtp/connection.py": "one state machine: each state is understood only beside the others",
}
LARGE_CLASSES = {
    "outbox/smtp/connection.py:SmtpConnection": "one state machine: each state is understood only beside the others",
}


INITS = sorted(init for folder in (PACKAGE, ROOT / "bench") for init in folder.rglob("__init__.py"))


def docstring_of(path):
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def modules_in(folder):
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return modules - {"__init__", "__main__"}


def classes_of(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def test_the_docstring_of_each_package_names_its_modules():
    for init in INITS:
        named = set(re.findall(r"\w+", docstring_of(init)))
        assert not modules_in(init.parent) - named, init.parent


def test_the_docstring_of_each_package_names_only_modules_that_exist():
    """In a list a name stands alone at the beginning of its line, or several with commas, and two spaces follow."""
    for init in INITS:
        lines = re.findall(r"^ *(\w+(?:, \w+)*)(?:  .*|)$", docstring_of(init), re.MULTILINE)
        listed = {name for line in lines for name in line.split(", ") if len(lines) > 1}
        assert not listed - modules_in(init.parent) - {"__main__"}, init.parent


def test_few_modules_lie_outside_of_a_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_modules_are_not_too_large():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in CODE}
    assert {
        name: count for name, count in lines.items() if count > MODULE_LINES_MAX and name not in LARGE_MODULES
    } == {}


def test_classes_are_not_too_large():
    lines = {
        f"{path.relative_to(ROOT)}:{one.name}": one.end_lineno - one.lineno + 1
        for path in CODE
        for one in classes_of(path)
    }
    too_large = {name: count for name, count in lines.items() if count > CLASS_LINES_MAX}
    assert not too_large.keys() - LARGE_CLASSES.keys(), too_large


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_a_page_names_files_that_exist(page):
    named = re.findall(r"`((?:outbox|bench|tests|scripts|docs)/[\w./-]+)[` ]", (ROOT / page).read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


# A statement that changes the state of a delivery, or inserts one with a state: in Python or in schema.sql.
CHANGES_STATE = re.compile(
    r"update\s+outbox\.delivery(?:\s+\w+)?\s+set\s(?:(?!\bwhere\b|\bfrom\b).)*?\bstate\s*="
    r"|insert\s+into\s+outbox\.delivery\s*\([^)]*\bstate\b",
    re.IGNORECASE | re.DOTALL,
)


def test_the_architecture_page_names_each_file_that_changes_the_state_of_a_delivery():
    page = (ROOT / "docs/architecture.md").read_text()
    table = page[page.index("## The states of a delivery") : page.index("## The fence")]
    upgrades = PACKAGE / "database/upgrades.py"
    changing = [
        str(path.relative_to(ROOT))
        for path in (*PACKAGE.rglob("*.py"), ROOT / "schema.sql")
        if path != upgrades and CHANGES_STATE.search(path.read_text())
    ]
    assert len(changing) >= 11
    assert not [path for path in changing if f"`{path}`" not in table]


def module_of(test):
    """The module or package that a unit test is named after."""
    path = test.relative_to(ROOT / "tests/unit").with_name(test.stem.removeprefix("test_"))
    return next((found for found in (PACKAGE / f"{path}.py", PACKAGE / path) if found.exists()), None)


# Unit tests of what is not a module: examples, lock files, pages, the program of a package.
NOT_OF_A_MODULE = {"test_architecture", "test_deploy_examples", "test_lock", "test_security_page", "test_main"}


def test_a_unit_test_is_named_after_its_module():
    tests = [path for path in (ROOT / "tests/unit").rglob("test_*.py") if path.stem not in NOT_OF_A_MODULE]
    assert not [str(path.relative_to(ROOT)) for path in tests if module_of(path) is None]
