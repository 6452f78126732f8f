"""`python -m bench faults`: its arguments, and the runs that they ask for."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.faults import campaign
from bench.faults.nemesis import FAULTS
from bench.faults.options import MIX, STORM_S, Options

USUAL = Options()


def faults(
    seed: Annotated[int, typer.Option(help="The schedule and the mail server's misbehaviour come from it.")] = 1,
    seeds: Annotated[str, typer.Option(help="Several, as 1..20.", metavar="A..B")] = "",
    count: Annotated[int, typer.Option(help="So many seeds from --seed on.", min=1)] = 1,
    soak: Annotated[float, typer.Option(help="Seeds from --seed on for so many minutes, to the first violation.")] = 0,
    stop_at_first: Annotated[bool, typer.Option("--stop-at-first", help="End with the first violation.")] = False,
    servers: Annotated[int, typer.Option(min=1, max=32)] = USUAL.servers,
    recipients: Annotated[int, typer.Option(min=1)] = USUAL.recipients,
    faults: Annotated[str, typer.Option(help=f"all, or some of: {', '.join(FAULTS)}.")] = "all",
    each: Annotated[bool, typer.Option("--each", help="Each of --faults in runs of its own.")] = False,
    minutes: Annotated[float | None, typer.Option(help="How long faults come; 0.2 is fine.")] = None,
    storm: Annotated[int, typer.Option(help="So many SIGKILLs of relays, and nothing else.")] = 0,
    every: Annotated[float, typer.Option(help="Seconds between two faults, about.", min=0.05)] = USUAL.every_s,
    in_doubt: Annotated[
        str, typer.Option(help="hold, resend, or ask (the servers look into the mail server's log).")
    ] = USUAL.in_doubt,
    resolve_after: Annotated[
        float, typer.Option(help="A person resolves doubt of so many seconds by what the mail server has.")
    ] = USUAL.resolve_after_s,
    lease: Annotated[float, typer.Option(help="lease_s of the relays.", min=2)] = USUAL.lease_s,
    connections: Annotated[int, typer.Option(help="connections_max of each relay.", min=1)] = USUAL.connections,
    routes: Annotated[
        int, typer.Option(help="Routes to the mail server, each for some of the people.", min=1)
    ] = USUAL.routes,
    dot: Annotated[float, typer.Option(help="Seconds that the mail server takes over each dot.")] = USUAL.dot_s,
    schedule: Annotated[Path | None, typer.Option(help="The verdict.json whose schedule is replayed.")] = None,
    package: Annotated[
        list[Path], typer.Option(help="A directory with another `outbox`; repeat for a mixed fleet.")
    ] = [],  # noqa: B006 - typer copies
    out: Annotated[Path, typer.Option(help="Where DIR/SEED/verdict.json and timeline.svg go.")] = USUAL.out,
) -> None:
    """Run faults on a fleet and judge the result: exit 0 if no law was broken, else 1."""
    kinds = MIX if faults == "all" else tuple(faults.split(","))
    _require_known(kinds, in_doubt, schedule, package)
    options = Options(
        seed=seed, servers=servers, recipients=recipients, faults=kinds,
        minutes=minutes if minutes is not None else storm * STORM_S / 60 or USUAL.minutes,
        storm=storm, every_s=every, in_doubt=in_doubt, resolve_after_s=resolve_after, lease_s=lease,
        connections=connections, routes=routes, dot_s=dot, schedule=schedule,
        packages=tuple(one.absolute() for one in package), out=out.absolute(),
    )  # fmt: skip
    until = time.monotonic() + soak * 60 if soak else None
    every_run = _runs(options, _seeds(seed, seeds, count, endless=bool(soak)), each=each)
    raise typer.Exit(
        campaign.run_all(every_run, out=options.out, stop_at_first=stop_at_first or bool(soak), until=until)
    )


def _require_known(kinds: tuple[str, ...], in_doubt: str, schedule: Path | None, packages: list[Path]) -> None:
    """Return if the arguments name what there is."""
    unknown = [kind for kind in kinds if kind not in FAULTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no fault; the faults are {', '.join(FAULTS)}.")
    if in_doubt not in ("hold", "resend", "ask"):
        raise typer.BadParameter(f"--in-doubt {in_doubt}: write hold, resend or ask.")
    if schedule is not None and not schedule.is_file():
        raise typer.BadParameter(f"--schedule {schedule}: there is no such file.")
    for one in packages:
        if not (one / "outbox" / "__init__.py").is_file():
            raise typer.BadParameter(f"--package {one}: there is no outbox/__init__.py in it.")


def _seeds(first: int, several: str, count: int, *, endless: bool) -> Iterator[int]:
    if endless:
        return itertools.count(first)
    begins, dots, ends = several.partition("..")
    if several and not (dots and begins.isdigit() and ends.isdigit()):
        raise typer.BadParameter(f"--seeds {several}: write the first and the last, as 1..20.")
    return iter(range(int(begins), int(ends) + 1) if several else range(first, first + count))


def _runs(options: Options, seeds: Iterator[int], *, each: bool) -> Iterator[Options]:
    for seed in seeds:
        seeded = replace(options, seed=seed)
        yield from campaign.each_alone(seeded) if each else [seeded]
