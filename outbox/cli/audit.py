"""`outbox audit`: compare an edition with the recipients who are to get it now."""

from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, settings_of
from outbox.cli.output import NAMES_SHOWN, printable, to_json

if TYPE_CHECKING:
    from outbox.operations.audit import Audit, Unsent


@app.command()
def audit(
    context: typer.Context,
    report: Annotated[str, typer.Argument(help="Which report.", metavar="REPORT", show_default=False)],
    period: Annotated[
        str | None,
        typer.Argument(help="Which period, such as 2026-W48; by default the one due now.", metavar="PERIOD"),
    ] = None,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; names all.")] = False,
    names: Annotated[
        int | None, typer.Option(min=0, help="How many recipients of a kind are named; 10, with --json all.")
    ] = None,
) -> None:
    """Say by name whether all of an edition is sent.

    Exit 0 only if each email is sent, or it is decided that it will not be (suppressed, cancelled, waived). Compares
    who is to get the report now with what was generated and sent, and changes nothing.
    """
    from outbox.operations.audit import audit as look

    settings = settings_of(context, config)
    settings.require("database_url", "reports")
    names_max = names if names is not None or as_json else NAMES_SHOWN
    found = awaited(look(settings, report, period, names_max=names_max))
    if as_json:
        typer.echo(to_json(found.as_json()))
    else:
        _print_audit(found)
    raise typer.Exit(0 if found.is_well else 1)


def _print_audit(found: "Audit") -> None:
    from outbox.operations.audit import BOUNCED, MISSING, SETTLED
    from outbox.operations.wording import state_label

    counts = {"expected": found.expected, "generated": found.generated, "sent": found.sent}
    kinds = {**found.unsent, BOUNCED: found.bounced}
    counts |= {kind: one.count for kind, one in kinds.items() if one.count or kind not in (*SETTLED, BOUNCED)}
    if found.done_elsewhere_at is not None:  # in an edition that another system made no report is missing
        del kinds[MISSING], counts[MISSING]
    typer.echo(f"{found.name}: " + ", ".join(f"{n:,} {state_label(word)}" for word, n in counts.items()) + ".")
    if found.left:
        typer.echo(f"No longer expected: {found.left:,} who have a report and are not named by the source now.")
    for kind, unsent in kinds.items():
        if unsent.count:
            typer.echo(f"\n{state_label(kind)}: {unsent.count:,}")
        for one in unsent.named:
            typer.echo(printable(f"  {_described(one)}"))
        if unsent.named and unsent.count > len(unsent.named):
            typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {unsent.count - len(unsent.named):,} more")
    typer.echo(("\n" if found.expected > found.sent or found.bounced.count else "") + found.sentence)


def _described(one: "Unsent") -> str:
    from outbox.operations.wording import state_label

    reasons = [state_label(one.state)] if one.state not in ("missing", "waived") else []
    reasons += [one.said.rstrip(".")] if one.said else []
    return f"{one.key} <{one.address}>" + (f": {', '.join(reasons)}." if reasons else "")
