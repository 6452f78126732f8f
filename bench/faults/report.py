"""Report of a run: verdict.json and timeline.svg."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.faults.checker import Violation, check, figures
from bench.faults.evidence import Record
from bench.faults.options import Options
from bench.faults.timeline import draw

STORIES_MAX: Final = 20
ORDERLY: Final = "every command ends in its time"


@dataclass(frozen=True)
class Verdict:
    """Result of a run."""

    options: Options
    violations: list[Violation]
    row: dict[str, Any]

    @property
    def is_kept(self) -> bool:
        """Return True if no law is broken."""
        return not self.violations


def judge(options: Options, record: Record, unorderly: Sequence[str]) -> Verdict:
    """Check and count; write verdict.json and timeline.svg."""
    violations = check(record.facts)
    if unorderly:
        violations.append(Violation(ORDERLY, tuple(unorderly)))
    row = {
        "kept": not violations,
        "replay": options.replay(),
        "violations": [{"law": one.law, "addresses": list(one.addresses)} for one in violations],
        "figures": {
            **figures(record.facts),
            **record.kills(),
            "doubts": len(record.doubts()),
            "faults_s": round(record.over_at - record.began_at, 2),
            "settled_s": round(record.settled_at - record.over_at, 2),
            "settled_bound_s": round(options.bound_s, 2),
        },
        "stories": {address: record.story(address) for one in violations for address in one.addresses[:STORIES_MAX]},
        "doubts_by_fault": record.doubts_by_fault(),
        "moods_met": dict(sorted(record.environment.mail.met.items())),
        "tracebacks": _tracebacks(record),
        "arguments": options.as_row(),
        "schedule": [struck.as_row() for struck in record.strikes],
    }
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "verdict.json").write_text(json.dumps(row, indent=1) + "\n")
    (options.directory / "timeline.svg").write_text(_picture(options, record, row))
    return Verdict(options, violations, row)


def _tracebacks(record: Record) -> dict[str, int]:
    logs = {host.number: (host.directory / "log") for host in record.environment.hosts}
    counts = {f"server-{n}": log.read_text(errors="replace").count("Traceback (") for n, log in logs.items()}
    return {name: count for name, count in counts.items() if count}


def _picture(options: Options, record: Record, row: dict[str, Any]) -> str:
    counted = row["figures"]
    title = f"seed {options.seed}: {'kept' if row['kept'] else ', '.join(v['law'] for v in row['violations'])}"
    subtitle = (
        f"{options.servers} servers, {counted['recipients']} recipients, {len(record.strikes)} faults: "
        f"{counted['accepted']} accepted, {counted['twice']} twice, {counted['lost']} lost, "
        f"{counted['in_doubt']} in doubt, {counted['dead']} dead; settled {counted['settled_s']:.1f} s after the last"
    )
    over_s, settled_s = record.over_at - record.began_at, record.settled_at - record.began_at
    return draw(
        title, subtitle, record.lanes(), ends_s=settled_s + 0.5,
        notes=[(over_s, "faults over"), (settled_s, "settled")],
    )  # fmt: skip
