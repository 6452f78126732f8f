"""The commands about who gets no more email: the suppression list, and the bounces that fill it."""

import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, printable, settings_of, table, to_json
from outbox.errors import ConfigurationError, DatabaseUnavailableError

if TYPE_CHECKING:
    from outbox.feedback.bounces import Read
    from outbox.relay.suppression import Entry, Suppression
    from outbox.settings import Settings

LIMIT = 50
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a mail server that pipes a message keeps it and comes again


@app.command()
def suppress(
    context: typer.Context,
    addresses: Annotated[
        list[str] | None, typer.Argument(help="Who gets no more email.", metavar="ADDRESS", show_default=False)
    ] = None,
    config: ConfigOption = None,
    *,
    report: Annotated[
        str | None, typer.Option(help="Only of this report; else no email at all.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take these addresses off the list.")] = False,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import",
            help="Add what a file lists: an address a line, or CSV as providers export it; - is standard input.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    why: Annotated[str, typer.Option(help="Why; kept with the entry and the operation.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many are listed at most.")] = LIMIT,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; lists all.")] = False,
) -> None:
    """Write to an address no more, or list who is not written to.

    What is pending for it is cancelled when a relay comes to it. Reports are made as ever.
    """
    faults = _clashes(addresses, report, remove=remove, import_=import_, as_json=as_json)
    if faults:
        raise ConfigurationError(faults)
    settings = settings_of(context, config)
    settings.require("database_url")
    entries = _of_file(import_) if import_ is not None else _entries(addresses or [], report)
    for name in sorted({one.report for one in entries} - {"", *settings.editions}):
        if not remove:
            settings.report(name)  # says what there is
    if import_ is not None:
        lines = awaited(_add(settings, entries, why or f"imported from {import_.name}"))
    elif not addresses:
        found, more = awaited(_list(settings, None if as_json else limit))
        lines = [to_json([one.as_json() for one in found])] if as_json else _listed(found, more, settings)
    elif remove:
        raise typer.Exit(awaited(_remove(settings, entries, why)))
    else:
        lines = awaited(_add(settings, entries, why))
    for line in lines:
        typer.echo(line)


def _clashes(
    addresses: list[str] | None, report: str | None, *, remove: bool, import_: Path | None, as_json: bool
) -> list[str]:
    """What does not go together in what was said, a sentence each."""
    faults = []
    if import_ is not None and (addresses or remove or report is not None):
        faults.append("--import: the file says who and of which report; say it alone.")
    if as_json and (addresses or import_ is not None):
        faults.append("--json: is for the list; say it without addresses.")
    if not addresses and import_ is None and (remove or report is not None):
        faults.append(f"{'--remove' if remove else '--report'}: name the address, as in ann@example.com.")
    return faults


def _entries(addresses: list[str], report: str | None) -> "list[Entry]":
    from outbox.mail.message import comparable
    from outbox.relay.suppression import ALL, Entry

    entries, faults = [], []
    for address in dict.fromkeys(addresses):
        try:
            entries.append(Entry(comparable(address), report or ALL))
        except ValueError as error:
            faults.append(f"ADDRESS: {str(error).rstrip('.')}; write one such as ann@example.com.")
    if faults:
        raise ConfigurationError(faults)
    return entries


def _of_file(path: Path) -> "list[Entry]":
    from outbox.feedback.suppression_import import entries_of

    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = raw.decode()
    except OSError as error:
        raise ConfigurationError(
            f"--import: {path} cannot be read ({error.strerror}); name a file that this user can read."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--import: {path} is not UTF-8; save the file as UTF-8.") from error
    return entries_of(text, name=str(path))


async def _list(settings: "Settings", limit: int | None) -> "tuple[list[Suppression], int]":
    from outbox.relay.suppression import read_list

    async with connected(settings, "outbox suppress") as connection:
        return await read_list(connection, limit=limit)


def _listed(found: "list[Suppression]", more: int, settings: "Settings") -> list[str]:
    from outbox.reports.period import spoken_time

    if not found:
        return ["Nobody is on the suppression list."]
    here = datetime.now().astimezone().tzinfo
    rows = []
    for one in found:
        known = settings.editions.get(one.report)
        since = spoken_time(one.since, known.zone if known is not None else here)
        why = f"{one.key}: {one.why}" if one.key else one.why
        rows.append([one.address, one.report or "all", one.reason, since, one.who, why])
    lines = table(["address", "report", "reason", "since", "who", "why"], rows)
    return lines + ([f"\N{HORIZONTAL ELLIPSIS} and {more:,} more; --limit shows more of them."] if more else [])


async def _add(settings: "Settings", entries: "list[Entry]", why: str) -> list[str]:
    from outbox.operations.resolve import whoami
    from outbox.relay.suppression import add

    async with connected(settings, "outbox suppress") as connection:
        new = await add(connection, entries, who=whoami(), why=why)
    if len(entries) != 1:
        return [f"{new:,} of {len(entries):,} addresses are new on the suppression list."]
    (one,) = entries
    of = f" of {one.report}" if one.report else ""
    return [f"{one.address} gets no more email{of}." if new else f"{one.address} is on the suppression list already."]


async def _remove(settings: "Settings", entries: "list[Entry]", why: str) -> int:
    from outbox.operations.resolve import whoami
    from outbox.relay.suppression import removal, remove, reports_of

    code = 0
    async with connected(settings, "outbox suppress") as connection:
        for one in entries:
            gone = await remove(connection, one.address, one.report, who=whoami(), why=why)
            left = await reports_of(connection, one.address)
            of = f" for {one.report}" if one.report else ""
            if gone:
                typer.echo(f"{one.address} is off the suppression list{of}.")
            else:
                code = 1
                typer.echo(f"outbox: {one.address} is not on the suppression list{of}.", err=True)
            for other in left:
                of_other = f" for {other}" if other else " for all email"
                typer.echo(printable(f"It is still on it{of_other}; `{removal(one.address, other)}`."))
    return code


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
            _tell(await bounces.read(connection, raw, name="standard input", policy=policy), counts)
        else:
            async for found in bounce_maildir.read_maildir(connection, directory, policy=policy):
                _tell(found, counts)
        if settled := await bounces.settle_doubts(connection):
            is_one = settled == 1
            typer.echo(
                f"{settled:,} {'email' if is_one else 'emails'} in doubt {'is' if is_one else 'are'} sent now, since "
                f"{'its bounce proves' if is_one else 'their bounces prove'} that a server accepted "
                f"{'it' if is_one else 'them'}."
            )


def _stdin() -> bytes:
    """One message; what is too long is read to its end, so that whoever pipes it in sees no fault, and forgotten."""
    from outbox.feedback.dsn import READ_MAX

    raw = sys.stdin.buffer.read(READ_MAX)
    while sys.stdin.buffer.read(READ_MAX):
        pass
    return raw


def _tell(found: "Read", counts: Counter[str]) -> None:
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
