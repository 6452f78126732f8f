"""`python -m bench fleet|relay`: see --help."""

from typing import Annotated

import typer

from bench import fleet as fleet_bench
from bench import relay as relay_bench
from bench.world import run

app = typer.Typer(help="Benchmarks on embedded Postgres, fsync on.", rich_markup_mode=None, no_args_is_help=True)


@app.command()
def fleet(servers: int = 4, relays: int = 4, recipients: int = 40, connections: int = 16, runs: int = 5) -> None:
    """N servers fire their cron at once while M relays run."""
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
    """One relay process against a bare aiosmtplib loop without a database."""
    run(lambda url: relay_bench.measure(url, emails=emails, size=size, connections=connections, runs=runs))


if __name__ == "__main__":
    app()
