"""`outbox pause` and `outbox resume`: hold back the emails of a report or of the fleet, and let them go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import printable
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from outbox.database.pause_list import Pause
    from outbox.settings import Settings

ReportArgument = Annotated[
    str | None, typer.Argument(help="Which report; without, the whole fleet.", metavar="[REPORT]", show_default=False)
]


@app.command()
def pause(
    context: typer.Context,
    report: ReportArgument = None,
    config: ConfigOption = None,
    *,
    why: Annotated[str, typer.Option(help="Why; `outbox status` shows it.", show_default=False)] = "",
) -> None:
    """Hold back a report, or all mail, until resume.

    Reports are made as ever. What a relay has begun to send still goes out.
    """
    if not why.strip():
        raise ConfigurationError('--why: say why, as in --why "the figures are wrong"; `outbox status` shows it.')
    for line in awaited(_pause(_settings(context, config), _named(report), why)):
        typer.echo(printable(line))


@app.command()
def resume(
    context: typer.Context,
    report: ReportArgument = None,
    config: ConfigOption = None,
    *,
    why: Annotated[str, typer.Option(help="Why; kept with the operation.", show_default=False)] = "",
) -> None:
    """Let go what pause holds back."""
    for line in awaited(_resume(_settings(context, config), _named(report), why)):
        typer.echo(printable(line))


def _settings(context: typer.Context, config: Path | None) -> "Settings":
    settings = settings_of(context, config)
    settings.require("database_url")
    return settings


def _named(report: str | None) -> str:
    """Return the name of a pause; '' is the fleet's, which is not typed."""
    if report is not None and not report.strip():
        raise ConfigurationError("REPORT: is empty; name a report, or leave it out to mean the whole fleet.")
    return report or ""


async def _pause(settings: "Settings", report: str, why: str) -> list[str]:
    from outbox.database.pause_list import read_pauses
    from outbox.operations.operator import whoami
    from outbox.operations.pause import begin_pause, is_known

    async with connected(settings, "outbox pause") as connection:
        if report and report not in settings.editions and not await is_known(connection, report):
            settings.report(report)  # raises an error with the names that exist
        begun = await begin_pause(connection, report, who=whoami(), why=why)
        for one in await read_pauses(connection):
            if one.report == report:
                return [_sentence(one, "now" if begun else "already")]
    return []  # it was resumed in the meantime


async def _resume(settings: "Settings", report: str, why: str) -> list[str]:
    from outbox.database.pause_list import label, read_pauses
    from outbox.operations.operator import whoami
    from outbox.operations.pause import end_pause

    async with connected(settings, "outbox resume") as connection:
        pauses = {one.report: one for one in await read_pauses(connection)}
        ours = pauses.pop(report, None)
        waiting = ours.waiting if ours is not None else 0
        ended = await end_pause(connection, report, who=whoami(), why=why, waiting=waiting)
    if not ended:
        lines = [f"{_capital(label(report))} is not paused."]
    else:
        lines = [f"{_capital(label(report))} goes on: {_emails(waiting)} no longer held back."]
    lines += [_sentence(one, "still") for one in pauses.values() if not one.report or not report]
    return lines


def _sentence(one: "Pause", how: str) -> str:
    return (
        f"{_capital(one.target)} is {how} paused since {one.since:%Y-%m-%d %H:%M:%S} UTC ({one.who}: {one.why}): "
        f"{_emails(one.waiting)} waiting; `{one.remedy}` lets them go."
    )


def _emails(count: int) -> str:
    return "1 email is" if count == 1 else f"{count:,} emails are"


def _capital(target: str) -> str:
    """Return the target as a sentence begins with it; a report's name is unchanged."""
    return "The fleet" if target == "the fleet" else target


def describe_pauses(pauses: "Iterable[Pause]") -> list[str]:
    """Return a line for each pause, for `outbox status`."""
    return [printable(_sentence(one, "").replace("  ", " ")) for one in pauses]
