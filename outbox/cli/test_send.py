"""`outbox test-send`: send one email now, past the outbox."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, log_warnings, settings_of
from outbox.cli.output import printable, redirected, to_json
from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from outbox.operations.send_test import TestSend
    from outbox.settings import Settings


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
    log_warnings()
    sent = awaited(_try(settings, recipient, report, key))
    if as_json:
        typer.echo(to_json(sent.as_json()))
    else:
        _print(sent)
    if not sent.is_sent:
        raise OutboxError(printable(sent.sentence))


async def _try(settings: "Settings", recipient: str, report: str | None, key: str | None) -> "TestSend":
    from outbox.operations.send_test import mail_to, send

    sender = settings.sender_mailbox
    if report is None:
        message_id, content = mail_to(sender, recipient)
    else:
        from outbox.operations.preview import preview as look

        mail = (await look(settings, report, key=key, address=recipient)).the_mail()
        message_id, content = mail.message_id, mail.message
    return await send(settings, sender=sender.address, recipient=recipient, message_id=message_id, content=content)


def _print(sent: "TestSend") -> None:
    if sent.redirect_to:
        typer.secho(redirected(sent.redirect_to), bold=True)
    lines = [
        ("server", sent.server),
        ("TLS", sent.tls),
        ("from", sent.sender),
        ("to", sent.recipient),
        *sent.replies,
    ]
    for name, line in lines:
        typer.echo(printable(f"{name:<9}{line}"))
    if sent.is_sent:
        typer.echo(printable(f"{sent.sentence} Its Message-ID is {sent.message_id}."))
