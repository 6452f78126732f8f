"""Cost of starting a command: the installed `outbox`, against a Python that imports its libraries only."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.harness.environment import open_environment, process_env
from bench.harness.figures import Spread, Target, keep, show

HELP: Final = "outbox --help"
TYPER: Final = "import typer"
GENERATE: Final = "outbox generate, nothing to do"
LIBRARIES: Final = "import sqlalchemy.ext.asyncio, asyncpg, jinja2, typer"
HELP_MAX: Final = 1.3
GENERATE_MAX: Final = 1.5

OUTBOX: Final = str(Path(sys.executable).with_name("outbox"))
COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    HELP: (OUTBOX, "--help"),
    TYPER: (sys.executable, "-c", TYPER),
    GENERATE: (OUTBOX, "generate"),
    LIBRARIES: (sys.executable, "-c", LIBRARIES),
}


async def measure(url: str, *, recipients: int, runs: int) -> None:
    """Alternate the commands; a table and bench/results/startup.json."""
    async with open_environment(url, connections=1) as environment:
        await environment.reset(recipients)
        for command in COMMANDS.values():  # makes the reports, and fills the caches
            _timed(command, environment.directory)
        found: dict[str, list[dict[str, float]]] = {who: [] for who in COMMANDS}
        for _ in range(runs):
            for who, command in COMMANDS.items():
                found[who].append(_timed(command, environment.directory))
    wall = {who: Spread.of([1000 * one["wall_s"] for one in every]) for who, every in found.items()}
    cpu = {who: Spread.of([1000 * one["cpu_s"] for one in every]) for who, every in found.items()}
    show(
        f"From start to exit, {recipients} recipients: median, least and most of {runs} runs",
        ("command", "wall ms", "CPU ms"),
        [(who, wall[who].text(",.0f"), cpu[who].text(",.0f")) for who in COMMANDS],
    )
    targets = [
        Target(f"{HELP}: wall time, against {TYPER}", wall[HELP].median / wall[TYPER].median, HELP_MAX, "times"),
        Target(f"{GENERATE}: wall time, against imports", _ratio(wall), GENERATE_MAX, "times"),
        Target(f"{GENERATE}: CPU time, against imports", _ratio(cpu), GENERATE_MAX, "times"),
    ]
    keep("startup", {"recipients": recipients, "runs": runs, "found": found}, targets)


def _ratio(spreads: Mapping[str, Spread]) -> float:
    return spreads[GENERATE].median / spreads[LIBRARIES].median


def _timed(command: Sequence[str], directory: Path) -> dict[str, float]:
    """Return wall and CPU seconds of one command, as a user's shell would run it."""
    kept = {name: value for name, value in process_env().items() if name != "PYTHONPATH"}
    with (directory / "log").open("ab") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=directory, env=kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench: {command} exited {process.returncode}: {(directory / 'log').read_text()[-2000:]}")
    return {"wall_s": wall_s, "cpu_s": used.ru_utime + used.ru_stime}
