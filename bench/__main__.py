"""`python -m bench COMMAND`: see --help."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from bench.faults.command import faults
from bench.harness import plots as plots_bench
from bench.harness import run_all as all_benchmarks
from bench.harness.environment import run
from bench.peers import race
from bench.peers.entrants import NAMES
from bench.speed import board as board_bench
from bench.speed import cli_startup as startup_bench
from bench.speed import enqueue_latency as latency_bench
from bench.speed import fleet as fleet_bench
from bench.speed import generate as generate_bench
from bench.speed import one_relay as relay_bench
from bench.speed import rate_limit as rate_bench
from bench.speed import relay_scaling as relays_bench
from bench.speed import report_page as web_bench
from bench.speed import scale_out as scale_bench
from bench.speed import slow_network as roundtrip_bench
from bench.speed import table_growth as growth_bench
from bench.speed import takeover as takeover_bench

app = typer.Typer(
    help="Benchmarks and faults on embedded Postgres, fsync on.", rich_markup_mode=None, no_args_is_help=True
)
NO_BENCHMARKS = ("faults", "takeover", "plots", "all")

app.command()(faults)


@app.command()
def fleet(servers: int = 4, relays: int = 4, recipients: int = 40, connections: int = 16, runs: int = 5) -> None:
    """Fire the cron of N servers at once while M relays run."""
    run(
        lambda url: fleet_bench.measure(
            url, servers=servers, relays=relays, recipients=recipients, connections=connections, runs=runs
        )
    )


@app.command()
def relay(
    emails: int = 20_000,
    size: int = 2000,
    connections: Annotated[list[int], typer.Option(help="Repeat for several.")] = [16, 64],  # noqa: B006 - typer copies
    runs: int = 5,
) -> None:
    """Compare one relay process with two loops without a database: by hand to smtp-sink, and aiosmtplib's sendmail."""
    run(lambda url: relay_bench.measure(url, emails=emails, size=size, connections=connections, runs=runs))


@app.command()
def generate(
    recipients: int = 5000,
    many: Annotated[int, typer.Option(help="Also for so many, with the peak of memory; 0: not.")] = 1_000_000,
    runs: int = 5,
) -> None:
    """Compare generate with a bare loop that renders and builds the same without a database."""
    run(lambda url: generate_bench.measure(url, recipients=recipients, many=many, runs=runs))


@app.command()
def peers(
    emails: Annotated[
        int, typer.Option(help="Of everybody's trial, which tells how many the runs have.", min=10)
    ] = 1000,
    seconds: Annotated[float, typer.Option(help="That each run lasts, about.", min=0.1)] = 4.0,
    size: int = 2000,
    workers: Annotated[int, typer.Option(help="Worker processes, of the peers and of outbox.", min=1)] = 4,
    connections: Annotated[int, typer.Option(help="SMTP connections per worker that can have several.", min=1)] = 16,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    only: Annotated[list[str], typer.Option(help=f"Repeat for several of: {', '.join(NAMES)}.")] = [],  # noqa: B006 - typer copies
) -> None:
    """Drain the same emails with outbox and with each peer at its documented best; one relay and smtp-source."""
    if unknown := [name for name in only if name not in NAMES]:
        raise typer.BadParameter(f"--only {unknown[0]}: write one of {', '.join(NAMES)}.")
    run(
        lambda url: race.measure(
            url,
            emails=emails,
            seconds=seconds,
            size=size,
            workers=workers,
            connections=connections,
            runs=runs,
            only=only,
        )
    )


@app.command()
def growth(
    settled: Annotated[str, typer.Option(help="So many sent emails of long ago.")] = "1000,100000,10000000",
    due: Annotated[str, typer.Option(help="So many emails that are due.")] = "1000,100000,1000000",
    deferred: Annotated[int, typer.Option(help="So many that are due tomorrow, against none.")] = 1_000_000,
    through: Annotated[int, typer.Option(help="So many go through, for what they leave behind.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Of each size, in turns.", min=1)] = 7,
    batches: Annotated[int, typer.Option(help="Of 100 emails in a round.", min=1, max=100)] = 10,
    prune_s: Annotated[float, typer.Option("--prune", help="So many seconds of a prune alone.")] = 30,
    parts: Annotated[str, typer.Option(help=f"Some of {', '.join(growth_bench.PARTS)}.")] = ",".join(
        growth_bench.PARTS
    ),
) -> None:
    """Measure the cost of emails and reads as tables grow; the largest of --settled is some 10 GB for ten million."""
    if unknown := set(parts.split(",")) - set(growth_bench.PARTS):
        raise typer.BadParameter(f"--parts {unknown.pop()}: write some of {', '.join(growth_bench.PARTS)}.")
    run(
        lambda url: growth_bench.measure(
            url, settled=_numbers(settled), due=_numbers(due), deferred=deferred, through=through, rounds=rounds,
            batches=batches, prune_s=prune_s, parts=parts.split(","),
        )
    )  # fmt: skip


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text}: write numbers, as 1000,100000.") from None


@app.command()
def takeover(rounds: int = 100, lost_rounds: int = 10, lease: Annotated[float, typer.Option(min=2)] = 10.0) -> None:
    """Measure the time from the loss of a relay (SIGKILL, SIGSTOP, black hole) until others have sent what it held."""
    takeover_bench.measure(rounds=rounds, lost_rounds=lost_rounds, lease_s=lease)


@app.command()
def startup(recipients: int = 40, runs: int = 15) -> None:
    """Compare `outbox --help` and a `generate` with nothing to do with bare imports."""
    run(lambda url: startup_bench.measure(url, recipients=recipients, runs=runs))


@app.command()
def web(
    reports: Annotated[str, typer.Option(help="So many are kept.")] = "100000,1000000",
    rate: Annotated[int, typer.Option(help="Requests a second.", min=1)] = 200,
    seconds: Annotated[float, typer.Option(help="That each run lasts.", min=1)] = 30,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    emails: Annotated[str, typer.Option(help="Of which the board shows.")] = "10000,1000000",
    board_seconds: Annotated[float, typer.Option(help="For each page of the board.", min=1)] = 10,
) -> None:
    """Measure pages of `outbox web` while requests come at a fixed rate: a report's (a million: 3 GB), the board's."""
    run(lambda url: web_bench.measure(url, reports=_numbers(reports), rate=rate, seconds=seconds, runs=runs))
    run(lambda url: board_bench.measure(url, emails=_numbers(emails), seconds=board_seconds))


@app.command()
def latency(
    relays: Annotated[list[int], typer.Option(help="Repeat for several.")] = [4, 8],  # noqa: B006 - typer copies
    singles: int = 200,
    runs: int = 5,
) -> None:
    """Measure from the COMMIT of a single email to its acceptance by an idle fleet: with NOTIFY, and by polls alone."""
    run(lambda url: latency_bench.measure(url, relays=relays, singles=singles, runs=runs))


@app.command()
def relays(
    count: Annotated[list[int], typer.Option(help="Repeat for several.")] = [1, 2, 4, 8],  # noqa: B006 - typer copies
    emails: int = 30_000,
    connections: Annotated[int, typer.Option(help="Of each relay: the default of connections_max.")] = 16,
    idle: Annotated[int, typer.Option(help="So many idle relays; 0 leaves that out.")] = 50,
    idle_s: float = 30.0,
    runs: int = 5,
) -> None:
    """Measure fleets of several sizes on one backlog, and the cost of many idle relays."""
    run(
        lambda url: relays_bench.measure(
            url, relays=count, emails=emails, connections=connections, idle=idle, idle_s=idle_s, runs=runs
        )
    )


@app.command()
def rate(
    rates: Annotated[list[float], typer.Option("--rate", help="Emails a second; repeat for several.")] = [14.0, 200.0],  # noqa: B006 - typer copies
    seconds: Annotated[float, typer.Option(min=15)] = 30.0,
    runs: int = 5,
) -> None:
    """Measure the precision of the fleet's rate while relays come, go and are killed."""
    run(lambda url: rate_bench.measure(url, rates=rates, seconds=seconds, runs=runs))


@app.command()
def roundtrip(
    ms: Annotated[list[float], typer.Option(help="A network's round trip; repeat for several.")] = [5.0, 50.0],  # noqa: B006 - typer copies
    seconds: Annotated[float, typer.Option(help="About, for each measurement at its limit.")] = 4.0,
    connections: int = 64,
    runs: int = 5,
) -> None:
    """Measure mail over a slow network: one connection against what round trips allow, and how many a relay opens."""
    run(
        lambda url: roundtrip_bench.measure(url, round_trips_ms=ms, seconds=seconds, connections=connections, runs=runs)
    )


@app.command()
def scale(
    emails: int = 20_000,
    crons: int = 16,
    recipients: int = 2000,
    sessions: Annotated[int, typer.Option(help="That PgBouncer has with Postgres.")] = 4,
    runs: int = 5,
) -> None:
    """Measure more than one Postgres: a synchronous standby, two servers side by side, crons on PgBouncer."""
    asyncio.run(scale_bench.measure(emails=emails, crons=crons, recipients=recipients, sessions=sessions, runs=runs))


@app.command()
def plots(out: Annotated[Path, typer.Option(help="The page.")] = plots_bench.PAGE) -> None:
    """Draw one page of the results in bench/results."""
    from bench.harness.svg import draw

    found = plots_bench.panels()
    if not found:
        raise typer.BadParameter("bench/results holds nothing to draw: run a benchmark first.")
    draw(found, out)
    print(f"{len(found)} panels: {out}")


@app.command(name="all")
def everything(
    runs: Annotated[int | None, typer.Option(help="Instead of what each does by itself.", show_default=False)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="As little as shows that all works; replaces the results.")
    ] = False,
) -> None:
    """Run all benchmarks, then draw the page and one table of targets: exit 0 when all were met, 1 when not."""
    named = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    names = [name for name in named if name not in NO_BENCHMARKS]
    raise typer.Exit(not all_benchmarks.run_all([*names, "plots"], runs=runs, quick=quick))


if __name__ == "__main__":
    app()
