"""All targets in turn for so many minutes; a finding is printed with its input, and makes the exit code 1."""

import argparse
import asyncio
import random
import sys
import time
from contextlib import ExitStack

from outbox.sandbox.postgres import postgres
from outbox.testing.postgres import FAST, make_template
from tests.fuzz.harness import Run
from tests.fuzz.targets import TARGETS

SLICE_S = 20.0


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("minutes", nargs="?", type=float, default=1.0, metavar="MINUTES")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), metavar="TARGET", help=", ".join(sorted(TARGETS)))
    parser.add_argument("--seed", type=int, default=None, help="to see the same inputs again")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(2**32)
    chosen = [TARGETS[name] for name in asked.only or sorted(TARGETS)]
    print(f"{len(chosen)} targets for {asked.minutes:g} min, --seed {seed}", flush=True)
    begun = time.monotonic()
    with ExitStack() as stack:
        url = None
        if any(target.needs_database for target in chosen):
            url = asyncio.run(make_template(stack.enter_context(postgres(settings=FAST))))
        runs = [Run(target, stack.enter_context(target.opened(url))) for target in chosen]
        for run in runs:
            for finding in run.replay():
                print(f"FOUND in the corpus: {finding}", flush=True)
        ends = time.monotonic() + asked.minutes * 60
        while (left_s := ends - time.monotonic()) > 0 and (able := [run for run in runs if not run.findings]):
            slice_s = min(SLICE_S, left_s / len(able))
            for run in able:
                seed += 1_000_000
                if (found := run.explore(slice_s, seed)) is not None:
                    print(f"FOUND: {found}", flush=True)
                print(f"{time.monotonic() - begun:6.0f} s  {run.target.name}: {run.examples:,} inputs", flush=True)
    found = sum(len(run.findings) for run in runs)
    print(
        f"{sum(run.examples for run in runs):,} inputs, {found} findings in {(time.monotonic() - begun) / 60:.1f} min"
    )
    for run in runs:
        print(f"  {run.target.name:<12} {run.examples:>9,} inputs  {len(run.findings) or 'no'} finding(s)")
    return 1 if found else 0


sys.exit(main())
