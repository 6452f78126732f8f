"""What the examples in docs/deploy say, done: their settings, their secrets as files, their sandbox's hardest rule."""

import sys
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "docs/deploy"

# PR_SET_MDWE, of Linux 6.3 and later, which is inherited: no memory is ever writable and executable. What
# MemoryDenyWriteExecute= does in systemd.
WITHOUT_WX = "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


async def test_the_examples_work_together_with_secrets_as_files_and_without_writable_code(fleet, tmp_path):
    await fleet.connection.execute("DROP TABLE people, progress")
    await fleet.connection.execute((DEPLOY / "example.sql").read_text())
    fleet.settings = (DEPLOY / "outbox.toml").read_text()
    secrets = {"database_url": fleet.database, "smtp_url": fleet.sink.url}
    for name, url in secrets.items():
        (tmp_path / name).write_text(url + "\n")
    environment = {f"OUTBOX_{name.upper()}_FILE": str(tmp_path / name) for name in secrets}
    for words in (("generate",), ("relay", "--until-empty"), ("audit", "progress")):
        process = await fleet.start(*words, environment=environment, within=[sys.executable, "-c", WITHOUT_WX])
        ended = await process.ended()
        assert ended.code == 0, ended
    assert (fleet.sink.addresses.total(), fleet.twice) == (3, {})
