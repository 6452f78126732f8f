"""The commands under which reports come to be."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import Bar, ConfigOption, app, awaited, connected, printable, settings_of
from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from outbox.generate.run import Result
    from outbox.settings import Settings

EarlyOption = Annotated[
    bool, typer.Option("--early", help="With --period: also one that is not over yet; it is made only once.")
]


@app.command()
def init(
    context: typer.Context,
    config: ConfigOption = None,
    redefine: Annotated[
        list[str] | None,
        typer.Option(help="Make this server's cadence, covers and timezone of REPORT the fleet's.", metavar="REPORT"),
    ] = None,
    *,
    roles: Annotated[
        bool, typer.Option("--roles", help="Make the roles too, each with the rights for its part and no others.")
    ] = False,
    rotate_bounce_key: Annotated[
        bool,
        typer.Option(
            "--rotate-bounce-key",
            help="Make a new key for bounce tokens; the former stays valid for 30 days.",
        ),
    ] = False,
) -> None:
    """Create or upgrade the database's schema.

    Safe on all servers at once, and again.
    """
    settings = settings_of(context, config)
    settings.require("database_url")
    for name in redefine or []:
        settings.report(name)
    (before, after), renewed, changes = awaited(_initialise(settings, redefine or [], roles=roles))
    for line in (_describe_version(before, after), *changes, *_former_timezones(settings)):
        typer.echo(line)
    for name in redefine or []:
        report = settings.report(name)
        typer.echo(f"{name} is {report.cadence}, covers {report.covers}, {report.timezone}, for the whole fleet.")
    if rotate_bounce_key:
        typer.echo(awaited(_rotate_bounce_key(settings)))
    if roles:
        _print_roles()
    elif renewed:
        typer.echo("The rights of its roles were renewed.")
    elif renewed is False:
        typer.echo("Its roles have no rights on new objects yet; run `outbox init --roles`.")


def _describe_version(before: int | None, after: int) -> str:
    if before is None:
        return f"The outbox schema is there now, at version {after}."
    if before < after:
        return f"The outbox schema was upgraded from version {before} to {after}."
    return f"The outbox schema is at version {after} already."


def _former_timezones(settings: "Settings") -> list[str]:
    """Return a line for each report whose timezone is written by a former name."""
    from outbox.reports.timezones import current
    from outbox.settings import table_of

    return [
        f"{table_of(name)}.timezone: {report.timezone} is a former name of {current(report.timezone)}, which is used "
        "where Postgres lacks it; both mean the same periods."
        for name, report in settings.editions.items()
        if report.timezone != current(report.timezone)
    ]


def _print_roles() -> None:
    from outbox.database.roles import ROLES

    typer.echo("These roles may do their part now, and nothing else:")
    for name, role in ROLES.items():
        typer.echo(f"  {name:<18} {role.does}")
    typer.echo("Let your own roles into them, and grant those that generate what your queries read:")
    typer.echo("  GRANT outbox_relay TO app_relay;")
    typer.echo("  GRANT outbox_generate TO app_generate; GRANT SELECT ON people, progress TO app_generate;")


async def _rotate_bounce_key(settings: "Settings") -> str:
    from outbox.feedback.bounce_key import rotate

    async with connected(settings, "outbox init") as connection:
        until = await rotate(connection)
    former = f"; tokens of the former one stay valid until {until:%Y-%m-%d %H:%M} UTC" if until else ""
    return f"A new key signs bounce tokens{former}."


async def _initialise(
    settings: "Settings", redefine: list[str], *, roles: bool
) -> tuple[tuple[int | None, int], bool | None, list[str]]:
    """Return the versions before and after, whether an upgrade renewed the rights of roles (None if it need not),
    and the other changes, one line each.
    """
    from outbox.database.engine import driver_of, engine
    from outbox.database.lock_wait import lock_waits
    from outbox.database.opening import connect
    from outbox.database.roles import are_renewed, are_used, grant_roles, renew_grants
    from outbox.database.schema import VERSION, initialise, limit_messages, read_broken
    from outbox.operations.route_rules import told, write_rules

    assert settings.database_url is not None
    connection = await connect(settings.database_url, application="outbox init")
    try:
        async with lock_waits(settings.database_url, connection, "`outbox init`"):
            versions = await initialise(connection, then=renew_grants)
            upgraded = versions[0] not in (None, versions[1])
            renewed = await are_renewed(connection) if upgraded and await are_used(connection) else None
            if roles:
                await grant_roles(connection)
            changes = []
            if versions[1] == VERSION:
                limit = await limit_messages(connection, settings.message_bytes_max)
                if limit is not None:
                    changes.append(
                        f"The limit on messages is now {settings.message_bytes_max:,} octets; it was {limit:,}."
                    )
                if upgraded or limit is not None:
                    changes += [
                        f"Older emails violate {name}; they stay as they are, and new ones are refused."
                        for name in await read_broken(connection)
                    ]
                changes += told(await write_rules(connection, settings))
    finally:
        await connection.close()
    if redefine:
        from outbox.generate import edition

        async with engine(settings.database_url, application="outbox init").connect() as session:
            driver = await driver_of(session)
            async with lock_waits(settings.database_url, driver, "`outbox init --redefine`"):
                for name in redefine:
                    await edition.redefine(session, name, settings.report(name))
    return versions, renewed, changes


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
    import logging

    from outbox.tracing import traced

    logging.basicConfig(level=logging.WARNING, format="outbox: %(message)s")
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
    import logging

    from outbox.tracing import traced

    logging.basicConfig(level=logging.WARNING, format="outbox: %(message)s")
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
    """Return who made how many of the reports; "elsewhere" is what other servers made during this run."""
    elsewhere = result.elsewhere - result.already
    parts = [f"{result.made} made here"]
    if elsewhere or not result.already:
        parts.append(f"{elsewhere} elsewhere")
    if result.already:
        parts.append(f"{result.already} already made")
    return ", ".join([*parts, f"{len(result.failed)} failed"])
