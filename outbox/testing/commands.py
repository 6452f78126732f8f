"""Settings of a test, and `outbox` commands that run with them.

Commands are processes: what a cron and systemd start, with signals, exit codes, a fresh import of the user's source and
its own event loop, so nothing of them can differ under test or disturb it. It costs about half a second each;
`outbox_database.deliver` relays without a process.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from outbox.testing.postgres import PATIENCE

# What a deployed relay tells the world while it runs; a test's does not, unless the test says so.
TOLD_OUTSIDE: Final = ("dead_man_url", "http")
USUAL: Final[dict[str, Any]] = {**PATIENCE, "sender": "Outbox tests <outbox@example.com>", "log_format": "human"}


class SettingsFile:
    """outbox.toml of a test, at `path`, with `values`.

    Call it to put more in, as often as you like; tables are merged, all else is replaced:

        outbox_settings(in_doubt="resend", reports={"progress": {"source": "myapp.reports:Progress", "link": "…"}})
        outbox_settings(Path("deploy/outbox.toml"))     # what you deploy; database and mail server remain the test's
        outbox_settings('rate = "14/s"')                # TOML

    Of a file, the `templates` beside it are used too, and its `dead_man_url` and `http` are left out: nobody is to hear
    of a test. Its `retry` is kept, so give a short one if mail is to be deferred.
    """

    def __init__(self, directory: Path, *, database_url: str, smtp_url: str) -> None:
        self.path = directory / "outbox.toml"
        self._servers = {"database_url": database_url, "smtp_url": smtp_url}
        self.values: dict[str, Any] = {}
        self(USUAL)

    def __call__(self, given: Mapping[str, Any] | str | Path = "", /, **keys: Any) -> Path:
        """Write the former values with `given` and `keys`; return the file's path.

        Raises:
            ValueError: `given` is no TOML.

        """
        if isinstance(given, Path):
            self._bring_templates(given.absolute().parent / "templates")
            deployed = tomllib.loads(given.read_text(encoding="utf-8-sig"))
            given = {key: value for key, value in deployed.items() if key not in TOLD_OUTSIDE}
        values = tomllib.loads(given) if isinstance(given, str) else given
        self.values = {**_merged(_merged(self.values, values), keys), **self._servers}
        lines = (f"{json.dumps(key)} = {toml(value)}\n" for key, value in self.values.items())
        self.path.write_text("".join(lines), encoding="utf-8")
        return self.path

    def _bring_templates(self, templates: Path) -> None:
        ours = self.path.parent / "templates"
        if templates.is_dir() and not ours.exists():
            ours.symlink_to(templates)


@dataclass(frozen=True)
class Ran:
    """Result of a command: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


class Commands:
    """Runner of `outbox …` with the test's settings, in their directory; it can import what the test can import."""

    def __init__(self, settings: SettingsFile) -> None:
        self._settings = settings

    def __call__(
        self,
        *arguments: str,
        code: int | None = 0,
        within_s: float = 60.0,
        environment: Mapping[str, str] = {},
    ) -> Ran:
        """Run a command to its end: `outbox_run("generate", "progress", "--period", "2026-W47")`.

        `code` is the exit code that the test expects; None takes any.

        Raises:
            AssertionError: it ended with another; it says what the command said.
            subprocess.TimeoutExpired: it did not end within `within_s`, and was killed.

        """
        ended = subprocess.run(
            [sys.executable, "-m", "outbox", "--config", str(self._settings.path), *arguments],
            cwd=self._settings.path.parent,
            env={**_environment(), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        if code is not None and ended.returncode != code:
            said = f"{ended.stdout}{ended.stderr}"
            raise AssertionError(f"`outbox {' '.join(arguments)}` ended with {ended.returncode}, not {code}\n{said}")
        return Ran(ended.returncode, ended.stdout, ended.stderr)


def _environment() -> dict[str, str]:
    """Return our variables with the test's import path and without OUTBOX_*, which would win over its settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(old)
    for key, value in new.items():
        there = both.get(key)
        both[key] = _merged(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return both


def toml(value: Any) -> str:
    """Return a value as TOML; tables are inline ones."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
        case list() | tuple():
            return f"[{', '.join(map(toml, value))}]"
        case bool() | int() | float():
            return json.dumps(value)
        case _:
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
