"""`outbox doctor`: check database, mail server and reports."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, settings_of
from outbox.cli.output import console, printable, to_json

if TYPE_CHECKING:
    from outbox.doctor.finding import Finding


@app.command()
def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Check database, mail server and reports; changes nothing."""
    from outbox.doctor.run import examine, has_problem

    settings = settings_of(context, config)
    import logging

    logging.basicConfig(level=logging.CRITICAL)  # the findings report every problem, once
    findings = awaited(examine(settings))
    if as_json:
        checks = [{"check": f.check, "grade": f.grade, "found": f.found, "mend": f.fix} for f in findings]
        typer.echo(to_json({"ok": not has_problem(findings), "checks": checks}))
    else:
        _print_findings(findings)
    raise typer.Exit(1 if has_problem(findings) else 0)


def _print_findings(findings: "list[Finding]") -> None:
    """Print a line for each finding: folded and coloured on a terminal, whole and plain elsewhere."""
    width = max(len(f.check) for f in findings)
    if not sys.stdout.isatty():
        for f in findings:
            typer.echo(printable(f"{f.grade:<7}  {f.check:<{width}}  {f.sentence}"))
    else:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid("", "", "", padding=(0, 2))
        colours = {"ok": "green", "note": "yellow", "fault": "bold red", "unknown": "dim"}
        for f in findings:
            grid.add_row(Text(f.grade, colours[f.grade]), Text(printable(f.check)), Text(printable(f.sentence)))
        console(highlight=False).print(grid)
    counts = [sum(f.grade == grade for f in findings) for grade in ("fault", "note", "unknown")]
    typer.echo("{} at fault, {} worth a note, {} not checked, of {}.".format(*counts, len(findings)))
