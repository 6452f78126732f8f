"""The map in `outbox/__init__.py` and that of the commands name every room."""

import re
from pathlib import Path

import outbox
import outbox.cli

HOUSE = Path(outbox.__file__).parent


def test_every_room_stands_in_the_map():
    for package, floor in ((outbox, HOUSE), (outbox.cli, HOUSE / "cli")):
        named = set(re.findall(r"\w+", package.__doc__))
        rooms = {path.stem for path in floor.glob("*.py")} - {"__init__", "__main__"}
        assert not rooms - named
