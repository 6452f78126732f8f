"""`outbox mark-done`: declare an edition as done by another system."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import printable
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.settings import Settings


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
    from outbox.operations.operator import whoami

    assert settings.database_url is not None
    async with connected(settings, "outbox mark-done"):
        pass  # raises the error that keeps this program from the database, if there is one
    report = settings.report(name)
    async with engine(settings.database_url, application="outbox mark-done").connect() as connection:
        driver = await driver_of(connection)
        async with lock_waits(settings.database_url, driver, "`outbox mark-done`"):
            if undo:
                return await marking.undo_mark_done(connection, name, report, period, who=whoami(), why=why)
            return await marking.mark_done(
                connection, name, report, period, who=whoami(), why=why, keep_emails=keep_emails
            )
