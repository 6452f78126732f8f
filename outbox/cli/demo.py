"""`outbox demo`: the whole story on an embedded Postgres and mail server."""

from pathlib import Path
from typing import Annotated

import typer

from outbox.cli.app import app


@app.command()
def demo(
    people: Annotated[int, typer.Option(min=1, max=5000, help="How many people get a report.")] = 40,
    servers: Annotated[int, typer.Option(min=1, max=16, help="How many servers fire their cron at once.")] = 4,
    keep: Annotated[
        Path | None, typer.Option(help="Keep the emails and reports in this directory.", metavar="DIR")
    ] = None,
) -> None:
    """Tell the whole story in a minute.

    On an embedded Postgres and mail server; one of the company's servers is killed on the way.
    """
    from outbox.sandbox.demo import tell

    raise typer.Exit(tell(people=people, servers=servers, keep=keep))
