"""Options of a fault run: its arguments, its schedule, and the bound within which everything must be settled."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.faults.nemesis import FAULTS
from bench.faults.schedule import Strike, plan, storm
from bench.faults.workload import DOUBT_GRACE_S, REPLY_S, RETRY_MAX_S
from bench.harness.environment import RESULTS

STORM_S: Final = 0.6  # between two kills of a storm, when --minutes does not say it
PEOPLE_PER_S: Final = 200.0
BREAKER_S: Final = 5.0
SLACK_S: Final = 30.0  # processes start, on a machine that is busy


MIX: Final = tuple(name for name, fault in FAULTS.items() if not fault.alone)


@dataclass(frozen=True)
class Options:
    """Arguments of a run; with the seed they are all that a replay needs."""

    seed: int = 1
    servers: int = 6
    recipients: int = 5000
    faults: tuple[str, ...] = MIX
    minutes: float = 1.0
    in_doubt: str = "hold"
    storm: int = 0
    lease_s: float = 2.0
    connections: int = 4
    routes: int = 1
    every_s: float = 1.5
    dot_s: float = 0.0
    resolve_after_s: float = 0.0
    schedule: Path | None = None
    packages: tuple[Path, ...] = ()
    out: Path = RESULTS / "faults"

    @property
    def seconds(self) -> float:
        """Return for how many seconds faults come."""
        return self.minutes * 60

    @property
    def directory(self) -> Path:
        """Return the directory of the verdict."""
        return self.out / str(self.seed)

    @property
    def bound_s(self) -> float:
        """Return the seconds from the last fault until all is settled: takeover, silent reply, retry, breaker."""
        takeover_s = 3 * self.lease_s
        grace_s = DOUBT_GRACE_S + 2 * self.lease_s if self.in_doubt != "hold" else self.resolve_after_s
        rest_s = self.recipients / PEOPLE_PER_S
        return takeover_s + 2 * REPLY_S + RETRY_MAX_S + BREAKER_S + grace_s + rest_s + SLACK_S

    def strikes(self) -> list[Strike]:
        """Return the schedule: that of a replayed verdict, a storm, or a mix."""
        if self.schedule is not None:
            rows = json.loads(self.schedule.read_text())["schedule"]
            return [Strike.of(row) for row in rows]
        if self.storm:
            return storm(self.seed, self.storm, seconds=self.seconds, servers=self.servers)
        shapes = {name: FAULTS[name].shape for name in self.faults}
        return plan(
            self.seed, self.faults, shapes,
            seconds=self.seconds, servers=self.servers, lease_s=self.lease_s, every_s=self.every_s,
        )  # fmt: skip

    def replay(self) -> str:
        """Return the command that repeats this run."""
        words = ["python", "-m", "bench", "faults"]
        for name, usual in Options.__dataclass_fields__.items():
            value = getattr(self, name)
            if name in ("seed", "minutes") or (value != usual.default and name != "out"):
                words += _option(name, value)
        return shlex.join(words)

    def as_row(self) -> dict[str, Any]:
        """Return the arguments as a verdict keeps them."""
        return {name: _plain(getattr(self, name)) for name in Options.__dataclass_fields__ if name != "out"}


def _option(name: str, value: Any) -> list[str]:
    flag = {"packages": "--package", "every_s": "--every", "lease_s": "--lease"}.get(
        name, f"--{name.replace('_', '-')}"
    )
    flag = flag.removesuffix("-s")
    if name == "faults":
        return [flag, ",".join(value)]
    if name == "packages":
        return [word for one in value for word in (flag, str(one))]
    return [flag, str(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
