"""`outbox list`: list emails, the newest first."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.email_options import PeriodOption, ReportOption, ToOption, clashes
from outbox.cli.output import table, to_json, zone_of
from outbox.errors import ConfigurationError
from outbox.mail.delivery_state import DeliveryState

if TYPE_CHECKING:
    from outbox.operations.email_filter import Selection
    from outbox.operations.email_list import Listing
    from outbox.settings import Settings

LIMIT = 50


@app.command("list")
def list_(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    state: Annotated[
        list[DeliveryState] | None,
        typer.Option(
            help="Only in this state: pending, sending, in_doubt, sent, dead, cancelled or expired; may be repeated.",
            metavar="STATE",
            show_default=False,
        ),
    ] = None,
    edition: Annotated[
        str | None, typer.Option(help='Only of this edition, such as "progress 2026-W48".', show_default=False)
    ] = None,
    report: ReportOption = None,
    period: PeriodOption = None,
    to: ToOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = LIMIT,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List emails, the newest first."""
    from outbox.operations.email_filter import Selection

    chosen = Selection((), edition, report, period, to, tuple(one.value for one in state or ()))
    problems = clashes(chosen)
    if problems:
        raise ConfigurationError(problems)
    settings = settings_of(context, config)
    settings.require("database_url")
    found = awaited(_list(settings, chosen, limit))
    if as_json:
        typer.echo(to_json(found.as_json()))
    else:
        _print_listing(found, settings)


async def _list(settings: "Settings", chosen: "Selection", limit: int) -> "Listing":
    from outbox.operations.email_list import list_emails

    async with connected(settings, "outbox list") as connection:
        return await list_emails(connection, chosen, limit=limit)


def _print_listing(found: "Listing", settings: "Settings") -> None:
    if not found.emails:
        typer.echo("No email fits.")
        return
    from outbox.reports.period import spoken_time

    rows = []
    for one in found.emails:
        state = one.state.replace("_", " ") + (" (paused)" if one.paused else "")
        state += " (undecided)" if one.needs_person and one.state != "in_doubt" else ""
        since = spoken_time(one.since, zone_of(settings, one.report))
        rows.append([one.key, one.to, state, str(one.attempts), since, one.said])
    for line in table(["key", "to", "state", "tries", "since", "last heard"], rows):
        typer.echo(line)
    if found.more:
        at_least = "at least " if found.at_least else ""
        typer.echo(f"\N{HORIZONTAL ELLIPSIS} and {at_least}{found.more:,} more; --limit shows more of them.")
