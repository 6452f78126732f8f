"""The commands under which emails go out, and grow old."""

import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outbox.cli.app import Bar, ConfigOption, app, awaited, connected, printable, settings_of, to_json
from outbox.errors import OutboxError

if TYPE_CHECKING:
    from datetime import timedelta

    from outbox.operations.prune import Pruned
    from outbox.relay.supervisor import Relays
    from outbox.settings import Settings


@app.command()
def relay(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Exit when nothing is pending or being sent.")
    ] = False,
    http: Annotated[
        str | None,
        typer.Option(
            help="Answer /metrics, /livez and /readyz there, as 127.0.0.1:9464.",
            metavar="HOST:PORT",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Send what is due; keep one running on every server. SIGTERM finishes what is in hand, twice ends at once."""
    settings = settings_of(context, config)
    has_schedules = not until_empty and any(report.schedule for report in settings.editions.values())
    settings.require("database_url", "smtp_url", *(["sender"] if has_schedules else []))
    if http is not None:
        settings = settings.model_copy(update={"http": http})
    from outbox.log import configure

    configure(settings.log_format, settings.log_level, addresses=settings.log_addresses)
    generating = _generating(config or context.obj) if has_schedules else None
    _run(_relay(settings, until_empty=until_empty, generating=generating))


def _generating(config: Path | None) -> list[str]:
    """How this program is run with these settings, before the command's name."""
    search = [] if str(Path.cwd()) in sys.path else ["-P"]  # `-m` would look for modules in the working directory first
    named = [] if config is None else ["--config", str(config)]
    return [sys.executable, *search, "-m", "outbox", *named]


async def _relay(settings: "Settings", *, until_empty: bool, generating: Sequence[str] | None) -> None:
    from outbox.cli.relay_services import attended

    async with attended(settings, until_empty=until_empty) as sender:
        await _run_until_told(sender, settings, generating)
    if until_empty:
        await _refuse_what_is_left(settings)
    if sender.left_in_doubt:
        raise OutboxError(
            f"The relay had to stop before everything was answered and written (drain_s), so {sender.left_in_doubt} "
            "of its emails may be in doubt; `outbox status` names those that are."
        )
    if sender.left_refused:
        refused = " ".join(
            f"{route} refuses this sender, host or login: {why.removeprefix(f'{route}: ').rstrip('.')}."
            for route, why in sender.left_refused.items()
        )
        raise OutboxError(printable(f"{refused} The emails stay pending; `outbox doctor` says what to correct."))
    if sender.left_held:
        waiting = max(one.waiting for one in sender.left_held)
        paused = " and ".join(f"{one.target} is paused ({one.who}: {one.why})" for one in sender.left_held)
        remedies = " and ".join(f"`{one.remedy}`" for one in sender.left_held)
        raise OutboxError(printable(f"{waiting:,} emails were not sent, since {paused}; {remedies} lets them go."))


async def _refuse_what_is_left(settings: "Settings") -> None:
    """Return if no email waits for a route that these settings do not have and nobody else serves.

    Raises:
        OutboxError: some do; a sentence names each such route.

    """
    from outbox.operations.route_rules import read_unserved

    async with connected(settings, "outbox relay") as connection:
        left = [one for one in await read_unserved(connection) if one.route not in settings.routes]
    if left:
        raise OutboxError(" ".join(printable(one.sentence) for one in left))


async def _run_until_told(sender: "Relays", settings: "Settings", generating: Sequence[str] | None) -> None:
    """Run the relays until their routes are empty, or a signal says to stop; a second one ends at once."""
    import asyncio
    import signal

    from outbox.log import Events

    log = Events("outbox.relay")
    scheduler = None
    if generating is not None:
        from outbox.generate.scheduler import Scheduler

        scheduler = Scheduler(settings, generating)

    def stop(signum: int) -> None:
        if sender.stopping:
            # What is past its dot stays marked: another relay finds it in doubt, as after a crash.
            os._exit(128 + signum)
        log.info(
            "relay_stopping", "stopping: what is in hand is finished first, for {drain_s:g} s", drain_s=settings.drain_s
        )
        if scheduler is not None:
            scheduler.stop()
        sender.stop()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    async with scheduler.running() if scheduler is not None else nullcontext():
        await sender.run()


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed: it halves the CPU per message."""
    try:
        import uvloop
    except ImportError:
        awaited(main)
    else:
        uvloop.run(main)


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
    """What went, and the signal that ended it early. A second signal ends at once, which harms nothing either."""
    import asyncio
    import signal

    from outbox.operations.prune import prune as remove

    assert settings.database_url is not None
    stop = asyncio.Event()
    heard: list[int] = []

    def end(signum: int) -> None:
        if heard:
            os._exit(128 + signum)
        heard.append(signum)
        stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end, signum)
    with Bar("pruning", counted=False) as bar:

        def progress(found: "Pruned") -> None:
            description = f"pruning {'pages' if found.walking == 'report' else 'emails'}"
            bar.show(total=1.0, completed=found.share, description=description)

        found = await remove(settings.database_url, keep, dry_run=dry_run, stop=stop, progress=progress)
    return found, heard[0] if heard else None


def _print_pruned(found: "Pruned", *, dry_run: bool, stopped: bool) -> None:
    line = (
        f"{'Would prune' if dry_run else 'Pruned'} {found.emails:,} emails, {found.attempts:,} attempts and "
        f"{found.pages:,} pages from before {found.before:%Y-%m-%d %H:%M:%S} UTC"
    )
    if found.unsettled:
        line += f"; {found.unsettled:,} emails stay that are not settled"
    typer.echo(line + ("; stopped early, run it again to go on." if stopped else "."))
