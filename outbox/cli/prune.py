"""`outbox prune`: remove the bodies, trails and pages of old, settled emails."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, settings_of
from outbox.cli.output import Bar, to_json

if TYPE_CHECKING:
    from datetime import timedelta

    from outbox.operations.prune import Pruned
    from outbox.settings import Settings


@app.command()
def prune(
    context: typer.Context,
    keep: Annotated[
        str, typer.Option(help="What is older goes: 400d, 52w, 48h; at least 1d.", metavar="TIME", show_default=False)
    ],
    config: ConfigOption = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Remove the bodies, trails and pages of old, settled emails.

    Their rows stay, so an old edition that is generated again sends nothing. Relays may run; so may cron run this.
    """
    from outbox.operations.prune import keep_of

    kept = keep_of(keep)
    settings = settings_of(context, config)
    settings.require("database_url")
    found, signum = awaited(_prune(settings, kept, dry_run=dry_run))
    if as_json:
        whole = {**found.as_json(), "dry_run": dry_run, "stopped": signum is not None}
        typer.echo(to_json(whole))
    else:
        _print_pruned(found, dry_run=dry_run, stopped=signum is not None)
    raise typer.Exit(0 if signum is None else 128 + signum)


async def _prune(settings: "Settings", keep: "timedelta", *, dry_run: bool) -> "tuple[Pruned, int | None]":
    """Return what was removed, and the signal that ended it early. A second signal ends at once, which is safe, too."""
    import asyncio
    import signal

    from outbox.operations.prune import prune as remove

    assert settings.database_url is not None
    stop = asyncio.Event()
    received: list[int] = []

    def end(signum: int) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end, signum)
    with Bar("pruning", counted=False) as bar:

        def progress(found: "Pruned") -> None:
            description = f"pruning {'pages' if found.walking == 'report' else 'emails'}"
            bar.show(total=1.0, completed=found.share, description=description)

        found = await remove(settings.database_url, keep, dry_run=dry_run, stop=stop, progress=progress)
    return found, received[0] if received else None


def _print_pruned(found: "Pruned", *, dry_run: bool, stopped: bool) -> None:
    line = (
        f"{'Would prune' if dry_run else 'Pruned'} {found.emails:,} emails, {found.attempts:,} attempts and "
        f"{found.pages:,} pages from before {found.before:%Y-%m-%d %H:%M:%S} UTC"
    )
    if found.unsettled:
        line += f"; {found.unsettled:,} emails stay that are not settled"
    typer.echo(line + ("; stopped early, run it again to go on." if stopped else "."))
