"""`outbox bounce`: read bounces and complaints that came back."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import printable
from outbox.errors import ConfigurationError, DatabaseUnavailableError

if TYPE_CHECKING:
    from outbox.feedback.bounces import Read
    from outbox.settings import Settings

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a mail server that pipes a message keeps it and comes again


@app.command()
def bounce(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="A Maildir whose new messages are read; without, one message from standard input.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Read bounces and complaints that came back.

    Who does not exist, or complains, comes onto the suppression list. Exit 1: something was not believed, or not read.
    """
    if directory is None and sys.stdin.isatty():
        raise ConfigurationError("DIR: nothing is on standard input; name a Maildir, or let a message flow in.")
    settings = settings_of(context, config)
    settings.require("database_url")
    counts: Counter[str] = Counter()
    try:
        awaited(_bounce(settings, directory, counts))
    except DatabaseUnavailableError as error:
        if directory is not None:
            raise
        typer.echo(f"outbox: {error}", err=True)
        raise typer.Exit(TRY_AGAIN) from error
    if directory is not None and not counts["busy"]:
        typer.echo(_summary(counts))
    raise typer.Exit(1 if any(counts[outcome] for outcome in ("unbelieved", "unreadable", "set_aside", "stays")) else 0)


async def _bounce(settings: "Settings", directory: Path | None, counts: Counter[str]) -> None:
    from outbox.feedback import bounce_maildir, bounces

    raw = b"" if directory is not None else _stdin()
    policy = bounces.Policy(
        suppressing=settings.redirect_to is None,  # else it came from there, and says nothing about the recipient
        bounces_max=settings.bounces_max,
        within_s=settings.bounces_within_s,
        within=settings.bounces_within,
    )
    async with connected(settings, "outbox bounce") as connection:
        if directory is None:
            _print(await bounces.read(connection, raw, name="standard input", policy=policy), counts)
        else:
            async for found in bounce_maildir.read_maildir(connection, directory, policy=policy):
                _print(found, counts)
        if settled := await bounces.settle_doubts(connection):
            is_one = settled == 1
            typer.echo(
                f"{settled:,} {'email' if is_one else 'emails'} in doubt {'is' if is_one else 'are'} sent now, since "
                f"{'its bounce proves' if is_one else 'their bounces prove'} that a server accepted "
                f"{'it' if is_one else 'them'}."
            )


def _stdin() -> bytes:
    """Return the message on standard input; one that is too long is read to its end, or its writer would fail."""
    from outbox.feedback.dsn import READ_MAX

    raw = sys.stdin.buffer.read(READ_MAX)
    while sys.stdin.buffer.read(READ_MAX):
        pass
    return raw


def _print(found: "Read", counts: Counter[str]) -> None:
    counts[found.outcome.value] += 1
    if found.outcome.is_problem:
        typer.echo(f"outbox: {printable(found.sentence)}", err=True)
    else:
        typer.echo(printable(found.sentence))


def _summary(counts: Counter[str]) -> str:
    said = {
        "hard": "bounced for good",
        "soft": "perhaps for now",
        "complained": "complained",
        "again": "known already",
        "other": "no bounces",
        "unbelieved": "not believed",
        "unreadable": "not read",
        "set_aside": "set aside",
        "stays": "left for another try",
    }
    parts = [f"{counts[outcome]:,} {words}" for outcome, words in said.items() if counts[outcome]]
    return f"{counts.total():,} messages were read{': ' if parts else ''}{', '.join(parts)}."
