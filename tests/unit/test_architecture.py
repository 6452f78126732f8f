"""The docstring of each package names its modules."""

import re
from pathlib import Path

import outbox


def test_the_docstring_of_each_package_names_its_modules():
    for init in Path(outbox.__file__).parent.rglob("__init__.py"):
        folder = init.parent
        named = set(re.findall(r"\w+", init.read_text().split('"""')[1]))
        modules = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        modules -= {"__init__", "__main__"}
        assert not modules - named, folder
