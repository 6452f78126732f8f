"""The commands with which one tries things out: nothing of theirs comes into the outbox."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, printable, redirected, settings_of, to_json
from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from outbox.operations.preview import Preview
    from outbox.operations.send_test import Trial
    from outbox.settings import Settings


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

    _log_plainly()
    found = awaited(look(settings, report, key=key, period_key=period))
    if as_json:
        typer.echo(to_json(found.as_json()))
    elif as_text:
        typer.echo(found.the_mail().text, nl=False)
    else:
        _show(found, out, opened=not no_open)


def _log_plainly() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="outbox: %(message)s")


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
    """Whether pages open in a window: one that took over the terminal would hide what was said."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")))


@app.command(name="test-send")
def send_test(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="Who gets it.", metavar="ADDRESS", show_default=False)],
    config: ConfigOption = None,
    report: Annotated[
        str | None, typer.Option(help="Send what `outbox preview` of this report shows.", metavar="REPORT")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--for", help="With --report: whose, by key; by default the first recipient's.", metavar="KEY"),
    ] = None,
    route: Annotated[
        str | None, typer.Option(help="Through this route; by default through smtp_url.", metavar="NAME")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Send one email now, past the outbox, as a test.

    Shows what the mail server says; exit 0 only if it took the email.
    """
    from outbox.operations.send_test import address_of

    recipient = address_of(address)
    if key is not None and report is None:
        raise ConfigurationError("--for: says whose report; add --report REPORT.")
    settings = settings_of(context, config)
    settings = settings.on_route(route or "")
    settings.require("smtp_url", "sender", *(("database_url", "reports") if report else ()))
    _log_plainly()
    trial = awaited(_try(settings, recipient, report, key))
    if as_json:
        typer.echo(to_json(trial.as_json()))
    else:
        _print_trial(trial)
    if not trial.is_sent:
        raise OutboxError(printable(trial.sentence))


async def _try(settings: "Settings", recipient: str, report: str | None, key: str | None) -> "Trial":
    from outbox.generate.report_builder import sender_of
    from outbox.operations.send_test import mail_to, send

    sender = sender_of(settings)
    if report is None:
        message_id, content = mail_to(sender, recipient)
    else:
        from outbox.operations.preview import preview as look

        mail = (await look(settings, report, key=key, address=recipient)).the_mail()
        message_id, content = mail.message_id, mail.message
    return await send(settings, sender=sender.address, recipient=recipient, message_id=message_id, content=content)


def _print_trial(trial: "Trial") -> None:
    if trial.redirect_to:
        typer.secho(redirected(trial.redirect_to), bold=True)
    lines = [
        ("server", trial.server),
        ("TLS", trial.tls),
        ("from", trial.sender),
        ("to", trial.recipient),
        *trial.replies,
    ]
    for name, line in lines:
        typer.echo(printable(f"{name:<9}{line}"))
    if trial.is_sent:
        typer.echo(printable(f"{trial.sentence} Its Message-ID is {trial.message_id}."))


@app.command()
def demo(
    people: Annotated[int, typer.Option(min=1, max=5000, help="How many people get a report.")] = 40,
    servers: Annotated[int, typer.Option(min=1, max=16, help="How many servers fire their cron at once.")] = 4,
    keep: Annotated[
        Path | None, typer.Option(help="Keep the emails and reports in this directory.", metavar="DIR")
    ] = None,
) -> None:
    """Tell the whole story in a minute.

    On an embedded Postgres and mail server; one of the company's servers is killed on the way.
    """
    from outbox.sandbox.demo import tell

    raise typer.Exit(tell(people=people, servers=servers, keep=keep))
