"""`outbox waive`: decide that nothing is owed to a recipient for an edition."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.email_options import WhyOption, YesOption, print_outcome, twice
from outbox.cli.output import NAMES_SHOWN, printable
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.operations.waive import Owed
    from outbox.settings import Settings


@app.command()
def waive(
    context: typer.Context,
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            help="REPORT/PERIOD/RECIPIENT, as `outbox status` shows them.", metavar="KEY", show_default=False
        ),
    ] = None,
    config: ConfigOption = None,
    *,
    edition: Annotated[
        str | None,
        typer.Option(
            help='Instead of keys: all without a report in an edition, such as "progress 2026-W48".',
            show_default=False,
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take such a decision back.")] = False,
    why: WhyOption = "",
    yes: YesOption = False,
) -> None:
    """Decide that nothing is owed to a recipient for an edition.

    For recipients whose report cannot be made, or whose email failed: the edition is complete without them, and
    generate makes no report for them. To leave people out for good, correct the recipients query.
    """
    wanted = list(dict.fromkeys(keys or ()))
    problems = _problems(wanted, edition, why, undo=undo, yes=yes)
    if problems:
        raise ConfigurationError(problems)
    settings = settings_of(context, config)
    settings.require("database_url")
    raise typer.Exit(awaited(_waive(settings, wanted, edition, why, undo=undo, yes=yes)))


def _problems(keys: list[str], edition: str | None, why: str, *, undo: bool, yes: bool) -> list[str]:
    from outbox.operations.waive import Owed

    if edition is None:
        nothing = 'Name keys, as `outbox status` shows them, or say --edition "progress 2026-W48".'
        wrong = [key for key in keys if Owed.parse(key) is None]
        return [f"{key}: is not REPORT/PERIOD/RECIPIENT, such as progress/2026-W48/42." for key in wrong] or (
            [] if keys else [nothing]
        )
    problems = ["--edition decides about a whole edition; name keys or say --edition, not both."] if keys else []
    if undo:
        problems.append("--undo takes keys; name them.")
    if not why.strip():
        problems.append('--why: say why, as in --why "no longer customers"; it is kept with the decision.')
    if not yes and not sys.stdin.isatty():
        problems.append("--edition decides about many recipients at once and cannot ask here; add --yes.")
    return problems


async def _waive(settings: "Settings", keys: list[str], edition: str | None, why: str, *, undo: bool, yes: bool) -> int:
    from outbox.operations.operator import whoami
    from outbox.operations.waive import Owed, unreached_of
    from outbox.operations.waive import waive as decide

    async with connected(settings, "outbox waive") as connection:
        recipients = [one for one in map(Owed.parse, keys) if one is not None]
        if edition is not None:
            report, _, period = edition.strip().rpartition(" ")
            recipients = await unreached_of(connection, report, period)
            if not recipients:
                typer.echo(f"No recipient of {printable(edition)} is without a report and undecided.")
                return 0
            _confirm(recipients, yes=yes)
        done, left = await decide(connection, recipients, who=whoami(), why=why, undo=undo)
    keys_done = [one.key for one in done]
    past = "owed again; run `outbox generate` to make the report" if undo else "nothing is owed"
    return print_outcome(keys_done[:NAMES_SHOWN] if edition is not None else keys_done, len(done), past, [
        *left.values(), *twice(keys),
    ])  # fmt: skip


def _confirm(recipients: "list[Owed]", *, yes: bool) -> None:
    """Return if `yes`, or if the user confirms at the terminal."""
    if yes:
        return
    for one in recipients[:NAMES_SHOWN]:
        typer.echo(printable(f"  {one.key}"), err=True)
    if len(recipients) > NAMES_SHOWN:
        typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {len(recipients) - NAMES_SHOWN:,} more", err=True)
    if not typer.confirm(f"Decide that nothing is owed to these {len(recipients):,} recipients?", err=True):
        typer.echo("outbox: Nothing was changed.", err=True)
        raise typer.Exit(1)
