"""All benchmarks one after the other, each in a process of its own, and all targets in one table."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.harness.die_with_parent import die_with_parent
from bench.harness.environment import HOUSE, RESULTS, process_env
from bench.harness.figures import Target, show, verdict

# For a look at whether all of it works: the figures are worth little, and they replace those that were there.
QUICK: Final[Mapping[str, Sequence[str]]] = {
    "growth": (
        "--rounds",
        "1",
        "--settled",
        "100,10000",
        "--due",
        "1000,10000",
        "--deferred",
        "10000",
        "--through",
        "10000",
        "--prune",
        "1",
    ),
    "fleet": ("--runs", "1"),
    "relay": ("--runs", "1", "--emails", "5000"),
    "generate": ("--runs", "1", "--recipients", "500", "--many", "0"),
    "peers": ("--runs", "1", "--emails", "200", "--seconds", "0.2"),
    "startup": ("--runs", "5"),
    "web": (
        "--runs",
        "1",
        "--reports",
        "1000,10000",
        "--seconds",
        "3",
        "--emails",
        "10000",
        "--board-seconds",
        "1",
    ),
    "latency": ("--runs", "1", "--singles", "40"),
    "rate": ("--runs", "1", "--seconds", "15"),
    "relays": ("--runs", "1", "--emails", "5000", "--idle", "10", "--idle-s", "5"),
    "scale": ("--runs", "1", "--emails", "4000", "--recipients", "200"),
    "roundtrip": ("--runs", "1", "--seconds", "1"),
}
REPEAT: Final[Mapping[str, str]] = {"growth": "--rounds"}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Command, and whether it came to its end."""

    name: str
    arguments: tuple[str, ...]
    done: bool

    @property
    def command(self) -> str:
        """Return the command as it is typed."""
        return " ".join(("scripts/bench", self.name, *self.arguments))

    def targets(self) -> Iterator[Target]:
        """Yield the targets in its results; none if it failed, since the results are then of an earlier run."""
        path = RESULTS / f"{self.name}.json"
        if self.done and path.exists():
            yield from map(Target.of, json.loads(path.read_text()).get("targets", ()))


def run_all(names: Sequence[str], *, runs: int | None, quick: bool) -> bool:
    """Run them all and print the targets; return True if all ran and met them."""
    ran = [_run(name, _arguments(name, runs, quick=quick)) for name in names]
    promised = [(target, one) for one in ran for target in one.targets()]
    rows = [
        (target.what, target.wanted, f"{target.measured:,.3g} {target.unit}".strip(), verdict(target), one.command)
        for target, one in promised
    ]
    rows += [("did not come to its end", "", "", "[red]failed[/red]", one.command) for one in ran if not one.done]
    show("Targets", ("what", "target", "measured", "", "command"), rows)
    without = [one.name for one in ran if one.done and one.name != "plots" and not any(one.targets())]
    if without:
        print(f"No targets, figures only: {', '.join(without)}")
    return all(one.done for one in ran) and all(target.met for target, _ in promised)


def _arguments(name: str, runs: int | None, *, quick: bool) -> tuple[str, ...]:
    if quick:
        return tuple(QUICK.get(name, ()))
    return () if runs is None or name == "plots" else (REPEAT.get(name, "--runs"), str(runs))


def _run(name: str, arguments: tuple[str, ...]) -> Benchmark:
    print(f"\n{name}", flush=True)
    command = [sys.executable, "-m", "bench", name, *arguments]
    ended = subprocess.run(command, cwd=HOUSE, env=process_env(), check=False, preexec_fn=die_with_parent)
    return Benchmark(name, arguments, ended.returncode == 0)
