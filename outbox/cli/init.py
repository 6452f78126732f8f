"""`outbox init`: create or upgrade the database's schema, and bring its settings into the database."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of

if TYPE_CHECKING:
    from outbox.database.connection import Connection
    from outbox.settings import Settings


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
    from outbox.database.lock_wait import lock_waits
    from outbox.database.opening import connect
    from outbox.database.roles import are_renewed, are_used, grant_roles, renew_grants
    from outbox.database.schema import VERSION, initialise

    assert settings.database_url is not None
    connection = await connect(settings.database_url, application="outbox init")
    try:
        async with lock_waits(settings.database_url, connection, "`outbox init`"):
            versions = await initialise(connection, then=renew_grants)
            upgraded = versions[0] not in (None, versions[1])
            renewed = await are_renewed(connection) if upgraded and await are_used(connection) else None
            if roles:
                await grant_roles(connection)
            is_current = versions[1] == VERSION
            changes = await _apply_settings(connection, settings, upgraded=upgraded) if is_current else []
    finally:
        await connection.close()
    if redefine:
        await _redefine(settings, redefine)
    return versions, renewed, changes


async def _apply_settings(connection: "Connection", settings: "Settings", *, upgraded: bool) -> list[str]:
    """Write the limit on messages and the rules of routes to the database; return the changes, one line each."""
    from outbox.database.schema import limit_messages, read_broken
    from outbox.operations.route_rules import told, write_rules

    changes = []
    former = await limit_messages(connection, settings.message_bytes_max)
    if former is not None:
        changes.append(f"The limit on messages is now {settings.message_bytes_max:,} octets; it was {former:,}.")
    if upgraded or former is not None:
        changes += [
            f"Older emails violate {name}; they stay as they are, and new ones are refused."
            for name in await read_broken(connection)
        ]
    return [*changes, *told(await write_rules(connection, settings))]


async def _redefine(settings: "Settings", reports: list[str]) -> None:
    """Make cadence, timezone and `covers` of these reports the fleet's, as these settings have them."""
    from outbox.database.engine import driver_of, engine
    from outbox.database.lock_wait import lock_waits
    from outbox.generate import edition

    assert settings.database_url is not None
    async with engine(settings.database_url, application="outbox init").connect() as session:
        driver = await driver_of(session)
        async with lock_waits(settings.database_url, driver, "`outbox init --redefine`"):
            for name in reports:
                await edition.redefine(session, name, settings.report(name))
