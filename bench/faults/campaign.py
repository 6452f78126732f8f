"""Campaign of many runs: a line for each, a table by kind of fault, and the command that replays each failure."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.faults.options import Options
from bench.faults.registry import NOBODY
from bench.faults.report import Verdict
from bench.faults.run import run_one

COUNTED = ("recipients", "accepted", "twice", "lost", "in_doubt", "in_doubt_not_accepted", "dead", "kills")


@dataclass(eq=False)
class Campaign:
    """Results of many runs."""

    console: Console
    runs: int = 0
    broken: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    settled_s: list[float] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        """Count a run and print its result."""
        row, counted = verdict.row, verdict.row["figures"]
        self.runs += 1
        self.settled_s.append(counted["settled_s"])
        for name in (*COUNTED, "doubts", "in_doubt_after_kills", "stood_between_dot_and_settle"):
            self.totals[name] += counted[name]
        struck = Counter(one["kind"] for one in row["schedule"] if one["note"] != NOBODY)
        for kind, times in struck.items():
            self.by_kind[kind].update(
                runs=1, strikes=times, lost=counted["lost"], twice=counted["twice"], doubts=_near(row, kind)
            )
        self._say(verdict)

    def _say(self, verdict: Verdict) -> None:
        row, counted = verdict.row, verdict.row["figures"]
        words = ", ".join(f"{counted[name]} {name.replace('_', ' ')}" for name in COUNTED)
        state = "[green]kept[/]" if verdict.is_kept else "[red]BROKEN[/]"
        self.console.print(
            f"seed {verdict.options.seed}: {state}; {words}; settled in {counted['settled_s']:.1f} s"
            f" (bound {counted['settled_bound_s']:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
        if counted["kills"]:
            self.console.print(
                f"  {counted['in_doubt_after_kills']} in doubt after {counted['kills']} kills"
                f" ({counted['in_doubt_per_kill']:g} per kill, {counted['in_doubt_per_kill_max']} at most):"
                f" {counted['stood_between_dot_and_settle']} connections stood between dot and settle,"
                f" {counted['in_doubt_without_a_dot']} between mark and dot",
                highlight=False,
                soft_wrap=True,
            )
        if row["tracebacks"]:
            self.console.print(f"  tracebacks in {verdict.options.directory}: {row['tracebacks']}", highlight=False)
        if verdict.is_kept:
            return
        self.broken.append(row["replay"])
        for one in verdict.violations:
            some = ", ".join(one.addresses[:5]) + (" …" if len(one.addresses) > 5 else "")
            self.console.print(f"  not kept: {one.law}: {len(one.addresses)} ({some})", highlight=False, soft_wrap=True)
        self.console.print(f"  look: {verdict.options.directory / 'timeline.svg'}", highlight=False, soft_wrap=True)
        self.console.print(f"  again: {row['replay']}", highlight=False, soft_wrap=True)

    def summary(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {
            "runs": self.runs,
            "broken": self.broken,
            "totals": dict(self.totals),
            "settled_s_max": max(self.settled_s, default=0.0),
            "by_fault": {kind: dict(counted) for kind, counted in sorted(self.by_kind.items())},
        }

    def table(self) -> Table:
        """Return a table by kind of fault: how often it came, and what followed."""
        title = f"{self.runs} runs, {self.totals['recipients']:,} recipients, {len(self.broken)} broken"
        table = Table(title=title, box=None)
        for column in ("fault", "times", "runs", "lost", "doubled", "in doubt per fault"):
            table.add_column(column, justify="left" if column == "fault" else "right")
        for kind, counted in sorted(self.by_kind.items()):
            doubts = counted["doubts"] / counted["strikes"]
            counts = (str(counted[name]) for name in ("strikes", "runs", "lost", "twice"))
            table.add_row(kind, *counts, f"{doubts:.2f}")
        return table


def _near(row: dict[str, Any], kind: str) -> int:
    """Count the doubts that arose while a fault of the kind affected the server: an upper bound of what it caused."""
    return int(row["doubts_by_fault"].get(kind, 0))


def each_alone(options: Options) -> Iterator[Options]:
    """Yield a run for every kind of fault, with that one only."""
    for kind in options.faults:
        yield replace(options, faults=(kind,), out=options.out / kind)


def run_all(every: Iterable[Options], *, out: Path, stop_at_first: bool, until: float | None = None) -> int:
    """Run them in turn and return the exit code. `until` is on time.monotonic's clock."""
    campaign = Campaign(Console())
    try:
        for options in every:
            campaign.add(run_one(options))
            if (stop_at_first and campaign.broken) or (until is not None and time.monotonic() > until):
                break
    finally:
        if campaign.runs:
            if campaign.runs > 1:
                campaign.console.print(campaign.table())
            out.mkdir(parents=True, exist_ok=True)
            (out / "summary.json").write_text(json.dumps(campaign.summary(), indent=1) + "\n")
            campaign.console.print(f"[dim]{out / 'summary.json'}[/]", highlight=False, soft_wrap=True)
    return 1 if campaign.broken else 0
