"""The commands that show emails: which there are, and all that is known of one."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, printable, settings_of, table, to_json
from outbox.cli.email_options import PeriodOption, ReportOption, ToOption, clashes
from outbox.errors import ConfigurationError, OutboxError
from outbox.mail.delivery_state import DeliveryState

if TYPE_CHECKING:
    from datetime import tzinfo

    from outbox.operations.email_filter import Selection
    from outbox.operations.email_list import Listing
    from outbox.operations.show import Story
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
    faults = clashes(chosen)
    if faults:
        raise ConfigurationError(faults)
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
        since = spoken_time(one.since, _zone(settings, one.report))
        rows.append([one.key, one.to, state, str(one.attempts), since, one.said])
    for line in table(["key", "to", "state", "tries", "since", "last heard"], rows):
        typer.echo(line)
    if found.more:
        at_least = "at least " if found.at_least else ""
        typer.echo(f"\N{HORIZONTAL ELLIPSIS} and {at_least}{found.more:,} more; --limit shows more of them.")


def _zone(settings: "Settings", report: str | None) -> "tzinfo | None":
    """The timezone of a report that is configured here."""
    known = settings.editions.get(report or "")
    return known.zone if known is not None else None


@app.command()
def show(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="As `outbox list` shows it.", metavar="KEY", show_default=False)],
    config: ConfigOption = None,
    *,
    text: Annotated[bool, typer.Option("--text", help="Print the text of its message.")] = False,
    eml: Annotated[
        Path | None,
        typer.Option(help="Write its message to this file; - is standard output.", metavar="FILE", show_default=False),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open its message in a browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Tell the whole story of one email.

    Links in messages hold the only key to a page, so they are shown with --text, --eml and --open only.
    """
    if sum((text, eml is not None, open_, as_json)) > 1:
        raise ConfigurationError("Say one of --text, --eml, --open and --json.")
    settings = settings_of(context, config)
    settings.require("database_url")
    story = awaited(_read(settings, key))
    if as_json:
        typer.echo(to_json(story.as_json()))
    elif text:
        for line in story.part("plain").splitlines():
            typer.echo(printable(line))
        for note in story.content().notes:
            typer.echo(f"outbox: {printable(story.key)}: not all of it is shown: {note}; use --eml.", err=True)
    elif eml is not None:
        _write(eml, story.whole())
    elif open_:
        _open(story)
    else:
        _print_story(story, _zone(settings, story.report))


async def _read(settings: "Settings", key: str) -> "Story":
    from outbox.operations.show import read_story

    async with connected(settings, "outbox show") as connection:
        return await read_story(connection, key)


def _write(path: Path, message: bytes) -> None:
    if str(path) == "-":
        sys.stdout.buffer.write(message)
        sys.stdout.flush()
        return
    try:
        path.write_bytes(message)
    except OSError as error:
        raise OutboxError(f"--eml: {path} cannot be written ({error.strerror}); name another file.") from error
    typer.echo(f"{printable(str(path))}: {len(message):,} bytes")


# Before an untrusted page: no script runs, and nothing is loaded, which would tell the sender that the page is read.
_HARMLESS = (
    "<!doctype html><meta charset=utf-8><meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
    "img-src data:; style-src 'unsafe-inline'; form-action 'none'\">\n"
)


def _open(story: "Story") -> None:
    """Show the page of the message, or its text, in the browser that is there; only this user may read the file."""
    import html
    import tempfile
    import webbrowser

    try:
        page = story.part("html")
    except OutboxError:
        page = f"<meta charset=utf-8><pre>{html.escape(story.part('plain'))}</pre>"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="outbox-", suffix=".html", encoding="utf-8", delete=False) as file:
            file.write(_HARMLESS + page)
    except OSError as error:
        raise OutboxError(
            f"No temporary file can be written for the browser ({error.strerror}); use --text or --eml FILE."
        ) from error
    opened = False
    with suppress(webbrowser.Error):
        opened = webbrowser.open(Path(file.name).as_uri())
    if not opened:
        raise OutboxError(f"No browser was found here; the message is in {file.name}.")
    typer.echo(file.name)


def _print_story(story: "Story", zone: "tzinfo | None") -> None:
    from outbox.reports.period import spoken_time

    typer.echo(typer.style(printable(_headline(story)), bold=True))
    facts = {
        "to": story.to,
        "from": story.sender,
        "subject": story.subject,
        "report": f"{story.report} {story.period}, recipient {story.recipient}" if story.report else None,
        "made": spoken_time(story.created_at, zone) + (f" on {story.made_by}" if story.made_by else ""),
        "route": story.route,
        "priority": "urgent" if story.urgent else None,
        "due": story.due_at and spoken_time(story.due_at, zone),
        "send before": story.send_before and spoken_time(story.send_before, zone),
        "settled": story.settled_at and spoken_time(story.settled_at, zone),
        "message": f"gone: {story.gone}" if story.gone else f"{story.size:,} bytes, Message-ID {story.message_id}",
    }
    for word, fact in facts.items():
        if fact:
            typer.echo(f"  {word:<11}  {printable(fact)}")
    for one in story.pauses:
        typer.echo(printable(f"  {'paused':<11}  {one.target}, by {one.who}: {one.why}"))
    if story.suppressed:
        typer.echo(printable(f"  {'suppressed':<11}  {story.suppressed}"))
    rows = [
        [
            str(one.attempt),
            one.verdict.replace("_", " "),
            f"{one.relay} on {one.host}, pid {one.pid}" if one.host else str(one.relay or ""),
            spoken_time(one.marked_at, zone) if one.marked_at else "",
            spoken_time(one.settled_at, zone),
            one.reply,
        ]
        for one in story.tries
    ]
    typer.echo("" if rows else "\nIt has not been tried yet.")
    for line in table(["try", "verdict", "relay", "marked", "settled", "what was heard"], rows) if rows else []:
        typer.echo(line)
    if story.choices:
        typer.echo("")
    for choice in story.choices:
        typer.echo(f"{choice.name:<9}  {choice.effect}")
    if story.remedies:
        typer.echo("\nYou may type one of these:" if len(story.remedies) > 1 else "\nYou may type:")
    for remedy in story.remedies:
        typer.echo(printable(f"  {remedy}"))


def _headline(story: "Story") -> str:
    """Its state as a sentence."""
    if story.state == "sending":
        where = f" on {story.host}" if story.host else ""
        return f"{story.key} is being sent by relay {story.relay}{where}."
    if story.state == "pending" and story.pauses:
        return f"{story.key} is pending, and held back: {story.pauses[0].target} is paused."
    if story.state == "pending" and story.relay:
        return f"{story.key} is pending, with relay {story.relay}{f' on {story.host}' if story.host else ''}."
    if story.tries and story.state == "cancelled" and story.tries[-1].verdict == "suppressed":
        return f"{story.key} is cancelled, since its address was on the suppression list."
    if story.state == "sent" and any(one.verdict == "bounced" for one in story.tries):
        return f"{story.key} is sent, and came back."
    return f"{story.key} is {story.state.replace('_', ' ')}."
