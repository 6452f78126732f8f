"""`outbox schedule`: show when relays start editions, and how the last one went."""

import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import console, printable, to_json
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


async def _look(settings: "Settings", names: list[str], count: int) -> "list[Agenda]":
    from outbox.generate.schedule_state import look

    async with connected(settings, "outbox schedule") as connection:
        return await look(connection, settings, names, count)


def _print(found: "list[Agenda]") -> None:
    """Print a line for each tick: folded on a terminal, whole and aligned elsewhere."""
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
    """Return for each tick its time in the report's timezone and in UTC, its period and its state."""
    shown = [] if one.last is None else [(one.last.tick, _outcome(one.last, one.report))]
    shown += [(tick, f"in {_label(tick.at - one.now)}") for tick in one.ticks]
    zone = one.report.zone
    return [
        (f"{tick.at.astimezone(zone):%a %Y-%m-%d %H:%M %Z}", f"{tick.at:%Y-%m-%d %H:%M}", tick.period, state)
        for tick, state in shown
    ]


def _outcome(last: "Latest", report: "EditionSettings") -> str:
    """Return the outcome of a tick, with the fix where a person is needed."""
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


def _label(length: timedelta) -> str:
    """Return a length such as `2 d 3 h`, `3 h 5 min` or `40 s`."""
    s = max(int(length.total_seconds()), 0)
    if s >= 86_400:  # noqa: PLR2004 - a day
        return f"{s // 86_400} d {s % 86_400 // 3600} h"
    return f"{s // 3600} h {s % 3600 // 60} min" if s >= 60 else f"{s} s"  # noqa: PLR2004 - a minute
