"""`outbox relay`: send the emails that are due, until a signal or an empty outbox ends it."""

import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import printable
from outbox.errors import OutboxError

if TYPE_CHECKING:
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
    """Return the words that run this program with these settings, before the name of a command."""
    search = [] if str(Path.cwd()) in sys.path else ["-P"]  # `-m` would look for modules in the working directory first
    named = [] if config is None else ["--config", str(config)]
    return [sys.executable, *search, "-m", "outbox", *named]


async def _relay(settings: "Settings", *, until_empty: bool, generating: Sequence[str] | None) -> None:
    from outbox.cli.relay_services import relays_with_services

    async with relays_with_services(settings, until_empty=until_empty) as relays:
        await _run_until_stopped(relays, settings, generating)
    if until_empty:
        await _refuse_what_is_left(settings)
    if relays.left_in_doubt:
        raise OutboxError(
            f"The relay had to stop before everything was answered and written (drain_s), so {relays.left_in_doubt} "
            "of its emails may be in doubt; `outbox status` names those that are."
        )
    if relays.left_refused:
        refused = " ".join(
            f"{route} refuses this sender, host or login: {why.removeprefix(f'{route}: ').rstrip('.')}."
            for route, why in relays.left_refused.items()
        )
        raise OutboxError(printable(f"{refused} The emails stay pending; `outbox doctor` says what to correct."))
    if relays.left_held:
        waiting = max(one.waiting for one in relays.left_held)
        paused = " and ".join(f"{one.target} is paused ({one.who}: {one.why})" for one in relays.left_held)
        remedies = " and ".join(f"`{one.remedy}`" for one in relays.left_held)
        raise OutboxError(printable(f"{waiting:,} emails were not sent, since {paused}; {remedies} lets them go."))


async def _refuse_what_is_left(settings: "Settings") -> None:
    """Return if no email waits for a route that these settings do not have and no other relay serves.

    Raises:
        OutboxError: some do; the message names each such route.

    """
    from outbox.operations.route_rules import read_unserved

    async with connected(settings, "outbox relay") as connection:
        left = [one for one in await read_unserved(connection) if one.route not in settings.routes]
    if left:
        raise OutboxError(" ".join(printable(one.sentence) for one in left))


async def _run_until_stopped(relays: "Relays", settings: "Settings", generating: Sequence[str] | None) -> None:
    """Run the relays until their routes are empty, or a signal stops them; a second signal ends at once."""
    import asyncio
    import signal

    from outbox.log import Events

    log = Events("outbox.relay")
    scheduler = None
    if generating is not None:
        from outbox.generate.scheduler import Scheduler

        scheduler = Scheduler(settings, generating)

    def stop(signum: int) -> None:
        if relays.stopping:
            # Emails past their dot stay marked: another relay finds them in doubt, as after a crash.
            os._exit(128 + signum)
        log.info(
            "relay_stopping", "stopping: what is in hand is finished first, for {drain_s:g} s", drain_s=settings.drain_s
        )
        if scheduler is not None:
            scheduler.stop()
        relays.stop()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    async with scheduler.running() if scheduler is not None else nullcontext():
        await relays.run()


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed: it halves the CPU per message."""
    try:
        import uvloop
    except ImportError:
        awaited(main)
    else:
        uvloop.run(main)
