"""`outbox suppress`: the list of addresses that get no more email."""

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import printable, table, to_json, zone_of
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.database.suppression_entry import Entry
    from outbox.operations.suppression_list import Suppression
    from outbox.settings import Settings

LIMIT = 50


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
    problems = _clashes(addresses, report, remove=remove, import_=import_, as_json=as_json)
    if problems:
        raise ConfigurationError(problems)
    settings = settings_of(context, config)
    settings.require("database_url")
    entries = _of_file(import_) if import_ is not None else _entries(addresses or [], report)
    for name in sorted({one.report for one in entries} - {"", *settings.editions}):
        if not remove:
            settings.report(name)  # raises an error with the names that exist
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
    """Return a sentence for each combination of options that makes no sense."""
    problems = []
    if import_ is not None and (addresses or remove or report is not None):
        problems.append("--import: the file says who and of which report; say it alone.")
    if as_json and (addresses or import_ is not None):
        problems.append("--json: is for the list; say it without addresses.")
    if not addresses and import_ is None and (remove or report is not None):
        problems.append(f"{'--remove' if remove else '--report'}: name the address, as in ann@example.com.")
    return problems


def _entries(addresses: list[str], report: str | None) -> "list[Entry]":
    from outbox.database.suppression_entry import ALL, Entry
    from outbox.mail.mailbox import comparable

    entries, problems = [], []
    for address in dict.fromkeys(addresses):
        try:
            entries.append(Entry(comparable(address), report or ALL))
        except ValueError as error:
            problems.append(f"ADDRESS: {str(error).rstrip('.')}; write one such as ann@example.com.")
    if problems:
        raise ConfigurationError(problems)
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
    from outbox.operations.suppression_list import read_list

    async with connected(settings, "outbox suppress") as connection:
        return await read_list(connection, limit=limit)


def _listed(found: "list[Suppression]", more: int, settings: "Settings") -> list[str]:
    from outbox.reports.period import spoken_time

    if not found:
        return ["Nobody is on the suppression list."]
    here = datetime.now().astimezone().tzinfo
    rows = []
    for one in found:
        since = spoken_time(one.since, zone_of(settings, one.report) or here)
        why = f"{one.key}: {one.why}" if one.key else one.why
        rows.append([one.address, one.report or "all", one.reason, since, one.who, why])
    lines = table(["address", "report", "reason", "since", "who", "why"], rows)
    return lines + ([f"\N{HORIZONTAL ELLIPSIS} and {more:,} more; --limit shows more of them."] if more else [])


async def _add(settings: "Settings", entries: "list[Entry]", why: str) -> list[str]:
    from outbox.operations.operator import whoami
    from outbox.operations.suppression_list import add

    async with connected(settings, "outbox suppress") as connection:
        new = await add(connection, entries, who=whoami(), why=why)
    if len(entries) != 1:
        return [f"{new:,} of {len(entries):,} addresses are new on the suppression list."]
    (one,) = entries
    of = f" of {one.report}" if one.report else ""
    return [f"{one.address} gets no more email{of}." if new else f"{one.address} is on the suppression list already."]


async def _remove(settings: "Settings", entries: "list[Entry]", why: str) -> int:
    from outbox.operations.operator import whoami
    from outbox.operations.suppression_list import removal, remove, reports_of

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
