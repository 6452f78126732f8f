"""`outbox generate` and `outbox digest`: make the missing reports and emails of an edition."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, log_warnings, settings_of
from outbox.cli.output import Bar, printable
from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from outbox.generate.result import Result
    from outbox.settings import Settings

EarlyOption = Annotated[
    bool, typer.Option("--early", help="With --period: also one that is not over yet; it is made only once.")
]


@app.command()
def generate(
    context: typer.Context,
    reports: Annotated[
        list[str] | None, typer.Argument(help="Which reports; all by default.", metavar="REPORT")
    ] = None,
    config: ConfigOption = None,
    period: Annotated[
        str | None, typer.Option(help="Which period, such as 2026-W48; by default the one due now.")
    ] = None,
    *,
    early: EarlyOption = False,
) -> None:
    """Make what is missing of an edition, once for the fleet.

    Each recipient gets a report and an email for the period; run it from cron on every server.
    """
    from outbox.settings import DIGEST

    _refuse_early_alone(period, early=early)
    settings = settings_of(context, config)
    settings.require("database_url", "sender", "reports")
    names = reports or list(settings.reports)
    if DIGEST in names:
        raise ConfigurationError("The digest is closed by `outbox digest`, not by `outbox generate`; run that.")
    for name in names:
        settings.report(name)
    from outbox.tracing import traced

    log_warnings()
    worst = 0
    with traced():
        for name in names:
            try:
                worst = max(worst, _generate_one(settings, name, period, early=early))
            except ConfigurationError:
                raise
            except OutboxError as error:
                if len(names) == 1:
                    raise
                typer.echo(f"outbox: {error}", err=True)
                worst = max(worst, error.exit_code)
    raise typer.Exit(worst)


@app.command()
def digest(
    context: typer.Context,
    config: ConfigOption = None,
    period: Annotated[
        str | None, typer.Option(help="Which period, such as 2026-W48; by default the one due now.")
    ] = None,
    *,
    early: EarlyOption = False,
) -> None:
    """Tell each address of all that waits for it, in one email.

    Closes the digest of a period: what comes later goes into the next. Run it from cron on every server.
    """
    from outbox.settings import DIGEST

    _refuse_early_alone(period, early=early)
    settings = settings_of(context, config)
    settings.require("database_url", "sender", DIGEST)
    from outbox.tracing import traced

    log_warnings()
    with traced():
        worst = _generate_one(settings, DIGEST, period, early=early)
    raise typer.Exit(worst)


def _refuse_early_alone(period: str | None, *, early: bool) -> None:
    if early and period is None:
        raise ConfigurationError("--early: goes with --period, since the period due now has ended; say which you mean.")


def _generate_one(settings: "Settings", name: str, period: str | None, *, early: bool) -> int:
    import os

    from outbox import tracing
    from outbox.generate.run import generate as make

    with Bar(name, counted=True) as bar, tracing.span("outbox generate", environ=os.environ, report=name):

        def progress(result: "Result") -> None:
            done = max(result.present, result.made) + len(result.failed) + len(result.waived)
            bar.show(total=result.expected, completed=done, description=result.edition.name)

        result = awaited(make(settings, name, period_key=period, early=early, progress=progress))
    if result.declared is not None:
        typer.echo(printable(f"{result.edition.name}: {result.declared.sentence}; nothing is made."))
        return 0
    for key, why in result.failed.items():
        typer.echo(f"outbox: {result.edition.name}, recipient {key}: {why}", err=True)
    typer.echo(f"{result.edition.name}: {_counts(result)}, of {result.expected} recipients.")
    if result.waived:
        typer.echo(f"{len(result.waived):,} of {result.expected:,} are owed nothing, as decided with `outbox waive`.")
    if result.suppressed:
        one = result.suppressed == 1
        typer.echo(
            f"{result.suppressed:,} of {result.expected:,} {'is' if one else 'are'} on the suppression list, "
            f"so no email goes to {'that one' if one else 'them'}: `outbox suppress`."
        )
    if result.waiting:
        wait = "report waits" if result.waiting == 1 else "reports wait"
        typer.echo(f"{result.waiting} {wait} for the next digest.")
    return 1 if result.failed else 0


def _counts(result: "Result") -> str:
    """Return the numbers of reports by where they were made; other servers made those "elsewhere" during this run."""
    elsewhere = result.elsewhere - result.already
    parts = [f"{result.made} made here"]
    if elsewhere or not result.already:
        parts.append(f"{elsewhere} elsewhere")
    if result.already:
        parts.append(f"{result.already} already made")
    return ", ".join([*parts, f"{len(result.failed)} failed"])
