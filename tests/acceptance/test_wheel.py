"""What users install: the wheel holds the schema, the templates and the types."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_ships_the_one_schema_the_templates_and_the_types(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("outbox_mail-*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        assert files.read("outbox/schema.sql") == (ROOT / "schema.sql").read_bytes()
    templates = {
        f"outbox/reports/templates/{path.name}"
        for path in (ROOT / "outbox/reports/templates").iterdir()
        if path.is_file()
    }
    assert templates
    assert templates | {"outbox/py.typed"} <= names
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
