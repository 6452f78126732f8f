"""The commands about which editions are made when: by schedules, or not at all since another system made them."""

import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, console, printable, settings_of, to_json
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.generate.schedule_state import Agenda, Latest
    from outbox.settings import EditionSettings, Settings

_EXAMPLE = 'schedule = "0 6 * * mon"'


@app.command()
def schedule(
    context: typer.Context,
    reports: Annotated[
        list[str] | None, typer.Argument(help="Which reports; by default all that have one.", metavar="REPORT")
    ] = None,
    config: ConfigOption = None,
    *,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many of the next ticks.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show when relays start editions, and how the last one went.

    Times are those of the report's timezone, and UTC; the database's clock says what is over.
    """
    from outbox.generate.schedule_state import scheduled
    from outbox.settings import table_of

    settings = settings_of(context, config)
    settings.require("database_url", "reports")
    for name in reports or []:
        if settings.report(name).schedule is None:
            raise ConfigurationError(f"{table_of(name)}: has no schedule; write one like {_EXAMPLE}.")
    found = awaited(_look(settings, list(dict.fromkeys(reports or scheduled(settings))), count))
    if as_json:
        typer.echo(to_json({"schedules": [one.as_json() for one in found]}))
    elif found:
        _print(found)
    else:
        typer.echo(f"No report has a schedule: write {_EXAMPLE} for one, or let cron start `outbox generate`.")


@app.command(name="mark-done")
def mark_done(
    context: typer.Context,
    report: Annotated[str, typer.Argument(help="Which report.", metavar="REPORT", show_default=False)],
    period: Annotated[
        str, typer.Argument(help="Which period, such as 2026-W48.", metavar="PERIOD", show_default=False)
    ],
    config: ConfigOption = None,
    *,
    why: Annotated[str, typer.Option(help="Why; kept with the operation.", show_default=False)] = "",
    keep_emails: Annotated[
        bool, typer.Option("--keep-emails", help="Emails of it that exist already stay as they are.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back: outbox makes the edition again.")] = False,
) -> None:
    """Declare an edition as done by another system.

    Neither generate nor a schedule makes it then. For going live beside an old cron job.
    """
    if undo and keep_emails:
        raise ConfigurationError("--undo and --keep-emails do not go together; say one of them.")
    settings = settings_of(context, config)
    settings.require("database_url")
    settings.report(report)
    typer.echo(printable(awaited(_mark_done(settings, report, period, why, keep_emails=keep_emails, undo=undo))))


async def _mark_done(settings: "Settings", name: str, period: str, why: str, *, keep_emails: bool, undo: bool) -> str:
    from outbox.database.engine import driver_of, engine
    from outbox.database.lock_wait import lock_waits
    from outbox.operations import mark_done as marking
    from outbox.operations.resolve import whoami

    assert settings.database_url is not None
    async with connected(settings, "outbox mark-done"):
        pass  # says what keeps this program from the database, if anything does
    report = settings.report(name)
    async with engine(settings.database_url, application="outbox mark-done").connect() as connection:
        driver = await driver_of(connection)
        async with lock_waits(settings.database_url, driver, "`outbox mark-done`"):
            if undo:
                return await marking.undo_mark_done(connection, name, report, period, who=whoami(), why=why)
            return await marking.mark_done(
                connection, name, report, period, who=whoami(), why=why, keep_emails=keep_emails
            )


async def _look(settings: "Settings", names: list[str], count: int) -> "list[Agenda]":
    from outbox.generate.schedule_state import look

    async with connected(settings, "outbox schedule") as connection:
        return await look(connection, settings, names, count)


def _print(found: "list[Agenda]") -> None:
    """A line for each tick: folded on a terminal, whole and aligned elsewhere."""
    lines: list[tuple[str, ...]] = [("report", "tick", "UTC", "period", "state")]
    for one in found:
        lines += [("" if n else one.name, *row) for n, row in enumerate(_rows(one))]
    lines = [tuple(map(printable, line)) for line in lines]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    made = Table(*lines[0], box=None, pad_edge=False, header_style="dim")
    for line in lines[1:]:
        made.add_row(*map(Text, line))
    console(highlight=False).print(made)


def _rows(one: "Agenda") -> list[tuple[str, str, str, str]]:
    """Of each tick: in the report's civil time, in UTC, its period, and what is known of it."""
    shown = [] if one.last is None else [(one.last.tick, _said(one.last, one.report))]
    shown += [(tick, f"in {_spoken(tick.at - one.now)}") for tick in one.ticks]
    zone = one.report.zone
    return [
        (f"{tick.at.astimezone(zone):%a %Y-%m-%d %H:%M %Z}", f"{tick.at:%Y-%m-%d %H:%M}", tick.period, state)
        for tick, state in shown
    ]


def _said(last: "Latest", report: "EditionSettings") -> str:
    """What became of a tick, and the mend where a person is needed."""
    from outbox.generate.schedule_state import Standing

    row = last.row
    failed = row.failed if row is not None and row.failures else ""
    match last.standing:
        case Standing.DONE if row is not None and row.done_at is not None:
            return f"done {_civil(row.done_at, report)}"
        case Standing.FAILING if row is not None:
            return f"{failed}; tried again at {_civil(row.retry_at, report)}"
        case Standing.MISSED:
            return f"missed, too late since {_civil(last.until, report)}{failed and '; '}{failed}"
        case Standing.NEW:
            return "before the schedule was followed"
        case _:
            return "due, or under way"


def _civil(at: datetime, report: "EditionSettings") -> str:
    return f"{at.astimezone(report.zone):%Y-%m-%d %H:%M:%S %Z}"


def _spoken(length: timedelta) -> str:
    """`2 d 3 h`, `3 h 5 min` or `40 s`."""
    s = max(int(length.total_seconds()), 0)
    if s >= 86_400:  # noqa: PLR2004 - a day
        return f"{s // 86_400} d {s % 86_400 // 3600} h"
    return f"{s // 3600} h {s % 3600 // 60} min" if s >= 60 else f"{s} s"  # noqa: PLR2004 - a minute
