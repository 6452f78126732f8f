"""The map in `outbox/__init__.py` and that of the commands name every room."""

import re
from pathlib import Path

import outbox
import outbox.cli
import outbox.web
import outbox.web.board


def test_every_room_stands_in_the_map():
    for package in (outbox, outbox.cli, outbox.web, outbox.web.board):
        floor = Path(package.__file__).parent
        named = set(re.findall(r"\w+", package.__doc__))
        rooms = {path.stem for path in floor.glob("*.py")} | {path.parent.name for path in floor.glob("*/__init__.py")}
        rooms -= {"__init__", "__main__"}
        assert not rooms - named
