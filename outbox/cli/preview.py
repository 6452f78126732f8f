"""`outbox preview`: show one recipient's report and email, and send nothing."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, log_warnings, settings_of
from outbox.cli.output import printable, to_json
from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from outbox.operations.preview import Preview


@app.command()
def preview(
    context: typer.Context,
    report: Annotated[str, typer.Argument(help="Which report.", metavar="REPORT", show_default=False)],
    config: ConfigOption = None,
    key: Annotated[
        str | None,
        typer.Option("--for", help="Whose, by key; by default the first recipient's.", metavar="KEY"),
    ] = None,
    period: Annotated[
        str | None, typer.Option(help="Which period, such as 2026-W48; by default the one due now.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Put the files here instead of into a new directory.", metavar="DIR")
    ] = None,
    *,
    as_text: Annotated[bool, typer.Option("--text", help="Print the email's text instead of writing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; writes no files.")] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the pages.")] = False,
) -> None:
    """Show one recipient's report and email; send nothing.

    From real rows; nothing is written to the database. They are put into files and, at a terminal, opened.
    """
    if (out is not None) + as_text + as_json > 1:
        raise ConfigurationError("--out, --text and --json are three ways to show it; say one of them.")
    settings = settings_of(context, config)
    settings.require("database_url", "sender", "reports")
    from outbox.operations.preview import preview as look

    log_warnings()
    found = awaited(look(settings, report, key=key, period_key=period))
    if as_json:
        typer.echo(to_json(found.as_json()))
    elif as_text:
        typer.echo(found.the_mail().text, nl=False)
    else:
        _show(found, out, opened=not no_open)


def _show(found: "Preview", out: Path | None, *, opened: bool) -> None:
    directory = out if out is not None else _make_directory()
    written = found.write(directory)
    person = found.recipient
    route = {"route": found.route} if found.route else {}
    lines = {
        "report": f"{found.report} {found.period.key}, for {person.key}",
        "period": found.words,
        "from": found.sender,
        "to": f"{person.name} <{person.email}>" if person.name else person.email,
        **route,
        **({"subject": found.mail.subject} if found.mail else {"title": found.title}),
    }
    for name, line in lines.items():
        typer.echo(printable(f"{name:<9}{line}"))
    for path in written:
        typer.echo(f"{'':<9}{path}")
    if found.mail is None:
        typer.echo("It has no email of its own: a digest tells of it, see `outbox preview digest`.")
    if found.early is not None:
        typer.echo(printable(f"`outbox generate` does not make it yet: {found.early}"))
    typer.echo("Nothing was written to the database, and the link opens nothing.")
    if opened and sys.stdout.isatty() and _has_browser():
        import webbrowser

        for path in written:
            if path.suffix == ".html":
                webbrowser.open(path.resolve().as_uri())


def _make_directory() -> Path:
    from tempfile import mkdtemp

    try:
        return Path(mkdtemp(prefix="outbox-preview-"))
    except OSError as error:
        raise OutboxError(
            f"No temporary directory can be written to ({error.strerror}); name a directory with --out DIR, "
            "or use --text or --json, which write no files."
        ) from error


def _has_browser() -> bool:
    """Return True if pages open in a window: a browser in the terminal would hide the output."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")))
