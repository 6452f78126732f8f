"""Names of keys as users write them: dotted as in TOML, or as the name of an OUTBOX_<KEY> variable."""

import re
from typing import Final

DIGEST: Final = "digest"
"""Name of the report over reports: its table is `[digest]`."""


def variable(key: str) -> str:
    """Return the name of the environment variable for a top-level key."""
    return f"OUTBOX_{key.upper()}"


def quoted(part: str) -> str:
    """Return one part of a dotted key as TOML spells it."""
    return part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'


def table_of(report: str) -> str:
    """Return the name of a report's table: `reports.progress`, or `digest`."""
    return DIGEST if report == DIGEST else f"reports.{quoted(report)}"


def command_of(report: str) -> list[str]:
    """Return the arguments of `outbox` that make an edition of this report, without its period."""
    return [DIGEST] if report == DIGEST else ["generate", report]
